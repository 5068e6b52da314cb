"""StatisticsLine: logs what the engine did in each interval, and in the whole run when it ends."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from nanovllm.engine.batch import ScheduledBatch
from nanovllm.engine.observer import CollectedStep, EngineObserver, EngineStart, SampledStep
from nanovllm.engine.prefill_policy import PrefillBudget
from nanovllm.engine.request_end import Cause, RequestEnd
from nanovllm.engine.row_table import RowTable
from nanovllm.engine.sequence import Sequence
from nanovllm.engine.statistics import EngineStatistics, Load
from nanovllm.logs import events
from nanovllm.utils.logger import setup_logger

logger = setup_logger("nanovllm.engine.metrics")  # the name that users' documents show

_MAX_NAMES = 16  # requests of the slowest step


@dataclass(frozen=True)
class _SlowStep:
    batch: ScheduledBatch
    seconds: float  # since the previous step was collected
    gpu_ms: float | None
    request_ids: list[str]

    @classmethod
    def of(cls, step: SampledStep, seconds: float) -> _SlowStep:
        rows = np.concatenate([step.batch.chunks["row"], step.batch.decode_rows])[:_MAX_NAMES].tolist()
        names = dict.fromkeys(step.rows.sequence(row).request_id for row in rows)
        return cls(step.batch, seconds, step.gpu_ms, list(names))


@dataclass
class _Window:
    """What happened since a moment. Times are seconds of the engine's clock."""

    began: float
    before: EngineStatistics  # the engine's totals at that moment
    peak_usage: float = 0.0
    peak_usage_at: float | None = None
    peak_waiting: int = 0
    peak_waiting_at: float | None = None
    device_seconds: float | None = None
    slowest: _SlowStep | None = None
    finished: Counter[Cause] = field(default_factory=Counter)
    budgets: Counter[str] = field(default_factory=Counter)  # of steps with prompt tokens, by reason

    def step_sampled(self, step: SampledStep, seconds: float) -> None:
        if self.slowest is None or seconds > self.slowest.seconds:
            self.slowest = _SlowStep.of(step, seconds)
        if step.gpu_ms is not None:
            self.device_seconds = (self.device_seconds or 0.0) + step.gpu_ms / 1e3

    def loaded(self, now: float, kv_cache_usage: float, num_waiting: int) -> None:
        if kv_cache_usage > self.peak_usage:
            self.peak_usage, self.peak_usage_at = kv_cache_usage, now
        if num_waiting > self.peak_waiting:
            self.peak_waiting, self.peak_waiting_at = num_waiting, now

    def fields(self) -> dict[str, Any]:
        """Returns the fields of `engine.statistics` that do not depend on the totals."""
        slowest = self.slowest
        batch = None if slowest is None else slowest.batch
        return {
            "peak_kv_cache_usage": self.peak_usage,
            "peak_kv_cache_at": self.peak_usage_at,
            "peak_waiting": self.peak_waiting,
            "peak_waiting_at": self.peak_waiting_at,
            "device_s": self.device_seconds,
            "slowest_step": None if batch is None else batch.step,
            "slowest_step_kind": None if batch is None else batch.kind,
            "slowest_step_ms": None if slowest is None else slowest.seconds * 1e3,
            "slowest_step_gpu_ms": None if slowest is None else slowest.gpu_ms,
            "slowest_step_prompt_tokens": None if batch is None else batch.num_prefill_tokens,
            "slowest_step_decode_seqs": None if batch is None else len(batch.decode_rows),
            "slowest_step_request_ids": [] if slowest is None else slowest.request_ids,
            "finished_by_cause": {str(cause): number for cause, number in self.finished.items()},
            "num_failed": self.finished["failed"],
            "num_refused": self.finished["refused"],
            "prefill_steps_by_budget": dict(self.budgets),
        }


class StatisticsLine(EngineObserver):
    """Logs a line at INFO every `interval` seconds while there is work, and one for the whole run at its end.

    The last one is not shown on the console after a run of less than an interval.
    """

    def __init__(self, interval: float) -> None:
        self._interval = interval
        self._clock = time.monotonic
        self._totals = EngineStatistics()
        self._run = _Window(0.0, EngineStatistics())
        self._window = _Window(0.0, EngineStatistics())
        self._load = Load(0, 0, 0, 1)
        self._num_added = 0  # sequences that joined the queue since a step was planned
        self._collected = 0.0  # when the previous step was collected, or the first one of some work was submitted

    def engine_started(self, start: EngineStart) -> None:
        self._clock, self._totals = start.clock, start.statistics
        self._load = Load(0, 0, 0, start.resolved.num_blocks)
        self._run = _Window(start.clock(), EngineStatistics())

    def work_began(self, now: float) -> None:
        self._window = _Window(now, self._totals.copy())

    def step_submitted(self, batch: ScheduledBatch, now: float, num_in_flight: int) -> None:
        if not num_in_flight:  # the engine was idle, and idle time belongs to no step
            self._collected = now

    def tokens_sampled(self, step: SampledStep) -> None:
        seconds, self._collected = step.now - self._collected, step.now
        for window in (self._window, self._run):
            window.step_sampled(step, seconds)
            window.loaded(step.now, step.load.used_blocks / step.load.num_blocks, step.load.num_waiting)

    def request_added(self, sequence: Sequence) -> None:
        self._num_added += 1
        for window in (self._window, self._run):
            window.loaded(sequence.queued, 0.0, self._load.num_waiting + self._num_added)

    def prefill_budgeted(self, budget: PrefillBudget) -> None:
        for window in (self._window, self._run):
            window.budgets[budget.reason] += 1

    def batch_scheduled(self, batch: ScheduledBatch, rows: RowTable) -> None:
        self._num_added = 0  # some may run now: the next step's load tells

    def step_collected(self, step: CollectedStep) -> None:
        self._load = step.load
        if step.collected - self._window.began >= self._interval:
            self._log(self._window, step.collected)
            self.work_began(step.collected)

    def request_finished(self, end: RequestEnd) -> None:
        for window in (self._window, self._run):
            window.finished[end.cause] += 1

    def engine_failed(self, error: BaseException, lost: Iterable[Sequence], goes_on: bool) -> None:
        self._load = Load(0, 0, 0, self._load.num_blocks)

    def engine_exiting(self, unfinished: Iterable[Sequence]) -> None:
        self._log(self._run, self._clock(), final=True)

    def _log(self, window: _Window, now: float, *, final: bool = False) -> None:
        done, load = self._totals.since(window.before), self._load
        wall = done.prefill_seconds + done.decode_seconds
        seconds = now - window.began
        per = max(wall if final else seconds, 1e-9)  # a run's rates leave out the time without work
        events.engine_statistics.log(
            logger,
            in_summary=not final or wall >= self._interval,
            prompt_tokens_per_second=done.num_prompt_tokens / per,
            generation_tokens_per_second=done.num_output_tokens / per,
            num_running=load.num_running,
            num_waiting=load.num_waiting,
            kv_cache_usage=load.used_blocks / load.num_blocks,
            prefix_cache_hit_rate=done.num_prefix_hits / max(done.num_prefix_queries, 1),
            preemptions=done.num_preemptions,
            final=final,
            seconds=seconds,
            num_steps=done.num_steps,
            num_prompt_tokens=done.num_prompt_tokens,
            num_output_tokens=done.num_output_tokens,
            num_prefix_queries=done.num_prefix_queries,
            num_prefix_hits=done.num_prefix_hits,
            num_blocks=load.num_blocks,
            wall_s=wall,
            **window.fields(),
        )
        if done.num_drafts:
            events.speculation_statistics.log(
                logger,
                in_summary=not final or wall >= self._interval,
                num_drafts=done.num_drafts,
                num_draft_tokens=done.num_draft_tokens,
                num_accepted_tokens=done.num_accepted_tokens,
                acceptance_rate=done.num_accepted_tokens / done.num_draft_tokens,
                mean_acceptance_length=1 + done.num_accepted_tokens / done.num_drafts,
                final=final,
            )
