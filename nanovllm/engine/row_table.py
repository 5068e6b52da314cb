"""RowTable: what the scheduler knows of every running sequence, as arrays indexed by row.

The device keeps tensors under the same row numbers. Planning a step is arithmetic over whole arrays,
so its cost hardly grows with the number of sequences.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from nanovllm.engine.batch import IntArray, StepNeeds
from nanovllm.engine.sequence import Sequence, num_asked
from nanovllm.sampling_params import MAX_LOGPROBS

BoolArray = npt.NDArray[np.bool_]


class RowTable:
    """`num_rows` rows; each is free or holds one sequence from admission to release.

    A sequence's length counts known tokens (`num_tokens`) and tokens that steps in flight will bring
    (`num_pending`): plans are made from the sum, never from a token's value.
    """

    def __init__(self, num_rows: int, max_model_len: int) -> None:
        self.sequences: list[Sequence | None] = [None] * num_rows
        self.token_ids: IntArray = np.zeros((num_rows, max_model_len + 1), dtype=np.int32)
        self.num_tokens = np.zeros(num_rows, dtype=np.int32)
        self.num_pending = np.zeros(num_rows, dtype=np.int32)
        self.num_computed = np.zeros(num_rows, dtype=np.int32)  # keys and values written by the steps planned so far
        self.num_cached = np.zeros(num_rows, dtype=np.int32)  # of those, found in the prefix cache on admission
        self.num_blocks = np.zeros(num_rows, dtype=np.int32)
        self.max_num_tokens = np.zeros(num_rows, dtype=np.int32)
        self.steps_in_flight = np.zeros(num_rows, dtype=np.int32)
        self.last_token = np.zeros(num_rows, dtype=np.float64)  # when it came; seconds
        self.arrival = np.zeros(num_rows, dtype=np.int64)
        # The block that ends the shortest prefix worth sharing, the same for those who share it; -1: shorter than that.
        self.prefix_block = np.full(num_rows, -1, dtype=np.int32)
        self.decoding: BoolArray = np.zeros(num_rows, dtype=np.bool_)  # takes part in decode steps
        self.stopped: BoolArray = np.zeros(num_rows, dtype=np.bool_)  # finished: what is in flight is dropped
        self.ignore_eos: BoolArray = np.zeros(num_rows, dtype=np.bool_)
        self.truncates: BoolArray = np.zeros(num_rows, dtype=np.bool_)  # draws with top-k, top-p or min-p
        self.edits_logits: BoolArray = np.zeros(num_rows, dtype=np.bool_)  # has penalties, biases, bans or a mask
        self.num_logprobs = np.full(num_rows, -1, dtype=np.int32)  # of the likeliest tokens; -1: no log-probabilities
        self.watched: BoolArray = np.zeros(num_rows, dtype=np.bool_)  # has stop rules of its own
        self.has_grammar: BoolArray = np.zeros(
            num_rows, dtype=np.bool_
        )  # structured: its last token decides on the next
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
        """The sequences that hold a row."""
        return [sequence for sequence in self.sequences if sequence is not None]

    def sequence(self, row: int) -> Sequence:
        sequence = self.sequences[row]
        assert sequence is not None, f"row {row} is free"
        return sequence

    def open(self, sequence: Sequence, num_cached: int, prefix_block: int = -1) -> int:
        """Gives `sequence` a row; its first `num_cached` tokens come from the prefix cache."""
        row = self._free_rows.pop()
        sequence.row = row
        self.sequences[row] = sequence
        num_tokens = len(sequence.token_ids)
        self.token_ids[row, :num_tokens] = sequence.token_ids
        self.num_tokens[row] = num_tokens
        self.num_pending[row] = 0
        self.num_computed[row] = num_cached
        self.num_cached[row] = num_cached
        self.num_blocks[row] = len(sequence.block_table.blocks)
        self.prefix_block[row] = prefix_block
        self.max_num_tokens[row] = sequence.max_num_tokens
        self.steps_in_flight[row] = 0
        self.last_token[row] = sequence.last_token or 0.0
        self.arrival[row] = sequence.seq_id
        self.decoding[row] = False
        self.stopped[row] = False
        self.ignore_eos[row] = sequence.params.ignore_eos
        self.truncates[row] = sequence.params.truncates
        self.edits_logits[row] = sequence.logit_edits is not None or sequence.grammar is not None
        self.num_logprobs[row] = num_asked(sequence.params.logprobs)
        self.watched[row] = sequence.watches_tokens
        self.has_grammar[row] = sequence.grammar is not None
        return row

    def known_tokens(self, row: int) -> IntArray:
        """The row's tokens so far, as a view."""
        known: IntArray = self.token_ids[row, : self.num_tokens[row]]
        return known

    def close(self, row: int) -> Sequence:
        """Takes the row back."""
        sequence = self.sequence(row)
        self.sequences[row] = None
        self.decoding[row] = False
        sequence.row = None
        self._free_rows.append(row)
        return sequence

    def needs(self, sampled: npt.NDArray[np.intp], shares_prefix: bool) -> StepNeeds:
        """Of a step that samples for these rows."""
        num_logprobs = int(self.num_logprobs[sampled].max(initial=-1))
        if 0 < num_logprobs < MAX_LOGPROBS:  # brought, then cut to what each asked for: a graph for each would be many
            num_logprobs = MAX_LOGPROBS
        truncates = bool(self.truncates[sampled].any())
        edits_logits = bool(self.edits_logits[sampled].any())
        return StepNeeds(shares_prefix, truncates, None if num_logprobs < 0 else num_logprobs, edits_logits)

    def token_masks(self, sampled: npt.NDArray[np.intp]) -> dict[int, IntArray]:
        """What each guided row of these may draw now."""
        guided = sampled[self.has_grammar[sampled]].tolist()
        return {row: matcher.mask for row in guided if (matcher := self.sequence(row).grammar) is not None}

    def schedulable_decode_rows(self) -> npt.NDArray[np.intp]:
        """Rows whose next token may be computed: decoding, not at their limit, with no token unread that decides it."""
        unread = self.has_grammar & (self.num_pending > 0)
        return np.flatnonzero(self.decoding & ~unread & (self.num_tokens + self.num_pending < self.max_num_tokens))
