"""Whatever becomes of a rank, at whatever place: rank 0 says so within a second, and nothing stays behind."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nanovllm import EngineDeadError, InvalidArgumentError, SamplingParams, WorkerError
from nanovllm.distributed import worker_pool
from nanovllm.distributed.worker_pool import WorkerPool
from nanovllm.distributed.worker_process import MessageKind
from nanovllm.runner import startup
from tests.distributed.faulty_worker import Fault, plant
from tests.distributed.rank_processes import (
    ONLY_LINUX,
    executor_of,
    folder,
    is_alive,
    nothing_stays_behind,
    pids_of,
    segments,
    until,
)
from tests.small_llm import generate, load, token_ids

__all__ = ["folder", "nothing_stays_behind"]  # fixtures
pytestmark = [ONLY_LINUX, pytest.mark.usefixtures("nothing_stays_behind")]

SECOND = 1.3  # with what a machine of two cores needs to get to it
PROMPTS = [[1, 2, 3], [4, 5]]


@pytest.fixture
def diary(tmp_path: Path) -> Path:
    return tmp_path / "diary"


def raises_worker_error(function: Callable[[], Any], diary: Path | None = None, seconds: float = SECOND) -> WorkerError:
    """Within so many seconds from now, or from what the diary has."""
    started = time.monotonic()
    with pytest.raises(WorkerError) as caught:
        function()
    since = time.monotonic() - (started if diary is None else float(diary.read_text()))
    assert since < seconds
    return caught.value


def check_told(error: WorkerError, fault: Fault) -> None:
    assert error.rank == fault.rank
    if fault.how == "kill":
        assert error.problem == "was killed by SIGKILL."
    elif fault.how == "quit":
        assert error.problem.startswith("ended with exit status 3 and gave no reason.")
        assert ("if __name__ == '__main__'" in error.problem) == (fault.place == "before")
    else:
        assert error.problem == f"failed: LookupError: on purpose: {fault.place}"
        assert f"On rank {fault.rank}:\nTraceback (most recent call last):" in str(error)
        assert "in happen" in error.traceback


# ---- while it starts


@pytest.mark.parametrize(
    ("place", "how"),
    [
        ("before", "kill"),
        ("before", "quit"),
        ("attached", "kill"),
        ("join", "raise"),
        ("load", "kill"),
        ("cache", "raise"),
    ],
)
def test_a_rank_that_is_lost_while_it_starts(
    folder: Path, monkeypatch: pytest.MonkeyPatch, diary: Path, place: str, how: str
) -> None:
    fault = Fault(1, place, how, diary)
    plant(monkeypatch, fault)
    check_told(raises_worker_error(lambda: load(folder, tensor_parallel_size=2), diary), fault)


@pytest.mark.parametrize("checks", [True, False], ids=["between tensors", "in one long call"])
def test_a_rank_that_fails_while_rank_0_loads(
    folder: Path, monkeypatch: pytest.MonkeyPatch, diary: Path, checks: bool
) -> None:
    """Rank 0's own loading ends where it looks up, and is not waited for where it does not."""
    fault = Fault(1, "load", "raise", diary)
    plant(monkeypatch, fault)
    others = set(threading.enumerate())
    is_over = threading.Event()

    def never_done(*arguments: Any) -> None:
        while not is_over.wait(0.01 if checks else None):
            arguments[-1]()

    monkeypatch.setattr(startup, "load_weights", never_done)
    check_told(raises_worker_error(lambda: load(folder, tensor_parallel_size=2), diary), fault)
    loading = set(threading.enumerate()) - others
    assert len(loading) == (0 if checks else 1)
    is_over.set()
    for thread in loading:
        thread.join(5)
        assert not thread.is_alive()


def test_ctrl_c_while_rank_0_loads(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ended = threading.Event()

    def takes_long(*arguments: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        try:
            for _ in range(1000):
                time.sleep(0.01)
                arguments[-1]()
        finally:
            ended.set()

    monkeypatch.setattr(startup, "load_weights", takes_long)
    with pytest.raises(KeyboardInterrupt):
        load(folder, tensor_parallel_size=2)
    assert ended.is_set()


# ---- in steps


@pytest.mark.parametrize(
    ("size", "place", "how"),
    [
        (2, "prefill", "kill"),
        (4, "decode", "kill"),
        (2, "decode", "raise"),
        (2, "gather", "raise"),
        (2, "answer", "kill"),
    ],
)
def test_a_rank_that_is_lost_in_a_step(
    folder: Path, monkeypatch: pytest.MonkeyPatch, diary: Path, size: int, place: str, how: str
) -> None:
    fault = Fault(size - 1, place, how, diary)
    plant(monkeypatch, fault)
    with load(folder, tensor_parallel_size=size) as llm:
        pids = pids_of(llm)
        call = executor_of(llm).synchronize if place == "answer" else lambda: generate(llm, PROMPTS)
        check_told(raises_worker_error(call, diary), fault)
        assert until(lambda: not any(map(is_alive, pids)), 1)
        with pytest.raises(EngineDeadError, match="was killed by SIGKILL" if how == "kill" else "on purpose"):
            generate(llm, PROMPTS)


def test_a_rank_that_is_killed_while_the_engine_is_idle(folder: Path) -> None:
    with load(folder, tensor_parallel_size=2) as llm:
        generate(llm, PROMPTS)
        os.kill(pids_of(llm)[0], signal.SIGKILL)
        assert until(lambda: executor_of(llm)._workers.failure is not None, 1)
        error = raises_worker_error(llm.memory_report)
        assert str(error) == "Rank 1 was killed by SIGKILL."


def test_a_rank_that_is_killed_in_the_middle_of_its_last_word(
    folder: Path, monkeypatch: pytest.MonkeyPatch, diary: Path
) -> None:
    """Nobody waits for the rest of it: neither rank 0's main thread nor the watch."""
    fault = Fault(1, "last word", "kill", diary)
    plant(monkeypatch, fault)
    with load(folder, tensor_parallel_size=2) as llm:
        check_told(raises_worker_error(executor_of(llm).synchronize, diary), fault)


def test_an_error_of_rank_0_ends_the_others(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with load(folder, tensor_parallel_size=2) as llm:
        pids = pids_of(llm)
        monkeypatch.setattr(executor_of(llm)._runner, "submit", lambda batch: 1 / 0)
        started = time.monotonic()
        with pytest.raises(ZeroDivisionError):
            generate(llm, PROMPTS)
        assert time.monotonic() - started < 1
        assert not any(map(is_alive, pids))
        with pytest.raises(EngineDeadError, match="division by zero"):
            generate(llm, PROMPTS)


# ---- alive, but hung: deadlines


def test_start_up_has_a_deadline_that_names_the_missing_rank(folder: Path) -> None:
    match = r"Rank 1 kept the others waiting for startup_timeout=0\.05 s \(rank 1 (has not started|is loading)"
    started = time.monotonic()
    with pytest.raises(WorkerError, match=match):
        load(folder, tensor_parallel_size=2, startup_timeout=0.05)
    assert time.monotonic() - started < 5


def test_a_rank_that_hangs_while_it_loads(folder: Path, monkeypatch: pytest.MonkeyPatch, diary: Path) -> None:
    """The deadline comes when the others are ready, however long that takes here."""
    plant(monkeypatch, Fault(2, "cache", "spin", diary))
    wait = WorkerPool.wait_until_ready

    def at_ready(pool: WorkerPool) -> bool:
        stages = pool._messages.stages
        return stages[1] == stages[3] == MessageKind.READY

    def wait_with_less_patience(pool: WorkerPool) -> None:
        assert until(lambda: (pool._messages.read_reports(), at_ready(pool))[1], 30)
        assert pool._limit is not None
        pool._limit.left = 0.1
        wait(pool)

    monkeypatch.setattr(WorkerPool, "wait_until_ready", wait_with_less_patience)
    error = raises_worker_error(lambda: load(folder, tensor_parallel_size=4), diary, 10)
    assert error.rank == 2
    assert "startup_timeout=600 s (rank 1 waits, rank 2 is loading, and is at work, rank 3 waits)" in error.problem
    assert "in happen" in error.traceback


@pytest.mark.parametrize(
    ("how", "place", "states"),
    [
        ("spin", "decode", "rank 1 waits, rank 2 is at work, rank 3 waits"),
        ("stop", "prefill", "rank 1 does not react"),
        ("stop", "answer", "rank 1 does not react"),
    ],
)
def test_a_rank_that_hangs_in_a_step(
    folder: Path, monkeypatch: pytest.MonkeyPatch, diary: Path, how: str, place: str, states: str
) -> None:
    late = 2 if how == "spin" else 1
    plant(monkeypatch, Fault(late, place, how, diary))
    with load(folder, tensor_parallel_size=2 * late, step_timeout=0.7) as llm:
        pids = pids_of(llm)
        call = executor_of(llm).synchronize if place == "answer" else lambda: generate(llm, PROMPTS)
        error = raises_worker_error(call, diary, 0.7 + SECOND)
        assert time.monotonic() - float(diary.read_text()) >= 0.5
        assert error.rank == late
        problem = f"kept the others waiting for step_timeout=0.7 s ({states}). Raise it if that is too short"
        assert error.problem.startswith(problem)
        assert ("in happen" in error.traceback) == (how == "spin")
        assert not any(map(is_alive, pids))


def test_rank_0_is_named_when_the_others_wait_for_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And time in which everybody was stopped, by Ctrl-Z or with the lid, is nobody's fault: the clock jumps."""
    ahead = [0.0]
    clock = SimpleNamespace(monotonic=lambda: time.monotonic() + ahead[0], sleep=time.sleep)
    monkeypatch.setattr(worker_pool, "time", clock)
    with load(folder, tensor_parallel_size=2, step_timeout=0.6) as llm:
        with executor_of(llm)._workers.within("step_timeout"):
            time.sleep(0.15)
            ahead[0] += 1000
            time.sleep(0.15)
        time.sleep(0.5)
        assert executor_of(llm)._workers.failure is None
        generate(llm, PROMPTS)
        submit = executor_of(llm)._runner.submit
        monkeypatch.setattr(executor_of(llm)._runner, "submit", lambda batch: (time.sleep(1.5), submit(batch))[1])
        error = raises_worker_error(lambda: generate(llm, PROMPTS), seconds=3)
        assert error.problem.startswith("kept the others waiting for step_timeout=0.6 s (rank 1 waits).")
        assert error.rank == 0


def test_a_message_that_nobody_reads_has_the_step_s_deadline(folder: Path) -> None:
    with load(folder, tensor_parallel_size=2, step_timeout=0.3) as llm:
        os.kill(pids_of(llm)[0], signal.SIGSTOP)
        error = raises_worker_error(lambda: executor_of(llm)._ask(MessageKind.DIAGNOSE, bytes(8 << 20)), seconds=2)
        assert "step_timeout=0.3 s (rank 1 does not react)" in error.problem


@pytest.mark.parametrize("field", ["startup_timeout", "step_timeout"])
@pytest.mark.parametrize("value", [0, -1, True, "1", float("nan"), float("inf"), 86401])
def test_deadlines_that_are_none(field: str, value: Any) -> None:
    with pytest.raises(InvalidArgumentError, match=f"{field}=.*a number of seconds > 0, at most 86400"):
        load(Path("tiny"), **{field: value})


# ---- at its end


@pytest.mark.parametrize("how", ["kill", "stop"])
def test_a_rank_that_is_lost_while_it_ends(
    folder: Path, monkeypatch: pytest.MonkeyPatch, diary: Path, how: str
) -> None:
    plant(monkeypatch, Fault(1, "exit", how, diary))
    monkeypatch.setattr("nanovllm.distributed.worker_pool._EXIT_SECONDS", 0.5)
    llm = load(folder, tensor_parallel_size=2)
    generate(llm, PROMPTS)
    pids = pids_of(llm)
    started = time.monotonic()
    llm.exit()
    assert diary.exists()
    assert time.monotonic() - started < 2
    llm.exit()
    assert not any(map(is_alive, pids))


def test_two_engines_of_one_process(folder: Path) -> None:
    """One is interrupted, one is never used and loses its worker; the end of one is not the other's."""
    with load(folder) as one:
        expected = token_ids(generate(one, PROMPTS))
    first, second = (load(folder, tensor_parallel_size=2, pipeline_depth=depth) for depth in (1, 2))
    assert segments(os.getpid()) == []  # the names are gone as soon as all are attached
    assert token_ids(generate(first, PROMPTS)) == expected
    threading.Timer(0.15, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        generate(first, [[7, 8]] * 8, SamplingParams(max_tokens=250, ignore_eos=True))
    assert token_ids(generate(first, PROMPTS)) == expected
    os.kill(pids_of(second)[0], signal.SIGKILL)
    raises_worker_error(lambda: generate(second, PROMPTS))
    second.exit()
    second.exit()
    assert token_ids(generate(first, PROMPTS)) == expected
    first.exit()
