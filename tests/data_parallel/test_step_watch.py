"""StepWatch: an engine with requests must end steps, and any engine must answer."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import pytest

from nanovllm.data_parallel import step_watch
from nanovllm.data_parallel.step_watch import StepWatch
from nanovllm.metrics import MetricsSnapshot
from tests.processes import PATIENCE, until


class Engine:
    """Answers with `figures`, unless it is stopped."""

    def __init__(self, figures: MetricsSnapshot) -> None:
        self.figures = figures
        self.goes_on = threading.Event()
        self.goes_on.set()
        self.is_stopped = threading.Event()
        self.num_answers = 0

    def metrics(self) -> MetricsSnapshot:
        if not self.goes_on.is_set():
            self.is_stopped.set()
            self.goes_on.wait()
        self.num_answers += 1
        return self.figures

    def answer(self) -> None:
        """Waits for further answers."""
        before = self.num_answers
        assert until(lambda: self.num_answers > before + 1)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time that watches see."""
    now = [0.0]
    monkeypatch.setattr(step_watch, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(step_watch, "_ASK_SECONDS", 0.01)
    return now


def passes(watch: StepWatch, clock: list[float], seconds: float) -> bool:
    """Lets time pass, and returns whether the engine hangs then."""
    for _ in range(round(seconds / 0.1)):
        clock[0] += 0.1
        watch.hangs()
    return watch.hangs()


def test_steps_and_idleness_are_signs_of_life(clock: list[float]) -> None:
    engine = Engine(MetricsSnapshot(num_running=1))
    watch = StepWatch(engine, 10)
    engine.answer()
    watch.hangs()
    assert not passes(watch, clock, 9)
    engine.figures = MetricsSnapshot(num_running=1, generation_tokens=1)
    engine.answer()
    assert not passes(watch, clock, 9)
    engine.figures = MetricsSnapshot(generation_tokens=2)
    for _ in range(3):
        engine.answer()
        assert not passes(watch, clock, 9)
    watch.stop()


@pytest.mark.parametrize("field", ["num_running", "num_waiting"])
def test_requests_without_a_step(clock: list[float], field: str) -> None:
    engine = Engine(MetricsSnapshot(**{field: 1}))
    watch = StepWatch(engine, 10)
    engine.answer()
    watch.hangs()
    assert not passes(watch, clock, 9.5)
    assert passes(watch, clock, 1)
    watch.stop()


def test_no_answer(clock: list[float]) -> None:
    engine = Engine(MetricsSnapshot())
    watch = StepWatch(engine, 10)
    engine.answer()
    engine.goes_on.clear()
    assert engine.is_stopped.wait(PATIENCE)
    clock[0] += 1000  # this process was stopped too
    assert not watch.hangs()
    assert passes(watch, clock, 11)
    watch.stop()
    engine.goes_on.set()
