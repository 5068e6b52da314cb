"""DeviceStepHandle: CUDA events are recorded again once their step is collected, and not before."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch

from nanovllm.kernels.logprobs import SampledTokens
from nanovllm.runner.step_handle import DeviceStepHandle, EventPool


class FakeEvent:
    """An event of a device that ends everything when it is waited for; each record takes a second."""

    created: ClassVar[list[FakeEvent]] = []
    now = 0.0

    def __init__(self, enable_timing: bool = False) -> None:
        self.has_time, self.at, self.is_done = enable_timing, 0.0, True
        FakeEvent.created.append(self)

    def record(self, stream: str) -> None:
        assert stream == "current stream"
        assert self.is_done, "it is still in use"
        FakeEvent.now += 1.0
        self.at, self.is_done = FakeEvent.now, False

    def synchronize(self) -> None:
        for event in FakeEvent.created:
            event.is_done = event.is_done or event.at <= self.at

    def query(self) -> bool:
        return self.is_done

    def elapsed_time(self, end: FakeEvent) -> float:
        assert self.has_time
        assert end.has_time
        return (end.at - self.at) * 1e3


@pytest.fixture
def pool(monkeypatch: pytest.MonkeyPatch) -> EventPool:
    monkeypatch.setattr(FakeEvent, "created", [])
    cuda: Any = SimpleNamespace(Event=FakeEvent, current_stream=lambda device: "current stream")
    monkeypatch.setattr(torch, "cuda", cuda)
    return EventPool(torch.device("cuda"))


def launch(pool: EventPool, *, is_timed: bool) -> DeviceStepHandle:
    began = pool.record(with_time=True) if is_timed else None
    sampled = SampledTokens(torch.zeros(1, dtype=torch.int32), None)
    return DeviceStepHandle(sampled, done=pool.record(with_time=is_timed), began=began, events=pool)


def test_two_steps_in_flight_need_four_events_however_many_steps_there_are(pool: EventPool) -> None:
    in_flight = [launch(pool, is_timed=True)]
    for _ in range(20):
        in_flight.append(launch(pool, is_timed=True))
        assert in_flight.pop(0).wait().gpu_ms == 1e3
    assert len(FakeEvent.created) == 4


def test_events_without_a_time_are_not_taken_for_timed_ones(pool: EventPool) -> None:
    for is_timed in (False, True, False, True):
        assert (launch(pool, is_timed=is_timed).wait().gpu_ms is None) is not is_timed
    assert [event.has_time for event in FakeEvent.created] == [False, True, True]


def test_the_events_of_a_step_that_is_not_collected_are_not_used_again(pool: EventPool) -> None:
    def stop() -> None:
        raise TimeoutError

    lost = launch(pool, is_timed=True)
    with pytest.raises(TimeoutError):
        lost.wait(stop)
    launch(pool, is_timed=True)
    assert len(FakeEvent.created) == 4


def test_there_are_no_events_on_a_cpu() -> None:
    pool = EventPool(torch.device("cpu"))
    assert pool.record(with_time=True) is None
    assert launch(pool, is_timed=True).wait().gpu_ms is None
