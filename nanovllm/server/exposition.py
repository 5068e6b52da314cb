"""exposition: metrics as text in Prometheus' format."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from prometheus_client.core import (
    CollectorRegistry,
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
)
from prometheus_client.core import Metric as MetricFamily
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import Collector

from nanovllm.metrics import Counter, Gauge, Histogram, Metric

CONTENT_TYPE = CONTENT_TYPE_LATEST

# What each metric is, and its unit: the HELP lines, and the table in docs/monitoring.md.
HELP: Mapping[str, str] = {
    "vllm:num_requests_running": "Number of requests that are running.",
    "vllm:num_requests_waiting": "Number of requests that wait in the queue. Above zero for long: the engine is full.",
    "vllm:kv_cache_usage_perc": "Fraction of the KV cache in use, from 0 to 1.",
    "vllm:cache_config_info": "Always 1. The labels are the tokens in a block and the number of blocks.",
    "vllm:prompt_tokens": "Number of prompt tokens computed, those computed again after a preemption included.",
    "vllm:generation_tokens": "Number of tokens generated.",
    "vllm:num_preemptions": "Number of times that a running request gave its blocks back, to be computed again.",
    "vllm:prefix_cache_queries": "Number of tokens looked up in the prefix cache.",
    "vllm:prefix_cache_hits": "Number of tokens found in the prefix cache.",
    "vllm:request_success": "Number of requests that ended, by finished_reason: stop, length, abort (aborted, or the "
    "client left) or error (refused or failed).",
    "vllm:time_to_first_token_seconds": "Seconds from the arrival of a request to its first token.",
    "vllm:inter_token_latency_seconds": "Seconds between two tokens of a request, one value for each gap.",
    "vllm:request_time_per_output_token_seconds": "Mean seconds between two tokens of a request, one value for each "
    "request.",
    "vllm:e2e_request_latency_seconds": "Seconds from the arrival of a request to its end.",
    "vllm:request_queue_time_seconds": "Seconds that a request waited before its first step.",
    "vllm:request_prefill_time_seconds": "Seconds from the first step of a request to its first token.",
    "vllm:request_decode_time_seconds": "Seconds from the first token of a request to its end.",
    "vllm:request_inference_time_seconds": "Seconds from the first step of a request to its end.",
    "vllm:request_prompt_tokens": "Number of prompt tokens of a request.",
    "vllm:request_generation_tokens": "Number of tokens that a request generated.",
    "vllm:iteration_tokens_total": "Number of tokens computed in a step.",
    "vllm:spec_decode_num_drafts": "Number of drafts computed. This metric and the next three exist only with "
    "speculative decoding.",
    "vllm:spec_decode_num_draft_tokens": "Number of tokens drafted.",
    "vllm:spec_decode_num_accepted_tokens": "Number of drafted tokens that were right.",
    "vllm:spec_decode_num_accepted_tokens_per_pos": "Number of drafted tokens that were right, by position in the "
    "draft, from 0.",
}


def exposition(metrics: Iterable[Metric]) -> bytes:
    """Returns the metrics as text. Metrics of one name differ in their labels."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Collector(metrics))
    return generate_latest(registry)


class _Collector(Collector):
    def __init__(self, metrics: Iterable[Metric]) -> None:
        self._metrics = metrics

    def collect(self) -> Iterator[MetricFamily]:
        families: dict[str, Any] = {}  # each kind has an `add_metric` of its own
        for metric in self._metrics:
            name, labels, values = metric.name, list(metric.labels), list(metric.labels.values())
            if isinstance(metric, Histogram):
                family = families.setdefault(name, HistogramMetricFamily(name, HELP[name], labels=labels))
                family.add_metric(values, list(metric.buckets.items()), metric.sum)
            elif isinstance(metric, (Counter, Gauge)):
                kind = CounterMetricFamily if isinstance(metric, Counter) else GaugeMetricFamily
                family = families.setdefault(name, kind(name, HELP[name], labels=labels))
                family.add_metric(values, metric.value)
        yield from families.values()
