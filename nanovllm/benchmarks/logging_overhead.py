"""Measures what logging adds to decode steps: each level against logging off, in one process.

The level changes every few steps of one generation, so both halves of a pair see the same batch, nearly the same
contexts and the same machine. A pair is off, on, on, off, so what changes steadily cancels. Records go where the
environment says; standard error is a file meanwhile, so that drawing on a terminal is not measured.
"""

from __future__ import annotations

import logging
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stderr
from dataclasses import dataclass
from math import comb
from typing import IO, Any

from nanovllm.benchmarks.settings import WorkloadError
from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.engine.observer import EngineObserver, Phase
from nanovllm.sampling_params import SamplingParams
from nanovllm.utils import env

OFF = logging.CRITICAL + 1
LEVELS = {"WARNING": logging.WARNING, "INFO": logging.INFO, "DEBUG": logging.DEBUG}
LIMITS = {"WARNING": 0.01, "INFO": 0.01, "DEBUG": 0.03}  # of the throughput on a GPU
BLOCK_STEPS = 10  # measured at one level in a row; at INFO one of them has a line
MAX_SECONDS = 100.0  # after which no further pair begins
_SETTLING_STEPS = 2  # before each block: the steps in flight, and those that look up the new level
_PROMPT_LEN = 16
_GENERATION_STEPS = 512  # after which the requests begin again, so that contexts stay short
_CONFIDENCE = 0.95


@dataclass(frozen=True)
class Times:
    """The seconds of some steps: wall time, and CPU time of the engine's thread without its waits for the device."""

    wall: float
    cpu: float

    def __add__(self, other: Times) -> Times:
        return Times(self.wall + other.wall, self.cpu + other.cpu)


@dataclass(frozen=True)
class Pair:
    """The times of two blocks with logging and of two without."""

    off: Times
    on: Times


@dataclass(frozen=True)
class Overhead:
    """What one level adds."""

    level: str
    pairs: list[Pair]
    bytes_written: int  # in all blocks at this level

    @property
    def wall_shares(self) -> list[float]:
        """What it adds to the wall time of steps in each pair, as a share. That is what throughput loses."""
        return [pair.on.wall / pair.off.wall - 1 for pair in self.pairs]

    @property
    def cpu_shares(self) -> list[float]:
        """What it adds to the CPU time of steps in each pair, as a share. Other work on the machine hardly matters."""
        return [pair.on.cpu / pair.off.cpu - 1 for pair in self.pairs]

    @property
    def cpu_microseconds(self) -> list[float]:
        """What it adds to the CPU time of a step in each pair."""
        return [(pair.on.cpu - pair.off.cpu) * 1e6 / (2 * BLOCK_STEPS) for pair in self.pairs]

    def entry(self) -> dict[str, Any]:
        """Returns the entry of the report."""
        off = [pair.off.wall / (2 * BLOCK_STEPS) for pair in self.pairs]
        return {
            "level": self.level,
            "limit_on_gpu": LIMITS[self.level],
            "num_pairs": len(self.pairs),
            "wall": _summary(self.wall_shares),
            "cpu": _summary(self.cpu_shares),
            "cpu_us_per_step": _summary(self.cpu_microseconds),
            "off_ms_per_step": statistics.median(off) * 1e3,
            "bytes_written": self.bytes_written,
        }

    def described(self) -> str:
        """Returns the line for people."""
        wall, cpu, added = map(_summary, (self.wall_shares, self.cpu_shares, self.cpu_microseconds))
        return (
            f"{self.level:<8} wall time {wall['median']:+.2%} ({wall['low']:+.2%} to {wall['high']:+.2%}; on a GPU at "
            f"most {LIMITS[self.level]:.0%}), CPU time {cpu['median']:+.2%} ({cpu['low']:+.2%} to {cpu['high']:+.2%}), "
            f"{added['median']:+.1f} µs a step ({added['low']:+.1f} to {added['high']:+.1f}); "
            f"{len(self.pairs)} pairs, {self.bytes_written / 1e3:,.0f} kB written"
        )


def median_interval(values: list[float], confidence: float = _CONFIDENCE) -> tuple[float, float]:
    """Returns a confidence interval of the median, between two of the values. It supposes no distribution.

    The interval of fewer than six values is their range, whose confidence is below 95 %.
    """
    ordered, rank, below = sorted(values), 0, 0.5 ** len(values)
    while below <= (1 - confidence) / 2:  # the chance that at most `rank` values are below the median
        rank += 1
        below += comb(len(values), rank) / 2 ** len(values)
    index = max(rank - 1, 0)
    return ordered[index], ordered[-1 - index]


def _summary(values: list[float]) -> dict[str, float]:
    low, high = median_interval(values)
    return {"median": statistics.median(values), "low": low, "high": high}


class WaitClock(EngineObserver):
    """Counts the CPU time in which the engine's thread waits for the device."""

    def __init__(self) -> None:
        self.waited = 0.0  # seconds
        self._began = 0.0

    def phase(self, phase: Phase) -> None:
        if phase == "wait":
            self._began = time.thread_time()
        elif phase == "update":
            self.waited += time.thread_time() - self._began


class DecodeSteps:
    """Runs steps in which `num_seqs` requests decode. `clock` is an observer of the engine."""

    def __init__(self, engine: LLMEngine, clock: WaitClock, num_seqs: int) -> None:
        self._engine, self._clock, self._num_seqs = engine, clock, num_seqs
        self._left = 0  # steps until the requests begin again
        self._request_ids: list[str] = []
        self._num_requests = 0

    def __call__(self) -> Times:
        """Runs a block of steps and returns its times."""
        if self._left < _SETTLING_STEPS + BLOCK_STEPS:
            self.stop()
            self._start()
        self._left -= _SETTLING_STEPS + BLOCK_STEPS
        for _ in range(_SETTLING_STEPS):
            self._engine.step()
        wall, cpu = time.perf_counter(), time.thread_time() - self._clock.waited
        for _ in range(BLOCK_STEPS):
            self._engine.step()
        return Times(time.perf_counter() - wall, time.thread_time() - self._clock.waited - cpu)

    def stop(self) -> None:
        """Ends the requests."""
        self._engine.discard_requests(self._request_ids)
        while self._engine.has_unfinished_requests():
            self._engine.step()

    def _start(self) -> None:
        """Adds requests and runs steps until all of them decode."""
        engine, params = self._engine, SamplingParams(max_tokens=None, ignore_eos=True)
        self._left = min(_GENERATION_STEPS, engine.resolved.max_model_len - _PROMPT_LEN)
        self._request_ids = []
        for seq in range(self._num_seqs):
            prompt = [(seq * 31 + index) % engine.resolved.vocab_size for index in range(_PROMPT_LEN)]
            self._request_ids.append(engine.add_request(str(self._num_requests), prompt, params))
            self._num_requests += 1
        while engine.num_waiting_tokens:
            engine.step()
            self._left -= 1
        self._left -= engine.resolved.pipeline_depth  # planned already
        if self._left < _SETTLING_STEPS + BLOCK_STEPS:
            raise WorkloadError("The overhead of logging needs longer requests: raise --max-model-len.")


def measure_overheads(
    run: Callable[[], Times],
    num_pairs: int,
    max_seconds: float = MAX_SECONDS,
    clock: Callable[[], float] = time.monotonic,
) -> list[Overhead]:
    """Returns the overhead of each level. `run` runs a block of steps and returns its times.

    No pair begins after `max_seconds`, but each level has two.
    """
    logger = logging.getLogger("nanovllm")
    level_before, deadline = logger.level, clock() + max_seconds
    pairs: dict[str, list[Pair]] = {name: [] for name in LEVELS}
    num_bytes = dict.fromkeys(LEVELS, 0)

    def block(level: int) -> Times:
        logger.setLevel(level)
        return run()

    try:
        with tempfile.TemporaryFile("w+", encoding="utf-8") as sink, redirect_stderr(sink):
            for level in (OFF, *LEVELS.values()):
                block(level)  # warms up
            while (done := len(pairs["DEBUG"])) < num_pairs and (done < 2 or clock() < deadline):
                for name, level in LEVELS.items():
                    before = _num_bytes(sink)
                    first_off, on, last_off = block(OFF), block(level) + block(level), block(OFF)
                    pairs[name].append(Pair(first_off + last_off, on))
                    num_bytes[name] += _num_bytes(sink) - before
    finally:
        logger.setLevel(level_before)
    return [Overhead(name, pairs[name], num_bytes[name]) for name in LEVELS]


def _num_bytes(sink: IO[str]) -> int:
    """Returns the bytes written to `sink` and to the log file, if there is one."""
    path = env.log_file()
    return sink.tell() + (path.stat().st_size if path is not None and path.exists() else 0)
