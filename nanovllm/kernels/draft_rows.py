"""Makes rows of drafted tokens before a step, and keeps the right ones after it, in one launch each.

A draft row is a copy of a row that is some drafted tokens longer. A step that decodes a row and its draft rows samples
the token after each drafted one. Those after right ones are the row's next tokens.
"""

from __future__ import annotations

import torch

from nanovllm.kernels.columns import DRAFTS, LOGIT_EDITS, column_of, num_words
from nanovllm.kernels.logit_edits import RowLogitEdits
from nanovllm.kernels.row_changes import OpenedRows
from nanovllm.kernels.triton_support import constant, jit, jit_with_varying, runs_triton, tl

_BLOCK_SIZE = 1024  # words that a program copies at a time

_WIDTH = constant(num_words(DRAFTS))
_ROW = constant(column_of(DRAFTS, "row"))
_SOURCE = constant(column_of(DRAFTS, "source"))
_OFFSET = constant(column_of(DRAFTS, "offset"))
_POSITION = constant(column_of(DRAFTS, "position"))
_TOKEN_ID = constant(column_of(DRAFTS, "token_id"))
_HAS_PENALTIES = constant(column_of(LOGIT_EDITS, "has_penalties"))
_NUM_TOKEN_BIASES = constant(column_of(LOGIT_EDITS, "num_token_biases"))
_HAS_MASK = constant(column_of(LOGIT_EDITS, "has_mask"))


@jit
def _copy(
    values_ptr: tl.tensor,
    source: tl.tensor,
    row: tl.tensor,
    width: tl.tensor,
    num_words: tl.tensor,
    BLOCK_SIZE: tl.constexpr,
) -> None:
    """Copies the first `num_words` words of row `source` to row `row`. Rows have `width` words."""
    for first in range(0, num_words, BLOCK_SIZE):
        column = first + tl.arange(0, BLOCK_SIZE)
        mask = column < num_words
        tl.store(values_ptr + row * width + column, tl.load(values_ptr + source * width + column, mask=mask), mask=mask)


@jit_with_varying("records_ptr")
def _open_draft_rows_kernel(
    records_ptr: tl.tensor,
    token_ids_ptr: tl.tensor,
    lengths_ptr: tl.tensor,
    temperatures_ptr: tl.tensor,
    seeds_ptr: tl.tensor,
    truncations_ptr: tl.tensor,
    logit_edits_ptr: tl.tensor,
    biases_ptr: tl.tensor,
    masks_ptr: tl.tensor,
    block_tables_ptr: tl.tensor,
    max_tokens: tl.tensor,
    max_bias_words: tl.tensor,
    mask_words: tl.tensor,
    max_blocks: tl.tensor,
    BLOCK_SIZE: tl.constexpr,
    SEED_WORDS: tl.constexpr,
    TRUNCATION_WORDS: tl.constexpr,
    EDIT_WORDS: tl.constexpr,
) -> None:
    """One program per draft row. All tensors are words. Only edits of logits read more than the last token."""
    record_ptr = records_ptr + tl.program_id(0) * _WIDTH
    row = tl.load(record_ptr + _ROW).to(tl.int64)
    source = tl.load(record_ptr + _SOURCE).to(tl.int64)
    offset = tl.load(record_ptr + _OFFSET)
    position = tl.load(record_ptr + _POSITION)
    tl.store(lengths_ptr + row, position + 1)
    tl.store(temperatures_ptr + row, tl.load(temperatures_ptr + source))
    for word in tl.static_range(SEED_WORDS):
        tl.store(seeds_ptr + row * SEED_WORDS + word, tl.load(seeds_ptr + source * SEED_WORDS + word))
    for word in tl.static_range(TRUNCATION_WORDS):
        value = tl.load(truncations_ptr + source * TRUNCATION_WORDS + word)
        tl.store(truncations_ptr + row * TRUNCATION_WORDS + word, value)
    for word in tl.static_range(EDIT_WORDS):
        tl.store(logit_edits_ptr + row * EDIT_WORDS + word, tl.load(logit_edits_ptr + source * EDIT_WORDS + word))
    _copy(block_tables_ptr, source, row, max_blocks, max_blocks, BLOCK_SIZE)

    has_penalties = tl.load(logit_edits_ptr + source * EDIT_WORDS + _HAS_PENALTIES)
    num_biases = tl.load(logit_edits_ptr + source * EDIT_WORDS + _NUM_TOKEN_BIASES)
    if num_biases != 0:
        _copy(biases_ptr, source, row, max_bias_words, max_bias_words, BLOCK_SIZE)
    if tl.load(logit_edits_ptr + source * EDIT_WORDS + _HAS_MASK) != 0:
        _copy(masks_ptr, source, row, mask_words, mask_words, BLOCK_SIZE)
    if (has_penalties != 0) | (num_biases != 0):
        _copy(token_ids_ptr, source, row, max_tokens, position - offset, BLOCK_SIZE)  # the source's tokens
    for before in range(0, offset + 1):
        token_id = tl.load(record_ptr - before * _WIDTH + _TOKEN_ID)
        tl.store(token_ids_ptr + row * max_tokens + position - before, token_id)


@jit_with_varying("records_ptr")
def _accept_drafts_kernel(
    records_ptr: tl.tensor, token_ids_ptr: tl.tensor, lengths_ptr: tl.tensor, max_tokens: tl.tensor
) -> None:
    """One program per draft row: checks the draft up to its token, of which no other program changes anything."""
    record_ptr = records_ptr + tl.program_id(0) * _WIDTH
    row = tl.load(record_ptr + _ROW).to(tl.int64)
    source = tl.load(record_ptr + _SOURCE).to(tl.int64)
    offset = tl.load(record_ptr + _OFFSET)
    position = tl.load(record_ptr + _POSITION)
    is_right = tl.load(token_ids_ptr + source * max_tokens + position - offset) == tl.load(
        record_ptr - offset * _WIDTH + _TOKEN_ID
    )
    for before in range(0, offset):
        earlier = tl.load(record_ptr - (before + 1) * _WIDTH + _ROW).to(tl.int64)
        sampled = tl.load(token_ids_ptr + earlier * max_tokens + position - before)
        is_right = is_right & (sampled == tl.load(record_ptr - before * _WIDTH + _TOKEN_ID))
    next_id = tl.load(token_ids_ptr + row * max_tokens + position + 1)
    tl.store(token_ids_ptr + source * max_tokens + position + 1, next_id, mask=is_right)
    tl.atomic_max(lengths_ptr + source, position + 2, mask=is_right)


def open_draft_rows_reference(
    records: torch.Tensor, rows: OpenedRows, logit_edits: RowLogitEdits, block_tables: torch.Tensor
) -> None:
    """Reference for `open_draft_rows` in plain torch; also used on CPUs."""
    row, source = (records[:, column_of(DRAFTS, name)].long() for name in ("row", "source"))
    per_row = (rows.temperatures, rows.seeds, rows.truncations, rows.logit_edits, rows.token_ids)
    for state in (*per_row, logit_edits.token_biases, logit_edits.masks, block_tables):
        state[row] = state[source]
    drafted: list[int] = []
    for record in records.tolist():
        own, _, offset, position, token_id = record
        drafted = [*drafted[:offset], token_id]
        rows.token_ids[own, position - offset : position + 1] = torch.tensor(drafted, dtype=torch.int32)
        rows.lengths[own] = position + 1


def open_draft_rows(
    records: torch.Tensor,
    rows: OpenedRows,
    logit_edits: RowLogitEdits,
    block_tables: torch.Tensor,
    *,
    use_triton: bool | None = None,
) -> None:
    """Makes each draft row a copy of its source, with the draft up to its token appended, in place.

    records [num_drafts, words of DRAFTS] int32; block_tables [all_rows, max_blocks] int32.
    """
    if not runs_triton(rows.lengths, use_triton):
        open_draft_rows_reference(records, rows, logit_edits, block_tables)
        return

    def words(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.view(torch.int32)

    _open_draft_rows_kernel[(len(records),)](
        records_ptr=records,
        token_ids_ptr=rows.token_ids,
        lengths_ptr=rows.lengths,
        temperatures_ptr=words(rows.temperatures),
        seeds_ptr=words(rows.seeds),
        truncations_ptr=words(rows.truncations),
        logit_edits_ptr=rows.logit_edits,
        biases_ptr=logit_edits.token_biases,
        masks_ptr=logit_edits.masks,
        block_tables_ptr=block_tables,
        max_tokens=rows.token_ids.shape[1],
        max_bias_words=logit_edits.token_biases.shape[1],
        mask_words=logit_edits.masks.shape[1],
        max_blocks=block_tables.shape[1],
        BLOCK_SIZE=_BLOCK_SIZE,
        SEED_WORDS=rows.seeds.itemsize // 4,
        TRUNCATION_WORDS=rows.truncations.shape[1],
        EDIT_WORDS=rows.logit_edits.shape[1],
    )


def accept_drafts_reference(records: torch.Tensor, token_ids: torch.Tensor, lengths: torch.Tensor) -> None:
    """Reference for `accept_drafts` in plain torch; also used on CPUs."""
    is_right, before = False, 0
    for row, source, offset, position, token_id in records.tolist():
        sampled = token_ids[source if offset == 0 else before, position]
        is_right = (offset == 0 or is_right) and int(sampled) == token_id
        before = row
        if is_right:
            token_ids[source, position + 1] = token_ids[row, position + 1]
            lengths[source] = position + 2


def accept_drafts(
    records: torch.Tensor, token_ids: torch.Tensor, lengths: torch.Tensor, *, use_triton: bool | None = None
) -> None:
    """Appends to each row that has a draft the tokens sampled after its right tokens, in place.

    A drafted token is right if it is what was sampled for its position, and so are those before it.
    records [num_drafts, words of DRAFTS] int32; token_ids [all_rows, max_tokens] int32 and lengths [all_rows] int32,
    after the step has appended its tokens.
    """
    if not runs_triton(token_ids, use_triton):
        accept_drafts_reference(records, token_ids, lengths)
        return
    _accept_drafts_kernel[(len(records),)](
        records_ptr=records, token_ids_ptr=token_ids, lengths_ptr=lengths, max_tokens=token_ids.shape[1]
    )
