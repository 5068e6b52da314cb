"""RowTable: what the scheduler knows of every running sequence, as arrays indexed by row.

The device keeps tensors under the same row numbers (`runner.device_rows`). A step is planned with operations over whole
arrays, so the cost hardly grows with the number of sequences.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from nanovllm.engine.batch import NO_LOGPROBS, IntArray, StepNeeds
from nanovllm.engine.sequence import Sequence, num_asked
from nanovllm.sampling_params import MAX_LOGPROBS

BoolArray = npt.NDArray[np.bool_]
RowArray = npt.NDArray[np.intp]

NO_BLOCK = -1  # in a column of block numbers: none


@dataclass(frozen=True)
class _Column:
    dtype: type[np.generic]
    free: int | bool
    opened: Callable[[Sequence], Any] | None


def _column(dtype: type[np.generic], free: int | bool = 0, opened: Callable[[Sequence], Any] | None = None) -> Any:
    """Declares a column.

    free: the value in a free row. opened: returns the value when a sequence takes the row; None: the value stays.
    """
    return _Column(dtype, free, opened)


class RowTable:
    """`num_rows` rows; each is free or holds one sequence, from admission to release.

    Each column declared below becomes an attribute of that name, an array [num_rows]. A sequence has `num_tokens` known
    tokens, and `num_pending` more that steps in flight will return. Steps are planned from the sum, never from the
    value of a token.
    """

    # Tokens
    num_tokens: IntArray = _column(np.int32, opened=lambda sequence: len(sequence.token_ids))
    num_pending: IntArray = _column(np.int32)
    num_computed: IntArray = _column(np.int32)  # tokens whose keys and values are written by the steps planned so far
    num_cached: IntArray = _column(np.int32)  # of those, found in the prefix cache on admission
    max_num_tokens: IntArray = _column(np.int32, opened=lambda sequence: sequence.max_num_tokens)
    last_token: npt.NDArray[np.float64] = _column(  # seconds; inf: none yet
        np.float64, opened=lambda sequence: np.inf if sequence.last_token is None else sequence.last_token
    )
    # Blocks
    num_blocks: IntArray = _column(np.int32, opened=lambda sequence: len(sequence.block_table.blocks))
    # The block at the end of the shortest prefix worth sharing; rows that share the prefix have the same.
    prefix_block: IntArray = _column(np.int32, free=NO_BLOCK)
    # State
    seq_id: npt.NDArray[np.int64] = _column(np.int64, opened=lambda sequence: sequence.seq_id)
    steps_in_flight: IntArray = _column(np.int32)
    decoding: BoolArray = _column(np.bool_)  # takes part in decode steps
    stopped: BoolArray = _column(np.bool_)  # finished: tokens of the steps still in flight are dropped
    # Sampling and stopping, as the request asks
    ignore_eos: BoolArray = _column(np.bool_, opened=lambda sequence: sequence.params.ignore_eos)
    truncates: BoolArray = _column(np.bool_, opened=lambda sequence: sequence.params.truncates)  # top-k, top-p, min-p
    edits_logits: BoolArray = _column(  # penalties, biases, bans or a mask
        np.bool_, opened=lambda sequence: sequence.logit_edits is not None or sequence.grammar is not None
    )
    num_logprobs: IntArray = _column(  # most likely tokens to return
        np.int32, free=NO_LOGPROBS, opened=lambda sequence: num_asked(sequence.params.logprobs)
    )
    watched: BoolArray = _column(  # `stops_at` must see its tokens
        np.bool_, opened=lambda sequence: sequence.watches_tokens
    )
    has_grammar: BoolArray = _column(  # its last token decides which may be next
        np.bool_, opened=lambda sequence: sequence.grammar is not None
    )
    speculates: BoolArray = _column(np.bool_)  # its steps have drafts, which its last token decides

    def __init__(self, num_rows: int, max_model_len: int) -> None:
        self.sequences: list[Sequence | None] = [None] * num_rows
        self.token_ids: IntArray = np.zeros((num_rows, max_model_len + 1), dtype=np.int32)
        self._free_values: list[tuple[npt.NDArray[Any], int | bool]] = []
        self._opened_values: list[tuple[npt.NDArray[Any], Callable[[Sequence], Any]]] = []
        for name, column in _COLUMNS.items():
            array = np.full(num_rows, column.free, dtype=column.dtype)
            setattr(self, name, array)
            self._free_values.append((array, column.free))
            if column.opened is not None:
                self._opened_values.append((array, column.opened))
        self._free_rows = list(range(num_rows - 1, -1, -1))  # a stack: low rows first

    @property
    def has_free_row(self) -> bool:
        return bool(self._free_rows)

    @property
    def num_open(self) -> int:
        return len(self.sequences) - len(self._free_rows)

    @property
    def is_empty(self) -> bool:
        return len(self._free_rows) == len(self.sequences)

    def running(self) -> list[Sequence]:
        """Returns the sequences that hold a row."""
        return [sequence for sequence in self.sequences if sequence is not None]

    def sequence(self, row: int) -> Sequence:
        """Returns the sequence that holds `row`."""
        sequence = self.sequences[row]
        assert sequence is not None, f"row {row} is free"
        return sequence

    def open(self, sequence: Sequence, num_cached: int, prefix_block: int) -> int:
        """Gives `sequence` a row and returns it. The first `num_cached` tokens were found in the prefix cache."""
        row = self._free_rows.pop()
        sequence.row = row
        self.sequences[row] = sequence
        for array, opened in self._opened_values:
            array[row] = opened(sequence)
        self.token_ids[row, : len(sequence.token_ids)] = sequence.token_ids
        self.num_computed[row] = self.num_cached[row] = num_cached
        self.prefix_block[row] = prefix_block
        return row

    def known_tokens(self, row: int) -> IntArray:
        """Returns the row's tokens so far, [num_tokens], as a view."""
        known: IntArray = self.token_ids[row, : self.num_tokens[row]]
        return known

    def close(self, row: int) -> Sequence:
        """Frees the row and returns the sequence that held it."""
        sequence = self.sequence(row)
        self.sequences[row] = None
        for array, free in self._free_values:
            array[row] = free
        sequence.row = None
        self._free_rows.append(row)
        return sequence

    def needs(self, sampled: RowArray, *, shares_prefix: bool, skips_draft_model: bool) -> StepNeeds:
        """Returns the StepNeeds of a step that samples `sampled`."""
        num_logprobs = int(self.num_logprobs[sampled].max(initial=NO_LOGPROBS))
        if 0 < num_logprobs < MAX_LOGPROBS:
            # Rounded up to MAX_LOGPROBS and trimmed later, so that one CUDA graph serves every value.
            num_logprobs = MAX_LOGPROBS
        return StepNeeds(
            shares_prefix=shares_prefix,
            truncates=bool(np.count_nonzero(self.truncates[sampled])),
            num_logprobs=None if num_logprobs == NO_LOGPROBS else num_logprobs,
            edits_logits=bool(np.count_nonzero(self.edits_logits[sampled])),
            skips_draft_model=skips_draft_model,
        )

    def token_masks(self, sampled: RowArray) -> dict[int, IntArray]:
        """Returns, for those of `sampled` with a grammar, the mask of the tokens that may come next."""
        with_grammar = sampled[self.has_grammar[sampled]].tolist()
        return {row: grammar.mask for row in with_grammar if (grammar := self.sequence(row).grammar) is not None}

    def schedulable_decode_rows(self) -> RowArray:
        """Returns the decoding rows that may compute a token now.

        Rows at their maximum length may not, nor rows whose grammar does not know yet what may come next, nor rows with
        drafts whose last token is not read yet.
        """
        waits = (self.has_grammar | self.speculates) & (self.num_pending > 0)
        for row in self.has_grammar.nonzero()[0].tolist():
            waits[row] |= self.sequence(row).waits_for_grammar
        is_short = self.num_tokens + self.num_pending < self.max_num_tokens
        return (self.decoding & ~waits & is_short).nonzero()[0]


# The declarations leave the class: Python reads an attribute of an instance faster if the class has none of that name.
_COLUMNS = {name: column for name, column in vars(RowTable).items() if isinstance(column, _Column)}
for _name in _COLUMNS:
    delattr(RowTable, _name)
