"""Scheduler: decides which tokens of which sequences run in the next step.

Continuous batching: every decoding row gets one token. Prompts then fill the rest of the token budget, first come first
served; a prompt that does not fit is computed in chunks. When the cache is full, the youngest sequence is preempted: it
gives its blocks back and is computed again later. The oldest is never preempted, so every request ends.

`schedule` plans from token counts, so it may be called again before the tokens of the last step are known. A row and
its blocks are released only when no step in flight touches them.
"""

from __future__ import annotations

import bisect
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from nanovllm.config import MIN_SHARED_PREFIX, ResolvedConfig
from nanovllm.engine.batch import (
    NO_LOGPROBS,
    Chunk,
    OpenedRow,
    PromptLogprobs,
    RecordArray,
    ScheduledBatch,
    StepResult,
)
from nanovllm.engine.block_manager import BlockManager, BlockTable
from nanovllm.engine.observer import EngineObserver, Preemption, SampledStep, Shortage
from nanovllm.engine.prefill_policy import PrefillBudget, PrefillPolicy
from nanovllm.engine.prefix_groups import PrefixGroups
from nanovllm.engine.row_table import NO_BLOCK, BoolArray, RowArray, RowTable
from nanovllm.engine.sequence import Sequence, SequenceStatus, token_logprobs
from nanovllm.engine.speculation import Speculation
from nanovllm.engine.statistics import Load
from nanovllm.errors import InvalidLogitsError
from nanovllm.kernels.columns import BLOCKS, INVALID_TOKEN
from nanovllm.outputs import FinishReason

# Log-probabilities that a step returns for a prompt with prompt_logprobs=-1: 134 MB with their token ids.
_MAX_PROMPT_LOGPROBS = 1 << 24
# Of a step: admitting a short prompt takes the host about as long as its tokens take the device, so the next ones are
# admitted while these are computed.
_MAX_ADMISSIONS = 64


@dataclass
class _StepPlan:
    """The contents of the next step, collected while it is planned."""

    opened: list[OpenedRow] = field(default_factory=list)
    blocks: list[RecordArray] = field(default_factory=list)  # of BLOCKS, each [num_new]
    chunks: list[Chunk] = field(default_factory=list)
    prompt_logprobs: list[PromptLogprobs] = field(default_factory=list)
    num_prompt_tokens: int = 0  # of the chunks


class Scheduler:
    """Owns the waiting queue, the rows and the blocks."""

    def __init__(
        self,
        config: ResolvedConfig,
        observer: EngineObserver | None = None,
        clock: Callable[[], float] = time.monotonic,
        last_step: int = 0,
        make_speculation: Callable[[], Speculation] = Speculation,
    ) -> None:
        self.now = 0.0  # seconds of `clock`, which each `schedule` and each `update` reads once
        self._clock = clock
        self._observer = observer or EngineObserver()
        self.policy = PrefillPolicy(config)
        self.speculation = make_speculation()
        self._is_eos: BoolArray = np.zeros(config.vocab_size, dtype=np.bool_)
        self._is_eos[[token_id for token_id in config.eos_token_ids if 0 <= token_id < config.vocab_size]] = True
        self.block_manager = BlockManager(
            config.num_blocks,
            config.block_size,
            enable_prefix_caching=config.enable_prefix_caching,
            salt=f"{config.model}|{config.dtype}",
        )
        self.rows = RowTable(config.max_num_seqs, config.max_model_len)
        self._prefix_groups = PrefixGroups(self.rows)
        self.waiting: deque[Sequence] = deque()  # in order of arrival
        self._prefilling: Sequence | None = None  # has a row and prompt tokens left
        self._leaving: list[int] = []  # rows to release as soon as no step in flight touches them
        self._closed: list[int] = []  # rows released since the last step was planned
        self.last_step = last_step  # the last step that was planned
        self._step = last_step  # the step that is being planned, or was collected last; for the log
        self._max_prompt_logprob_tokens = max(_MAX_PROMPT_LOGPROBS // config.vocab_size, 1)

    def add(self, sequence: Sequence) -> None:
        """Appends a sequence to the waiting queue."""
        if not self.has_unfinished:
            self._observer.work_began(sequence.arrival)
        self.waiting.append(sequence)

    @property
    def has_unfinished(self) -> bool:
        return bool(self.waiting) or not self.rows.is_empty

    @property
    def load(self) -> Load:
        blocks = self.block_manager
        return Load(self.rows.num_open, len(self.waiting), blocks.num_used_blocks, blocks.num_blocks)

    # Planning

    def schedule(self) -> ScheduledBatch | None:
        """Returns the next step, or None when nothing can run before a step in flight is collected."""
        self.now, self._step = self._clock(), self.last_step + 1
        plan = _StepPlan()
        self.speculation.watch(self.rows)
        decode_rows, shares_prefix = self._prefix_groups.arrange(self._schedule_decode(plan), self._step)
        next_prompt = self._prefilling or self._first_waiting()
        if next_prompt is not None:
            self._schedule_prefill(plan, self.policy.budget(self.rows, decode_rows, next_prompt, self.now))
        if not plan.chunks and not len(decode_rows):
            return None
        room = self.policy.max_num_batched_tokens - len(decode_rows) - plan.num_prompt_tokens
        drafts = self.speculation.draft(self.rows, decode_rows, plan.chunks, self.block_manager, room)
        # Only the last chunk can stop before the end of its prompt, so the final ones come first, as batches need.
        final_rows = [chunk.row for chunk in plan.chunks if self.rows.decoding[chunk.row]]
        sampled = np.append(decode_rows, final_rows) if final_rows else decode_rows
        self.last_step += 1
        batch = ScheduledBatch.build(
            self.last_step,
            closed=self._closed,
            opened=plan.opened,
            blocks=np.concatenate(plan.blocks + drafts.blocks, dtype=BLOCKS) if plan.blocks or drafts.blocks else (),
            token_masks=self.rows.token_masks(sampled),
            chunks=plan.chunks,
            num_final_chunks=len(final_rows),
            prompt_logprobs=plan.prompt_logprobs,
            drafts=drafts.tokens,
            proposals=drafts.proposals,
            decode_rows=decode_rows,
            needs=self.rows.needs(sampled, shares_prefix=shares_prefix, skips_draft_model=drafts.skips_draft_model),
        )
        self._closed = []
        self.rows.steps_in_flight[batch.scheduled_rows] += 1
        self.rows.num_pending[sampled] += 1
        self.policy.step_planned(batch, self.rows, self.now)
        self._observer.batch_scheduled(batch, self.rows)
        return batch

    def _schedule_decode(self, plan: _StepPlan) -> RowArray:
        """Returns the rows that decode in this step, each with a block for its next token."""
        rows, full = self._make_room()
        if len(full):
            by_arrival = full[np.argsort(self.rows.seq_id[full])]
            granted = by_arrival[: self.block_manager.num_free_blocks]
            tables = [self.rows.sequence(row).block_table for row in granted.tolist()]
            new_blocks = [self.block_manager.append_block(table) for table in tables]
            plan.blocks.append(_block_entries(granted, self.rows.num_blocks[granted], new_blocks))
            self.rows.num_blocks[granted] += 1
            rows = rows[~np.isin(rows, by_arrival[len(granted) :])]
        self.rows.num_computed[rows] += 1
        return rows

    def _rows_without_room(self, rows: RowArray) -> RowArray:
        """Returns those of `rows` whose next position lies past their last block."""
        blocks_filled = self.rows.num_computed[rows] // self.block_manager.block_size
        full: RowArray = rows[blocks_filled >= self.rows.num_blocks[rows]]
        return full

    def _make_room(self) -> tuple[RowArray, RowArray]:
        """Preempts the youngest sequences until enough blocks are free for the decoding rows.

        Returns these rows, and those of them that need a block for their next token.

        `coming` counts the blocks that become free later, since a step in flight still writes them. No further sequence
        is preempted in their place: the rows that need them skip this step.
        """
        coming = sum(self.block_manager.num_releasable(self.rows.sequence(row).block_table) for row in self._leaving)
        while True:
            rows = self.rows.schedulable_decode_rows()
            full, free = self._rows_without_room(rows), self.block_manager.num_free_blocks
            if len(full) <= free + coming:
                return rows, full
            candidates = [
                s for s in self.rows.running() if s.status in (SequenceStatus.PREFILLING, SequenceStatus.DECODING)
            ]
            if len(candidates) < 2:
                return rows, full
            oldest = self.rows.sequence(int(full[self.rows.seq_id[full].argmin()]))
            shortage = Shortage(self._step, oldest, len(full), free)
            coming += self._preempt(max(candidates, key=lambda sequence: sequence.seq_id), shortage)

    def _preempt(self, sequence: Sequence, shortage: Shortage) -> int:
        """Sends `sequence` back to the queue. Returns how many of its blocks become free later rather than now."""
        releasable = self.block_manager.num_releasable(sequence.block_table)
        num_tokens = int(self.rows.num_tokens[self._row(sequence)])
        released = self._leave(sequence, SequenceStatus.PREEMPTED)
        coming = 0 if released else releasable
        sequence.preempted_at.append(self.now)
        free_blocks = self.block_manager.num_free_blocks
        preemption = Preemption(shortage, releasable - coming, coming, num_tokens, free_blocks)
        self._observer.sequence_preempted(sequence, preemption)
        return coming

    def _schedule_prefill(self, plan: _StepPlan, budget: PrefillBudget) -> None:
        """Plans chunks of prompts, admitting waiting sequences in order, until the budget is used.

        Only prompts that a long one keeps waiting for many steps may go before it.
        """
        most = budget.num_tokens
        if self._prefilling is not None:
            row = self._row(self._prefilling)
            self.policy.share(int(self.rows.num_tokens[row] - self.rows.num_computed[row]), most)
            while (sequence := self._admit(plan, self.policy.overtaking(self.waiting))) is not None:
                self.policy.overtook(self._plan_chunk(plan, sequence, most))
        while plan.num_prompt_tokens < most:
            sequence = self._prefilling or self._admit(plan, self._first_waiting())
            if sequence is None:
                break
            self._plan_chunk(plan, sequence, most)
            if sequence.params.prompt_logprobs == -1:  # a step has memory for those of one prompt only
                break
        is_full = len(plan.opened) == _MAX_ADMISSIONS
        if is_full and plan.num_prompt_tokens < most and self._first_waiting() is not None:
            budget = PrefillBudget(plan.num_prompt_tokens, "max_admissions")
        if plan.chunks:
            self._observer.prefill_budgeted(budget)

    def _plan_chunk(self, plan: _StepPlan, sequence: Sequence, most: int) -> int:
        """Plans a chunk with which the step computes up to `most` prompt tokens, and returns its length."""
        row = self._row(sequence)
        start, num_tokens = int(self.rows.num_computed[row]), int(self.rows.num_tokens[row])
        end = min(num_tokens, start + most - plan.num_prompt_tokens)
        if sequence.needs_prompt_logprobs and sequence.params.prompt_logprobs == -1:
            end = min(end, start + self._max_prompt_logprob_tokens)
        prompt_logprobs = sequence.plan_prompt_logprobs(start, end, row, plan.num_prompt_tokens)
        if prompt_logprobs is not None:
            plan.prompt_logprobs.append(prompt_logprobs)
        plan.chunks.append(Chunk(row, start, end - start))
        plan.num_prompt_tokens += end - start
        self.rows.num_computed[row] = end
        self.block_manager.register(sequence.block_table, self.rows.token_ids[row, :end])
        if end < num_tokens:
            self._prefilling = sequence
        else:
            sequence.status = SequenceStatus.DECODING
            self.rows.decoding[row] = True
            if sequence is self._prefilling:
                self._prefilling = None
        return end - start

    def _first_waiting(self) -> Sequence | None:
        return next((sequence for sequence in self.waiting if not sequence.waits_for_grammar), None)

    def _admit(self, plan: _StepPlan, sequence: Sequence | None) -> Sequence | None:
        """Gives a waiting sequence a row, and blocks for all its tokens, and returns it.

        Returns None for None, when the step admits no more, and when no row or too few blocks are free.
        """
        if sequence is None or not self.rows.has_free_row or len(plan.opened) == _MAX_ADMISSIONS:
            return None
        # The log-probabilities of a prompt token exist only in the step that computes it: a cached prefix has none.
        share = not sequence.needs_prompt_logprobs
        keep_free = 0 if self.rows.is_empty else self.policy.watermark
        token_ids, salt = sequence.token_ids, sequence.cache_salt
        table = self.block_manager.allocate(
            sequence, self._step, token_ids, salt=salt, share=share, keep_free=keep_free
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
        opened = OpenedRow(row, token_ids, params.temperature, sequence.seed, truncation, sequence.logit_edits)
        plan.opened.append(opened)
        plan.blocks.append(_block_entries(row, np.arange(len(table.blocks)), table.blocks))
        return sequence

    def _prefix_block(self, table: BlockTable) -> int:
        """Returns the block at the end of the shortest prefix worth sharing, or NO_BLOCK for a shorter sequence.

        Rows with the same block there share all blocks before it too.
        """
        last = self.block_manager.blocks_for(MIN_SHARED_PREFIX) - 1
        return table.blocks[last] if last < len(table.blocks) else NO_BLOCK

    # Results

    def update(self, batch: ScheduledBatch, result: StepResult) -> list[Sequence]:
        """Takes a collected step's tokens. Returns the sequences that it ended.

        Steps must be collected in the order in which they were scheduled.
        """
        rows = self.rows
        now = self.now = self._clock()
        self._step = batch.step
        self.policy.step_collected(now, result.gpu_ms)
        rows.steps_in_flight[batch.scheduled_rows] -= 1
        rows.num_pending[batch.sampled_rows] -= 1
        for planned, logprobs in zip(batch.prompt_logprobs, result.prompt_logprobs, strict=True):
            if not rows.stopped[planned.row]:
                rows.sequence(planned.row).prompt_logprobs += token_logprobs(logprobs, planned.num_top)
        ended = []
        for index, (sampled, tokens) in enumerate(self.speculation.rounds(batch, result, rows)):
            ended += self._take_tokens(batch, result, sampled, tokens, drafted=index > 0)
        return ended

    def _take_tokens(
        self, batch: ScheduledBatch, result: StepResult, sampled: RowArray, tokens: RowArray, drafted: bool = False
    ) -> list[Sequence]:
        """Appends a token to each row of `sampled`. Returns the sequences that end there.

        tokens: where they are in `result`. drafted: they follow drafted tokens, after the step's first token of a row.
        """
        rows, now = self.rows, self.now
        token_ids = result.token_ids[tokens]
        live, is_invalid = ~rows.stopped[sampled], token_ids == INVALID_TOKEN
        invalid = sampled[live & is_invalid]
        rows.stopped[invalid] = True
        live &= ~is_invalid  # the tokens of all others are dropped
        sampled, tokens, token_ids = sampled[live], tokens[live], token_ids[live]
        self._record_logprobs(sampled, tokens, result)
        if drafted:
            rows.num_computed[sampled] += 1
        else:
            gaps = now - rows.last_token[sampled]
            self._observer.tokens_sampled(SampledStep(batch, rows, sampled, gaps, now, result.gpu_ms, self.load))
        num_before = rows.num_tokens[sampled]
        rows.token_ids[sampled, num_before] = token_ids
        rows.num_tokens[sampled] = num_before + 1
        rows.last_token[sampled] = now
        for row in () if drafted else batch.sampled_rows[len(batch.decode_rows) :].tolist():
            if not rows.stopped[row] and rows.sequence(row).first_token is None:
                rows.sequence(row).first_token = now
                self._observer.first_token(rows.sequence(row))

        # The new token's own key and value are not written yet: a block is full one token later.
        filled = sampled[num_before % self.block_manager.block_size == 0]
        for row in filled.tolist():
            self.block_manager.register(rows.sequence(row).block_table, rows.known_tokens(row)[:-1])

        at_eos = self._is_eos[token_ids] & ~rows.ignore_eos[sampled]
        at_end = at_eos | (num_before + 1 >= rows.max_num_tokens[sampled])
        for index in (rows.watched[sampled] & ~at_eos).nonzero()[0].tolist():
            at_end[index] |= rows.sequence(int(sampled[index])).stops_at(int(token_ids[index]))
        ended = [rows.sequence(row) for row in sampled[at_end].tolist()]
        for sequence, eos in zip(ended, at_eos[at_end].tolist(), strict=True):
            self._finish(sequence, "stop" if eos or sequence.stop_reason is not None else "length")
        for sequence in [rows.sequence(row) for row in invalid.tolist()]:
            sequence.error = InvalidLogitsError()
            self._finish(sequence, "abort")
            ended.append(sequence)
        self._release_leaving()
        return ended

    def _record_logprobs(self, sampled: RowArray, tokens: RowArray, result: StepResult) -> None:
        """Appends the log-probabilities of `tokens` in the result to the sequences of `sampled` that asked for them."""
        if result.logprobs is not None:
            num_top = self.rows.num_logprobs[sampled]
            for index in np.flatnonzero(num_top != NO_LOGPROBS).tolist():
                sequence = self.rows.sequence(int(sampled[index]))
                sequence.logprobs += token_logprobs(result.logprobs, int(num_top[index]), [int(tokens[index])])

    def abort(self, sequence: Sequence) -> None:
        """Ends `sequence` in any state, with the tokens it has. Does nothing to one that has ended."""
        if sequence.status is not SequenceStatus.FINISHED:
            self.now = self._clock()
            self._finish(sequence, "abort")

    def _finish(self, sequence: Sequence, reason: FinishReason) -> None:
        sequence.finish_reason = reason
        sequence.finished = self.now
        if sequence.status is SequenceStatus.WAITING:
            if sequence in self.waiting:  # it is not if Ctrl-C interrupted `add`
                self.waiting.remove(sequence)
            sequence.status = SequenceStatus.FINISHED
        else:
            sequence.token_ids = self.rows.known_tokens(self._row(sequence)).copy()
            self.rows.stopped[sequence.row] = True
            self._leave(sequence, SequenceStatus.FINISHED)
        self._observer.sequence_finished(sequence)

    def _leave(self, sequence: Sequence, status: SequenceStatus) -> bool:
        """Stops planning steps for a sequence that holds a row. Returns whether its row and blocks are released now."""
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
        """Releases the leaving rows that no step in flight touches; preempted sequences go back to the queue."""
        still_in_flight = []
        for row in self._leaving:
            if self.rows.steps_in_flight[row]:
                still_in_flight.append(row)
                continue
            sequence = self.rows.sequence(row)
            if sequence.status is SequenceStatus.PREEMPTED:
                sequence.token_ids = self.rows.known_tokens(row).copy()
                sequence.last_token = None if sequence.first_token is None else float(self.rows.last_token[row])
                sequence.status = SequenceStatus.WAITING
                bisect.insort(self.waiting, sequence, key=lambda waiting: waiting.seq_id)
            self.block_manager.release(sequence, self._step, sequence.block_table)
            sequence.block_table = BlockTable()
            self.rows.close(row)
            self._closed.append(row)
        self._leaving = still_in_flight

    @staticmethod
    def _row(sequence: Sequence) -> int:
        assert sequence.row is not None, f"seq_id={sequence.seq_id} holds no row"
        return sequence.row


def _block_entries(rows: npt.ArrayLike, indices: npt.ArrayLike, blocks: list[int]) -> RecordArray:
    """Returns items of a batch's section `blocks`, [num_blocks]."""
    items: RecordArray = np.empty(len(blocks), dtype=BLOCKS)
    items["row"], items["index"], items["block"] = rows, indices, blocks
    return items
