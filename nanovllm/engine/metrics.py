"""What an engine counts: totals, and distributions of latencies.

The statistics line, the progress bar and benchmarks take their figures from here. `EngineMetrics` does not depend on
how they are shown.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

from nanovllm.engine.batch import ScheduledBatch
from nanovllm.engine.observer import CollectedStep, EngineObserver, Preemption
from nanovllm.engine.sequence import Sequence
from nanovllm.engine.statistics import EngineStatistics

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)


class Histogram:
    """Counts values by upper bound, as Prometheus does; the last of `counts` is for values above all bounds."""

    def __init__(self, bounds: Seq[float] = _SECONDS) -> None:
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(self.bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float | None) -> None:
        """Counts a value. None, for something that did not happen, is ignored."""
        if value is not None:
            self.counts[bisect.bisect_left(self.bounds, value)] += 1
            self.sum += value

    @property
    def count(self) -> int:
        return sum(self.counts)


@dataclass
class EngineMetrics(EngineObserver):
    """Counters and histograms (in seconds) of one engine. Its gauges are the scheduler's `load`."""

    totals: EngineStatistics = field(default_factory=EngineStatistics)
    num_finished: dict[str, int] = field(default_factory=dict)  # by finish reason
    queue_time: Histogram = field(default_factory=Histogram)
    time_to_first_token: Histogram = field(default_factory=Histogram)
    inter_token_latency: Histogram = field(default_factory=Histogram)  # a request's mean
    end_to_end: Histogram = field(default_factory=Histogram)
    _last_collected: float = 0.0

    def sequence_scheduled(self, sequence: Sequence, num_cached: int) -> None:
        self.totals.num_prefix_queries += len(sequence.token_ids)
        self.totals.num_prefix_hits += num_cached

    def sequence_preempted(self, sequence: Sequence, preemption: Preemption) -> None:
        self.totals.num_preemptions += 1

    def step_submitted(self, batch: ScheduledBatch, now: float, num_in_flight: int) -> None:
        if not num_in_flight:  # the engine was idle, and idle time belongs to no step
            self._last_collected = now

    def step_collected(self, step: CollectedStep) -> None:
        elapsed, self._last_collected = step.collected - self._last_collected, step.collected
        totals, batch = self.totals, step.batch
        totals.num_steps += 1
        totals.num_prompt_tokens += batch.num_prefill_tokens
        totals.num_output_tokens += len(batch.sampled_rows)
        if len(batch.chunks):
            totals.prefill_seconds += elapsed
        else:
            totals.decode_seconds += elapsed

    def first_token(self, sequence: Sequence) -> None:
        if sequence.first_token is not None:
            self.time_to_first_token.observe(sequence.first_token - sequence.arrival)

    def sequence_finished(self, sequence: Sequence) -> None:
        metrics, reason = sequence.metrics(), str(sequence.finish_reason)
        self.num_finished[reason] = self.num_finished.get(reason, 0) + 1
        self.queue_time.observe(metrics.queue_time)
        self.inter_token_latency.observe(metrics.inter_token_latency)
        self.end_to_end.observe(metrics.end_to_end)
