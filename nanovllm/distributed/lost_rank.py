"""Finds the rank that failed first, and the error to raise for it."""

from __future__ import annotations

import signal
from collections.abc import Mapping

from nanovllm.distributed.worker_messages import FailureReport
from nanovllm.errors import WorkerError


def first_lost_rank(
    exit_codes: Mapping[int, int], failures: Mapping[int, FailureReport], stages: Mapping[int, int]
) -> WorkerError:
    """Returns the error of the worker in `exit_codes` that ended first.

    A lost rank makes others fail: a rank that was killed comes first, then the earliest failure.
    """

    def order(rank: int) -> tuple[bool, int]:
        return exit_codes[rank] >= 0, failures[rank].failed_at if rank in failures else 0

    rank = min(exit_codes, key=order)
    if rank in failures:
        text = failures[rank].traceback
        return WorkerError(rank, f"failed: {text.strip().splitlines()[-1]}", text)
    if exit_codes[rank] < 0:
        return WorkerError(rank, f"was killed by {signal.Signals(-exit_codes[rank]).name}.")
    return WorkerError(rank, f"ended with exit status {exit_codes[rank]} and gave no reason.{_hint(stages[rank])}")


def _hint(stage: int) -> str:
    """Returns advice for a process that ended before `run_worker` began; empty for later stages."""
    if stage:
        return ""
    return (
        " Its error output may say why. Each rank reads the script that starts the engine: what the script does must "
        "stand below if __name__ == '__main__'."
    )
