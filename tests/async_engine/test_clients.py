"""An engine's process with several clients: each gets its own tokens, and one that ends takes its requests along."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from multiprocessing import Pipe
from typing import Any

import numpy as np
import pytest

from nanovllm import LLM, AsyncLLM, EngineDeadError, RequestOutput, SamplingParams
from nanovllm.async_engine import engine_process
from nanovllm.async_engine.encoding import FromProcess
from nanovllm.async_engine.engine_client import EngineClient
from nanovllm.async_engine.engine_process import EngineProcess
from nanovllm.async_engine.messages import Answer, EngineEnded, Event, Logprobs, RequestRefused, RequestsLost, StepNews
from nanovllm.async_engine.routing import client_of, first_number, parts
from nanovllm.async_llm import connected
from nanovllm.config import EngineConfig
from nanovllm.engine.sequence import TokenLogprob
from tests.distributed.rank_processes import ONLY_LINUX
from tests.processes import WATCHDOG, until

CONFIG = EngineConfig("tiny", device="cpu", num_kvcache_blocks=512)
LONG = SamplingParams(temperature=0, max_tokens=100_000, ignore_eos=True)


def client(process: EngineProcess, kind: type[EngineClient] = EngineClient) -> AsyncLLM:
    theirs, ours = Pipe()
    process.add_client(ours, os.getpid())
    return connected(CONFIG, kind(CONFIG, theirs))


@pytest.fixture
def process() -> Iterator[EngineProcess]:
    with running() as process:
        yield process


@contextmanager
def running() -> Iterator[EngineProcess]:
    process = EngineProcess(CONFIG, serves=False)
    process.start(lambda event: None)
    try:
        yield process
    finally:
        process.stop()


async def texts_of(engine: AsyncLLM, prompts: list[str]) -> list[str]:
    params = SamplingParams(temperature=0, max_tokens=12, logprobs=1)

    async def text_of(prompt: str) -> str:
        text = ""
        async for output in engine.generate(prompt, params, delta=True):
            assert len(output.outputs[0].logprobs or []) == len(output.outputs[0].token_ids)
            text += output["text"]
        return text

    return await asyncio.gather(*map(text_of, prompts))


async def last_of(stream: AsyncIterator[RequestOutput]) -> RequestOutput:
    async for output in stream:
        last = output
    return last


@ONLY_LINUX
def test_each_client_gets_its_own_texts(process: EngineProcess) -> None:
    prompts = [f"{number} + 4 =" for number in range(10)]
    with LLM("tiny", device="cpu", num_kvcache_blocks=512) as llm:
        expected = [each["text"] for each in llm.generate(prompts, SamplingParams(temperature=0, max_tokens=12))]

    async def test() -> None:
        with client(process) as one, client(process) as other:
            own, others = await asyncio.gather(texts_of(one, prompts[:5]), texts_of(other, prompts[5:]))
            assert own + others == expected
            assert one.metrics.finished == other.metrics.finished
            assert sum(one.metrics.finished.values()) == len(prompts), "the metrics are those of the engine"

    asyncio.run(asyncio.wait_for(test(), WATCHDOG))


@ONLY_LINUX
def test_a_client_that_ends_takes_its_requests_along(process: EngineProcess) -> None:
    async def test() -> None:
        with client(process) as stays:
            leaves = client(process)
            streams = [leaves.generate("a", LONG), leaves.generate("b", LONG), stays.generate("c", LONG, "stays")]
            for stream in streams:
                await anext(stream)
            assert stays.metrics.num_running == 3
            leaves.exit()
            assert until(lambda: stays.metrics.num_running == 1)
            with pytest.raises(EngineDeadError):
                await last_of(streams[0])
            await anext(streams[2])
            await streams[2].aclose()
            assert until(lambda: stays.metrics.used_blocks == 0)

    asyncio.run(asyncio.wait_for(test(), WATCHDOG))


class Stalling(EngineClient):
    """A client that reads while `reads` is set."""

    reads = threading.Event()
    reads.set()

    def _next_message(self) -> FromProcess:
        self.reads.wait()
        return super()._next_message()


@contextmanager
def stalled() -> Iterator[None]:
    Stalling.reads.clear()
    try:
        yield
    finally:
        Stalling.reads.set()


@ONLY_LINUX
def test_a_client_that_does_not_read_is_dropped(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    hasty = "from nanovllm.async_engine import client_sender\nclient_sender.PATIENCE = 2\nfrom nanovllm.async_engine."
    main = engine_process._MAIN.replace("from nanovllm.async_engine.", hasty)
    monkeypatch.setattr(engine_process, "_MAIN", main)

    async def test(process: EngineProcess) -> None:
        with client(process) as stays, client(process, Stalling) as stalls:
            streams = [stalls.generate(prompt, LONG) for prompt in "ab"]
            for stream in streams:
                await anext(stream)
            with stalled():
                while not dropped():
                    await texts_of(stays, ["c", "d"])
                assert until(lambda: stays.metrics.num_running == stays.metrics.used_blocks == 0)
            for stream in streams:
                with pytest.raises(EngineDeadError, match="did not read"):
                    await last_of(stream)
            assert stalls.is_dead

    def dropped() -> list[int]:
        records = [record for record in caplog.records if getattr(record, "event", "") == "api_process.dropped"]
        return [record.fields["client_pid"] for record in records]  # type: ignore[attr-defined]

    with running() as process:
        asyncio.run(asyncio.wait_for(test(process), WATCHDOG))
    assert dropped() == [os.getpid()]


@ONLY_LINUX
def test_the_end_of_the_engine_reaches_every_client(process: EngineProcess) -> None:
    async def test() -> None:
        engines = [client(process) for _ in range(2)]
        streams = [engine.generate("a", LONG) for engine in engines]
        for stream in streams:
            await anext(stream)
        assert process._process is not None
        process._process.kill()
        for stream in streams:
            with pytest.raises(EngineDeadError):
                await last_of(stream)
        for engine in engines:
            assert engine.is_dead
            engine.exit()

    asyncio.run(asyncio.wait_for(test(), WATCHDOG))


def news(*tokens: tuple[int, int, float | None]) -> StepNews:
    """News of (number, token, log-probability)."""
    top = np.array([7], np.int32), np.array([-1], np.float32)
    scores = [TokenLogprob(each, 1, *top) for *_, each in tokens if each]
    return StepNews(
        numbers=np.array([number for number, *_ in tokens], np.int64),
        token_ids=np.array([token for _, token, _ in tokens], np.int32),
        scored=np.array([index for index, (*_, score) in enumerate(tokens) if score], np.int32),
        logprobs=Logprobs.pack(scores),
        cached=[(number, 0) for number, *_ in tokens],
        ended=[],
    )


def read(event: Event) -> list[tuple[int, int, float | None]]:
    """What `news` was given."""
    assert isinstance(event, StepNews)
    rows = [] if event.logprobs is None else event.logprobs.unpack()
    scores: dict[int, Any] = {at: row.logprob for at, row in zip(event.scored.tolist(), rows, strict=True)}
    tokens = zip(event.numbers.tolist(), event.token_ids.tolist(), strict=True)
    assert [number for number, _ in event.cached] == event.numbers.tolist()
    return [(number, token, scores.get(at)) for at, (number, token) in enumerate(tokens)]


def test_news_are_divided() -> None:
    one, other = first_number(1), first_number(2)
    assert (client_of(one + 5), client_of(other - 1)) == (1, 1)
    rows = [(other, 4, -0.5), (one, 5, None), (one + 1, 6, -0.25), (other + 2, 8, None), (one + 2, 9, -2.0)]
    divided = dict(parts(news(*rows), [0, 1, 2]))
    assert {number: read(part) for number, part in divided.items()} == {
        1: [rows[1], rows[2], rows[4]],
        2: [rows[0], rows[3]],
    }
    refused = RequestRefused(other + 3, ValueError("a"))
    assert list(parts(refused, [0, 1, 2])) == [(2, refused)]
    answer, ended = Answer(one + 3, "a"), EngineEnded(ValueError("a"))
    assert list(parts(answer, [0, 1, 2])) == [(1, answer)]
    assert list(parts(ended, [0, 2])) == [(0, ended), (2, ended)]
    lost = dict(parts(RequestsLost([one, other, one + 1], ValueError("a"), goes_on=True), [0, 1, 2]))
    assert {number: part.numbers for number, part in lost.items() if isinstance(part, RequestsLost)} == {
        0: [],
        1: [one, one + 1],
        2: [other],
    }
