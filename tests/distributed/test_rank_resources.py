"""What an engine of several ranks holds of the system: where it listens, and that everything goes with its end."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from nanovllm import LLM, WorkerError
from nanovllm.distributed.worker_pool import WorkerPool
from tests.distributed.faulty_worker import Fault, plant
from tests.distributed.rank_processes import ONLY_LINUX, folder, nothing_stays_behind, pids_of
from tests.small_llm import GREEDY, generate, load

__all__ = ["folder", "nothing_stays_behind"]  # fixtures
pytestmark = [ONLY_LINUX, pytest.mark.usefixtures("nothing_stays_behind")]

LISTENS = "0A"  # a state in /proc/net/tcp
LOOPBACK = "0100007F"  # 127.0.0.1 there


def descriptors(pid: int | None = None) -> dict[int, str]:
    """Descriptors of a process, and what they are."""
    found = {}
    for path in Path(f"/proc/{pid or os.getpid()}/fd").iterdir():
        with suppress(OSError):  # the folder's own
            found[int(path.name)] = str(path.readlink())
    return found


def listens_at(pid: int) -> list[str]:
    """The addresses where a process accepts connections."""
    sockets = set(descriptors(pid).values())
    found = []
    for name in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{name}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == LISTENS and f"socket:[{fields[9]}]" in sockets:
                found.append(fields[1].split(":")[0])
    return found


@pytest.fixture
def without_collection() -> Iterator[None]:
    """Objects go when nobody refers to them, or not at all."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def test_ranks_listen_to_this_machine_alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = len(listens_at(os.getpid()))
    seen: list[list[str]] = []
    wait_until_ready = WorkerPool.wait_until_ready

    def look(pool: WorkerPool) -> None:
        seen.append(listens_at(os.getpid()))
        wait_until_ready(pool)

    monkeypatch.setattr(WorkerPool, "wait_until_ready", look)
    with load(folder, tensor_parallel_size=2) as llm:
        for pid in (os.getpid(), *pids_of(llm)):
            seen.append(listens_at(pid))
    (starting, running, worker) = seen
    assert {*starting, *running, *worker} == {LOOPBACK}
    assert len(starting) == before + 2, "the store, where the ranks meet, and gloo"
    assert len(running) == before + 1, "the store is closed when they have met"
    assert len(worker) == 1


def test_an_engine_s_end_and_a_failed_start_leave_no_descriptor_and_no_thread(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, without_collection: None
) -> None:
    def start_and_exit() -> LLM:
        llm = load(folder, tensor_parallel_size=2)
        generate(llm, [[1, 2]], GREEDY)
        llm.exit()
        return llm

    start_and_exit()  # what torch and multiprocessing open once stays
    before, threads = descriptors(), set(threading.enumerate())
    ended = start_and_exit()
    assert descriptors() == before
    assert set(threading.enumerate()) == threads
    for place in ("attached", "join", "cache"):
        plant(monkeypatch, Fault(1, place, "raise", tmp_path / place))
        with pytest.raises(WorkerError) as caught:
            load(folder, tensor_parallel_size=2)
        assert descriptors() == before, "while the error is kept"
        assert set(threading.enumerate()) == threads
        assert caught.value.rank == 1
    assert ended.llm_engine.is_dead
