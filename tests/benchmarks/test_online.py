"""Sending and measuring requests, with engines whose times are known."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import cast

import pytest

from nanovllm.benchmarks.arrivals import OnlineRequest
from nanovllm.benchmarks.online import OnlineRun, RequestRecord, replay, token_arrivals
from tests.benchmarks.virtual_time import VirtualLoop, run_virtually


class TimedEngine:
    """Yields what a request's script says: (seconds to wait, tokens so far), or an error to raise.

    The script is chosen by the first token of the prompt.
    """

    def __init__(self, *scripts: list[tuple[float, int | None] | Exception]) -> None:
        self._scripts = scripts
        self.num_running = 0

    async def stream(self, request: OnlineRequest) -> AsyncIterator[int | None]:
        self.num_running += 1
        try:
            for step in self._scripts[request.prompt[0]]:
                if isinstance(step, Exception):
                    raise step
                await asyncio.sleep(step[0])
                yield step[1]
        finally:
            self.num_running -= 1


def request(index: int, at: float, output_len: int, script: int = 0) -> OnlineRequest:
    return OnlineRequest(index, at, [script, 1, 2], output_len)


def records_of(engine: TimedEngine, *requests: OnlineRequest) -> list[RequestRecord]:
    run = OnlineRun(requests)
    run_virtually(replay(engine, run))
    return sorted(run.records, key=lambda record: record.index)


def test_times_of_one_request() -> None:
    """A delta of three tokens after 0.3 s counts as three gaps of 0.1 s; the longest gap is the 0.3 s."""
    (record,) = records_of(TimedEngine([(0.5, 1), (0.1, 2), (0.3, 5)]), request(0, at=2.0, output_len=5))
    assert record.error is None
    assert record.ttft == pytest.approx(0.5)
    assert record.latency == pytest.approx(0.9)
    assert record.gaps == pytest.approx([0.1, 0.1, 0.1, 0.1])
    assert record.mean_itl == pytest.approx(0.1)
    assert record.longest_gap == pytest.approx(0.3)
    assert (record.at, record.lateness, record.prompt_len, record.num_output_tokens) == (2.0, 0.0, 3, 5)


def test_the_first_delta_is_no_gap_whatever_its_size() -> None:
    (record,) = records_of(TimedEngine([(0.5, 4)]), request(0, at=0, output_len=4))
    assert (record.gaps, record.longest_gap, record.mean_itl) == ([], 0.0, 0.0)
    assert record.ttft == record.latency == pytest.approx(0.5)


def test_requests_are_sent_when_they_are_due_whatever_the_others_do() -> None:
    engine = TimedEngine([(10.0, 1)])
    run = OnlineRun([request(index, at=0.5 * index, output_len=1) for index in range(4)])
    run_virtually(replay(engine, run))
    assert [record.lateness for record in run.records] == pytest.approx([0, 0, 0, 0])
    assert run.seconds == pytest.approx(11.5)


def test_a_loop_that_is_held_up_makes_the_generator_late() -> None:
    class Blocking(TimedEngine):
        async def stream(self, request: OnlineRequest) -> AsyncIterator[int | None]:
            if request.index == 0:
                cast(VirtualLoop, asyncio.get_running_loop()).spend(0.25)
            async for num_tokens in super().stream(request):
                yield num_tokens

    first, second = records_of(Blocking([(0.1, 1)]), request(0, 0.0, 1), request(1, 0.2, 1))
    assert first.lateness == pytest.approx(0.0)
    assert second.lateness == pytest.approx(0.05)
    assert second.ttft == pytest.approx(0.1)  # from when it was sent


def test_what_fails_is_counted_and_stops_no_other() -> None:
    engine = TimedEngine(
        [(0.1, 1), (0.1, 2)],
        [(0.1, 1), ConnectionResetError("gone")],
        [(0.1, 1)],
        [ValueError("x" * 1000)],
    )
    good, broken, short, refused = records_of(engine, *(request(index, 0, 2, script=index) for index in range(4)))
    assert good.error is None
    assert broken.error == "ConnectionResetError: gone"
    assert broken.num_output_tokens == 1
    assert short.error == "It ended after 1 of 2 tokens."
    assert refused.error is not None
    assert len(refused.error) == 300
    assert refused.ttft is None


def test_an_interrupt_leaves_no_request_behind_and_keeps_the_records() -> None:
    engine = TimedEngine([(0.1, 1)], [(1e6, 1)])
    run = OnlineRun([request(0, 0, 1), request(1, 0, 1, script=1), request(2, 1e9, 1)])

    async def interrupt() -> None:
        task = asyncio.create_task(replay(engine, run))
        await asyncio.sleep(5)
        assert engine.num_running == 1
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert engine.num_running == 0

    run_virtually(interrupt())
    assert [record.index for record in run.records] == [0]
    assert run.seconds == pytest.approx(0.1)


def test_deltas_that_repeat_a_number_bring_nothing() -> None:
    assert token_arrivals([(0.1, 0), (0.2, 2), (0.3, 2), (0.4, 3)]) == [(0.2, 2), (0.4, 1)]
    assert token_arrivals([]) == []


def test_deltas_without_a_number_share_the_final_one() -> None:
    assert token_arrivals([(0.1, None), (0.2, None), (0.3, None), (0.4, 5)]) == [(0.1, 2), (0.2, 2), (0.3, 1)]
    assert token_arrivals([(0.1, None), (0.2, None), (0.3, 1)]) == [(0.1, 1)]
    assert token_arrivals([(0.1, None), (0.2, None)]) == []  # nothing ever said a number
    # Numbers in the stream count; a delta without one, such as that of the role, does not.
    assert token_arrivals([(0.1, None), (0.2, 1), (0.3, 2)]) == [(0.2, 1), (0.3, 1)]
