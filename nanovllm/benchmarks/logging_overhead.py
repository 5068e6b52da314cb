"""Measures what logging adds to decoding: each level against logging off, in pairs of runs, in one process.

Records go to standard error, as a user's do; here that is a file, so drawing on a terminal is not measured.
"""

from __future__ import annotations

import logging
import statistics
import tempfile
from collections.abc import Callable
from contextlib import redirect_stderr
from dataclasses import dataclass
from typing import IO

from nanovllm.benchmarks.workloads import Requests

OFF = logging.CRITICAL + 1
LEVELS = {"WARNING": logging.WARNING, "INFO": logging.INFO, "DEBUG": logging.DEBUG}
LIMITS = {"WARNING": 0.01, "INFO": 0.01, "DEBUG": 0.03}
_PROMPT_LEN, _OUTPUT_LEN = 16, 256  # tokens; nearly all steps decode


@dataclass(frozen=True)
class Overhead:
    """The time that one level adds."""

    level: str
    shares: list[float]  # of the time without logging, in each pair
    bytes_written: int  # by all runs at this level
    off_seconds: float  # median

    @property
    def median(self) -> float:
        return statistics.median(self.shares)

    @property
    def quartiles(self) -> tuple[float, float]:
        low, _, high = statistics.quantiles(self.shares, n=4)
        return low, high

    def described(self) -> str:
        """Returns the line for people."""
        low, high = self.quartiles
        return (
            f"{self.level:<8} {self.median:+.2%} (quartiles {low:+.2%} to {high:+.2%}; on a GPU at most "
            f"{LIMITS[self.level]:.0%}), {self.bytes_written / 1e3:,.0f} kB written; off {self.off_seconds:.3f} s"
        )


def decode_requests(num_seqs: int) -> Requests:
    """Returns requests that decode together from the first step to the last."""
    prompts = [[1 + (seq * 31 + index) % 500 for index in range(_PROMPT_LEN)] for seq in range(num_seqs)]
    return Requests(prompts, [_OUTPUT_LEN] * num_seqs, shared_len=0)


def measure_overheads(run: Callable[[], float], num_pairs: int) -> list[Overhead]:
    """Returns the overhead of each level. `run` generates once and returns the seconds spent decoding.

    A pair is one run with logging and one without; which comes first alternates.
    """
    logger = logging.getLogger("nanovllm")
    level_before = logger.level

    def timed(level: int) -> float:
        logger.setLevel(level)
        return run()

    try:
        with tempfile.TemporaryFile("w+", encoding="utf-8") as sink, redirect_stderr(sink):
            timed(OFF)
            return [_measure_level(name, level, timed, num_pairs, sink) for name, level in LEVELS.items()]
    finally:
        logger.setLevel(level_before)


def _measure_level(name: str, level: int, timed: Callable[[int], float], num_pairs: int, sink: IO[str]) -> Overhead:
    timed(level)  # warms up
    start = sink.tell()
    off_seconds, on_seconds = [], []
    for index in range(num_pairs):
        if index % 2:
            on_seconds.append(timed(level))
            off_seconds.append(timed(OFF))
        else:
            off_seconds.append(timed(OFF))
            on_seconds.append(timed(level))
    return Overhead(
        level=name,
        shares=[on / off - 1 for off, on in zip(off_seconds, on_seconds, strict=True)],
        bytes_written=sink.tell() - start,
        off_seconds=statistics.median(off_seconds),
    )
