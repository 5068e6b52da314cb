"""Measures how long a device waits for the host in the benchmark's workloads: `python tools/bench_host.py`.

The engine is the real one, down to `LLM.generate`; the device is simulated. A step takes a time that grows with its
rows and its prompt tokens, roughly as on an H200 with Qwen3-0.6B, and begins when it is launched or when the step
before it has ended. What a run takes beyond the sum of these times is the host's: queueing prompts before the first
step, planning after a step that ended every request, outputs after the last one.

`--slowdown`: how many times slower this machine's cores are than the ones to be judged. Steps take as much longer, and
the figures are divided by it.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench_scheduler import VOCAB_SIZE, IdleExecutor, engine_of, settings

from nanovllm import LLM, SamplingParams
from nanovllm.benchmarks.workloads import WORKLOADS, Workload
from nanovllm.config import ResolvedConfig
from nanovllm.engine.batch import ScheduledBatch, StepResult

STEP_SECONDS, ROW_SECONDS, PROMPT_TOKEN_SECONDS = 1.2e-3, 4.1e-6, 2.3e-6
_SPIN_SECONDS = 5e-4  # before the end of a step, in which sleeping would wake too late


@dataclass(frozen=True)
class Running:
    """A step that ends at `end`, in seconds of `time.perf_counter`."""

    result: StepResult
    end: float

    def wait(self, check: Callable[[], None] | None = None) -> StepResult:
        while (left := self.end - time.perf_counter()) > 0:
            time.sleep(max(left - _SPIN_SECONDS, 0))
        return self.result


class SimulatedDevice(IdleExecutor):
    """Runs one step after another. busy: the seconds of all of them."""

    def __init__(self, resolved: ResolvedConfig, slowdown: float) -> None:
        super().__init__(resolved)
        self._slowdown, self._end = slowdown, 0.0
        self.busy, self.num_steps = 0.0, 0

    def submit(self, batch: ScheduledBatch) -> Running:
        seconds = STEP_SECONDS + ROW_SECONDS * len(batch.decode_rows) + PROMPT_TOKEN_SECONDS * batch.num_prefill_tokens
        seconds *= self._slowdown
        self.busy, self.num_steps = self.busy + seconds, self.num_steps + 1
        self._end = max(self._end, time.perf_counter()) + seconds
        return Running(StepResult(np.ones(len(batch.sampled_rows), dtype=np.int32)), self._end)


def make_llm(workload: Workload, slowdown: float) -> tuple[LLM, SimulatedDevice]:
    resolved = settings(
        max_model_len=workload.longest + 1,
        max_num_seqs=512,
        max_num_batched_tokens=16384,
        num_blocks=60_000,
        block_size=16,
    )
    device = SimulatedDevice(resolved, slowdown)
    llm = object.__new__(LLM)  # whose arguments name a model to load
    llm.llm_engine = engine_of(device)
    llm._counter = itertools.count()
    return llm, device


def measure(workload: Workload, runs: int, slowdown: float) -> None:
    """Prints a line for a workload. The first run warms up."""
    llm, device = make_llm(workload, slowdown)
    waits = []
    for run in range(runs + 1):
        requests = workload.draw(workload.num_seqs, VOCAB_SIZE, run)
        params = [SamplingParams(temperature=0.6, ignore_eos=True, max_tokens=most) for most in requests.output_lens]
        device.busy, device.num_steps = 0.0, 0
        started = time.perf_counter()
        llm.generate(requests.prompts, params, use_tqdm=False)
        waits.append((time.perf_counter() - started - device.busy) / slowdown * 1e3)
    llm.exit()
    waits = waits[1:]
    print(
        f"{device.num_steps:5d}   {device.busy / slowdown * 1e3:9.0f}   {statistics.median(waits):14.1f}"
        f"   {min(waits):.1f}-{max(waits):.1f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", nargs="+", default=["shared", "prefill", "wide"], choices=sorted(WORKLOADS))
    parser.add_argument("--runs", type=int, default=3, help="counted runs of each")
    parser.add_argument("--slowdown", type=float, default=1.0)
    args = parser.parse_args()
    os.environ.setdefault("NANOVLLM_LOG_LEVEL", "WARNING")
    print("workload   steps   device, ms   host alone, ms   least-most")
    for name in args.workload:
        print(f"{name:8}   ", end="", flush=True)
        measure(WORKLOADS[name], args.runs, args.slowdown)


if __name__ == "__main__":
    main()
