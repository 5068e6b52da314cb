from __future__ import annotations

import threading
from collections.abc import Callable

from nanovllm.engine.batch import ScheduledBatch, StepResult
from nanovllm.runner.warm_up import WarmUp


class Handle:
    def wait(self, check: Callable[[], None] | None = None) -> StepResult:
        raise RuntimeError("the results are discarded; an error comes again later")


def test_every_kind_of_step_runs_in_the_background() -> None:
    submitted: list[ScheduledBatch] = []
    started = threading.Event()

    def submit(batch: ScheduledBatch) -> Handle:
        assert started.wait(10), "the caller goes on while steps run"
        submitted.append(batch)
        return Handle()

    warm_up = WarmUp(submit, max_num_seqs=8)
    started.set()
    warm_up.wait()
    kinds = sorted((len(batch.chunks), len(batch.decode_rows)) for batch in submitted)
    assert kinds == [(0, 1), (1, 0)]  # the first decode step failed, so the second was left out


def test_decode_steps_are_of_one_row_and_of_all() -> None:
    submitted: list[ScheduledBatch] = []

    class Done(Handle):
        def wait(self, check: Callable[[], None] | None = None) -> StepResult:
            return StepResult(submitted[-1].decode_rows)

    def submit(batch: ScheduledBatch) -> Done:
        submitted.append(batch)
        return Done()

    WarmUp(submit, max_num_seqs=8).wait()
    assert sorted(len(batch.decode_rows) for batch in submitted) == [0, 1, 8]
