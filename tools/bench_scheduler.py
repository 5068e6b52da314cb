"""Measures the engine's own work per step in microseconds, without a model: `python tools/bench_scheduler.py`.

The executor computes nothing and answers every step at once. What remains is planning, packing, bookkeeping and
output, as in a run with a GPU. Decode is steady: every row gets a token, and one row in `block_size` a new block.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from nanovllm import SamplingParams
from nanovllm.config import EngineConfig, ResolvedConfig
from nanovllm.engine.batch import ScheduledBatch, StepResult
from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.engine_factory import default_observers

PROMPT_LEN = 64
VOCAB_SIZE = 1 << 16


@dataclass(frozen=True)
class Answered:
    result: StepResult

    def wait(self) -> StepResult:
        return self.result


class IdleExecutor:
    """Computes nothing: every token is 1."""

    def __init__(self, resolved: ResolvedConfig) -> None:
        self.resolved = resolved

    def submit(self, batch: ScheduledBatch) -> Answered:
        return Answered(StepResult(np.ones(len(batch.sampled_rows), dtype=np.int32)))

    def collect(self, handle: Answered) -> StepResult:
        return handle.wait()

    def synchronize(self) -> None:
        pass

    def capture_ahead(self) -> bool:
        return False

    def shutdown(self) -> None:
        pass


def settings(
    *, max_model_len: int, max_num_seqs: int, max_num_batched_tokens: int, num_blocks: int, block_size: int
) -> ResolvedConfig:
    """Returns the settings of an engine without a model."""
    return ResolvedConfig(
        model="none",
        device="none",
        dtype="none",
        vocab_size=VOCAB_SIZE,
        eos_token_ids=(0,),
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        max_prefill_tokens_beside_decode=None,
        inter_token_latency_target_ms=None,
        block_size=block_size,
        num_blocks=num_blocks,
        kv_cache_dtype="bfloat16",
        enable_prefix_caching=True,
        use_cuda_graphs=False,
        prefill_backend="none",
        decode_backend="none",
        pipeline_depth=2,
    )


def engine_of(executor: IdleExecutor) -> LLMEngine:
    config = EngineConfig("none", skip_tokenizer_init=True)
    return LLMEngine(config, lambda config, stopwatch: executor, default_observers(config))


def make_engine(num_seqs: int, num_steps: int, block_size: int) -> LLMEngine:
    max_model_len = PROMPT_LEN + num_steps
    resolved = settings(
        max_model_len=max_model_len,
        max_num_seqs=num_seqs,
        max_num_batched_tokens=num_seqs * PROMPT_LEN,
        num_blocks=num_seqs * (-(-max_model_len // block_size) + 1),
        block_size=block_size,
    )
    return engine_of(IdleExecutor(resolved))


@dataclass(frozen=True)
class Measured:
    admission: float  # seconds for all prompts: queueing, hashing, blocks, the first step
    steps: list[float]  # seconds of each decode step
    outputs: float  # seconds for the last step, which ends every request


def measure(num_seqs: int, num_steps: int, block_size: int) -> Measured:
    engine = make_engine(num_seqs, num_steps, block_size)
    rng = np.random.default_rng(0)
    prompts = rng.integers(1, VOCAB_SIZE, (num_seqs, PROMPT_LEN)).tolist()
    params = SamplingParams(max_tokens=num_steps, ignore_eos=True)
    started = time.perf_counter()
    for index, prompt in enumerate(prompts):
        engine.add_request(str(index), prompt, params)
    engine.step()
    admission = time.perf_counter() - started
    steps: list[float] = []
    finished = 0
    while finished < num_seqs:
        started = time.perf_counter()
        finished += len(engine.step())
        steps.append(time.perf_counter() - started)
    engine.exit()
    return Measured(admission, steps[:-1], steps[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-seqs", type=int, nargs="+", default=[1, 64, 512, 2048])
    parser.add_argument("--steps", type=int, default=200, help="decode steps of each size")
    parser.add_argument("--block-size", type=int, default=16)
    args = parser.parse_args()
    os.environ.setdefault("NANOVLLM_LOG_LEVEL", "WARNING")
    print("sequences   µs a step (median)   p99   µs a sequence   admission, µs a request   outputs, µs a request")
    for num_seqs in args.num_seqs:
        measured = measure(num_seqs, args.steps, args.block_size)
        median = statistics.median(measured.steps) * 1e6
        p99 = float(np.quantile(measured.steps, 0.99)) * 1e6
        print(
            f"{num_seqs:9d}   {median:18.0f}   {p99:5.0f}   {median / num_seqs:13.2f}"
            f"   {measured.admission / num_seqs * 1e6:23.1f}   {measured.outputs / num_seqs * 1e6:21.1f}"
        )


if __name__ == "__main__":
    main()
