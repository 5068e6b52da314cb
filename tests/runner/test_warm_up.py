from __future__ import annotations

import threading
from collections.abc import Callable

from nanovllm.engine.batch import ScheduledBatch, StepNeeds, StepResult
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

    warm_up = WarmUp(submit, max_num_rows=8)
    started.set()
    warm_up.wait()
    kinds = sorted((len(batch.chunks), len(batch.decode_rows)) for batch in submitted)
    assert kinds == [(0, 1), (0, 2), (0, 4), (0, 8), (1, 0)]


def test_decode_steps_are_of_powers_of_two_and_of_all_rows() -> None:
    sizes = [len(batch.decode_rows) for batch in steps_of(max_num_rows=12)]
    assert sorted(sizes) == [0, 1, 2, 4, 8, 12]


def test_everything_includes_what_only_some_requests_need() -> None:
    needs = [batch.needs for batch in steps_of(max_num_rows=2, everything=True)]
    assert StepNeeds(truncates=True) in needs
    assert StepNeeds(edits_logits=True) in needs
    assert any(each.num_logprobs for each in needs)
    assert needs.count(StepNeeds(shares_prefix=True)) == 2  # for each size


def steps_of(max_num_rows: int, *, everything: bool = False) -> list[ScheduledBatch]:
    submitted: list[ScheduledBatch] = []

    def submit(batch: ScheduledBatch) -> Handle:
        submitted.append(batch)
        return Handle()

    WarmUp(submit, max_num_rows, everything=everything).wait()
    return submitted


def test_drafts_are_warmed_up_where_there_are_some() -> None:
    submitted: list[ScheduledBatch] = []

    def submit(batch: ScheduledBatch) -> Handle:
        submitted.append(batch)
        return Handle()

    WarmUp(submit, max_num_rows=12, drafts=True).wait()
    assert [batch.section("drafts")["row"].tolist() for batch in submitted if len(batch.section("drafts"))] == [[11]]
