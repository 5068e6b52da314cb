"""Rank 0 is killed, interrupted, ended by an exception, or never used: nothing outlives it."""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress
from pathlib import Path

import pytest

from tests.distributed.rank_processes import (
    ONLY_LINUX,
    folder,
    nothing_stays_behind,
    segments,
    session_of,
    start_script,
)
from tests.processes import PATIENCE, until
from tests.small_llm import generate, load, token_ids

__all__ = ["folder", "nothing_stays_behind"]  # fixtures
pytestmark = [ONLY_LINUX, pytest.mark.usefixtures("nothing_stays_behind")]

PROMPTS = [[1, 2, 3], [4, 5]]
ENDLESS = """
import multiprocessing, sys, time
from tests.small_llm import *
if __name__ == "__main__":
    if {end!r}.endswith("while loading"):
        from nanovllm.distributed.worker_pool import WorkerPool
        WorkerPool.wait_until_attached = lambda pool: (print("ready", flush=True), time.sleep(60))
    llm = load({folder!r}, tensor_parallel_size=2)
    if {end!r} == "unused":
        sys.exit()
    generate(llm, [[1, 2]])
    print("ready", flush=True)
    if {end!r} == "exception":
        raise LookupError("the user's")
    while True:
        generate(llm, [[1, 2]] * 8, SamplingParams(max_tokens=200, ignore_eos=True))
"""


@pytest.mark.parametrize(
    "end", ["SIGKILL", "SIGKILL while loading", "SIGINT", "SIGINT while loading", "exception", "unused"]
)
def test_nothing_outlives_rank_0(folder: Path, tmp_path: Path, end: str) -> None:
    process = start_script(ENDLESS.format(end=end, folder=str(folder)), tmp_path, NANOVLLM_LOG_LEVEL="ERROR")
    session = process.pid
    try:
        assert process.stdout is not None
        assert (process.stdout.readline() == "ready\n") == (end != "unused")
        if end.startswith("SIG"):
            time.sleep(0.1)
            if end.startswith("SIGINT"):
                os.killpg(session, signal.SIGINT)  # as a terminal does: to all of them
            else:
                process.kill()
        _, errors = process.communicate(timeout=PATIENCE)
        assert until(lambda: not session_of(session))
        assert segments(session) == []
        assert "leaked" not in errors
        assert "rank 1" not in errors.lower()
        status = {"SIGINT": -2, "SIGKILL": -9, "exception": 1, "unused": 0}
        assert process.returncode == status[end.split()[0]]
        assert ("LookupError: the user's" in errors) == (end == "exception")
    finally:
        with suppress(ProcessLookupError):
            os.killpg(session, signal.SIGKILL)


def test_everything_of_one_engine_is_killed_and_the_next_starts_beside_another(folder: Path, tmp_path: Path) -> None:
    """All processes at once, so that nobody can clean up: while it decodes, and before its names are gone."""
    with load(folder, tensor_parallel_size=2) as other:
        expected = token_ids(generate(other, PROMPTS))
        for end in ("SIGKILL", "SIGKILL while loading"):
            process = start_script(ENDLESS.format(end=end, folder=str(folder)), tmp_path)
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            # Counted while it lives: once it is dead, an engine that starts, as in a test beside this, removes them.
            assert len(segments(process.pid)) == (0 if end == "SIGKILL" else 2)
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate(timeout=PATIENCE)
            assert until(lambda session=process.pid: not session_of(session))  # type: ignore[misc]
            assert token_ids(generate(other, PROMPTS)) == expected
            with load(folder, tensor_parallel_size=2) as again:
                assert segments(process.pid) == []
                assert token_ids(generate(again, PROMPTS)) == expected
