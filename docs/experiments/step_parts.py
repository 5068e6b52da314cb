"""Clocks the parts of a decode step of one request, to find out why one process takes longer than the next.

    for core in 0 5 10; do taskset -c $core python docs/experiments/step_parts.py --model qwen3-0.6b; done

Prints where the process runs, then of each part the 10th percentile, the median and the 90th, in microseconds. A part
contains those that are indented below it.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from nanovllm import LLM, SamplingParams
from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.engine.model_runner import ModelRunner
from nanovllm.engine.scheduler import Scheduler
from nanovllm.runner import step_handle
from nanovllm.runner.cuda_graph import DecodeGraphs
from nanovllm.runner.device_batch import BatchUploads

PARTS: dict[str, tuple[Any, str]] = {
    "step": (LLMEngine, "_step"),
    "  plan": (Scheduler, "schedule"),
    "  launch": (ModelRunner, "launch"),
    "    upload": (BatchUploads, "upload"),
    "    run": (ModelRunner, "_run"),
    "      replay, with copying rows": (DecodeGraphs, "replay"),
    "        CUDAGraph.replay": (torch.cuda.CUDAGraph, "replay"),
    "    download": (ModelRunner, "_download"),
    "  wait": (step_handle, "wait_for"),
    "  update": (Scheduler, "update"),
}


def clock(place: Any, name: str) -> list[float]:
    times: list[float] = []
    function = getattr(place, name)

    def timed(*given: Any, **named: Any) -> Any:
        began = time.perf_counter()
        try:
            return function(*given, **named)
        finally:
            times.append((time.perf_counter() - began) * 1e6)

    setattr(place, name, timed)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="qwen3-0.6b")
    parser.add_argument("--tokens", type=int, default=2000)
    args = parser.parse_args()
    cpus = subprocess.run(["lscpu"], capture_output=True, text=True).stdout.splitlines()
    print(*[line for line in cpus if line.startswith(("Model name", "NUMA", "Thread", "CPU max", "CPU MHz"))], sep="\n")
    print("may run on", sorted(os.sched_getaffinity(0)), "runs on", Path("/proc/self/stat").read_text().split()[38])
    llm = LLM(args.model, load_format="dummy", skip_tokenizer_init=True, max_num_seqs=16)
    params = SamplingParams(max_tokens=args.tokens, ignore_eos=True)
    prompts = [list(range(1, 129))]
    llm.generate(prompts, params, use_tqdm=False)
    times = {name: clock(*place) for name, place in PARTS.items()}
    began = time.perf_counter()
    llm.generate(prompts, params, use_tqdm=False)
    print(f"a token: {(time.perf_counter() - began) / args.tokens * 1e6:.0f} µs, clocks included")
    for name, values in times.items():
        if values:
            values.sort()
            shown = [values[len(values) * part // 10] for part in (1, 5, 9)]
            print(f"{name:32}", *[f"{value:8.1f}" for value in shown], f"   {len(values)} times")


if __name__ == "__main__":
    main()
