"""Compares where the engine of `AsyncLLM` runs: in a thread, or in a process of its own; and `LLM` beside both.

    python tools/bench_async_engine.py                                     # the tiny checkpoint, on a CPU
    python tools/bench_async_engine.py --model Qwen/Qwen3-0.6B --device cuda

A round sends `--streams` requests at once and ends with the last of them. Consumers do what an HTTP server does: they
write each delta as a line of JSON. `LLM` completes the same prompts with one `generate`. Rounds of the three alternate,
and the table has the median of `--rounds`. CPU seconds are those of all processes and threads.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from nanovllm import LLM, AsyncLLM, SamplingParams

_ROW = "{:>7} {:>8} {:>9} {:>7} {:>14} {:>9} {:>8} {:>8} {:>7}"


@dataclass
class Round:
    """What one round took. Times in seconds, latencies in ms."""

    wall: float
    cpu: float
    num_tokens: int
    num_outputs: int = 0
    ttft: tuple[float, float] = (0.0, 0.0)  # p50, p99
    itl: tuple[float, float] = (0.0, 0.0)  # of the outputs of one request


def quantiles(values: list[float]) -> tuple[float, float]:
    ordered = sorted(values) or [0.0]
    return ordered[len(ordered) // 2] * 1e3, ordered[min(len(ordered) * 99 // 100, len(ordered) - 1)] * 1e3


def cpu_seconds(pids: list[int]) -> float:
    """Returns the CPU time of processes so far, without that of children."""
    total = 0.0
    for pid in pids:
        with open(f"/proc/{pid}/stat", encoding="utf-8") as stat:
            fields = stat.read().rpartition(")")[2].split()
        total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return total


async def consume(engine: AsyncLLM, prompt: list[int], params: SamplingParams, seen: list[list[float]]) -> int:
    started, times, num_bytes = time.perf_counter(), [], 0
    async for output in engine.generate({"prompt_token_ids": prompt}, params, delta=True):
        times.append(time.perf_counter() - started)
        completion = output.outputs[0]
        choice = {"index": 0, "delta": {"content": completion.text}, "finish_reason": completion.finish_reason}
        chunk: dict[str, Any] = {"id": output.request_id, "object": "chat.completion.chunk", "choices": [choice]}
        num_bytes += len(f"data: {json.dumps(chunk)}\n\n".encode())
    seen.append(times)
    return num_bytes


def run_async(engine: AsyncLLM, params: SamplingParams, pids: list[int], prompts: list[list[int]]) -> Round:
    seen: list[list[float]] = []

    async def everything() -> None:
        await asyncio.gather(*(consume(engine, prompt, params, seen) for prompt in prompts))

    wall, cpu = time.perf_counter(), cpu_seconds(pids)
    asyncio.run(everything())
    wall, cpu = time.perf_counter() - wall, cpu_seconds(pids) - cpu
    gaps = [after - before for times in seen for before, after in itertools.pairwise(times)]
    num_tokens, num_outputs = len(prompts) * (params.max_tokens or 0), sum(map(len, seen))
    return Round(wall, cpu, num_tokens, num_outputs, quantiles([times[0] for times in seen]), quantiles(gaps))


def run_llm(llm: LLM, params: SamplingParams, prompts: list[list[int]]) -> Round:
    wall, cpu = time.perf_counter(), cpu_seconds([os.getpid()])
    llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)
    wall, cpu = time.perf_counter() - wall, cpu_seconds([os.getpid()]) - cpu
    return Round(wall, cpu, len(prompts) * (params.max_tokens or 0))


def median(rounds: list[Round]) -> Round:
    return sorted(rounds, key=lambda each: each.wall)[len(rounds) // 2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--load-format", default="auto")
    parser.add_argument("--tokenizer")
    parser.add_argument("--streams", default="64,256,1000")
    parser.add_argument("--engines", default="llm,thread,process")
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=1)
    options = parser.parse_args()
    streams = [int(number) for number in options.streams.split(",")]
    per_engine = 0.85 / len(options.engines.split(","))  # of a GPU's memory, which they share
    settings: dict[str, Any] = {
        "device": options.device,
        "load_format": options.load_format,
        "tokenizer": options.tokenizer,
        "max_num_seqs": min(max(streams), 512),
        "max_model_len": options.prompt_tokens + options.tokens + 16,
        "gpu_memory_utilization": per_engine,
        "fast_start": False,
    }
    params = SamplingParams(temperature=0, max_tokens=options.tokens, ignore_eos=True)
    choose = random.Random(0)
    print(
        _ROW.format("streams", "engine", "tokens/s", "CPU s", "tokens/output", "TTFT p50", "p99", "ITL p50", "p99 ms")
    )
    with ExitStack() as stack:
        runs: dict[str, Callable[[list[list[int]]], Round]] = {}
        for name in options.engines.split(","):
            if name == "llm":
                runs[name] = partial(run_llm, stack.enter_context(LLM(options.model, **settings)), params)
            else:
                engine = stack.enter_context(AsyncLLM(options.model, engine_process=name == "process", **settings))
                process = getattr(engine._connection, "_process", None)
                pids = [os.getpid(), *([] if process is None else [process.pid])]
                runs[name] = partial(run_async, engine, params, pids)
        for run in runs.values():  # warm
            run([[choose.randrange(3, 400) for _ in range(options.prompt_tokens)] for _ in range(8)])
        for number in streams:
            results: dict[str, list[Round]] = {name: [] for name in runs}
            for _ in range(options.rounds):
                for name, run in runs.items():
                    prompts = [[choose.randrange(3, 400) for _ in range(options.prompt_tokens)] for _ in range(number)]
                    results[name].append(run(prompts))
            for name, rounds in results.items():
                each = median(rounds)
                cpu = statistics.median(one.cpu for one in rounds)
                cells = [f"{each.num_tokens / each.wall:.0f}", f"{cpu:.2f}"]
                if each.num_outputs:
                    cells += [f"{each.num_tokens / each.num_outputs:.2f}"]
                    cells += [f"{latency:.1f}" for latency in (*each.ttft, *each.itl)]
                print(_ROW.format(number, name, *cells, *[""] * (7 - len(cells))), flush=True)


if __name__ == "__main__":
    main()
