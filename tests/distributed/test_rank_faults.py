"""Whatever becomes of a rank, at whatever place: rank 0 says so, and nothing stays behind.

No test measures how fast. Engines here have deadlines of ten minutes unless a test sets one, so an error that comes
before `PATIENCE` is over came because of the fault; where the deadline itself is tested, it passes on a condition.
"""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nanovllm import EngineDeadError, InvalidArgumentError, SamplingParams, WorkerError
from nanovllm.distributed import stacks, worker_pool
from nanovllm.distributed.worker_pool import WorkerPool
from nanovllm.distributed.worker_process import MessageKind
from nanovllm.engine.batch import ScheduledBatch
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
)
from tests.processes import PATIENCE, until
from tests.small_llm import generate, load, token_ids

__all__ = ["folder", "nothing_stays_behind"]  # fixtures
pytestmark = [ONLY_LINUX, pytest.mark.usefixtures("nothing_stays_behind")]

PROMPTS = [[1, 2, 3], [4, 5]]
CHECK = 4  # the index of `check` among the arguments of `load_weights`


@pytest.fixture
def diary(tmp_path: Path) -> Path:
    return tmp_path / "diary"


@pytest.fixture(autouse=True)
def news_that_come_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a busy machine: of the worker behind a collective's failure, and of a stack that was asked for."""
    monkeypatch.setattr(worker_pool, "_GRACE_SECONDS", 10.0)
    monkeypatch.setattr(stacks, "_SECONDS", 0.5)


def raises_worker_error(function: Callable[[], Any]) -> WorkerError:
    started = time.monotonic()
    with pytest.raises(WorkerError) as caught:
        function()
    assert time.monotonic() - started < PATIENCE
    return caught.value


def pass_deadline_when(
    monkeypatch: pytest.MonkeyPatch, states: str, is_time: Callable[[WorkerPool], bool] = lambda pool: True
) -> None:
    """The deadline of what ranks do together passes when `is_time` and they are at `states`, whenever that is here."""
    within = WorkerPool.within

    @contextmanager
    def watched(pool: WorkerPool, field: str) -> Iterator[None]:
        with within(pool, field):
            limit = pool._limit
            assert limit is not None

            def look() -> None:
                while pool._limit is limit and not (is_time(pool) and states_of(pool) == states):
                    time.sleep(0.02)
                limit.left = 0.0

            threading.Thread(target=look, daemon=True).start()
            yield

    monkeypatch.setattr(WorkerPool, "within", watched)


def states_of(pool: WorkerPool) -> str:
    pids = {rank: process.pid for rank, process in pool._processes.items()}
    return stacks.find_late_rank(pids, pool._stacks, pool._messages.stages, worker_pool._STAGES).states


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
    check_told(raises_worker_error(lambda: load(folder, tensor_parallel_size=2)), fault)


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
            arguments[CHECK]()

    monkeypatch.setattr(startup, "load_weights", never_done)
    check_told(raises_worker_error(lambda: load(folder, tensor_parallel_size=2)), fault)
    loading = set(threading.enumerate()) - others
    assert len(loading) == (0 if checks else 1)
    is_over.set()
    for thread in loading:
        thread.join(PATIENCE)
        assert not thread.is_alive()


def test_ctrl_c_while_rank_0_loads(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ended = threading.Event()

    def takes_long(*arguments: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        try:
            while True:
                time.sleep(0.01)
                arguments[CHECK]()
        finally:
            ended.set()

    monkeypatch.setattr(startup, "load_weights", takes_long)
    with pytest.raises(KeyboardInterrupt):
        load(folder, tensor_parallel_size=2)
    assert ended.wait(PATIENCE)


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
        check_told(raises_worker_error(call), fault)
        assert until(lambda: not any(map(is_alive, pids)))
        with pytest.raises(EngineDeadError, match="was killed by SIGKILL" if how == "kill" else "on purpose"):
            generate(llm, PROMPTS)


def test_a_rank_that_is_killed_while_the_engine_is_idle(folder: Path) -> None:
    with load(folder, tensor_parallel_size=2) as llm:
        generate(llm, PROMPTS)
        os.kill(pids_of(llm)[0], signal.SIGKILL)
        assert until(lambda: executor_of(llm)._workers.failure is not None)
        error = raises_worker_error(llm.memory_report)
        assert str(error) == "Rank 1 was killed by SIGKILL."


def test_a_rank_that_is_killed_in_the_middle_of_its_last_word(
    folder: Path, monkeypatch: pytest.MonkeyPatch, diary: Path
) -> None:
    """Nobody waits for the rest of it: neither rank 0's main thread nor the watch."""
    fault = Fault(1, "last word", "kill", diary)
    plant(monkeypatch, fault)
    with load(folder, tensor_parallel_size=2) as llm:
        check_told(raises_worker_error(executor_of(llm).synchronize), fault)


def test_an_error_of_rank_0_ends_the_others(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with load(folder, tensor_parallel_size=2) as llm:
        pids = pids_of(llm)
        monkeypatch.setattr(executor_of(llm)._runner, "submit", lambda batch: 1 / 0)
        started = time.monotonic()
        with pytest.raises(ZeroDivisionError):
            generate(llm, PROMPTS)
        assert time.monotonic() - started < PATIENCE
        assert not any(map(is_alive, pids))
        with pytest.raises(EngineDeadError, match="division by zero"):
            generate(llm, PROMPTS)


# ---- alive, but hung: deadlines


def test_start_up_has_a_deadline_that_names_the_missing_rank(folder: Path) -> None:
    match = r"Rank 1 kept the others waiting for startup_timeout=0\.05 s \(rank 1 (has not started|is loading)"
    error = raises_worker_error(lambda: load(folder, tensor_parallel_size=2, startup_timeout=0.05))
    assert re.match(match, str(error)), error


def test_a_rank_that_hangs_while_it_loads(folder: Path, monkeypatch: pytest.MonkeyPatch, diary: Path) -> None:
    """The deadline comes when the others are ready, however long that takes here."""
    plant(monkeypatch, Fault(2, "cache", "spin", diary))
    states = "rank 1 waits, rank 2 is loading, and is at work, rank 3 waits"

    def is_time(pool: WorkerPool) -> bool:
        return diary.exists() and pool._messages.stages[1] == pool._messages.stages[3] == MessageKind.READY

    pass_deadline_when(monkeypatch, states, is_time)
    error = raises_worker_error(lambda: load(folder, tensor_parallel_size=4))
    assert error.rank == 2
    assert f"startup_timeout=600 s ({states})" in error.problem
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
    with load(folder, tensor_parallel_size=2 * late) as llm:
        pids = pids_of(llm)
        pass_deadline_when(monkeypatch, states, lambda pool: diary.exists())
        call = executor_of(llm).synchronize if place == "answer" else lambda: generate(llm, PROMPTS)
        error = raises_worker_error(call)
        assert error.rank == late
        problem = f"kept the others waiting for step_timeout=300 s ({states}). Raise it if that is too short"
        assert error.problem.startswith(problem)
        assert ("in happen" in error.traceback) == (how == "spin")
        assert not any(map(is_alive, pids))


def test_rank_0_is_named_when_the_others_wait_for_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And time in which everybody was stopped, by Ctrl-Z or with the lid, is nobody's fault: the clock jumps."""
    ahead = [0.0]
    clock = SimpleNamespace(monotonic=lambda: time.monotonic() + ahead[0], sleep=time.sleep)
    monkeypatch.setattr(worker_pool, "time", clock)
    with load(folder, tensor_parallel_size=2) as llm:
        pool, runner = executor_of(llm)._workers, executor_of(llm)._runner
        with pool.within("step_timeout"):
            limit = pool._limit
            limit.left = left = 500.0
            ahead[0] += 1000
            assert until(lambda: limit.left <= left - 0.3)  # two looks and more
            assert limit.left > left - PATIENCE
        left = limit.left
        time.sleep(0.3)
        assert limit.left >= left - 0.2, "a look may be under way, but nothing counts outside of the block"
        assert pool.failure is None
        generate(llm, PROMPTS)
        submit = runner.submit
        monkeypatch.setattr(runner, "submit", lambda batch: (until(lambda: pool.failure is not None), submit(batch))[1])
        pass_deadline_when(monkeypatch, "rank 1 waits")
        error = raises_worker_error(lambda: generate(llm, PROMPTS))
        assert error.problem.startswith("kept the others waiting for step_timeout=300 s (rank 1 waits).")
        assert error.rank == 0


def test_a_message_that_nobody_reads_has_the_step_s_deadline(folder: Path) -> None:
    with load(folder, tensor_parallel_size=2, step_timeout=0.3) as llm:
        os.kill(pids_of(llm)[0], signal.SIGSTOP)
        started = time.monotonic()
        error = raises_worker_error(lambda: executor_of(llm)._ask(MessageKind.DIAGNOSE, bytes(8 << 20)))
        assert time.monotonic() - started >= 0.3
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
    llm = load(folder, tensor_parallel_size=2)
    generate(llm, PROMPTS)
    pids = pids_of(llm)
    (process,) = executor_of(llm)._workers._processes.values()
    join, limits = process.join, []

    def join_once_it_is_lost(timeout: float | None = None) -> None:
        limits.append(timeout)
        assert until(diary.exists)
        join(None if timeout is None or how == "kill" else 0.1)

    monkeypatch.setattr(process, "join", join_once_it_is_lost)
    llm.exit()
    assert limits[0] is not None
    assert 0 < limits[0] <= 5
    llm.exit()
    assert not any(map(is_alive, pids))


def test_two_engines_of_one_process(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One is interrupted, one is never used and loses its worker; the end of one is not the other's."""
    with load(folder) as one:
        expected = token_ids(generate(one, PROMPTS))
    first, second = (load(folder, tensor_parallel_size=2, pipeline_depth=depth) for depth in (1, 2))
    assert segments(os.getpid()) == []  # the names are gone as soon as all are attached
    assert token_ids(generate(first, PROMPTS)) == expected
    submit, num_steps = first.llm_engine.executor.submit, 0

    def interrupt_the_thirtieth(batch: ScheduledBatch) -> Any:
        nonlocal num_steps
        num_steps += 1
        if num_steps == 30:
            signal.raise_signal(signal.SIGINT)
        return submit(batch)

    with monkeypatch.context() as patched:
        patched.setattr(first.llm_engine.executor, "submit", interrupt_the_thirtieth)
        with pytest.raises(KeyboardInterrupt):
            generate(first, [[7, 8]] * 8, SamplingParams(max_tokens=250, ignore_eos=True))
    assert token_ids(generate(first, PROMPTS)) == expected
    os.kill(pids_of(second)[0], signal.SIGKILL)
    raises_worker_error(lambda: generate(second, PROMPTS))
    second.exit()
    second.exit()
    assert token_ids(generate(first, PROMPTS)) == expected
    first.exit()
