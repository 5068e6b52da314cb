"""Prints every metric of the engine after a few requests."""

import sys

from vllm import LLM, SamplingParams
from vllm.v1.metrics.reader import Counter, Gauge, Histogram, Vector


def show(metric):
    if isinstance(metric, Gauge):
        print("gauge", metric.name, metric.value)
    elif isinstance(metric, Counter):
        print("counter", metric.name, metric.value)
    elif isinstance(metric, Vector):
        print("vector", metric.name, metric.values)
    elif isinstance(metric, Histogram):
        print("histogram", metric.name, metric.count, round(metric.sum, 3), len(metric.buckets))


def main():
    llm = LLM(model=sys.argv[1], disable_log_stats=False)
    llm.generate(["count from 3 to 9", "introduce yourself"], SamplingParams(max_tokens=8, ignore_eos=True))
    for metric in llm.get_metrics():
        show(metric)


if __name__ == "__main__":
    main()
