"""SchedulerLog: the log lines about the scheduler's decisions, and the choice of decode steps that get one."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from nanovllm.engine.batch import IntArray, ScheduledBatch
from nanovllm.engine.observer import CollectedStep, EngineObserver, Preemption, SampledStep
from nanovllm.engine.prefill_policy import PrefillBudget
from nanovllm.engine.request_end import Cause, cause_of
from nanovllm.engine.row_table import RowTable
from nanovllm.engine.sequence import Sequence
from nanovllm.logs import events
from nanovllm.logs.decode_rule import DecodeLogPolicy
from nanovllm.utils.logger import MAX_ITEMS, ItemList, first_items, setup_logger

logger = setup_logger("nanovllm.engine.scheduler")  # the name that users' documents show

_LOGGED_REASON: Mapping[Cause, str] = {
    "eos": "eos",
    "stop": "stop",
    "length": "max_tokens",
    "abort": "abort",
    "left": "abort",
    "failed": "failed",
}


class SchedulerLog(EngineObserver):
    """Writes the lines of the logger `nanovllm.engine.scheduler`."""

    def __init__(self) -> None:
        self._decode_log = DecodeLogPolicy()
        self._decode_step = 0  # decode steps since the engine was idle
        self._num_preempted = 0  # preemptions since the last decode step
        self._collected = 0  # the last step that was collected
        self._budget = PrefillBudget(0, "")  # of the step that is being planned

    def work_began(self, now: float) -> None:
        self._decode_step = 0
        self._decode_log.reset()

    def sequence_preempted(self, sequence: Sequence, preemption: Preemption) -> None:
        self._num_preempted += 1
        shortage = preemption.shortage
        other = None if shortage.oldest is sequence else shortage.oldest
        events.sequence_preempted.log(
            logger,
            seq_id=sequence.seq_id,
            request_id=sequence.request_id,
            freed=preemption.freed,
            coming=preemption.coming,
            num_tokens=preemption.num_tokens,
            free_blocks=preemption.free_blocks,
            whom="its own next token" if other is None else f"seq_id={other.seq_id}",
            for_seq_id=None if other is None else other.seq_id,
            for_request_id=None if other is None else other.request_id,
            needed=shortage.needed,
            free_before=shortage.free,
            step=shortage.step,
            **sequence.caller.fields,
        )

    def tokens_sampled(self, step: SampledStep) -> None:
        self._collected = step.batch.step

    def prefill_budgeted(self, budget: PrefillBudget) -> None:
        self._budget = budget

    def batch_scheduled(self, batch: ScheduledBatch, rows: RowTable) -> None:
        if len(batch.chunks) and logger.isEnabledFor(logging.INFO):
            events.batch_prefill.log(
                logger,
                step=batch.step,
                size=len(batch.chunks),
                batched_tokens=batch.num_prefill_tokens,
                budget=self._budget.num_tokens,
                budget_reason=self._budget.reason,
                seqs=_described(rows, batch.chunks["row"], cached=batch.chunks["start"]),
            )
        if len(batch.decode_rows):
            self._log_decode(batch, rows)

    def _log_decode(self, batch: ScheduledBatch, rows: RowTable) -> None:
        self._decode_step += 1
        size = len(batch.decode_rows)
        level = self._decode_log.level_for(self._decode_step, size, self._num_preempted)
        if logger.isEnabledFor(level):
            events.batch_decode.log_at(
                level,
                logger,
                in_summary=self._decode_log.in_summary(self._decode_step, self._num_preempted),
                step=batch.step,
                decode_step=self._decode_step,
                size=size,
                preempted=self._num_preempted,
                shares_prefix=batch.needs.shares_prefix,
                seqs=_described(rows, batch.decode_rows),
            )
        self._num_preempted = 0

    def sequence_finished(self, sequence: Sequence) -> None:
        if not logger.isEnabledFor(logging.DEBUG) or sequence.finish_reason is None:
            return
        metrics = sequence.metrics()
        events.sequence_finished.log(
            logger,
            seq_id=sequence.seq_id,
            request_id=sequence.request_id,
            num_prompt_tokens=sequence.num_prompt_tokens,
            num_cached_tokens=metrics.num_cached_tokens,
            output_len=metrics.num_output_tokens,
            step=self._collected,
            reason=_LOGGED_REASON[cause_of(sequence)],
            arrival=metrics.arrival,
            first_scheduled=metrics.first_scheduled,
            first_token=metrics.first_token,
            finished=metrics.finished,
            queue_ms=_milliseconds(metrics.queue_time),
            ttft_ms=_milliseconds(metrics.time_to_first_token),
            itl_ms=_milliseconds(metrics.inter_token_latency),
            e2e_ms=_milliseconds(metrics.end_to_end),
            preemptions=metrics.num_preemptions,
            **sequence.caller.fields,
        )

    def step_collected(self, step: CollectedStep) -> None:
        num_finished, num_seqs = len(step.ended), len(step.batch.sampled_rows)
        events.batch_postprocess.log(logger, step=step.batch.step, num_finished=num_finished, num_seqs=num_seqs)


def _described(rows: RowTable, indices: IntArray, cached: IntArray | None = None) -> ItemList:
    """Returns the first sequences of `indices`. Arrays are read at once, which is cheaper than row by row."""
    first = indices[:MAX_ITEMS]
    seq_ids, lengths = rows.seq_id[first].tolist(), rows.num_tokens[first].tolist()
    ends = [")"] * len(first) if cached is None else [f",cached={number})" for number in cached[:MAX_ITEMS].tolist()]
    return first_items(range(len(indices)), lambda index: f"seq_{seq_ids[index]}(len={lengths[index]}{ends[index]}")


def _milliseconds(seconds: float | None) -> float | None:
    return None if seconds is None else seconds * 1e3
