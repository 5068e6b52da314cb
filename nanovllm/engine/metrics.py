"""What an engine counts: totals, and distributions of latencies. The source of every figure that it reports.

The statistics line, the progress bar and benchmarks read this, and a server's /metrics would. Nothing here knows how
it is shown, and nothing is computed before somebody asks.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field, fields

from nanovllm.logs import events
from nanovllm.outputs import RequestMetrics
from nanovllm.utils.logger import setup_logger

logger = setup_logger(__name__)

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)


@dataclass
class EngineStatistics:
    """Totals since the engine started. Times are wall time in seconds, each step's under what it ran."""

    num_steps: int = 0
    num_prompt_tokens: int = 0  # computed in prefill, those computed again after a preemption included
    num_output_tokens: int = 0  # sampled; with several steps in flight, those dropped after an end included
    prefill_seconds: float = 0.0  # steps with at least one prefill chunk
    decode_seconds: float = 0.0  # all others
    num_preemptions: int = 0
    num_prefix_queries: int = 0  # prompt tokens looked for in the prefix cache
    num_prefix_hits: int = 0  # of those, found

    def since(self, earlier: EngineStatistics) -> EngineStatistics:
        return EngineStatistics(*(getattr(self, f.name) - getattr(earlier, f.name) for f in fields(self)))

    def copy(self) -> EngineStatistics:
        return self.since(EngineStatistics())


class Histogram:
    """How often a value was at most each bound, in the form of Prometheus: `counts` has one more, for the rest."""

    def __init__(self, bounds: Seq[float] = _SECONDS) -> None:
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(self.bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect.bisect_left(self.bounds, value)] += 1
        self.sum += value

    @property
    def count(self) -> int:
        return sum(self.counts)


@dataclass
class EngineMetrics:
    """Counters and histograms (of seconds) of one engine; its gauges are the scheduler's properties."""

    totals: EngineStatistics = field(default_factory=EngineStatistics)
    num_finished: dict[str, int] = field(default_factory=dict)  # by finish reason
    queue_time: Histogram = field(default_factory=Histogram)
    time_to_first_token: Histogram = field(default_factory=Histogram)
    inter_token_latency: Histogram = field(default_factory=Histogram)  # a request's mean
    end_to_end: Histogram = field(default_factory=Histogram)

    def finish(self, reason: str, request: RequestMetrics) -> None:
        """Counts a request that has ended."""
        self.num_finished[reason] = self.num_finished.get(reason, 0) + 1
        for histogram, value in (
            (self.queue_time, request.queue_time),
            (self.time_to_first_token, request.time_to_first_token),
            (self.inter_token_latency, request.inter_token_latency),
            (self.end_to_end, request.end_to_end),
        ):
            if value is not None:
                histogram.observe(value)


@dataclass(frozen=True)
class Load:
    """How busy the engine is at one moment."""

    num_running: int
    num_waiting: int
    used_blocks: int
    num_blocks: int


class StatisticsLine:
    """A line at INFO every `interval` seconds while there is work, with rates over that time."""

    def __init__(self, interval: float, totals: EngineStatistics) -> None:
        self._interval = interval
        self._totals = totals
        self.start(0.0)

    def start(self, now: float) -> None:
        """Work begins after idle time, which belongs to no interval. now: monotonic seconds."""
        self._began = now
        self._before = self._totals.copy()

    def is_due(self, now: float) -> bool:
        return now - self._began >= self._interval

    def log(self, now: float, load: Load) -> None:
        done, seconds = self._totals.since(self._before), now - self._began
        self.start(now)
        events.engine_statistics.log(
            logger,
            prompt_tokens_per_second=done.num_prompt_tokens / seconds,
            generation_tokens_per_second=done.num_output_tokens / seconds,
            num_running=load.num_running,
            num_waiting=load.num_waiting,
            kv_cache_usage=load.used_blocks / load.num_blocks,
            prefix_cache_hit_rate=done.num_prefix_hits / max(done.num_prefix_queries, 1),
            preemptions=done.num_preemptions,
        )
