"""Python processes that tests start, and how tests wait for what they do.

A process runs in the repository, on one thread, with none of the caller's settings. SIGINT interrupts it: see conftest.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Seconds after which a process, or a condition that is waited for, counts as hung: no test measures a time by them.
WATCHDOG = 300.0
PATIENCE = 120.0  # shorter than the deadlines that an engine has unless a test sets one


def until(condition: Callable[[], bool]) -> bool:
    """Waits for a condition, and returns whether it came to hold before the test counts as hung."""
    deadline = time.monotonic() + PATIENCE
    while not (holds := condition()) and time.monotonic() < deadline:
        time.sleep(0.01)
    return holds  # not asked again: it may hold for a moment only


def environment(**variables: str) -> dict[str, str]:
    """Returns this process's environment without settings of nanovllm and OpenTelemetry, plus `variables`.

    One OpenMP thread: on cores that other work uses too, threads that wait for one another take minutes.
    """
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("NANOVLLM_", "OTEL_"))}
    return {**inherited, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **variables}


def run_python(
    *arguments: str, cwd: Path = ROOT, stdin: str | None = None, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Runs `python arguments` to its end."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env=environment(**variables),
        input=stdin,
        capture_output=True,
        text=True,
        timeout=WATCHDOG,
    )


def start_python(*arguments: str, cwd: Path = ROOT, **variables: str) -> subprocess.Popen[str]:
    """Starts `python arguments` in a session of its own, whose number is the process's."""
    return subprocess.Popen(
        [sys.executable, *arguments],
        cwd=cwd,
        env=environment(**variables),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
