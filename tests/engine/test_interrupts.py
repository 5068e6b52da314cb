"""Ctrl-C at any line of adding, aborting, discarding, stepping and recovering leaves a whole engine."""

from __future__ import annotations

import itertools
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import pytest

from nanovllm import LLM, LLMEngine, SamplingParams, StepFailedError
from tests.engine.breakable_executor import BreakableExecutor
from tests.engine.simulated_executor import expected_output
from tests.engine.stepping_clock import Clock, make_timed_engine
from tests.engine.test_llm_engine import greedy, is_empty, make_engine, run, tokens
from tests.interrupts import Interrupter, Place, places

ENGINE = ("engine/llm_engine.py", "engine/unfinished_requests.py", "engine/turns.py", "requests/parallel_sampling.py")
STATE = ("engine/scheduler.py", "engine/block_manager.py", "engine/row_table.py")
OBSERVERS = (
    "engine/observer.py",
    "engine/request_tracker.py",
    "engine/stalls.py",
    "engine/queue_waits.py",
    "engine/engine_log.py",
)
CALLS = (*ENGINE, "nanovllm/llm.py", "nanovllm/feed.py", "nanovllm/streaming.py")
SEVERAL = SamplingParams(n=3, max_tokens=4, ignore_eos=True)
SETTINGS = {"pipeline_depth": 2, "num_blocks": 14, "max_num_seqs": 3, "max_num_batched_tokens": 8}


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """A log line a step, of thousands of steps, takes most of the time."""
    logger = logging.getLogger("nanovllm")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    yield
    logger.setLevel(level)


def check_whole(engine: LLMEngine) -> None:
    """Nothing is left once the engine has had its steps, and the next request has its tokens."""
    run(engine)
    assert is_empty(engine)
    assert not engine._unfinished.requests()
    for request_id in ("a", "b", "c"):  # the ids are free
        engine.add_request(request_id, [1, 2, 3, 4, 5], greedy())
    outputs = run(engine)
    assert [tokens(output) for output in outputs.values()] == [expected_output([1, 2, 3, 4, 5], 5, 64, True)] * 3
    assert is_empty(engine)


def use(engine: LLMEngine) -> None:
    """Adds, runs, aborts and discards requests with one completion and with several."""
    engine.add_request("a", [1, 2, 3, 4, 5] * 2, greedy())
    engine.add_request("b", [1, 2, 3, 4, 5] * 2, SEVERAL)
    engine.step()
    engine.add_request("c", [1, 2, 3], SEVERAL)
    engine.add_request("d", [4], greedy(9))
    engine.discard_requests(["c", "unknown"])
    engine.step()
    engine.abort_request("a")
    engine.reset_prefix_cache()
    engine.step()
    engine.discard_requests(["d"])
    engine.drain()
    while engine.has_unfinished_requests():
        engine.step()
    engine.add_request("e", [1], greedy(1))
    engine.step()


def interrupted(place: Place, files: tuple[str, ...], call: Callable[[], object]) -> bool:
    interrupter = Interrupter(files, place)
    with interrupter.tracing(), suppress(KeyboardInterrupt):
        call()
    return interrupter.has_fired


def at_every_line(files: tuple[str, ...], use: Callable[[LLMEngine, BreakableExecutor], object]) -> int:
    """Interrupts `use` of a new engine at each line of `files`. Returns the number of lines.

    Time passes with steps alone, so that every engine runs the same lines.
    """
    engine, executor = make_timed_engine(Clock(), **SETTINGS)
    lines = places(files, lambda: use(engine, executor))
    for place in lines:
        engine, executor = make_timed_engine(Clock(), **SETTINGS)
        assert interrupted(place, files, lambda: use(engine, executor)), place  # noqa: B023
        try:
            check_whole(engine)
        except BaseException as error:
            raise AssertionError(f"interrupted at {place}") from error
    return len(lines)


@pytest.mark.parametrize("files", [ENGINE, STATE, OBSERVERS])
def test_at_every_line_of_the_engine(files: tuple[str, ...]) -> None:
    assert at_every_line(files, lambda engine, executor: use(engine)) > 100


def llm_with(engine: LLMEngine) -> LLM:
    llm = object.__new__(LLM)
    llm.llm_engine, llm._counter = engine, itertools.count()
    return llm


def test_at_every_line_of_a_generation_and_of_a_stream() -> None:
    """Nobody cleans up after the interrupted call, whose frames are alive as long as its exception is."""

    def use(engine: LLMEngine, executor: BreakableExecutor) -> None:
        llm = llm_with(engine)
        prompts = [[1, 2, 3], [1, 2, 3, 4, 5], []]
        llm.generate(prompts, [SEVERAL, greedy(), greedy()], use_tqdm=False)
        stream = llm.stream(prompts, greedy())
        for _ in range(4):
            next(stream)
        stream.close()

    assert at_every_line(CALLS, use) > 150


def test_again_at_every_line_of_the_recovery() -> None:
    """A second Ctrl-C. The first one comes while a step is collected."""

    def use(engine: LLMEngine, executor: BreakableExecutor) -> None:
        engine.add_request("a", [1, 2, 3, 4, 5], greedy())
        engine.add_request("b", [1, 2, 3], SEVERAL)
        engine.step()
        executor.failures["collect"] = KeyboardInterrupt()
        tracer = sys.gettrace()
        sys.settrace(None)
        recover = engine._recover

        def traced(*arguments: Any) -> None:
            sys.settrace(tracer)
            recover(*arguments)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(engine, "_recover", traced)
            with pytest.raises(KeyboardInterrupt):
                engine.step(())

    assert at_every_line((*ENGINE, *STATE), use) > 50


def test_an_interrupted_step_gives_those_that_it_did_not_return_an_error() -> None:
    engine, executor = make_engine()
    engine.add_request("others", [1, 2], greedy())
    engine.add_request("mine", [1, 2], greedy())
    engine.step(["mine"])
    executor.failures["collect"] = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        engine.step(["mine"])
    engine.add_request("next", [1, 2], greedy(1))
    outputs = run(engine)
    assert outputs.keys() == {"others", "next"}
    assert isinstance(outputs["others"].error, StepFailedError)
    assert "KeyboardInterrupt" in str(outputs["others"].error)
    assert outputs["next"].error is None
    assert is_empty(engine)
