"""Simulates the scheduler under more load than fits: `python tools/simulate_load.py`.

Requests arrive at random (Poisson), at multiples of the rate at which the engine is saturated. The engine is the real
one. Only the device is simulated: a step takes `constant + prompt tokens · p + context of the decode rows · c` seconds
of a clock that nothing else moves, so the same arguments give the same table on every machine. The defaults are about
Qwen3-8B on one H100, with a KV cache for some 50 of the 256 requests that may run.

TTFT grows with the queue. The time between tokens does not, and neither do the tokens a second shrink.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from nanovllm import SamplingParams
from nanovllm.config import EngineConfig, ResolvedConfig
from nanovllm.engine.batch import ScheduledBatch, StepResult
from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.engine.observer import EngineObserver, SampledStep
from nanovllm.engine.sequence import Sequence

VOCAB_SIZE = 1 << 16


class Clock:
    """Seconds that only the simulated device moves."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@dataclass(frozen=True)
class Device:
    """What a step costs, in seconds."""

    constant: float = 6e-3
    prompt_token: float = 27e-6
    context_token: float = 49e-9

    def seconds(self, context: int, num_prompt_tokens: int) -> float:
        return self.constant + self.prompt_token * num_prompt_tokens + self.context_token * context


@dataclass(frozen=True)
class Load:
    """Requests with log-normal lengths."""

    num_requests: int = 2000
    mean_prompt: int = 220
    mean_output: int = 190
    longest: int = 1024  # prompt tokens, and output tokens
    long_every: int | None = None  # each so many requests one has a prompt of `long_prompt` tokens; None: none has
    long_prompt: int = 16_000
    seed: int = 0

    def is_long(self, index: int) -> bool:
        return self.long_every is not None and index % self.long_every == self.long_every // 2

    def lengths(self) -> tuple[list[int], list[int]]:
        """Returns the lengths of the prompts and of the outputs."""
        rng, sigma = np.random.default_rng(self.seed), 0.8

        def draw(mean: int) -> list[int]:
            lengths = rng.lognormal(np.log(mean) - sigma**2 / 2, sigma, self.num_requests)
            return np.clip(lengths, 1, self.longest).astype(int).tolist()

        prompts, outputs = draw(self.mean_prompt), draw(self.mean_output)
        prompts = [self.long_prompt if self.is_long(index) else length for index, length in enumerate(prompts)]
        return prompts, outputs

    def arrivals(self, rate: float) -> list[float]:
        """Returns the seconds at which the requests arrive. rate: requests a second; infinite: all at once."""
        gaps = np.random.default_rng(self.seed + 1).exponential(1.0, self.num_requests)
        return np.cumsum(gaps / rate).tolist()


@dataclass
class Simulated:
    """A step in flight."""

    executor: SimulatedDevice
    result: StepResult
    ends: float

    def wait(self) -> StepResult:
        self.executor.clock.now = max(self.executor.clock.now, self.ends)
        return self.result


class SimulatedDevice:
    """An executor whose steps take the time that a `Device` says, one after another. Every token is 1."""

    def __init__(self, resolved: ResolvedConfig, device: Device, clock: Clock) -> None:
        self.resolved, self.device, self.clock = resolved, device, clock
        self._free = 0.0  # when the last step ends
        self._num_tokens = np.zeros(resolved.max_num_seqs, dtype=np.int64)  # of each row

    def submit(self, batch: ScheduledBatch) -> Simulated:
        opened = batch.section("opened")
        self._num_tokens[opened["row"]] = opened["num_tokens"]
        seconds = self.device.seconds(int(self._num_tokens[batch.decode_rows].sum()), batch.num_prefill_tokens)
        self._num_tokens[batch.sampled_rows] += 1
        self._free = max(self._free, self.clock.now) + seconds
        return Simulated(self, StepResult(np.ones(len(batch.sampled_rows), dtype=np.int32)), self._free)

    def collect(self, handle: Simulated) -> StepResult:
        return handle.wait()

    def synchronize(self) -> None:
        pass

    def shutdown(self) -> None:
        pass


@dataclass
class Watcher(EngineObserver):
    """Keeps what the table shows."""

    gaps: list[np.ndarray] = field(default_factory=list)  # between tokens
    tokens: list[tuple[float, int]] = field(default_factory=list)  # time, and tokens sampled then
    ttft: dict[int, float] = field(default_factory=dict)  # by seq_id
    first_tokens: list[int] = field(default_factory=list)  # seq_ids in the order of their first tokens
    finished: list[float] = field(default_factory=list)

    def tokens_sampled(self, step: SampledStep) -> None:
        self.gaps.append(step.gaps[step.gaps >= 0])
        self.tokens.append((step.now, len(step.sampled)))

    def first_token(self, sequence: Sequence) -> None:
        assert sequence.first_token is not None
        self.first_tokens.append(sequence.seq_id)
        self.ttft[sequence.seq_id] = sequence.first_token - sequence.arrival

    def sequence_finished(self, sequence: Sequence) -> None:
        self.finished.append(sequence.finished or 0.0)


@dataclass(frozen=True)
class Outcome:
    """What one run gave. Times are seconds."""

    ttft: np.ndarray  # in the order of arrival
    itl: np.ndarray
    first_tokens: list[int]
    num_preemptions: int
    num_prompt_tokens: int
    num_recomputed: int
    # From the end of the first fifth of the requests to the end of the fourth:
    goodput: float  # output tokens a second
    requests_per_second: float


Prepare = Callable[[LLMEngine], None]


def simulate(load: Load, rate: float, device: Device, prepare: Prepare = lambda engine: None, **config: int) -> Outcome:
    """Runs a load at `rate` requests a second. prepare: is given the engine before the first request."""
    clock, watcher = Clock(), Watcher()
    resolved = resolve(**config)
    engine_config = EngineConfig("none", skip_tokenizer_init=True)
    engine = LLMEngine(
        engine_config, lambda config, stopwatch: SimulatedDevice(resolved, device, clock), [watcher], clock
    )
    prepare(engine)
    prompt_lens, output_lens = load.lengths()
    arrivals = load.arrivals(rate)
    pending = deque(range(load.num_requests))
    rng = np.random.default_rng(load.seed + 2)
    while pending or engine.has_unfinished_requests():
        if pending and not engine.has_unfinished_requests():
            clock.now = max(clock.now, arrivals[pending[0]])
        while pending and arrivals[pending[0]] <= clock.now:
            index = pending.popleft()
            params = SamplingParams(max_tokens=output_lens[index], ignore_eos=True)
            prompt = rng.integers(1, VOCAB_SIZE, prompt_lens[index]).tolist()
            engine.enqueue(str(index), engine.prepare(prompt, params), arrivals[index])
        engine.step()
    finished = np.sort(watcher.finished)
    begins, ends = (float(finished[len(finished) * fifths // 5]) for fifths in (1, 4))
    num_tokens = sum(count for now, count in watcher.tokens if begins <= now < ends)
    totals = engine.statistics
    return Outcome(
        ttft=np.array([watcher.ttft[index] for index in range(load.num_requests)]),
        itl=np.concatenate(watcher.gaps),
        first_tokens=watcher.first_tokens,
        num_preemptions=totals.num_preemptions,
        num_prompt_tokens=sum(prompt_lens),
        num_recomputed=totals.num_prompt_tokens - sum(prompt_lens),
        goodput=num_tokens / (ends - begins),
        requests_per_second=len(finished) * 3 / 5 / (ends - begins),
    )


def resolve(**changes: object) -> ResolvedConfig:
    values: dict[str, object] = {
        "model": "none",
        "device": "none",
        "dtype": "none",
        "vocab_size": VOCAB_SIZE,
        "eos_token_ids": (0,),
        "max_model_len": 20_000,
        "max_num_seqs": 256,
        "max_num_batched_tokens": 16384,
        "max_prefill_tokens_beside_decode": None,
        "inter_token_latency_target_ms": None,
        "block_size": 16,
        "num_blocks": 2000,
        "kv_cache_dtype": "bfloat16",
        "enable_prefix_caching": True,
        "use_cuda_graphs": False,
        "prefill_backend": "none",
        "decode_backend": "none",
        "pipeline_depth": 2,
    }
    return ResolvedConfig(**{**values, **changes})  # type: ignore[arg-type]


@dataclass(frozen=True)
class Setting:
    """What one row of the table is about."""

    num_blocks: int
    target_ms: float | None
    watermark: float
    multiple: float


def row_of(setting: Setting, rate: float, load: Load, overtaking: bool) -> str:
    """Runs a load and returns its row of the table."""

    def prepare(engine: LLMEngine) -> None:
        engine.scheduler.policy.watermark = int(setting.watermark * setting.num_blocks)
        if not overtaking:
            engine.scheduler.policy.overtaking = lambda waiting: None  # type: ignore[method-assign]

    config = {"num_blocks": setting.num_blocks, "inter_token_latency_target_ms": setting.target_ms}
    done = simulate(load, rate, Device(), prepare, **config)
    is_long = np.array([load.is_long(index) for index in range(load.num_requests)])
    ttft, itl = np.quantile(done.ttft[~is_long], [0.5, 0.99]), np.quantile(done.itl, [0.5, 0.99]) * 1e3
    long = f"{np.median(done.ttft[is_long]):8.2f}" if is_long.any() else "       -"
    return (
        f"{setting.num_blocks:6d}   {setting.target_ms or 0:10g}   {setting.watermark:9.0%}   {setting.multiple:4g}"
        f"   {rate:10.1f}   {ttft[0]:11.3f}   {ttft[1]:7.3f}   {long}   {itl[0]:11.1f}   {itl[1]:6.1f}"
        f"   {done.num_preemptions:11d}   {done.num_recomputed:17d}   {done.goodput:15.0f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--loads", type=float, nargs="+", default=[0.5, 1.0, 2.0, 4.0], help="multiples of the saturating rate")
    add("--requests", type=int, default=2000)
    add("--mean-prompt", type=int, default=220)
    add("--mean-output", type=int, default=190)
    add("--long-every", type=int, help="each so many requests one has a prompt of 16,000 tokens; its TTFT is apart")
    add("--num-blocks", type=int, nargs="+", default=[1000], help="sizes of the KV cache")
    add("--target-ms", type=float, nargs="+", default=[0.0, 20.0], help="inter_token_latency_target_ms; 0: none")
    add("--watermark", type=float, nargs="+", default=[0.0, 0.05], help="parts of the cache that admission leaves free")
    add("--no-overtaking", action="store_true", help="let short prompts wait for long ones")
    add("--seed", type=int, default=0)
    args = parser.parse_args()
    os.environ.setdefault("NANOVLLM_LOG_LEVEL", "WARNING")
    load = Load(args.requests, args.mean_prompt, args.mean_output, long_every=args.long_every, seed=args.seed)
    print(
        "blocks   target, ms   watermark   load   requests/s   TTFT p50, s       p99    long, s   ITL p50, ms", end=""
    )
    print("      p99   preemptions   recomputed tokens   output tokens/s")
    for num_blocks in args.num_blocks:
        saturation = simulate(load, float("inf"), Device(), num_blocks=num_blocks).requests_per_second
        for target, watermark, multiple in itertools.product(args.target_ms, args.watermark, args.loads):
            setting = Setting(num_blocks, target or None, watermark, multiple)
            print(row_of(setting, multiple * saturation, load, not args.no_overtaking), flush=True)


if __name__ == "__main__":
    main()
