"""The overhead of logging, measured on a machine whose times the test decides, and on an engine without a model."""

from __future__ import annotations

import json
import logging
import random
import time
from collections.abc import Iterator

import pytest

from nanovllm.benchmarks import logging_overhead
from nanovllm.benchmarks.logging_overhead import (
    BLOCK_STEPS,
    OFF,
    DecodeSteps,
    Times,
    WaitClock,
    measure_overheads,
    median_interval,
)
from nanovllm.benchmarks.settings import WorkloadError
from nanovllm.logs import events
from nanovllm.utils.logger import configure_logging
from tests.engine.test_llm_engine import make_engine

logger = logging.getLogger("nanovllm.engine.llm_engine")
ADDED = {OFF: 0.0, logging.WARNING: 0.0, logging.INFO: 0.01, logging.DEBUG: 0.05}  # shares of a block's time


@pytest.fixture(autouse=True)
def levels_stay() -> Iterator[None]:
    package = logging.getLogger("nanovllm")
    level = package.level
    yield
    assert package.level == level
    configure_logging()


class Machine:
    """Runs blocks that take a second, and as much longer as the level says. Each takes longer than the one before."""

    def __init__(self, drift: float = 0.0, noise: float = 0.0) -> None:
        self.drift, self.noise, self.random = drift, noise, random.Random(0)
        self.levels: list[int] = []
        self.now = 0.0

    def clock(self) -> float:
        return self.now

    def run(self) -> Times:
        level = logger.getEffectiveLevel()
        seconds = (1.0 + self.drift * len(self.levels)) * (1.0 + ADDED[level])
        busy = self.noise if self.random.random() < 0.2 else 0.0  # another process takes the core
        self.levels.append(level)
        self.now += seconds
        return Times(wall=seconds * (1 + busy), cpu=seconds / 2)


def test_each_level_is_measured_against_off_although_steps_grow_longer() -> None:
    machine = Machine(drift=0.001)
    overheads = measure_overheads(machine.run, num_pairs=5, clock=machine.clock)
    assert [overhead.level for overhead in overheads] == ["WARNING", "INFO", "DEBUG"]
    for overhead, added in zip(overheads, (0.0, 0.01, 0.05), strict=True):
        assert len(overhead.pairs) == 5
        assert overhead.cpu_shares == pytest.approx([added] * 5, abs=1e-6)
        assert overhead.wall_shares == pytest.approx([added] * 5, abs=1e-6)


def test_what_disturbs_some_blocks_does_not_move_the_median() -> None:
    machine = Machine(noise=0.5)
    info = measure_overheads(machine.run, num_pairs=41, max_seconds=1e9, clock=machine.clock)[1].entry()
    assert info["cpu"]["median"] == pytest.approx(0.01)
    assert info["wall"]["median"] == pytest.approx(0.01)
    assert info["wall"]["low"] < 0.01 + 1e-9
    assert info["wall"]["high"] > 0.01 - 1e-9
    assert info["cpu_us_per_step"]["median"] == pytest.approx(0.005 * 1e6 / BLOCK_STEPS)


def test_it_ends_in_time_with_two_pairs_at_least() -> None:
    for max_seconds, num_pairs in ((0.0, 2), (40.0, 3), (1e9, 60)):
        machine = Machine()
        overheads = measure_overheads(machine.run, 60, max_seconds, clock=machine.clock)
        assert [len(overhead.pairs) for overhead in overheads] == [num_pairs] * 3


def test_lines_are_counted_and_appear_nowhere(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(logging.root, "handlers", [])
    configure_logging()

    def run() -> Times:
        events.generation_start.log(logger, num_prompts=1)
        return Times(1.0, 1.0)

    warning, info, debug = measure_overheads(run, num_pairs=3)
    assert warning.bytes_written == 0
    assert 0 < info.bytes_written == debug.bytes_written
    assert info.bytes_written % 6 == 0  # two blocks in each of three pairs
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("count", "low", "high"),
    [(2, 0, 1), (5, 0, 4), (6, 0, 5), (9, 1, 7), (40, 13, 26), (60, 21, 38)],  # from tables of the sign test
)
def test_the_interval_of_a_median(count: int, low: int, high: int) -> None:
    values = [float(value) for value in range(count)]
    random.Random(0).shuffle(values)
    assert median_interval(values) == (low, high)


def test_every_measured_step_decodes_all_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging_overhead, "_GENERATION_STEPS", 30)  # the requests begin again
    with make_engine(max_num_seqs=2, max_model_len=64)[0] as engine:
        steps = DecodeSteps(engine, WaitClock(), num_seqs=2)
        for _ in range(5):
            times = steps()
            assert times.wall > 0
            assert times.cpu > 0
            assert engine.scheduler.load.num_running == 2
            assert not engine.num_waiting_tokens
        json.dumps(measure_overheads(steps, num_pairs=2)[0].entry())
        steps.stop()
        assert not engine.has_unfinished_requests()


def test_requests_that_end_too_soon_are_refused() -> None:
    with (
        make_engine(max_num_seqs=4, max_model_len=24)[0] as engine,
        pytest.raises(WorkloadError, match="--max-model-len"),
    ):
        DecodeSteps(engine, WaitClock(), num_seqs=4)()


def test_waiting_for_the_device_is_not_the_host_s_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "thread_time", lambda: now[0])
    clock = WaitClock()
    for phase, seconds in (("schedule", 1.0), ("launch", 2.0), ("wait", 4.0), ("update", 8.0), ("idle", 16.0)):
        clock.phase(phase)  # type: ignore[arg-type]
        now[0] += seconds
    assert clock.waited == 4.0
