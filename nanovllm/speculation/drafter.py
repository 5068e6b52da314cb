"""Drafter: decides which rows have drafts, and which tokens of these were right."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

import numpy as np

from nanovllm.config import ResolvedConfig
from nanovllm.engine.batch import Chunk, IntArray, RecordArray, ScheduledBatch, StepResult
from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.observer import EngineObserver, VerifiedDrafts
from nanovllm.engine.row_table import BoolArray, RowArray, RowTable
from nanovllm.engine.sequence import Sequence
from nanovllm.engine.speculation import NO_DRAFTS, Draft, Speculation, StepDrafts
from nanovllm.kernels.columns import BLOCKS
from nanovllm.logs import events
from nanovllm.speculation.draft_length import DraftRate, draft_length
from nanovllm.speculation.proposers import Proposer, RecentOutputs, make_proposer
from nanovllm.speculative_config import MAX_DRAFTING_ROWS, SpeculativeConfig
from nanovllm.utils.logger import setup_logger

logger = setup_logger(__name__)

_READ_EACH = 2048  # tokens that are read between two steps, so that long prompts hold up none


@dataclass
class DraftState:
    """What is known of a sequence that may have drafts."""

    proposer: Proposer
    rate: DraftRate = field(default_factory=DraftRate)
    proposal: list[int] = field(default_factory=list)  # what may follow its known tokens
    num_tokens: int = 0  # these tokens, when the proposal was made
    length: int = 0  # tokens of the proposal that pay


class Drafter(Speculation):
    """Drafts tokens with a proposer for each sequence.

    Proposals are made from tokens that are read. So a row that has drafts is in no step in flight while the next one is
    planned. A row without a good proposal runs as without speculation, and its proposals are compared with its tokens
    all the same: this tells, at no cost on the device, when drafts begin to pay.
    """

    max_idle_rows = 16  # without drafts, that are looked at between two steps: looking for repetitions takes long

    def __init__(self, config: SpeculativeConfig, resolved: ResolvedConfig, observer: EngineObserver) -> None:
        self._config, self._observer = config, observer
        self._overlaps = resolved.pipeline_depth > 1
        self._first_row = resolved.max_num_seqs
        self._num_draft_rows = config.num_draft_rows(resolved.max_num_seqs)
        self._states: dict[Sequence, DraftState | None] = {}  # of unfinished sequences; None: no drafts (any more)
        self._seen = np.zeros(resolved.max_num_seqs, dtype=np.int32)  # tokens of each row that `watch` has seen
        self._in_flight: BoolArray = np.zeros(resolved.max_num_seqs, dtype=np.bool_)  # a step has a draft of the row
        cached = config.suffix_decoding_max_cached_requests if config.method == "suffix" else 0
        self._others = RecentOutputs(cached) if cached else None
        self._ended: deque[IntArray] = deque(maxlen=cached)  # outputs to be added to `_others`

    def watch(self, rows: RowTable) -> None:
        for sequence in [sequence for sequence in self._states if sequence.finish_reason is not None]:
            del self._states[sequence]
            if not sequence.cache_salt:
                self._ended.append(sequence.output_token_ids)
        num_rows = int(np.count_nonzero(rows.decoding))
        if num_rows > MAX_DRAFTING_ROWS:
            rows.speculates &= self._in_flight
            return
        left = _READ_EACH
        while self._others is not None and self._ended and left > 0:
            left -= len(self._ended[0])
            self._others.add(self._ended.popleft())
        longest = self._num_draft_rows // max(int(np.count_nonzero(rows.speculates)), 1)
        for row in self._fresh_rows(rows).tolist():
            self._seen[row] = rows.num_tokens[row]
            sequence = rows.sequence(row)
            state = self._state_of(sequence)
            if state is None:
                rows.speculates[row] = False
                continue
            tokens = rows.known_tokens(row)
            if state.proposal and len(tokens) > state.num_tokens:  # not verified by a step
                is_right = int(tokens[state.num_tokens]) == state.proposal[0]
                state.rate.observe(num_right=int(is_right), num_wrong=int(not is_right))
            left -= state.proposer.read(tokens, max(left, 1))
            state.proposal, state.num_tokens = state.proposer.propose(tokens, self._config.max_draft), len(tokens)
            state.length = self._length(state.rate.share, num_rows, min(len(state.proposal), longest))
            rows.speculates[row] = self._speculates(sequence, state, num_rows, longest)

    def forget_outputs(self) -> None:
        self._states = {sequence: state for sequence, state in self._states.items() if sequence.finish_reason is None}
        self._ended.clear()
        if self._others is not None:
            self._others.clear()

    def _fresh_rows(self, rows: RowTable) -> RowArray:
        """Returns the rows with new tokens: all that have drafts, and of the others those not seen for longest."""
        behind = np.where(rows.decoding, np.abs(rows.num_tokens - self._seen), 0)  # a new sequence may have fewer
        idle = np.flatnonzero((behind > 0) & ~rows.speculates)
        if len(idle) > self.max_idle_rows:
            idle = idle[np.argsort(-behind[idle], kind="stable")[: self.max_idle_rows]]
        return np.concatenate([np.flatnonzero((behind > 0) & rows.speculates), idle])

    def _speculates(self, sequence: Sequence, state: DraftState, num_rows: int, longest: int) -> bool:
        """Returns whether the next step of a sequence must wait for its last token. longest: its drafts, in tokens."""
        return state.length > 0

    def _state_of(self, sequence: Sequence) -> DraftState | None:
        """Returns the state of a sequence, None if it has no drafts."""
        if sequence not in self._states:
            if sequence.grammar is not None:
                self._turn_off(sequence, "structured_outputs")
            elif not sequence.params.speculate:
                self._turn_off(sequence, "speculate=False")
            else:
                self._states[sequence] = DraftState(self._make_proposer(sequence))
        return self._states[sequence]

    def _turn_off(self, sequence: Sequence, why: str) -> None:
        """Makes no drafts of a sequence until it ends."""
        self._states[sequence] = None
        events.speculation_off.log(logger, request_id=sequence.request_id, why=why)

    def _make_proposer(self, sequence: Sequence) -> Proposer:
        return make_proposer(self._config, None if sequence.cache_salt else self._others)

    def _length(self, share: float, num_rows: int, longest: int) -> int:
        return draft_length(share, num_rows, longest, overlaps=self._overlaps)

    def draft(
        self, rows: RowTable, decode_rows: RowArray, chunks: Seq[Chunk], blocks: BlockManager, num_tokens: int
    ) -> StepDrafts:
        candidates = decode_rows[rows.speculates[decode_rows]].tolist()
        if not candidates:
            return NO_DRAFTS
        left = min(num_tokens, self._num_draft_rows)
        share = max(left // len(candidates), 1)
        drafts: list[Draft] = []
        new_blocks: list[RecordArray] = []
        for row in candidates:
            state = self._states[rows.sequence(row)]
            assert state is not None, f"row {row} has no drafts"
            start = int(rows.num_tokens[row])
            longest = min(state.length, share, left - len(drafts), int(rows.max_num_tokens[row]) - start - 1)
            length = min(longest, self._make_room(rows, row, start + longest, blocks, new_blocks) - start)
            if length <= 0:
                continue
            for offset, token_id in enumerate(state.proposal[:length]):
                drafts.append(Draft(self._first_row + len(drafts), row, offset, start + offset, token_id))
            state.proposal = []
            self._in_flight[row] = True
        return StepDrafts(drafts, new_blocks)

    def _make_room(
        self, rows: RowTable, row: int, num_tokens: int, blocks: BlockManager, new_blocks: list[RecordArray]
    ) -> int:
        """Gives a row blocks for `num_tokens` tokens, as far as others do not need them. Returns for how many it has.

        What it gets is appended to `new_blocks`. Later tokens fill the blocks of a draft that is refused.
        """
        first = int(rows.num_blocks[row])
        spare = blocks.num_free_blocks - rows.num_open
        num_new = min(blocks.blocks_for(num_tokens) - first, spare)
        if num_new > 0:
            table = rows.sequence(row).block_table
            items: RecordArray = np.empty(num_new, dtype=BLOCKS)
            items["row"], items["index"] = row, np.arange(first, first + num_new)
            items["block"] = [blocks.append_block(table) for _ in range(num_new)]
            rows.num_blocks[row] += num_new
            new_blocks.append(items)
        return int(rows.num_blocks[row]) * blocks.block_size

    def rounds(self, batch: ScheduledBatch, result: StepResult, rows: RowTable) -> Iterator[tuple[RowArray, RowArray]]:
        verified = _verify(batch, result.token_ids, rows)
        for row, one in verified.items():
            self._in_flight[row] = False
            one.sequence.num_draft_tokens += one.num_drafted
            one.sequence.num_accepted_tokens += len(one.right)
            if (state := self._states.get(one.sequence)) is not None:
                state.rate.observe(num_right=len(one.right), num_wrong=int(len(one.right) < one.num_drafted))
        yield batch.sampled_rows, batch.sampled_tokens
        taking = verified
        while taking := {
            row: one
            for row, one in taking.items()
            if one.num_taken < len(one.right) and rows.sequences[row] is not None and not rows.stopped[row]
        }:
            yield np.array([*taking]), np.array([one.right[one.num_taken] for one in taking.values()])
            for one in taking.values():
                one.num_taken += 1
        if verified:
            drafts = verified.values()
            self._observer.drafts_verified(
                VerifiedDrafts(
                    num_drafted=[one.num_drafted for one in drafts],
                    num_accepted=[len(one.right) for one in drafts],
                    gained=[(one.sequence, one.num_taken) for one in drafts],
                )
            )


@dataclass
class _Verified:
    """What became of the draft of a row."""

    sequence: Sequence
    num_drafted: int = 0
    right: list[int] = field(default_factory=list)  # where in the result the tokens after its right tokens are
    num_taken: int = 0  # of these


def _verify(batch: ScheduledBatch, token_ids: IntArray, rows: RowTable) -> dict[int, _Verified]:
    """Compares drafts with what was sampled. Returns the outcome for each row that has one."""
    drafts, verified = batch.section("drafts"), dict[int, _Verified]()
    if not len(drafts):
        return verified
    places = {row: place for place, row in enumerate(batch.decode_rows.tolist())}
    sampled, is_right = token_ids.tolist(), False
    for place, (_, source, offset, _, token_id) in enumerate(drafts.tolist(), start=len(batch.decode_rows)):
        if offset == 0:
            verified[source] = _Verified(rows.sequence(source))
        before = places[source] if offset == 0 else place - 1
        is_right = (is_right or offset == 0) and sampled[before] == token_id
        verified[source].num_drafted += 1
        if is_right:
            verified[source].right.append(place)
    return verified
