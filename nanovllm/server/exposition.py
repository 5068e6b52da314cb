"""exposition: metrics as text in Prometheus' format."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
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
                family = families.setdefault(name, HistogramMetricFamily(name, name, labels=labels))
                family.add_metric(values, list(metric.buckets.items()), metric.sum)
            elif isinstance(metric, (Counter, Gauge)):
                kind = CounterMetricFamily if isinstance(metric, Counter) else GaugeMetricFamily
                family = families.setdefault(name, kind(name, name, labels=labels))
                family.add_metric(values, metric.value)
        yield from families.values()
