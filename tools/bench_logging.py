"""What logging costs a decode step: each level against logging off, in pairs, in one process.

Records go where a user's would, to standard error, which is a file here: drawing on a terminal is not measured.
"""

from __future__ import annotations

import logging
import statistics
import tempfile
from collections.abc import Callable
from contextlib import redirect_stderr
from dataclasses import dataclass

from tools.bench_workloads import Requests

OFF = logging.CRITICAL + 1
LEVELS = {"WARNING": logging.WARNING, "INFO": logging.INFO, "DEBUG": logging.DEBUG}
LIMITS = {"WARNING": 0.01, "INFO": 0.01, "DEBUG": 0.03}
_PROMPT_LEN, _OUTPUT_LEN = 16, 256  # decoding is nearly all


@dataclass(frozen=True)
class Overhead:
    """Of one level: what share of a run's time it adds, in each pair."""

    level: str
    shares: list[float]
    bytes_written: int  # of all runs at this level
    off_seconds: float  # median

    @property
    def median(self) -> float:
        return statistics.median(self.shares)

    @property
    def quartiles(self) -> tuple[float, float]:
        low, _, high = statistics.quantiles(self.shares, n=4)
        return low, high

    def described(self) -> str:
        low, high = self.quartiles
        return (
            f"{self.level:<8} {self.median:+.2%} (quartiles {low:+.2%} to {high:+.2%}; on a GPU at most "
            f"{LIMITS[self.level]:.0%}), {self.bytes_written / 1e3:,.0f} kB written; off {self.off_seconds:.3f} s"
        )


def decode_requests(num_seqs: int) -> Requests:
    """Requests that decode together from the first step to the last."""
    prompts = [[1 + (seq * 31 + index) % 500 for index in range(_PROMPT_LEN)] for seq in range(num_seqs)]
    return Requests(prompts, [_OUTPUT_LEN] * num_seqs, shared_len=0)


def measure_overheads(run: Callable[[], float], num_pairs: int) -> list[Overhead]:
    """`run` gives the seconds that a generation decoded. A pair is one with logging and one without, in turns."""
    logger = logging.getLogger("nanovllm")
    before = logger.level
    found = []

    def timed(level: int) -> float:
        logger.setLevel(level)
        return run()

    try:
        with tempfile.TemporaryFile("w+", encoding="utf-8") as sink, redirect_stderr(sink):
            timed(OFF)
            for name, level in LEVELS.items():
                timed(level)
                start = sink.tell()
                pairs = []
                for index in range(num_pairs):
                    first, second = (level, OFF) if index % 2 else (OFF, level)
                    seconds = {first: timed(first)}
                    seconds[second] = timed(second)
                    pairs.append((seconds[OFF], seconds[level]))
                found.append(
                    Overhead(
                        level=name,
                        shares=[on / off - 1 for off, on in pairs],
                        bytes_written=sink.tell() - start,
                        off_seconds=statistics.median(off for off, _ in pairs),
                    )
                )
    finally:
        logger.setLevel(before)
    return found
