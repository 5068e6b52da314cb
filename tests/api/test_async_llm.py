"""AsyncLLM: many streams at a time, however they end, and an engine that is empty after each."""

from __future__ import annotations

import asyncio
import gc
import itertools
import signal
import subprocess
import threading
import weakref
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nanovllm import (
    LLM,
    AsyncLLM,
    EngineDeadError,
    InvalidArgumentError,
    InvalidStateError,
    LLMEngine,
    ModelLoadError,
    RequestOutput,
    RequestTooLargeError,
    SamplingParams,
    StepFailedError,
    UnknownArgumentError,
)
from nanovllm.async_engine.engine_loop import EngineLoop
from nanovllm.async_engine.engine_thread import EngineThread
from nanovllm.outputs import CompletionOutput
from tests.api.test_streaming import join, many_kinds
from tests.processes import WATCHDOG, start_python
from tests.processes import until as wait_in_this_thread

LONG = SamplingParams(temperature=0, max_tokens=100_000, ignore_eos=True)
SHORT = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)


@pytest.fixture(scope="module", params=[False, True], ids=["thread", "process"])
def tiny(request: pytest.FixtureRequest) -> Iterator[AsyncLLM]:
    """Used from a new event loop by each test, after the one before is closed."""
    settings: dict[str, Any] = {"pipeline_depth": 2, "max_num_seqs": 64, "engine_process": request.param}
    with AsyncLLM("tiny", device="cpu", **settings) as engine:
        yield engine


def engine_of(engine: AsyncLLM) -> LLMEngine:
    """The engine of an AsyncLLM that runs it in a thread."""
    assert isinstance(engine._connection, EngineThread)
    return engine._connection._made.result().engine


def run(test: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(test, WATCHDOG))


async def collect(engine: AsyncLLM, *args: Any, **kwargs: Any) -> list[RequestOutput]:
    return [output async for output in engine.generate(*args, **kwargs)]


async def until(condition: Callable[[], bool]) -> None:
    for _ in range(20_000):
        if condition():
            return
        await asyncio.sleep(0.005)
    raise AssertionError("it does not come true")


async def assert_empty(engine: AsyncLLM) -> None:
    """Soon: the engine runs elsewhere."""
    consumers, connection = engine._consumers, engine._connection
    await until(lambda: not (consumers._open or consumers._completions or consumers._to_wake))
    await until(lambda: num_unfinished(engine) == 0 and num_used_blocks(engine) == 0)
    if isinstance(connection, EngineThread):
        loop, inner = connection._made.result(), engine_of(engine)
        await until(
            lambda: (
                loop._commands.empty()
                and not inner.has_unfinished_requests()
                and inner.scheduler.rows.is_empty
                and not (loop._requests or loop._numbers or loop._unstarted)
            )
        )


def num_unfinished(engine: AsyncLLM) -> int:
    metrics = engine.metrics
    return metrics.num_running + metrics.num_waiting


def num_used_blocks(engine: AsyncLLM) -> int:
    return engine.metrics.used_blocks


# ---- outputs


def assert_same(found: CompletionOutput, expected: CompletionOutput) -> None:
    """Log-probabilities may differ in their last bits, as the requests arrive, and share batches, as it happens."""
    assert replace(found, logprobs=None, cumulative_logprob=None) == replace(
        expected, logprobs=None, cumulative_logprob=None
    )
    assert found.cumulative_logprob == pytest.approx(expected.cumulative_logprob, abs=1e-3)
    for row, wanted in zip(found.logprobs or (), expected.logprobs or (), strict=True):
        assert row.keys() == wanted.keys()
        assert [each.logprob for each in row.values()] == pytest.approx(
            [each.logprob for each in wanted.values()], abs=1e-3
        )


def test_outputs_are_those_of_llm(tiny: AsyncLLM) -> None:
    with LLM("tiny", device="cpu", max_num_seqs=8) as llm:
        params = many_kinds(llm)
        prompts: list[Any] = ["introduce yourself"] * len(params)
        expected = [output.outputs[0] for output in llm.generate(prompts, params, use_tqdm=False)]

    async def test() -> None:
        whole = await asyncio.gather(*(collect(tiny, *request) for request in zip(prompts, params, strict=True)))
        parts = await asyncio.gather(
            *(collect(tiny, *request, delta=True) for request in zip(prompts, params, strict=True))
        )
        await assert_empty(tiny)
        for outputs, streamed, wanted in zip(whole, parts, expected, strict=True):
            assert_same(outputs[-1].outputs[0], wanted)
            assert_same(join(streamed), wanted)
        for outputs in whole:
            assert [output.finished for output in outputs] == [False] * (len(outputs) - 1) + [True]
            assert len({output.request_id for output in outputs}) == 1
            for before, after in itertools.pairwise(outputs):
                assert after["text"].startswith(before["text"])
                assert after["token_ids"][: len(before["token_ids"])] == before["token_ids"]
                assert len(after["token_ids"]) > len(before["token_ids"])
                if before.outputs[0].logprobs is not None:
                    assert after.outputs[0].logprobs[: len(before["token_ids"])] == before.outputs[0].logprobs

    run(test())


def test_a_thousand_streams_at_a_time(tiny: AsyncLLM) -> None:
    words = [f"count from {start} to {start + 3}" for start in range(20)]
    with LLM("tiny", device="cpu", max_num_seqs=8) as llm:
        expected = [output["text"] for output in llm.generate(words, SHORT, use_tqdm=False)]
        assert len(set(expected)) > 10

    async def test() -> None:
        async def stream(index: int) -> tuple[str, int]:
            text, num_outputs = "", 0
            async for output in tiny.generate(words[index % 20], SHORT, f"stream-{index}", delta=True):
                assert output.request_id == f"stream-{index}"
                text += output["text"]
                num_outputs += 1
            return text, num_outputs

        found = await asyncio.gather(*(stream(index) for index in range(1000)))
        await assert_empty(tiny)
        texts = [text for text, _ in found]
        assert texts == expected * 50
        assert sum(num_outputs for _, num_outputs in found) > 1000, "they are streams, not results"

    run(test())


# ---- ends


def test_a_consumer_that_leaves_ends_its_request(tiny: AsyncLLM) -> None:
    """By break, by closing the generator, by cancellation while it waits, and before the request has run at all."""

    async def test() -> None:
        async for _ in tiny.generate("introduce yourself", LONG):
            assert num_used_blocks(tiny) > 0
            break
        await assert_empty(tiny)

        outputs = tiny.generate("introduce yourself", LONG)
        await anext(outputs)
        await outputs.aclose()
        await assert_empty(tiny)

        for seconds in (0, 0.02, 0.1):
            tasks = [asyncio.create_task(collect(tiny, "introduce yourself", LONG)) for _ in range(5)]
            await asyncio.sleep(seconds)
            for task in tasks:
                task.cancel()
            results = await asyncio.gather(*tasks, return_exceptions=True)
            assert all(isinstance(result, asyncio.CancelledError) for result in results)
            await assert_empty(tiny)

        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(collect(tiny, "introduce yourself", LONG, "r"), 0.1)
        assert len(await collect(tiny, "introduce yourself", SHORT, "r")) <= 6, "the id is free again"
        await assert_empty(tiny)

    run(test())


def test_the_clients_name_of_a_request_is_in_its_records(tiny: AsyncLLM, caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        await collect(tiny, "Hello", SHORT, "own")
        await collect(tiny, "Hello", replace(SHORT, n=2, temperature=1.0), "several", client_request_id="order 66 é")
        with pytest.raises(InvalidArgumentError):
            await collect(tiny, [], SHORT, "refused", client_request_id="x" * 128)
        for wrong in ("", "a\n", "x" * 129, 5):
            with pytest.raises(InvalidArgumentError, match="client_request_id.*1 to 128 printable characters"):
                await collect(tiny, "Hello", SHORT, client_request_id=wrong)

    def records() -> dict[tuple[str, str], str | None]:
        found = [record for record in caplog.records if getattr(record, "event", "").startswith("request.")]
        fields = [(record.event, record.fields) for record in found]  # type: ignore[attr-defined]
        return {(event, each["request_id"]): each.get("client_request_id") for event, each in fields}

    with caplog.at_level("INFO", "nanovllm"):
        run(test())
        assert wait_in_this_thread(lambda: len(records()) == 4)
    assert records() == {
        ("request.finished", "own"): None,
        ("request.finished", "several"): "order 66 é",
        ("request.failed", "refused"): "x" * 128,
        ("request.finished", "refused"): "x" * 128,
    }


def test_a_profile(tiny: AsyncLLM, tmp_path: Path) -> None:
    async def test() -> None:
        with pytest.raises(InvalidStateError, match="No profile runs"):
            await tiny.stop_profile()
        await tiny.start_profile(tmp_path / "profile")
        with pytest.raises(InvalidStateError, match="A profile runs already"):
            await tiny.start_profile()
        await collect(tiny, "introduce yourself", SHORT)
        table = await tiny.stop_profile()
        assert "aten::" in table
        assert (tmp_path / "profile" / "profile_rank0.txt").read_text() == table
        assert (tmp_path / "profile" / "profile_rank0.json").stat().st_size > 10_000
        (tmp_path / "file").write_text("")
        with pytest.raises(InvalidArgumentError, match="a folder that can be written"):
            await tiny.start_profile(tmp_path / "file")

    run(test())


def test_an_engine_that_ends_answers_questions(tiny: AsyncLLM) -> None:
    async def test() -> None:
        engine = AsyncLLM("tiny", device="cpu", engine_process=not isinstance(tiny._connection, EngineThread))
        leaving = asyncio.create_task(engine.stop_profile())
        await asyncio.sleep(0)
        leaving.cancel()
        engine.exit()
        with pytest.raises(EngineDeadError):
            await engine.stop_profile()
        assert not engine._consumers._questions

    run(test())


def test_abort(tiny: AsyncLLM) -> None:
    async def test() -> None:
        running = asyncio.create_task(collect(tiny, "introduce yourself", LONG, "r"))
        await until(lambda: num_used_blocks(tiny) > 0)
        await tiny.abort("r")
        outputs = await running
        assert outputs[-1].outputs[0].finish_reason == "abort"
        assert 0 < len(outputs[-1]["token_ids"]) < 1000
        await tiny.abort("r")
        await tiny.abort("never seen")
        await assert_empty(tiny)

        # A consumer that is not there when it ends, and one that has not begun.
        stream = tiny.generate("introduce yourself", LONG, "r")
        await anext(stream)
        await tiny.abort("r")
        *_, last = [output async for output in stream]
        assert (last.finished, last.outputs[0].finish_reason) == (True, "abort")
        await assert_empty(tiny)

    run(test())


# ---- back-pressure


def test_a_slow_consumer_gets_fewer_and_longer_outputs(tiny: AsyncLLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=120, ignore_eos=True)

    async def test() -> None:
        whole = await collect(tiny, "introduce yourself", params)
        stream = tiny.generate("introduce yourself", params, "slow", delta=True)
        parts = [await anext(stream)]
        request = tiny._consumers._open["slow"]
        await until(lambda: request.end is not None)
        await collect(tiny, "count from 3 to 9", SHORT)  # the engine does not wait for anybody
        assert request.started is not None
        assert 0 < len(request.started._unread[0][0]) < 120
        parts += [output async for output in stream]
        assert len(parts) == 2
        assert join(parts) == whole[-1].outputs[0]
        await assert_empty(tiny)

    run(test())


def test_an_event_loop_that_is_busy_is_called_once(tiny: AsyncLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    async def test() -> None:
        loop = asyncio.get_running_loop()
        original = loop.call_soon_threadsafe

        def counted(callback: Callable[..., object], *args: Any, **kwargs: Any) -> asyncio.Handle:
            calls.append(threading.current_thread().name)
            return original(callback, *args, **kwargs)

        monkeypatch.setattr(loop, "call_soon_threadsafe", counted)
        streams = [tiny.generate("introduce yourself", SHORT, f"r{index}") for index in range(8)]
        first = [await anext(stream) for stream in streams]
        tokens, before = tiny.metrics.generation_tokens, len(calls)
        # The event loop does not turn meanwhile.
        assert wait_in_this_thread(lambda: all(each.end for each in tiny._consumers._open.values()))
        assert tiny.metrics.generation_tokens > tokens + 1
        assert calls[before:] in ([], ["nanovllm-engine"], ["nanovllm-engine-reader"])
        for stream in streams:
            *_, last = [output async for output in stream]
            assert len(last["token_ids"]) == 6
        assert len(first) == 8
        await assert_empty(tiny)

    run(test())


# ---- errors


def test_a_bad_request_is_its_consumer_s_alone(tiny: AsyncLLM) -> None:
    bad: list[tuple[Any, Any, type[Exception]]] = [
        ("", SHORT, InvalidArgumentError),
        ([1] * 100_000, SHORT, RequestTooLargeError),
        ({"promt": "x"}, SHORT, InvalidArgumentError),
        ("fine", {"temperature": 0}, InvalidArgumentError),
        ("fine", SamplingParams(stop_token_ids=[10**6]), InvalidArgumentError),
        (object(), SHORT, InvalidArgumentError),
    ]

    async def test() -> None:
        (alone,) = [(await collect(tiny, "count from 3 to 9", SHORT))[-1]]
        requests = [collect(tiny, prompt, params) for prompt, params, _ in bad]
        good = [collect(tiny, "count from 3 to 9", SHORT) for _ in bad]
        results = await asyncio.gather(*requests, *good, return_exceptions=True)
        for result, (_, _, kind) in zip(results, bad, strict=False):
            assert type(result) is kind
        for result in results[len(bad) :]:
            assert isinstance(result, list)
            assert result[-1].outputs == alone.outputs
        await assert_empty(tiny)

        stream = tiny.generate("introduce yourself", LONG, "r")
        await anext(stream)
        with pytest.raises(InvalidArgumentError, match="request_id='r'.*unique"):
            await collect(tiny, "count from 3 to 9", SHORT, "r")
        assert not (await anext(stream)).finished
        await stream.aclose()
        await assert_empty(tiny)

    run(test())


@pytest.mark.parametrize("is_fatal", [False, True])
def test_a_step_that_fails_reaches_all(is_fatal: bool) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("the device failed")

    async def test() -> None:
        with AsyncLLM("tiny", device="cpu") as engine:
            (expected,) = [(await collect(engine, "count from 3 to 9", SHORT))[-1]]
            executor = engine_of(engine).executor
            with pytest.MonkeyPatch.context() as patch:
                tasks = [asyncio.create_task(collect(engine, "introduce yourself", LONG)) for _ in range(4)]
                await until(lambda: num_used_blocks(engine) > 0)
                if is_fatal:
                    patch.setattr(executor, "synchronize", fail)
                patch.setattr(executor, "collect", fail)
                errors = await asyncio.gather(*tasks, return_exceptions=True)
            kind = EngineDeadError if is_fatal else StepFailedError
            for error in errors:
                assert type(error) is kind
                assert "the device failed" in str(error)
                assert isinstance(error.__cause__, RuntimeError)
            assert len({id(error) for error in errors}) == 4, "a traceback of one's own"
            if is_fatal:
                with pytest.raises(EngineDeadError, match="the device failed"):
                    await collect(engine, "count from 3 to 9", SHORT)
            else:
                assert (await collect(engine, "count from 3 to 9", SHORT))[-1].outputs == expected.outputs
            await assert_empty(engine)

    run(test())


def test_an_error_of_ours_ends_the_engine_and_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever goes wrong in the thread, nobody waits for ever."""

    def fail(*_: object) -> None:
        raise ZeroDivisionError

    async def test() -> None:
        with AsyncLLM("tiny", device="cpu") as engine:
            monkeypatch.setattr(EngineLoop, "_is_running", fail)
            task = asyncio.create_task(collect(engine, "introduce yourself", LONG, "r"))
            await until(lambda: num_used_blocks(engine) > 0)
            await engine.abort("r")
            with pytest.raises(EngineDeadError) as caught:
                await task
            assert isinstance(caught.value.__cause__, ZeroDivisionError)
            with pytest.raises(EngineDeadError):
                await collect(engine, "introduce yourself", SHORT)

    run(test())


def test_what_making_it_raises(tmp_path: Path) -> None:
    with pytest.raises(UnknownArgumentError, match="max_model_len"):
        AsyncLLM("tiny", max_modle_len=64)  # type: ignore[call-arg]
    with pytest.raises(ModelLoadError):
        AsyncLLM(str(tmp_path), device="cpu")


# ---- event loops


def test_event_loops_in_several_threads(tiny: AsyncLLM) -> None:
    async def test() -> None:
        expected = [output["text"] for output in await collect(tiny, "introduce yourself", SHORT)][-1]
        stream = tiny.generate("introduce yourself", LONG, "r")
        await anext(stream)

        async def from_another() -> list[RequestOutput]:
            *_, outputs = await asyncio.gather(*(collect(tiny, "introduce yourself", SHORT) for _ in range(5)))
            await tiny.abort("r")
            return outputs

        others = [asyncio.to_thread(asyncio.run, from_another()) for _ in range(3)]
        for outputs in await asyncio.gather(*others):
            assert outputs[-1]["text"] == expected
        *_, last = [output async for output in stream]
        assert last.outputs[0].finish_reason == "abort"
        await assert_empty(tiny)

    run(test())


def test_a_closed_loop_delays_nobody(tiny: AsyncLLM) -> None:
    """Its consumers wait, one with news that it will never read, and so does one who has aborted a request."""
    closed = asyncio.new_event_loop()
    tasks = [closed.create_task(collect(tiny, "introduce yourself", LONG, f"left-{index}")) for index in range(3)]
    closed.run_until_complete(until(lambda: num_unfinished(tiny) == 3))

    async def test() -> None:
        mine = tiny.generate("introduce yourself", LONG, "mine")
        await anext(mine)
        tasks.append(closed.create_task(tiny.abort("mine")))
        await asyncio.to_thread(closed.run_until_complete, asyncio.sleep(0))
        closed.close()
        *_, last = [output async for output in mine]
        assert last.outputs[0].finish_reason == "abort"
        assert (await collect(tiny, "introduce yourself", SHORT, "left-1"))[-1].finished
        await assert_empty(tiny)

    run(test())
    for task in tasks:
        task._log_destroy_pending = False  # type: ignore[attr-defined]  # asyncio's own complaint, rightly about us


@pytest.mark.parametrize("how", ["dropped", "closed", "aborted"])
def test_a_generator_that_is_left_needs_no_event_loop(
    tiny: AsyncLLM, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The loop is closed without a turn in between: a task of it would never run."""

    async def test() -> None:
        stream = tiny.generate("introduce yourself", LONG, "r")
        await anext(stream)
        if how == "aborted":
            await tiny.abort("r")
        elif how == "closed":
            await stream.aclose()
            with pytest.raises(StopAsyncIteration):
                await anext(stream)
        del stream

    loop = asyncio.new_event_loop()
    loop.run_until_complete(test())
    loop.close()
    gc.collect()
    assert [record.getMessage() for record in caplog.records if record.name == "asyncio"] == []
    run(assert_empty(tiny))


def test_closing_a_generator_ends_a_task_that_waits_for_it(tiny: AsyncLLM, gate: threading.Event) -> None:
    async def test() -> None:
        stream = tiny.generate("held", LONG)
        waiting = asyncio.create_task(anext(stream))
        await asyncio.sleep(0)
        await stream.aclose()
        gate.set()
        with pytest.raises(StopAsyncIteration):
            await waiting
        await assert_empty(tiny)

    run(test())


# ---- preparing


@pytest.fixture
def gate(tiny: AsyncLLM, monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Until it is set, the prompt "held" takes for ever to prepare."""
    event, prepare = threading.Event(), tiny._connection.preparation.prepare

    def held(prompt: Any, params: Any) -> Any:
        if prompt == "held":
            assert event.wait(WATCHDOG)
        return prepare(prompt, params)

    monkeypatch.setattr(tiny._connection.preparation, "prepare", held)
    yield event
    event.set()


def test_a_text_that_takes_long_to_prepare_delays_neither_steps_nor_the_event_loop(
    tiny: AsyncLLM, gate: threading.Event
) -> None:
    async def test() -> None:
        running = tiny.generate("introduce yourself", LONG)
        await anext(running)
        held = [asyncio.create_task(collect(tiny, "held", SHORT)) for _ in range(20)]
        for _ in range(5):
            assert not (await anext(running)).finished
        assert not any(task.done() for task in held)
        await running.aclose()
        gate.set()
        assert all(outputs[-1].finished for outputs in await asyncio.gather(*held))
        await assert_empty(tiny)

    run(test())


def test_a_request_that_is_left_or_aborted_while_it_is_prepared(tiny: AsyncLLM, gate: threading.Event) -> None:
    async def test() -> None:
        left, aborted = (asyncio.create_task(collect(tiny, "held", LONG, name)) for name in ("left", "aborted"))
        await until(lambda: len(tiny._consumers._open) == 2)
        left.cancel()
        await asyncio.gather(left, return_exceptions=True)
        ended = asyncio.create_task(tiny.abort("aborted"))
        await asyncio.sleep(0)
        gate.set()
        await ended
        (output,) = await aborted
        assert (output["token_ids"], output.outputs[0].finish_reason) == ([], "abort")
        assert (await collect(tiny, "introduce yourself", SHORT, "left"))[-1].finished
        await assert_empty(tiny)

    run(test())


# ---- closed event loops


@pytest.mark.parametrize("comes_back", [True, False])
def test_a_loop_that_was_closed_with_streams_open(tiny: AsyncLLM, comes_back: bool) -> None:
    """Not as asyncio.run does it: nobody has closed the generators."""
    loop = asyncio.new_event_loop()
    left = [tiny.generate("introduce yourself", LONG, f"left-{index}") for index in range(3)]
    for stream in left:
        loop.run_until_complete(anext(stream))
    loop.close()

    async def test() -> None:
        if comes_back:
            assert (await collect(tiny, "introduce yourself", SHORT, "left-1"))[-1].finished
        await assert_empty(tiny)

    run(test())
    del left


# ---- the end


def test_exit_tells_those_who_wait() -> None:
    async def test() -> None:
        engine = AsyncLLM("tiny", device="cpu")
        task = asyncio.create_task(collect(engine, "introduce yourself", LONG))
        await until(lambda: num_used_blocks(engine) > 0)
        engine.exit()
        engine.exit()
        engine.shutdown()
        assert isinstance(engine._connection, EngineThread)
        assert not engine._connection._thread.is_alive()
        with pytest.raises(EngineDeadError, match="exit"):
            await task
        with pytest.raises(EngineDeadError, match=r"exit\(\) was called.*make a new one"):
            await collect(engine, "introduce yourself", SHORT)
        await engine.abort("r")

    run(test())


def test_forgotten_it_ends_too() -> None:
    engine = AsyncLLM("tiny", device="cpu")
    run(_short(engine))
    assert isinstance(engine._connection, EngineThread)
    thread, inner = engine._connection._thread, weakref.ref(engine_of(engine))
    del engine
    gc.collect()
    thread.join(10)
    assert not thread.is_alive()
    gc.collect()
    assert inner() is None


async def _short(engine: AsyncLLM) -> None:
    async with engine:
        assert len((await collect(engine, "introduce yourself", SHORT))[-1]["token_ids"]) == 6


SCRIPT = """
import asyncio
from nanovllm import AsyncLLM, SamplingParams

async def main():
    engine = AsyncLLM("tiny", device="cpu")
    shown = False
    params = SamplingParams(temperature=0, max_tokens={max_tokens}, ignore_eos=True)
    async for output in engine.generate("introduce yourself", params):
        if not shown and len(output["token_ids"]) >= 6:
            print("six", flush=True)
            shown = True

asyncio.run(main())
"""


def start(max_tokens: int) -> subprocess.Popen[str]:
    return start_python("-c", SCRIPT.format(max_tokens=max_tokens), NANOVLLM_LOG_LEVEL="WARNING")


def test_a_process_that_never_calls_exit_ends() -> None:
    process = start(max_tokens=6)
    stdout, stderr = process.communicate(timeout=WATCHDOG)
    assert (process.returncode, stdout, stderr) == (0, "six\n", "")


def test_ctrl_c() -> None:
    process = start(max_tokens=2000)
    assert process.stdout is not None
    assert process.stdout.readline() == "six\n"
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=WATCHDOG)
    assert process.returncode not in (0, -signal.SIGSEGV, -signal.SIGABRT)
    assert stderr.strip().endswith("KeyboardInterrupt")
    assert stderr.count("Traceback") <= 2, stderr  # asyncio's own: the task was cancelled, because of Ctrl-C


@pytest.mark.gpu
def test_on_a_gpu_streams_give_what_llm_gives() -> None:
    """CUDA graphs are captured and replayed in the engine's thread, and two steps are in flight."""
    settings: dict[str, Any] = {"device": "cuda", "dtype": "float32", "max_num_seqs": 64, "num_kvcache_blocks": 2048}
    words = [f"count from {start} to {start + 3}" for start in range(100)]
    with LLM("tiny", **settings) as llm:
        expected = [output["text"] for output in llm.generate(words, SHORT, use_tqdm=False)]

    async def test() -> None:
        async with AsyncLLM("tiny", **settings) as engine:
            leaving = engine.generate("introduce yourself", LONG)
            await anext(leaving)
            outputs = await asyncio.gather(*(collect(engine, word, SHORT) for word in words))
            await leaving.aclose()
            assert [parts[-1]["text"] for parts in outputs] == expected
            await assert_empty(engine)

    run(test())


def test_an_idle_engine_captures_graphs_between_requests() -> None:
    captured = threading.Semaphore(0)
    num_left = 5

    async def test() -> None:
        assert len(await collect(engine, "Hello", SHORT)) > 0
        assert await asyncio.to_thread(captured.acquire, timeout=WATCHDOG)
        assert len(await collect(engine, "Hello", SHORT)) > 0  # a request is taken between two graphs
        while num_left > 0:
            assert await asyncio.to_thread(captured.acquire, timeout=WATCHDOG)

    with AsyncLLM("tiny", device="cpu", engine_process=False) as engine:
        inner = engine_of(engine)

        def capture_ahead() -> bool:
            nonlocal num_left
            assert not inner.has_unfinished_requests()
            num_left -= 1
            captured.release()
            return num_left > 0

        inner.capture_ahead = capture_ahead  # type: ignore[method-assign]
        run(test())
