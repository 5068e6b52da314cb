"""The metrics of an engine as plain values, under the names that vLLM's dashboards read.

    for metric in llm.get_metrics():
        if isinstance(metric, Counter):
            print(metric.name, metric.labels, metric.value)

`MetricsSnapshot` holds the figures of one or several engines. It crosses a process border as numbers (`to_numbers`,
`from_numbers`), and the sum of two snapshots describes both engines.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import accumulate, zip_longest
from typing import Any

__all__ = ["Counter", "Distribution", "Gauge", "Histogram", "Metric", "MetricsSnapshot", "Vector"]


@dataclass(frozen=True)
class Metric:
    """A metric with its labels, such as {"model_name": "tiny"}."""

    name: str
    labels: dict[str, str]


@dataclass(frozen=True)
class Counter(Metric):
    """A number that only grows."""

    value: int


@dataclass(frozen=True)
class Vector(Metric):
    """Several counters that belong together, by index."""

    values: list[int]


@dataclass(frozen=True)
class Gauge(Metric):
    """A number that goes up and down."""

    value: float


@dataclass(frozen=True)
class Histogram(Metric):
    """A distribution. buckets: for each upper bound as text, "+Inf" the last, how many values are at most that."""

    count: int
    sum: float
    buckets: dict[str, int]


@dataclass(frozen=True)
class Distribution:
    """How many values lie between bounds. The last of `counts` is for values above all bounds."""

    bounds: tuple[float, ...]
    counts: tuple[int, ...]
    sum: float

    @property
    def count(self) -> int:
        return sum(self.counts)

    def __add__(self, other: Distribution) -> Distribution:
        assert self.bounds == other.bounds, "distributions of one name have the same bounds"
        counts = tuple(ours + theirs for ours, theirs in zip(self.counts, other.counts, strict=True))
        return Distribution(self.bounds, counts, self.sum + other.sum)


@dataclass(frozen=True)
class MetricsSnapshot:
    """The figures of one engine, or the sums over several, at one moment.

    finished: requests that ended, by "stop", "length", "abort" and "error". accepted_per_position: drafted tokens that
    were right, by their place in the draft; empty without speculative decoding. distributions: by vLLM's name without
    the prefix; times in seconds. Times per request are those of the completion that ended last.
    """

    num_running: int = 0
    num_waiting: int = 0
    used_blocks: int = 0
    num_blocks: int = 0
    block_size: int = 0
    prompt_tokens: int = 0  # computed, including those computed again after a preemption
    generation_tokens: int = 0
    preemptions: int = 0
    prefix_cache_queries: int = 0  # tokens
    prefix_cache_hits: int = 0
    num_drafts: int = 0  # how often a step had a draft of a sequence
    draft_tokens: int = 0
    accepted_tokens: int = 0  # of those, right
    accepted_per_position: tuple[int, ...] = ()
    finished: Mapping[str, int] = field(default_factory=dict)
    distributions: Mapping[str, Distribution] = field(default_factory=dict)

    @property
    def kv_cache_usage(self) -> float:
        """The share of the KV blocks in use, 0 to 1."""
        return self.used_blocks / max(self.num_blocks, 1)

    def __add__(self, other: MetricsSnapshot) -> MetricsSnapshot:
        sums = {name: getattr(self, name) + getattr(other, name) for name in _NUMBERS}
        reasons = dict.fromkeys([*self.finished, *other.finished])
        names = dict.fromkeys([*self.distributions, *other.distributions])
        return MetricsSnapshot(
            **sums,
            block_size=self.block_size or other.block_size,
            accepted_per_position=tuple(
                map(sum, zip_longest(self.accepted_per_position, other.accepted_per_position, fillvalue=0))
            ),
            finished={reason: self.finished.get(reason, 0) + other.finished.get(reason, 0) for reason in reasons},
            distributions={name: _sum(self.distributions.get(name), other.distributions.get(name)) for name in names},
        )

    def to_numbers(self) -> dict[str, Any]:
        """Returns the figures as dictionaries, lists and numbers, which JSON and msgpack carry."""
        return {
            **{name: getattr(self, name) for name in (*_NUMBERS, "block_size")},
            "accepted_per_position": list(self.accepted_per_position),
            "finished": dict(self.finished),
            "distributions": {
                name: [list(each.bounds), list(each.counts), each.sum] for name, each in self.distributions.items()
            },
        }

    @classmethod
    def from_numbers(cls, numbers: Mapping[str, Any]) -> MetricsSnapshot:
        """Returns the snapshot whose `to_numbers` returned `numbers`."""
        distributions = {
            name: Distribution(tuple(bounds), tuple(counts), total)
            for name, (bounds, counts, total) in numbers["distributions"].items()
        }
        accepted = tuple(numbers["accepted_per_position"])
        return cls(**{**numbers, "accepted_per_position": accepted, "distributions": distributions})

    def metrics(self, **labels: str) -> list[Metric]:
        """Returns the figures as vLLM's list, each with `labels`."""
        values: list[Metric] = [
            Gauge("vllm:num_requests_running", labels, self.num_running),
            Gauge("vllm:num_requests_waiting", labels, self.num_waiting),
            Gauge("vllm:kv_cache_usage_perc", labels, self.kv_cache_usage),
            Gauge("vllm:cache_config_info", labels | self._cache_labels(), 1.0),
            Counter("vllm:prompt_tokens", labels, self.prompt_tokens),
            Counter("vllm:generation_tokens", labels, self.generation_tokens),
            Counter("vllm:num_preemptions", labels, self.preemptions),
            Counter("vllm:prefix_cache_queries", labels, self.prefix_cache_queries),
            Counter("vllm:prefix_cache_hits", labels, self.prefix_cache_hits),
        ]
        values += [
            Counter("vllm:request_success", {**labels, "finished_reason": reason}, count)
            for reason, count in self.finished.items()
        ]
        if self.accepted_per_position:
            values += [
                Counter("vllm:spec_decode_num_drafts", labels, self.num_drafts),
                Counter("vllm:spec_decode_num_draft_tokens", labels, self.draft_tokens),
                Counter("vllm:spec_decode_num_accepted_tokens", labels, self.accepted_tokens),
            ]
            values += [
                Counter("vllm:spec_decode_num_accepted_tokens_per_pos", {**labels, "position": str(position)}, count)
                for position, count in enumerate(self.accepted_per_position)
            ]
        for name, each in self.distributions.items():
            bounds = [*map(str, each.bounds), "+Inf"]
            buckets = dict(zip(bounds, accumulate(each.counts), strict=True))
            values.append(Histogram(f"vllm:{name}", labels, each.count, each.sum, buckets))
        return values

    def _cache_labels(self) -> dict[str, str]:
        return {"block_size": str(self.block_size), "num_gpu_blocks": str(self.num_blocks)}


_NUMBERS = (
    "num_running",
    "num_waiting",
    "used_blocks",
    "num_blocks",
    "prompt_tokens",
    "generation_tokens",
    "preemptions",
    "prefix_cache_queries",
    "prefix_cache_hits",
    "num_drafts",
    "draft_tokens",
    "accepted_tokens",
)


def _sum(first: Distribution | None, second: Distribution | None) -> Distribution:
    known = [each for each in (first, second) if each is not None]
    return known[0] if len(known) == 1 else known[0] + known[1]
