"""Scheduler: which tokens of which sequences run in the next step.

Continuous batching: every decoding row gets one token; prompts then fill the rest of the token budget, in chunks
where they must, first come first served. When the cache is full, the youngest sequence gives its blocks back and is
computed again later. The oldest never does, so every request ends.

`schedule` may be called again before the last step's tokens are known: it plans from counts. A row and its blocks are
released only when no step in flight touches them.
"""

from __future__ import annotations

import bisect
import time
from collections import deque
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from nanovllm.config import MIN_SHARED_PREFIX, ResolvedConfig
from nanovllm.engine.batch import (
    BLOCKS,
    Chunk,
    IntArray,
    OpenedRow,
    PromptLogprobs,
    RecordArray,
    ScheduledBatch,
    StepLogprobs,
    StepResult,
)
from nanovllm.engine.block_manager import BlockManager, BlockTable
from nanovllm.engine.observer import EngineObserver, Preemption
from nanovllm.engine.row_table import BoolArray, RowTable
from nanovllm.engine.sequence import Sequence, SequenceStatus, token_logprobs
from nanovllm.engine.statistics import Load
from nanovllm.logs import events
from nanovllm.outputs import FinishReason
from nanovllm.utils.logger import setup_logger

logger = setup_logger(__name__)

RowArray = npt.NDArray[np.intp]

# Reading a prefix once for all its rows pays from this many rows, and this many tokens that are not read again.
_MIN_SHARERS = 16
_MIN_TOKENS_SAVED = 20_000
_MAX_PROMPT_LOGPROBS = 1 << 24  # log-probabilities of all tokens that a step gives for a prompt: 134 MB with their ids


class Scheduler:
    """Owns the waiting queue, the rows and the blocks."""

    def __init__(
        self,
        config: ResolvedConfig,
        observer: EngineObserver | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.now = 0.0  # seconds of `clock`, read once by each `schedule` and each `update`
        self._clock = clock
        self._observer = observer or EngineObserver()
        self.max_num_batched_tokens = config.max_num_batched_tokens
        self.max_prefill_tokens_beside_decode = config.max_prefill_tokens_beside_decode
        self.eos_token_ids = np.array(config.eos_token_ids, dtype=np.int32)
        self.block_manager = BlockManager(
            config.num_blocks,
            config.block_size,
            enable_prefix_caching=config.enable_prefix_caching,
            salt=f"{config.model}|{config.dtype}",
        )
        self.rows = RowTable(config.max_num_seqs, config.max_model_len)
        self.waiting: deque[Sequence] = deque()  # in order of arrival
        self._prefilling: Sequence | None = None  # holds a row and has prompt tokens left; the next waits for its end
        self._leaving: list[int] = []  # rows to release as soon as no step in flight touches them
        self._closed: list[int] = []  # rows released since the last step was planned
        self._step = 0
        self._max_prompt_logprob_tokens = max(_MAX_PROMPT_LOGPROBS // config.vocab_size, 1)
        self._shares_prefix = False  # the last step's decode rows

    def add(self, sequence: Sequence) -> None:
        if not self.has_unfinished:
            self._observer.work_began(sequence.arrival)
        self.waiting.append(sequence)

    @property
    def has_unfinished(self) -> bool:
        return bool(self.waiting) or not self.rows.is_empty

    @property
    def load(self) -> Load:
        blocks = self.block_manager
        num_waiting = len(self.waiting)
        return Load(self.rows.num_open, num_waiting, blocks.num_used_blocks, blocks.num_blocks)

    # Planning

    def schedule(self) -> ScheduledBatch | None:
        """Returns the next step, or None when nothing can run before a step in flight is collected."""
        self.now = self._clock()
        blocks: list[RecordArray] = []  # of BLOCKS, each [num_new]
        decode_rows, shares_prefix = self._arrange(self._schedule_decode(blocks))
        opened: list[OpenedRow] = []
        prompt_logprobs: list[PromptLogprobs] = []
        chunks = self._schedule_prefill(self._prefill_budget(len(decode_rows)), opened, blocks, prompt_logprobs)
        if not chunks and not len(decode_rows):
            return None
        # Only the last chunk can run out of budget, so the chunks that end their prompt come first.
        num_final = len(chunks) - (self._prefilling is not None) if chunks else 0
        self._step += 1
        final_rows = np.array([chunk.row for chunk in chunks[:num_final]], dtype=np.intp)
        sampled = np.append(decode_rows, final_rows)
        batch = ScheduledBatch.build(
            self._step,
            closed=self._closed,
            opened=opened,
            blocks=np.concatenate(blocks) if blocks else (),
            token_masks=self.rows.token_masks(sampled),
            chunks=chunks,
            num_final_chunks=num_final,
            prompt_logprobs=prompt_logprobs,
            decode_rows=decode_rows,
            needs=self.rows.needs(sampled, shares_prefix),
        )
        self._closed = []
        self.rows.steps_in_flight[decode_rows] += 1
        self.rows.steps_in_flight[batch.chunks["row"]] += 1
        self.rows.num_pending[sampled] += 1
        self._observer.batch_scheduled(batch, self.rows)
        return batch

    def _prefill_budget(self, num_decode_rows: int) -> int:
        """Returns how many prompt tokens the step may compute. Beside decode rows a bound keeps their pace."""
        budget = self.max_num_batched_tokens - num_decode_rows
        if num_decode_rows and self.max_prefill_tokens_beside_decode is not None:
            return min(budget, self.max_prefill_tokens_beside_decode)
        return budget

    def _schedule_decode(self, blocks: list[RecordArray]) -> RowArray:
        rows = self._make_room()
        needy = self._rows_without_room(rows)
        if len(needy):
            by_arrival = needy[np.argsort(self.rows.arrival[needy])]
            granted = by_arrival[: self.block_manager.num_free_blocks]
            tables = [self.rows.sequence(row).block_table for row in granted.tolist()]
            new_blocks = [self.block_manager.append_block(table) for table in tables]
            blocks.append(_appended(granted, self.rows.num_blocks[granted], new_blocks))
            self.rows.num_blocks[granted] += 1
            rows = np.setdiff1d(rows, by_arrival[len(granted) :])
        self.rows.num_computed[rows] += 1
        return rows

    def _arrange(self, rows: RowArray) -> tuple[RowArray, bool]:
        """Returns the decode rows with those that share a prefix side by side, and whether enough of them do.

        Within a group the longest come first: attention over a long context that starts late would end alone.
        """
        blocks = self.rows.prefix_block[rows]
        if np.count_nonzero(blocks >= 0) < _MIN_SHARERS:
            longest_first: RowArray = rows[np.argsort(-self.rows.num_computed[rows], kind="stable")]
            self._shares_prefix = False
            return longest_first, False
        shared, group, sizes = np.unique(blocks, return_inverse=True, return_counts=True)
        saved = np.bincount(group, weights=self.rows.num_cached[rows])
        pays = (shared >= 0) & (sizes >= _MIN_SHARERS) & (saved >= _MIN_TOKENS_SAVED)
        shares = pays[group]
        order = np.lexsort((-self.rows.num_computed[rows], np.where(shares, group, len(rows))))
        arranged: RowArray = rows[order]
        shares_prefix = bool(shares.any())
        if shares_prefix and not self._shares_prefix:
            num_sharing, saved_tokens = int(shares.sum()), int(saved[pays].sum())
            events.batch_shares_prefix.log(logger, num_sharing=num_sharing, size=len(rows), saved_tokens=saved_tokens)
        self._shares_prefix = shares_prefix
        return arranged, shares_prefix

    def _rows_without_room(self, rows: RowArray) -> RowArray:
        """Returns those of `rows` whose next position lies past their last block."""
        needy: RowArray = rows[
            self.rows.num_computed[rows] // self.block_manager.block_size >= self.rows.num_blocks[rows]
        ]
        return needy

    def _make_room(self) -> RowArray:
        """Preempts the youngest sequences until the decoding rows have the blocks they need; returns those rows.

        Blocks that a step in flight still writes become free later. They count as coming, and the rows that wait for
        them sit this step out.
        """
        coming = sum(self.block_manager.num_releasable(self.rows.sequence(row).block_table) for row in self._leaving)
        while True:
            rows = self.rows.schedulable_decode_rows()
            missing = len(self._rows_without_room(rows)) - self.block_manager.num_free_blocks - coming
            if missing <= 0:
                return rows
            candidates = [
                s for s in self.rows.running() if s.status in (SequenceStatus.PREFILLING, SequenceStatus.DECODING)
            ]
            if len(candidates) < 2:
                return rows
            victim = max(candidates, key=lambda sequence: sequence.seq_id)
            coming += self._preempt(victim)

    def _preempt(self, sequence: Sequence) -> int:
        """Sends `sequence` back to the queue. Returns how many of its blocks become free later rather than now."""
        releasable = self.block_manager.num_releasable(sequence.block_table)
        num_tokens = int(self.rows.num_tokens[self._row(sequence)])
        released = self._leave(sequence, SequenceStatus.PREEMPTED)
        coming = 0 if released else releasable
        sequence.preempted_at.append(self.now)
        free_blocks = self.block_manager.num_free_blocks
        self._observer.sequence_preempted(sequence, Preemption(releasable - coming, coming, num_tokens, free_blocks))
        return coming

    def _schedule_prefill(
        self,
        budget: int,
        opened: list[OpenedRow],
        blocks: list[RecordArray],
        prompt_logprobs: list[PromptLogprobs],
    ) -> list[Chunk]:
        chunks: list[Chunk] = []
        num_planned = 0
        while num_planned < budget:
            sequence = self._prefilling or self._admit(opened, blocks)
            if sequence is None:
                break
            row = self._row(sequence)
            start, num_tokens = int(self.rows.num_computed[row]), int(self.rows.num_tokens[row])
            end = min(num_tokens, start + budget - num_planned)
            of_all_tokens = sequence.needs_prompt_logprobs and sequence.params.prompt_logprobs == -1
            if of_all_tokens:
                end = min(end, start + self._max_prompt_logprob_tokens)
            planned = sequence.plan_prompt_logprobs(start, end, row, num_planned)
            if planned is not None:
                prompt_logprobs.append(planned)
            num_planned += end - start
            chunks.append(Chunk(row, start, end - start))
            self.rows.num_computed[row] = end
            self.block_manager.register(sequence.block_table, self.rows.token_ids[row, :end])
            self._prefilling = sequence if end < num_tokens else None
            if end == num_tokens:
                sequence.status = SequenceStatus.DECODING
                self.rows.decoding[row] = True
            if end < num_tokens or of_all_tokens:
                break
        return chunks

    def _admit(self, opened: list[OpenedRow], blocks: list[RecordArray]) -> Sequence | None:
        """Gives the first waiting sequence that can run a row, and blocks for all its tokens, if both are free."""
        sequence = next((sequence for sequence in self.waiting if not sequence.waits_for_grammar), None)
        if sequence is None or not self.rows.has_free_row:
            return None
        # Log-probabilities of prompt tokens need the tokens computed: a cached prefix has none.
        table = self.block_manager.allocate(
            sequence.seq_id, sequence.token_ids, share=not sequence.needs_prompt_logprobs
        )
        if table is None:
            return None
        self.waiting.remove(sequence)
        sequence.status = SequenceStatus.PREFILLING
        sequence.block_table = table
        num_cached = table.num_registered * self.block_manager.block_size
        if sequence.num_cached_tokens is None:
            sequence.num_cached_tokens = num_cached
            sequence.first_scheduled = self.now
        else:
            sequence.resumed_at.append(self.now)
        self._observer.sequence_scheduled(sequence, num_cached)
        row = self.rows.open(sequence, num_cached, self._prefix_block(table))
        params = sequence.params
        truncation = (min(max(params.top_k, 0), 2**24), params.top_p, params.min_p)  # exact in float32
        opened.append(
            OpenedRow(
                row=row,
                token_ids=sequence.token_ids,
                temperature=params.temperature,
                seed=sequence.seed,
                truncation=truncation,
                logit_edits=sequence.logit_edits,
            )
        )
        blocks.append(_appended(row, np.arange(len(table.blocks)), table.blocks))
        return sequence

    def _prefix_block(self, table: BlockTable) -> int:
        """Returns the block that ends the shortest prefix worth sharing; rows with the same one share all before it.

        -1: the sequence is shorter than that.
        """
        last = self.block_manager.blocks_for(MIN_SHARED_PREFIX) - 1
        return table.blocks[last] if last < len(table.blocks) else -1

    # Learning

    def update(self, batch: ScheduledBatch, result: StepResult) -> list[Sequence]:
        """Takes a collected step's tokens. Returns the sequences that it ended.

        Steps must be collected in the order in which they were scheduled.
        """
        rows = self.rows
        now = self.now = self._clock()
        rows.steps_in_flight[batch.decode_rows] -= 1
        rows.steps_in_flight[batch.chunks["row"]] -= 1
        sampled = batch.sampled_rows
        rows.num_pending[sampled] -= 1
        live = ~rows.stopped[sampled]
        if result.logprobs is not None:
            self._note_logprobs(sampled, live, result.logprobs)
        for planned, logprobs in zip(batch.prompt_logprobs, result.prompt_logprobs, strict=True):
            if not rows.stopped[planned.row]:
                rows.sequence(planned.row).prompt_logprobs += token_logprobs(logprobs, planned.num_top)
        sampled, token_ids = sampled[live], result.token_ids[live]
        rows.token_ids[sampled, rows.num_tokens[sampled]] = token_ids
        rows.num_tokens[sampled] += 1
        rows.last_token[sampled] = now
        for row in batch.final_chunks["row"].tolist():
            if not rows.stopped[row] and rows.sequence(row).first_token is None:
                rows.sequence(row).first_token = now
                self._observer.first_token(rows.sequence(row))

        # The new token's own key and value are not written yet: a block is full one token later.
        filled = sampled[(rows.num_tokens[sampled] - 1) % self.block_manager.block_size == 0]
        for row in filled.tolist():
            self.block_manager.register(rows.sequence(row).block_table, rows.known_tokens(row)[:-1])

        at_eos = np.isin(token_ids, self.eos_token_ids) & ~rows.ignore_eos[sampled]
        at_limit = rows.num_tokens[sampled] >= rows.max_num_tokens[sampled]
        at_end = at_eos | at_limit
        for index in np.flatnonzero(rows.watched[sampled] & ~at_eos).tolist():
            at_end[index] |= rows.sequence(int(sampled[index])).stops_at(int(token_ids[index]))
        ended = [self.rows.sequence(row) for row in sampled[at_end].tolist()]
        for sequence, eos in zip(ended, at_eos[at_end].tolist(), strict=True):
            stopped = eos or sequence.stop_reason is not None
            self._finish(sequence, "abort" if sequence.error is not None else "stop" if stopped else "length")
        self._release_leaving()
        return ended

    def _note_logprobs(self, sampled: IntArray, live: BoolArray, logprobs: StepLogprobs) -> None:
        asked = self.rows.num_logprobs[sampled]
        for index in np.flatnonzero(live & (asked >= 0)).tolist():
            self.rows.sequence(int(sampled[index])).logprobs += token_logprobs(logprobs, int(asked[index]), [index])

    def abort(self, sequence: Sequence) -> None:
        """Ends `sequence` in any state, with the tokens it has. Does nothing to one that has ended."""
        if sequence.status is not SequenceStatus.FINISHED:
            self.now = self._clock()
            self._finish(sequence, "abort")

    def _finish(self, sequence: Sequence, reason: FinishReason) -> None:
        sequence.finish_reason = reason
        sequence.finished = self.now
        if sequence.status is SequenceStatus.WAITING:
            if sequence in self.waiting:  # not yet, if Ctrl-C came while it was being added
                self.waiting.remove(sequence)
            sequence.status = SequenceStatus.FINISHED
        else:
            sequence.token_ids = self.rows.known_tokens(self._row(sequence)).copy()
            self.rows.stopped[sequence.row] = True
            self._leave(sequence, SequenceStatus.FINISHED)
        self._observer.sequence_finished(sequence)

    def _leave(self, sequence: Sequence, status: SequenceStatus) -> bool:
        """Plans no more steps for a running sequence. Returns whether its row and blocks are already released."""
        row = self._row(sequence)
        if sequence is self._prefilling:
            self._prefilling = None
        if sequence.first_token is not None:
            sequence.last_token = float(self.rows.last_token[row])
        already_leaving = sequence.status is SequenceStatus.PREEMPTED
        sequence.status = status
        self.rows.decoding[row] = False
        if not already_leaving:
            self._leaving.append(row)
        self._release_leaving()
        return sequence.row is None

    def _release_leaving(self) -> None:
        still_in_flight = []
        for row in self._leaving:
            if self.rows.steps_in_flight[row]:
                still_in_flight.append(row)
                continue
            sequence = self.rows.sequence(row)
            if sequence.status is SequenceStatus.PREEMPTED:
                sequence.token_ids = self.rows.known_tokens(row).copy()
                sequence.status = SequenceStatus.WAITING
                bisect.insort(self.waiting, sequence, key=lambda waiting: waiting.seq_id)
            self.block_manager.release(sequence.seq_id, sequence.block_table)
            sequence.block_table = BlockTable()
            self.rows.close(row)
            self._closed.append(row)
        self._leaving = still_in_flight

    @staticmethod
    def _row(sequence: Sequence) -> int:
        assert sequence.row is not None, f"seq_id={sequence.seq_id} holds no row"
        return sequence.row


def _appended(rows: npt.ArrayLike, indices: npt.ArrayLike, blocks: list[int]) -> RecordArray:
    """[num_blocks]: the items of a batch's section `blocks`."""
    items: RecordArray = np.empty(len(blocks), dtype=BLOCKS)
    items["row"], items["index"], items["block"] = rows, indices, blocks
    return items
