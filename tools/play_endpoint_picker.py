"""Plays the endpoint picker of the Gateway API inference extension: `python tools/play_endpoint_picker.py URL URL …`.

For each request it scrapes the metrics that the extension's model server protocol asks for, scores the ready servers by
queue, KV cache and the prefixes that they were sent, as the default picker does, and sends the request to the best one.
Ends with status 1 if a server lacks a metric, and names it. Needs the extra `dev`.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import httpx2
from prometheus_client.parser import text_string_to_metric_families

REQUIRED = ("vllm:num_requests_waiting", "vllm:num_requests_running", "vllm:kv_cache_usage_perc")
INFO = "vllm:cache_config_info"
LABELS = ("block_size", "num_gpu_blocks")
QUEUE, CACHE, PREFIX = 2, 2, 3  # the default picker's weights
PREFIX_CHARACTERS = 256


class MissingMetric(Exception):
    """A server does not offer what the protocol asks for."""


@dataclass
class Endpoint:
    """A server, as the picker sees it."""

    url: str
    is_ready: bool = False
    gauges: dict[str, float] = field(default_factory=dict)
    prefixes: set[str] = field(default_factory=set)  # that it was sent

    def scrape(self, client: httpx2.Client) -> None:
        """Reads readiness and metrics. Raises MissingMetric."""
        self.is_ready = client.get(f"{self.url}/health").status_code == 200
        if self.is_ready:
            self.gauges = read_gauges(client.get(f"{self.url}/metrics").text)


def read_gauges(text: str) -> dict[str, float]:
    """Returns the required gauges of a server with one engine. Raises MissingMetric."""
    families = {family.name: family for family in text_string_to_metric_families(text)}
    for name in (*REQUIRED, INFO):
        if name not in families or families[name].type != "gauge" or len(families[name].samples) != 1:
            raise MissingMetric(f"{name}: not a gauge with one value")
    for label in LABELS:
        if not families[INFO].samples[0].labels.get(label, "").isdigit():
            raise MissingMetric(f"{INFO}: no number in the label {label}")
    return {name: families[name].samples[0].value for name in REQUIRED}


def pick(endpoints: list[Endpoint], prompt: str) -> Endpoint:
    """Returns the ready endpoint with the highest score, the first one among equals."""
    ready = [each for each in endpoints if each.is_ready]
    if not ready:
        raise MissingMetric("no server is ready")
    waiting = {each.url: each.gauges["vllm:num_requests_waiting"] for each in ready}
    low, high = min(waiting.values()), max(waiting.values())

    def score(each: Endpoint) -> float:
        queue = 1.0 if high == low else (high - waiting[each.url]) / (high - low)
        has_prefix = prompt[:PREFIX_CHARACTERS] in each.prefixes
        return QUEUE * queue + CACHE * (1 - each.gauges["vllm:kv_cache_usage_perc"]) + PREFIX * has_prefix

    return max(ready, key=score)


def play(urls: list[str], prompts: list[str], max_tokens: int, at_once: int) -> Counter[str]:
    """Sends the prompts, `at_once` at the same time, and returns how many each server has answered."""
    endpoints = [Endpoint(url.rstrip("/")) for url in urls]
    answered: Counter[str] = Counter()
    with httpx2.Client(timeout=300, trust_env=False) as client, ThreadPoolExecutor(at_once) as pool:

        def send(endpoint: Endpoint, prompt: str) -> None:
            body = {"prompt": prompt, "max_tokens": max_tokens, "ignore_eos": True}
            client.post(f"{endpoint.url}/v1/completions", json=body).raise_for_status()
            answered[endpoint.url] += 1

        sent = []
        for prompt in prompts:
            for endpoint in endpoints:
                endpoint.scrape(client)
            chosen = pick(endpoints, prompt)
            chosen.prefixes.add(prompt[:PREFIX_CHARACTERS])
            sent.append(pool.submit(send, chosen, prompt))
        for each in sent:
            each.result()
    return answered


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("urls", nargs="+", metavar="URL", help="address of a server, such as http://127.0.0.1:8000")
    parser.add_argument("--requests", type=int, default=40)
    parser.add_argument("--prefixes", type=int, default=4, help="different beginnings of prompts")
    parser.add_argument("--max-tokens", type=int, default=32)
    parser.add_argument("--at-once", type=int, default=8)
    args = parser.parse_args()
    beginnings = [f"count from {number} to 99, " * 24 for number in range(args.prefixes)]
    prompts = [f"{beginnings[index % len(beginnings)]}then stop at {index}" for index in range(args.requests)]
    try:
        answered = play(args.urls, prompts, args.max_tokens, args.at_once)
    except MissingMetric as error:
        print(f"play_endpoint_picker: {error}", file=sys.stderr)
        return 1
    for url in args.urls:
        print(f"{answered[url.rstrip('/')]:6d} of {args.requests} requests   {url}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
