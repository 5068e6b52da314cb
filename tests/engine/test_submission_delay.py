"""The next step waits for arriving requests as long as the device surely has work, and no longer."""

from __future__ import annotations

import pytest

from nanovllm.engine.batch import Chunk, ScheduledBatch
from nanovllm.engine.observer import CollectedStep
from nanovllm.engine.statistics import Load
from nanovllm.engine.submission_delay import SubmissionDelay

LAUNCH = 0.001  # seconds from planning a step to its submission
DECODE = ScheduledBatch.build(0, decode_rows=[0])
MIXED = ScheduledBatch.build(0, decode_rows=[0], chunks=[Chunk(row=1, start=0, length=9)], num_final_chunks=1)


class Run:
    """Steps on a device, on a clock of its own."""

    def __init__(self) -> None:
        self.now = 100.0
        self.delay = SubmissionDelay(lambda: self.now)

    def submit(self, batch: ScheduledBatch) -> None:
        planned = self.now
        self.now += LAUNCH
        self.delay.step_submitted(batch, planned, 0)

    def collect(self, batch: ScheduledBatch, at: float) -> None:
        self.now = at
        load = Load(num_running=0, num_waiting=0, used_blocks=0, num_blocks=1)
        self.delay.step_collected(CollectedStep(batch, 0.0, at, None, [], load))

    def decode(self, seconds: float, steps: int = 3) -> None:
        """Decodes with two steps in flight. One is in flight afterwards, and has just begun."""
        self.submit(DECODE)
        ends = self.now + seconds
        for _ in range(steps):
            self.submit(DECODE)
            self.collect(DECODE, ends)
            ends += seconds


def test_it_waits_until_shortly_before_the_step_in_flight_ends() -> None:
    run = Run()
    run.decode(seconds=0.010)
    assert 0.006 < run.delay.seconds() < 0.010 - LAUNCH
    run.now += 0.004
    assert 0.002 < run.delay.seconds() < 0.006 - LAUNCH
    run.now += 0.006
    assert run.delay.seconds() == 0


def test_it_does_not_wait_beside_short_steps() -> None:
    run = Run()
    run.decode(seconds=0.0012)
    assert run.delay.seconds() == 0


@pytest.mark.parametrize("in_flight", [0, 2])
def test_it_waits_only_while_exactly_one_step_is_in_flight(in_flight: int) -> None:
    run = Run()
    run.decode(seconds=0.010)
    if in_flight == 0:
        run.collect(DECODE, run.now + 0.010)
    else:
        run.submit(DECODE)
    assert run.delay.seconds() == 0


def test_nothing_is_known_before_the_first_decode_step() -> None:
    run = Run()
    run.submit(MIXED)
    assert run.delay.seconds() == 0
    run.submit(MIXED)
    run.collect(MIXED, run.now + 0.05)
    assert run.delay.seconds() == 0


def test_a_step_with_prompt_tokens_is_expected_to_take_at_least_as_long_as_one_without() -> None:
    run = Run()
    run.decode(seconds=0.010)
    run.submit(MIXED)
    run.collect(DECODE, run.now + 0.010)  # the mixed step begins
    run.submit(DECODE)
    run.collect(MIXED, run.now + 0.050)
    assert 0.006 < run.delay.seconds() < 0.010  # the long step is not taken for a decode step


def test_the_shortest_of_the_last_steps_counts() -> None:
    run = Run()
    run.decode(seconds=0.010)
    run.submit(DECODE)
    run.collect(DECODE, run.now)  # after as long as the launch took: it had fewer rows
    assert run.delay.seconds() == 0


def test_nothing_is_in_flight_after_a_failed_step() -> None:
    run = Run()
    run.decode(seconds=0.010)
    run.delay.engine_failed(RuntimeError(), [], goes_on=True)
    assert run.delay.seconds() == 0
    run.decode(seconds=0.010)
    assert run.delay.seconds() > 0
