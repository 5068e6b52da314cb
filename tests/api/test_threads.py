"""Several threads use one engine: they share steps, and each gets its own tokens."""

from __future__ import annotations

import itertools
import random
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from nanovllm import LLM, EngineDeadError, InvalidStateError, LLMEngine, SamplingParams, StepFailedError
from nanovllm.engine.batch import StepResult
from tests.api.test_streaming import join
from tests.engine.breakable_executor import BreakableExecutor
from tests.engine.simulated_executor import Handle, expected_output
from tests.engine.test_llm_engine import greedy, is_empty, make_engine, run, tokens
from tests.models.qwen3_checkpoints import make_qwen3_checkpoint
from tests.processes import WATCHDOG, until
from tests.small_llm import assert_empty, generate, load, token_ids

LONG = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)


def llm_with(engine: LLMEngine) -> LLM:
    """Returns an LLM on a simulated engine."""
    llm = object.__new__(LLM)
    llm.llm_engine, llm._counter = engine, itertools.count()
    return llm


class Gate:
    """Holds an executor's steps before they are collected."""

    def __init__(self, executor: BreakableExecutor) -> None:
        self.reached, self.opened = threading.Event(), threading.Event()
        original = executor.collect

        def collect(handle: Handle) -> StepResult:
            self.reached.set()
            assert self.opened.wait(WATCHDOG)
            return original(handle)

        executor.collect = collect  # type: ignore[method-assign]


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(16) as pool:
        yield pool


def test_every_thread_gets_its_tokens_and_steps_are_shared(tmp_path: Path, threads: ThreadPoolExecutor) -> None:
    prompts = [[10 + index] * (3 + index) for index in range(8)]
    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
    with load(make_qwen3_checkpoint(tmp_path), dtype="float32", pipeline_depth=2) as llm:
        expected = token_ids(generate(llm, prompts, params))
        steps = llm.llm_engine.statistics.num_steps
        together = threading.Barrier(len(prompts))

        def ask(index: int) -> list[int]:
            together.wait(WATCHDOG)
            if index % 2:
                return generate(llm, prompts[index], params)[0]["token_ids"]
            return join(list(llm.stream(prompts[index], params))).token_ids

        assert list(threads.map(ask, range(len(prompts)))) == expected
        llm.llm_engine.drain()
        assert llm.llm_engine.statistics.num_steps - steps < 8 * 24 / 2, "each thread ran steps of its own"
        assert_empty(llm)


def test_no_thread_waits_until_another_is_done(threads: ThreadPoolExecutor) -> None:
    """One streams for as long as the others take."""
    engine, _ = make_engine(max_num_seqs=4, max_model_len=4096, num_blocks=4096)
    llm = llm_with(engine)
    done = threading.Event()

    def endless() -> bool:
        return any(done.is_set() for _ in llm.stream([1], SamplingParams(max_tokens=None, ignore_eos=True)))

    first = threads.submit(endless)
    assert until(lambda: engine.statistics.num_steps > 3)
    for start in range(5):
        (output,) = llm.generate([[2, start]], greedy(9), use_tqdm=False)
        assert tokens(output) == expected_output([2, start], 9, 4096, ignore_eos=True)
    assert not first.done()
    done.set()
    assert first.result(WATCHDOG)
    assert is_empty(engine)


def test_a_step_from_outside_while_another_runs_is_refused(threads: ThreadPoolExecutor) -> None:
    engine, executor = make_engine()
    gate = Gate(executor)
    running = threads.submit(llm_with(engine).generate, [[1, 2]], greedy(), use_tqdm=False)
    assert gate.reached.wait(WATCHDOG)
    with pytest.raises(InvalidStateError, match="step of this engine is running"):
        engine.step()
    engine.add_request("a", [3], greedy())  # neither waits for the step
    engine.add_request("b", [4], greedy())
    engine.abort_request("a")
    engine.discard_requests(["b"])
    engine.reset_prefix_cache()
    assert not running.done()
    gate.opened.set()
    assert tokens(running.result(WATCHDOG)[0]) == expected_output([1, 2], 5, 64, ignore_eos=True)
    outputs = run(engine)
    assert [(name, output.outputs[0].finish_reason) for name, output in outputs.items()] == [("a", "abort")]
    assert is_empty(engine)


def test_a_call_from_within_a_step_is_refused_and_a_stream_that_is_dropped_there_is_not() -> None:
    engine, executor = make_engine()
    llm = llm_with(engine)
    streams = [llm.stream([1, 2, 3], greedy())]
    next(streams[0])
    original = executor.collect
    refused: list[InvalidStateError] = []

    def collect(handle: Handle) -> StepResult:
        if streams:
            streams.clear()  # as a garbage collection may
            with pytest.raises(InvalidStateError) as caught:
                llm.generate([[5]], greedy(), use_tqdm=False)
            refused.append(caught.value)
        return original(handle)

    executor.collect = collect  # type: ignore[method-assign]
    (output,) = llm.generate([[4]], greedy(), use_tqdm=False)
    assert tokens(output) == expected_output([4], 5, 64, ignore_eos=True)
    assert refused
    assert is_empty(engine)


@pytest.mark.parametrize("error", [RuntimeError("the device failed"), KeyboardInterrupt()])
@pytest.mark.parametrize("is_fatal", [False, True])
def test_a_step_that_fails_ends_the_calls_of_all(
    threads: ThreadPoolExecutor, error: BaseException, is_fatal: bool
) -> None:
    engine, executor = make_engine(max_num_seqs=8)
    llm = llm_with(engine)
    gate = Gate(executor)
    calls = [threads.submit(llm.generate, [[index], [9]], greedy(), use_tqdm=False) for index in range(3)]
    calls += [threads.submit(lambda index: list(llm.stream([[index]], greedy())), index) for index in range(3)]
    assert gate.reached.wait(WATCHDOG)
    # Of those that do not step, all wait; their requests are in the next step.
    assert until(lambda: len(engine._turns._waiting) == 5 and len(engine._unfinished.requests()) == 9)
    original = executor.submit

    def submit(batch: Any) -> Handle:
        if len(batch.sampled_rows) < 8:
            return original(batch)
        if is_fatal:
            executor.failures["synchronize"] = RuntimeError("illegal access")
        raise error

    executor.submit = submit  # type: ignore[method-assign]
    gate.opened.set()
    raised = [call.exception(WATCHDOG) for call in calls]
    others = [each for each in raised if each is not error]
    assert len(others) == 5
    assert {type(each) for each in others} == {EngineDeadError if is_fatal else StepFailedError}
    assert all(each is not None and each.__cause__ is error for each in others)
    if not is_fatal:
        executor.submit = original  # type: ignore[method-assign]
        (output,) = llm.generate([[4]], greedy(), use_tqdm=False)
        assert tokens(output) == expected_output([4], 5, 64, ignore_eos=True)
        assert is_empty(engine)


def test_ctrl_c_in_a_thread_that_waits_leaves_its_own_requests_only(threads: ThreadPoolExecutor) -> None:
    engine, executor = make_engine()
    llm = llm_with(engine)
    gate = Gate(executor)
    other = threads.submit(llm.generate, [[1, 2]], greedy(9), use_tqdm=False)
    assert gate.reached.wait(WATCHDOG)

    def interrupt() -> None:
        assert until(lambda: len(engine._turns._waiting) > 0)
        signal.raise_signal(signal.SIGINT)

    threads.submit(interrupt)
    with pytest.raises(KeyboardInterrupt):
        llm.generate([[3, 4]], greedy(9), use_tqdm=False)
    assert not other.done()
    gate.opened.set()
    assert tokens(other.result(WATCHDOG)[0]) == expected_output([1, 2], 9, 64, ignore_eos=True)
    run(engine)
    assert is_empty(engine)


@pytest.mark.parametrize("seed", range(4))
def test_requests_come_and_go_in_every_thread(threads: ThreadPoolExecutor, seed: int) -> None:
    engine, _ = make_engine(pipeline_depth=1 + seed % 3, num_blocks=24)
    llm = llm_with(engine)

    def use(number: int) -> None:
        rng = random.Random(seed * 100 + number)
        for index in range(12):
            prompt = [rng.randrange(6) for _ in range(rng.randrange(1, 9))]
            params = SamplingParams(n=rng.choice((1, 1, 3)), max_tokens=rng.randrange(1, 9), ignore_eos=True)
            expected = expected_output(prompt, params.max_tokens or 0, 64, ignore_eos=True)
            way = rng.randrange(4)
            if way == 0:
                (output,) = llm.generate([prompt], params, use_tqdm=False)
                assert [each.token_ids for each in output.outputs] == [expected] * params.n
            elif way == 1:
                found: dict[int, list[int]] = {each: [] for each in range(params.n)}
                for output in llm.stream([prompt], params):
                    for each in output.outputs:
                        found[each.index] += each.token_ids
                assert list(found.values()) == [expected] * params.n
            elif way == 2:
                stream = llm.stream([prompt], params)
                next(stream)
                stream.close()
            else:
                engine.add_request(f"{number}-{index}", prompt, params)
                engine.abort_request(f"{number}-{index}")
                engine.reset_prefix_cache()
                engine.discard_requests([f"{number}-{index}"])

    list(threads.map(use, range(8)))
    assert run(engine) == {}
    assert is_empty(engine)
    assert not engine._unfinished.calls or engine.step() == []


def test_the_engine_exits_while_another_thread_uses_it(threads: ThreadPoolExecutor) -> None:
    engine, executor = make_engine()
    llm = llm_with(engine)
    gate = Gate(executor)
    calls = [threads.submit(llm.generate, [[1, 2]], LONG, use_tqdm=False) for _ in range(3)]
    assert gate.reached.wait(WATCHDOG)
    exits = threads.submit(llm.exit)
    assert until(lambda: engine.is_dead)
    assert not executor.is_shut_down, "a step runs"
    gate.opened.set()
    exits.result(WATCHDOG)
    assert executor.is_shut_down
    for call in calls:
        assert isinstance(call.exception(WATCHDOG), EngineDeadError)
