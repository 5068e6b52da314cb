"""Measures what single settings do to throughput, latency and memory: `python tools/measure_settings.py`.

64 requests of 16-256 tokens in and out (bench.py's "mixed"), which arrive together, on the checkpoint that ships,
once for each setting; docs/choosing-settings.md discusses the table. Other models: --model, --load-format, --device.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from nanovllm import LLM, SamplingParams
from nanovllm.benchmarks.workloads import WORKLOADS, Requests

# What is changed, each alone, against the defaults. The cache of the last ones is too small for all requests at once.
SETTINGS: tuple[dict[str, Any], ...] = (
    {},
    {"max_num_seqs": 1},
    {"max_num_seqs": 4},
    {"max_num_seqs": 16},
    {"max_num_seqs": 32},
    {"max_prefill_tokens_beside_decode": 64},
    {"max_num_batched_tokens": 512},
    {"pipeline_depth": 2},
    {"kvcache_block_size": 64},
    {"dtype": "bfloat16"},
    {"kv_cache_dtype": "fp8"},
    {"enable_prefix_caching": False},
    {"num_kvcache_blocks": 512},
    {"num_kvcache_blocks": 256},
    {"num_kvcache_blocks": 256, "max_num_seqs": 16},
)


@dataclass(frozen=True)
class Measured:
    """One run. Times in seconds, medians over its requests."""

    seconds: float
    first_token: float
    between_tokens: float
    preemptions: int
    peak_blocks: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--load-format", default="auto", choices=("auto", "dummy"))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--workload", default="mixed", choices=list(WORKLOADS))
    parser.add_argument("--num-seqs", type=int, help="requests, instead of the workload's own number")
    parser.add_argument("--runs", type=int, default=3, help="counted runs of each setting (default 3)")
    parser.add_argument("--only", nargs="*", metavar="NAME", help="settings with one of these names, and the defaults")
    args = parser.parse_args()
    os.environ.setdefault("NANOVLLM_LOG_LEVEL", "WARNING")
    workload = WORKLOADS[args.workload]
    columns = f"{'tokens/s':>9}{'spread':>8}{'first, ms':>11}{'between, ms':>13}{'preempted':>11}{'cache MB':>10}"
    print(f"{'setting':<46}{columns}")
    for setting in SETTINGS:
        if setting and args.only is not None and not setting.keys() & set(args.only):
            continue
        options = {"max_num_seqs": 64, "max_model_len": workload.longest, "device": args.device, **setting}
        with LLM(args.model, load_format=args.load_format, skip_tokenizer_init=True, **options) as llm:
            requests = workload.draw(args.num_seqs or workload.num_seqs, llm.llm_engine.resolved.vocab_size, seed=0)
            runs = [run(llm, requests) for _ in range(args.runs + 1)][1:]
            block_bytes = llm.memory_report().kv_cache // (llm.llm_engine.resolved.num_blocks + 1)
        name = ", ".join(f"{key}={value!r}" for key, value in setting.items()) or "defaults, max_num_seqs=64"
        print(line(name, runs, requests.num_output_tokens, block_bytes), flush=True)


def run(llm: LLM, requests: Requests) -> Measured:
    engine = llm.llm_engine
    params = [SamplingParams(temperature=0.6, max_tokens=count, ignore_eos=True) for count in requests.output_lens]
    llm.reset_prefix_cache()
    before = engine.statistics.copy()
    ids = [
        engine.add_request(f"{time.monotonic_ns()}", *request) for request in zip(requests.prompts, params, strict=True)
    ]
    outputs, peak_blocks = [], 0
    started = time.perf_counter()
    while engine.has_unfinished_requests():
        outputs += engine.step()
        peak_blocks = max(peak_blocks, engine.scheduler.load.used_blocks)
    seconds = time.perf_counter() - started
    assert len(outputs) == len(ids)
    metrics = [output.metrics for output in outputs]
    return Measured(
        seconds,
        statistics.median(entry.time_to_first_token or 0.0 for entry in metrics),
        statistics.median(entry.inter_token_latency or 0.0 for entry in metrics),
        engine.statistics.since(before).num_preemptions,
        peak_blocks,
    )


def line(name: str, runs: list[Measured], num_tokens: int, block_bytes: int) -> str:
    seconds = [entry.seconds for entry in runs]
    median = statistics.median(seconds)
    first, between = (
        1e3 * statistics.median(getattr(entry, field) for entry in runs) for field in ("first_token", "between_tokens")
    )
    peak = max(entry.peak_blocks for entry in runs) * block_bytes / 1e6
    return (
        f"{name:<46}{num_tokens / median:>9,.0f}{(max(seconds) - min(seconds)) / median:>8.1%}{first:>11.0f}"
        f"{between:>13.1f}{runs[-1].preemptions:>11}{peak:>10.1f}"
    )


if __name__ == "__main__":
    main()
