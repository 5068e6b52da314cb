"""What an engine counts: totals, and distributions of times and sizes.

`LLM.get_metrics`, `AsyncLLM.metrics`, the statistics line, the progress bar and benchmarks take their figures from
here. `EngineMetrics` does not depend on how they are shown.
"""

from __future__ import annotations

import bisect
from collections.abc import Mapping
from collections.abc import Sequence as Seq

import numpy as np
import numpy.typing as npt

from nanovllm.config import EngineConfig, ResolvedConfig
from nanovllm.engine.batch import ScheduledBatch
from nanovllm.engine.observer import CollectedStep, EngineObserver, Preemption, SampledStep, VerifiedDrafts
from nanovllm.engine.request_end import FINISHED_REASON, RequestEnd
from nanovllm.engine.sequence import Sequence
from nanovllm.engine.statistics import EngineStatistics, Load
from nanovllm.metrics import Distribution, MetricsSnapshot
from nanovllm.speculative_config import SpeculativeConfig

# Upper bounds: in seconds, and in tokens. Snapshots of different engines are added, so all have the same.
_SECONDS = tuple(digit * 10.0**power for power in range(-3, 4) for digit in (1, 2.5, 5))
_GAP_MS = (0.5, 1, 2, 3, 4, 5, 7.5, 10, 15, 20, 25, 30, 40, 50, 75, 100, 150, 200, 300, 400, 500, 750)
_GAP_SECONDS = (*(ms / 1000 for ms in _GAP_MS), 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0)
_TOKENS = tuple(float(digit * 10**power) for power in range(6) for digit in (1, 2, 5))
_BOUNDS: Mapping[str, Seq[float]] = {  # by vLLM's name of the metric; times in seconds
    "time_to_first_token_seconds": _SECONDS,
    "inter_token_latency_seconds": _GAP_SECONDS,  # each gap
    "request_time_per_output_token_seconds": _GAP_SECONDS,  # the mean gap of a request
    "e2e_request_latency_seconds": _SECONDS,
    "request_queue_time_seconds": _SECONDS,
    "request_prefill_time_seconds": _SECONDS,  # from the first step to the first token, with preemptions
    "request_decode_time_seconds": _SECONDS,  # from the first token to the end, with preemptions
    "request_inference_time_seconds": _SECONDS,  # both
    "request_prompt_tokens": _TOKENS,
    "request_generation_tokens": _TOKENS,
    "iteration_tokens_total": (1.0, *(8.0 * 2**power for power in range(13))),  # of a step
}


class DistributionCounter:
    """Counts values by upper bound, as Prometheus does; the last of `counts` is for values above all bounds."""

    def __init__(self, bounds: Seq[float]) -> None:
        self._bounds = tuple(bounds)
        self._bounds_array = np.array(bounds)
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float | None) -> None:
        """Counts a value. None, for something that did not happen, is ignored."""
        if value is not None:
            self.counts[bisect.bisect_left(self._bounds, value)] += 1
            self.sum += value

    def observe_all(self, values: npt.NDArray[np.float64]) -> None:
        """Counts each of `values`, which are often equal."""
        if len(values) and not np.count_nonzero(values != values[0]):
            self.counts[bisect.bisect_left(self._bounds, values[0])] += len(values)
            self.sum += float(values[0]) * len(values)
            return
        new = np.bincount(self._bounds_array.searchsorted(values), minlength=len(self.counts))
        self.counts = [count + added for count, added in zip(self.counts, new.tolist(), strict=True)]
        self.sum += float(values.sum())

    @property
    def count(self) -> int:
        return sum(self.counts)

    def snapshot(self) -> Distribution:
        return Distribution(self._bounds, tuple(self.counts), self.sum)


class EngineMetrics(EngineObserver):
    """Counters and distributions of one engine. Its gauges are the scheduler's `load`."""

    def __init__(self) -> None:
        self.totals = EngineStatistics()
        self.num_generated = 0  # tokens that requests got
        self.num_finished = dict.fromkeys(FINISHED_REASON.values(), 0)
        self.distributions = {name: DistributionCounter(bounds) for name, bounds in _BOUNDS.items()}
        self.accepted_per_position: list[int] = []  # drafted tokens found to be right, by their place in the draft
        self._block_size = 0
        self._last_collected = 0.0

    def engine_starting(self, config: EngineConfig) -> None:
        speculative = SpeculativeConfig.of(config.speculative_config)
        self.accepted_per_position = [] if speculative is None else [0] * speculative.max_draft

    def engine_resolved(self, resolved: ResolvedConfig) -> None:
        self._block_size = resolved.block_size

    def snapshot(self, load: Load) -> MetricsSnapshot:
        """Returns the figures of this moment. Any thread may call it."""
        totals = self.totals
        return MetricsSnapshot(
            num_running=load.num_running,
            num_waiting=load.num_waiting,
            used_blocks=load.used_blocks,
            num_blocks=load.num_blocks,
            block_size=self._block_size,
            prompt_tokens=totals.num_prompt_tokens,
            generation_tokens=self.num_generated,
            preemptions=totals.num_preemptions,
            prefix_cache_queries=totals.num_prefix_queries,
            prefix_cache_hits=totals.num_prefix_hits,
            num_drafts=totals.num_drafts,
            draft_tokens=totals.num_draft_tokens,
            accepted_tokens=totals.num_accepted_tokens,
            accepted_per_position=tuple(self.accepted_per_position),
            finished=dict(self.num_finished),
            distributions={name: counter.snapshot() for name, counter in self.distributions.items()},
        )

    def sequence_scheduled(self, sequence: Sequence, num_cached: int) -> None:
        self.totals.num_prefix_queries += len(sequence.token_ids)
        self.totals.num_prefix_hits += num_cached

    def sequence_preempted(self, sequence: Sequence, preemption: Preemption) -> None:
        self.totals.num_preemptions += 1

    def step_submitted(self, batch: ScheduledBatch, now: float, num_in_flight: int) -> None:
        if not num_in_flight:  # the engine was idle, and idle time belongs to no step
            self._last_collected = now

    def tokens_sampled(self, step: SampledStep) -> None:
        self.num_generated += len(step.sampled)
        self.distributions["iteration_tokens_total"].observe(step.batch.num_tokens)
        gaps = step.gaps if not len(step.batch.chunks) else step.gaps[step.gaps >= 0]  # without first tokens
        self.distributions["inter_token_latency_seconds"].observe_all(gaps)

    def drafts_verified(self, drafts: VerifiedDrafts) -> None:
        totals, gained = self.totals, sum(number for _, number in drafts.gained)
        totals.num_drafts += len(drafts.num_drafted)
        totals.num_draft_tokens += sum(drafts.num_drafted)
        totals.num_accepted_tokens += sum(drafts.num_accepted)
        totals.num_output_tokens += gained
        self.num_generated += gained
        for number in drafts.num_accepted:
            for position in range(number):
                self.accepted_per_position[position] += 1

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
        is_first = sequence.parent_id is None or sequence.request_id == f"{sequence.parent_id}/0"
        if is_first and sequence.first_token is not None:
            self.distributions["time_to_first_token_seconds"].observe(sequence.first_token - sequence.arrival)

    def request_finished(self, end: RequestEnd) -> None:
        self.num_finished[FINISHED_REASON[end.cause]] += 1
        last = end.last
        if last is None:
            return
        end_to_end, times = end.end_to_end, last.times
        values: dict[str, float | None] = {
            "e2e_request_latency_seconds": end_to_end,
            "request_prompt_tokens": end.num_prompt_tokens,
            "request_generation_tokens": end.num_output_tokens,
            "request_time_per_output_token_seconds": end.inter_token_latency,
        }
        if last.first_step is not None:
            values["request_queue_time_seconds"] = times.queue
            values["request_inference_time_seconds"] = end_to_end - times.queue
        if times.to_first_token is not None:
            values["request_prefill_time_seconds"] = times.to_first_token - times.queue
            values["request_decode_time_seconds"] = end_to_end - times.to_first_token
        for name, value in values.items():
            self.distributions[name].observe(value)
