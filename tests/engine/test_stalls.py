"""Why a sequence waited for its next token, where a step says it by what it left out."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from nanovllm.engine.observer import EngineObserver, SampledStep
from nanovllm.engine.row_table import RowTable
from nanovllm.engine.stalls import Stalls
from tests.engine.scheduler_driver import Driver


class Steps:
    """Two sequences in rows of their own, and steps a second apart that give chosen rows a token."""

    def __init__(self) -> None:
        self.stalls = Stalls(EngineObserver())
        self.driver = Driver()
        sequences = [self.driver.add(3), self.driver.add(3)]
        batch = self.driver.launch()
        assert batch is not None
        self.batch: Any = batch
        self.rows: RowTable = self.driver.scheduler.rows
        self.seq_of = {sequence.row: sequence.seq_id for sequence in sequences}
        for sequence in sequences:
            self.stalls.sequence_scheduled(sequence, 0)
        self.load = self.driver.scheduler.load
        self.now = 100.0
        self.last = dict.fromkeys(self.seq_of, np.inf)

    def step(self, *rows: int, gpu_ms: float | None = None) -> None:
        self.now += 1
        gaps = np.array([self.now - self.last[row] for row in rows])
        sampled = np.array(rows, dtype=np.int32)
        self.stalls.tokens_sampled(SampledStep(self.batch, self.rows, sampled, gaps, self.now, gpu_ms, self.load))
        self.last.update(dict.fromkeys(rows, self.now))


@pytest.mark.parametrize(("has_grammar", "cause"), [(True, "grammar"), (False, "blocks")])
def test_a_row_that_a_step_left_out(has_grammar: bool, cause: str) -> None:
    steps = Steps()
    first, second = steps.seq_of
    steps.rows.has_grammar[second] = has_grammar
    steps.step(first, second)
    steps.step(first)
    steps.step(first, second)
    ordinary, skipped = (steps.stalls.take(steps.seq_of[row]) for row in (first, second))
    assert ordinary is not None
    assert skipped is not None
    assert (ordinary.seconds, ordinary.cause) == (1, "prefill")
    assert (skipped.seconds, skipped.cause) == (2, cause)


@pytest.mark.parametrize(("gpu_ms", "cause"), [(100.0, "host"), (900.0, "decode"), (None, "decode")])
def test_the_device_waited_for_the_host(gpu_ms: float | None, cause: str) -> None:
    steps = Steps()
    (first, _) = steps.seq_of
    steps.driver.collect()
    steps.batch = steps.driver.launch()  # a decode step
    steps.step(first)
    steps.step(first, gpu_ms=gpu_ms)
    stall = steps.stalls.take(steps.seq_of[first])
    assert stall is not None
    assert (stall.seconds, stall.cause) == (1, cause)


def test_nothing_is_kept_of_a_sequence_that_has_ended() -> None:
    steps = Steps()
    steps.step(*steps.seq_of)
    for seq_id in steps.seq_of.values():
        assert steps.stalls.take(seq_id) is None, "one token has no gap"
    kept = steps.stalls
    assert not any([kept._rows, kept._kept, kept._admitted, kept._preemptions])
