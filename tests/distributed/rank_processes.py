"""What an engine of several ranks has beside this process, and what must not be left of it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from nanovllm import LLM
from tests.models.qwen3_checkpoints import make_qwen3_checkpoint
from tests.processes import start_python

ONLY_LINUX = pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc and /dev/shm")
SHARED_MEMORY = Path("/dev/shm")
# More heads than ranks, KV heads on two ranks each, a vocabulary that the ranks cannot share evenly.
SMALL = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 321, "attention_bias": True}


def executor_of(llm: LLM) -> Any:
    return llm.llm_engine.executor


def pids_of(llm: LLM) -> list[int]:
    return [process.pid for process in executor_of(llm)._workers._processes.values()]


def segments(pid: int) -> list[str]:
    """Names of the shared memory that process `pid` made."""
    return [path.name for path in SHARED_MEMORY.glob(f"nanovllm-{pid}-*")]


def processes() -> Iterator[tuple[int, str, int, int]]:
    """Process id, state, parent and session of every process there is."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, parent, _, session = path.read_text().rpartition(")")[2].split()[:4]
            yield int(path.parent.name), state, int(parent), int(session)


def is_alive(pid: int) -> bool:
    return any(found == pid and state != "Z" for found, state, _, _ in processes())


def zombies() -> list[int]:
    return [pid for pid, state, parent, _ in processes() if parent == os.getpid() and state == "Z"]


def session_of(session: int) -> list[int]:
    return [pid for pid, state, _, its_session in processes() if its_session == session and state != "Z"]


def start_script(script: str, folder: Path, **variables: str) -> subprocess.Popen[str]:
    """Starts a script that is a file, as an engine of several ranks needs it, in a session of its own."""
    path = folder / "script.py"
    path.write_text(script)
    return start_python(str(path), **variables)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_qwen3_checkpoint(tmp_path_factory.mktemp("qwen3"), **SMALL)


@pytest.fixture
def nothing_stays_behind() -> Iterator[None]:
    before = set(zombies())
    yield
    assert segments(os.getpid()) == []
    assert set(zombies()) <= before  # looked at first: asking multiprocessing for its children ends them
