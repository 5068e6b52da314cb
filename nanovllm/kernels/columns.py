"""The columns of the records that kernels read, declared once for both sides.

The engine fills these records (`engine.batch`, `requests.logit_edits`), and kernels read them as tensors of 32-bit
words. Kernels must not import the engine, and the engine must not import torch, so both sides take the place of a
column from this table, which needs no torch.
"""

from __future__ import annotations

import numpy as np

WORD_BYTES = 4

INVALID_TOKEN = -1  # sampled from a row whose logits are NaN or infinite

# How a row's distribution is truncated (`kernels.truncate`). NO_TRUNCATION keeps every token.
TRUNCATION = np.dtype([("top_k", np.float32), ("top_p", np.float32), ("min_p", np.float32)])
NO_TRUNCATION = (0.0, 1.0, 0.0)

# What changes a row's logits (`kernels.logit_edits`). Zeros change nothing.
LOGIT_EDITS = np.dtype(
    [
        ("num_prompt_tokens", np.int32),
        ("num_token_biases", np.int32),
        ("has_penalties", np.int32),  # 0 or 1
        ("has_mask", np.int32),  # 0 or 1
        ("repetition_penalty", np.float32),
        ("frequency_penalty", np.float32),
        ("presence_penalty", np.float32),
    ]
)

# A row that a sequence takes, and an entry of a row's block table (`kernels.row_changes`).
OPENED = np.dtype(
    [
        ("row", np.int32),
        ("num_tokens", np.int32),
        ("temperature", np.float32),
        ("seed", np.int64),
        ("truncation", TRUNCATION),
        ("logit_edits", LOGIT_EDITS),
    ]
)
BLOCKS = np.dtype([("row", np.int32), ("index", np.int32), ("block", np.int32)])  # entry `index` becomes `block`

# A drafted token (`kernels.draft_rows`): `row` becomes row `source` as it would be with the drafted tokens up to this
# one. A draft's tokens are adjacent records, numbered by `offset`; the first stands where the source's tokens end.
DRAFTS = np.dtype(
    [
        ("row", np.int32),
        ("source", np.int32),
        ("offset", np.int32),
        ("position", np.int32),  # of the drafted token
        ("token_id", np.int32),
    ]
)

# A number to add to one token's logit, while the row is shorter than `until_length` and its output ends in the
# `ending_length` tokens stored `ending_start` words after the row's first bias.
TOKEN_BIAS = np.dtype(
    [
        ("token_id", np.int32),
        ("bias", np.float32),
        ("until_length", np.int32),
        ("ending_start", np.int32),
        ("ending_length", np.int32),
    ]
)


def num_words(record: np.dtype[np.void] | np.dtype[np.generic]) -> int:
    """Returns the number of 32-bit words in a record or a plain value."""
    return record.itemsize // WORD_BYTES


def column_of(record: np.dtype[np.void], name: str) -> int:
    """Returns the index of the first word of the field `name`."""
    assert record.fields is not None
    return int(record.fields[name][1]) // WORD_BYTES


def columns_of(record: np.dtype[np.void], name: str) -> slice:
    """Returns the indices of the words of the field `name`."""
    assert record.fields is not None
    first = column_of(record, name)
    return slice(first, first + num_words(record.fields[name][0]))


BIAS_WIDTH = num_words(TOKEN_BIAS)
