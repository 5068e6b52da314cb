"""10,000 requests of every kind, by every way: nothing that the engine or Python holds grows; every block is free."""

from __future__ import annotations

import asyncio
import gc
import logging
import sys
import tracemalloc
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pytest

from nanovllm import LLM, AsyncLLM, InvalidArgumentError, LLMEngine, RequestOutput, SamplingParams
from nanovllm.async_engine.engine_thread import EngineThread
from tests.small_llm import assert_empty, generate

SETTINGS: dict[str, Any] = {"device": "cpu", "max_model_len": 96, "kvcache_block_size": 16, "num_kvcache_blocks": 200}
PREFIX = list(range(20, 56))  # two full blocks
NUM_ROUNDS = 10
PER_ROUND = 900  # of LLM; AsyncLLM has 100 in each of as many rounds
WARM_UP = 4  # rounds in which caches fill: Python's, torch's, and the prefix cache
# What the rounds after that may bring. One small object kept for each request would be thousands of blocks.
MOST_BLOCKS, MOST_BYTES = 1500, 150_000
MOST_RESIDENT = 40_000_000  # oneDNN's code for sizes that it has not met yet


@pytest.fixture(autouse=True)
def silence() -> Iterator[None]:
    """pytest keeps every line that is logged."""
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


@dataclass(frozen=True)
class Held:
    """What is held after a round."""

    blocks: int  # memory blocks of Python's allocator
    objects: int  # that the garbage collector follows
    containers: Mapping[str, int]  # items of each of the engine's own


def params_of(number: int) -> SamplingParams:
    """Every kind of request, in turn."""
    kinds: list[dict[str, Any]] = [
        {"temperature": 0},
        {"temperature": 0.8, "seed": number, "top_k": 5},
        {"temperature": 1.2, "top_p": 0.8, "min_p": 0.01},
        {"temperature": 0, "logprobs": 2},
        {"temperature": 0, "stop": ["1", " the", "e"]},
        {"temperature": 1.0, "stop_token_ids": list(range(100))},
        {"temperature": 0, "detokenize": False, "ignore_eos": True},
    ]
    return SamplingParams(max_tokens=1 + number % 3, **kinds[number % len(kinds)])


def prompt_of(number: int) -> Any:
    """New ones, old ones, and such that begin like others."""
    own = [200 + number % 251, 200 + number // 251 % 251]
    return [f"count from {number} on", PREFIX + own, PREFIX[:16] + own * 9, "introduce yourself", own][number % 5]


def a_round(llm: LLM, first: int) -> int:
    """`PER_ROUND` requests from number `first` on, by every way in and out."""
    numbers = list(range(first, first + PER_ROUND))
    requests = [(prompt_of(number), params_of(number)) for number in numbers]

    def part(size: int) -> tuple[list[Any], list[SamplingParams]]:
        taken, requests[:] = requests[:size], requests[size:]
        return [prompt for prompt, _ in taken], [params for _, params in taken]

    prompts, params = part(450)
    prompts[7:400:40] = [""] * 10  # refused, the others run
    outputs = generate(llm, prompts, params)
    assert sum(output.error is not None for output in outputs) == 10
    for _ in llm.stream(*part(150)):
        pass
    for place, _ in enumerate(llm.stream(*part(100))):
        if place == 60:
            break
    for _ in range(5):
        with pytest.raises(InvalidArgumentError):
            generate(llm, [[]] * 4)
    part(20)
    engine = llm.llm_engine
    for index, request in enumerate(zip(*part(180), strict=True)):  # aborted or dropped while waiting, running, ended
        engine.add_request(f"r{index}", *request)
        if index % 3 == 0:
            engine.abort_request(f"r{index // 2}")
        if index % 7 == 0:
            engine.discard_requests([f"r{index}"])
        if index % 30 == 0:
            engine.step()
    while engine.has_unfinished_requests():
        engine.step()
    assert not requests
    assert_empty(llm)
    return len(numbers)


def containers_of(root: object, most: int = 10_000) -> dict[str, int]:
    """The items in every container that an object of nanovllm holds, by the path to it."""
    found: dict[str, int] = {}
    seen: set[int] = set()
    to_do: list[tuple[str, object]] = [("engine", root)]
    while to_do:
        path, value = to_do.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        assert len(seen) < most
        if isinstance(value, (list, dict, set, deque, tuple)):
            found[path] = len(value)
        elif type(value).__module__.startswith("nanovllm"):
            to_do += [(f"{path}.{name}", held) for name, held in getattr(value, "__dict__", {}).items()]
    return found


def held_by(engine: LLMEngine) -> Held:
    for _ in range(2):
        gc.collect()
    return Held(sys.getallocatedblocks(), len(gc.get_objects()), containers_of(engine))


def check(before: Held, after: Held, most: int = MOST_BLOCKS) -> list[str]:
    """What has grown."""
    grown = [
        f"{name}: {getattr(before, name)} → {getattr(after, name)}"
        for name in ("blocks", "objects")
        if getattr(after, name) - getattr(before, name) > most
    ]
    return grown + [
        f"{path}: {before.containers.get(path, 0)} → {size}"
        for path, size in after.containers.items()
        if size > before.containers.get(path, 0) + 20
    ]


@pytest.mark.heavy("ten rounds of 900 requests, the last one traced")
def test_nothing_grows_in_9000_requests() -> None:
    number = 0
    with LLM("tiny", max_num_seqs=64, **SETTINGS) as llm:
        engine = llm.llm_engine
        held: list[Held] = []
        resident: list[int] = []
        for index in range(NUM_ROUNDS):
            if index == NUM_ROUNDS - 1:  # slow, so of the last round alone: where in the source memory stays behind
                tracemalloc.start()
                first = tracemalloc.take_snapshot()
            number += a_round(llm, number)
            if index >= WARM_UP - 1:
                held.append(held_by(engine))
                resident.append(engine.diagnostics.memory_use()[0])
        last = tracemalloc.take_snapshot()
        tracemalloc.stop()
        assert number == NUM_ROUNDS * PER_ROUND
        assert len(held[0].containers) > 15, "the walk finds the engine's containers"
        assert check(held[0], held[-2]) == []
        assert resident[-2] - resident[0] < MOST_RESIDENT, resident
        ours = [stat for stat in last.compare_to(first, "filename") if "nanovllm" in stat.traceback[0].filename]
        assert [str(stat) for stat in ours if stat.size_diff > MOST_BYTES and "tests" not in str(stat)] == []
        statistics = engine.statistics
        assert statistics.num_prefix_hits > 1000, "the test needs prefix hits"
        assert all(engine.metrics.num_finished[reason] for reason in ("stop", "length", "abort"))
        scheduler = engine.scheduler
        assert scheduler.block_manager.num_free_blocks == engine.resolved.num_blocks
        scheduler.block_manager.check_integrity([])
        # That it would be seen: what a round's requests leave, if somebody keeps it.
        kept: list[RequestOutput] = []
        before = held_by(engine)
        kept += generate(llm, [prompt_of(number) for number in range(1000)], SamplingParams(max_tokens=1))
        engine.metrics.num_finished.update({f"leak {number}": 1 for number in range(50)})
        grown = check(before, held_by(engine))
        assert any(line.startswith("blocks: ") for line in grown)
        assert any(".num_finished: " in line for line in grown)
        assert len(kept) == 1000


def test_nothing_grows_in_1000_requests_of_coroutines() -> None:
    async def one(engine: AsyncLLM, number: int) -> None:
        async for output in engine.generate(prompt_of(number), params_of(number), f"r{number}", delta=number % 2 == 0):
            if number % 5 == 0:
                break
            assert output.request_id == f"r{number}"
            if number % 7 == 0:
                await engine.abort(f"r{number}")

    async def a_round(engine: AsyncLLM, first: int) -> None:
        tasks = [asyncio.create_task(one(engine, number)) for number in range(first, first + 98)]
        tasks += [asyncio.create_task(engine.generate("", None).__anext__()) for _ in range(2)]  # type: ignore[arg-type]
        await asyncio.sleep(0.01)
        for task in tasks[::9]:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def main() -> None:
        settings = {**SETTINGS, "num_kvcache_blocks": 40}  # fewer requests fill them
        with AsyncLLM("tiny", max_num_seqs=64, **settings) as engine:
            assert isinstance(engine._connection, EngineThread)
            consumers, loop = engine._consumers, engine._connection._made.result()
            inner = loop.engine
            held: list[Held] = []
            for index in range(NUM_ROUNDS):
                await a_round(engine, index * 98)
                for _ in range(1000):
                    await asyncio.sleep(0.005)
                    if not (consumers._open or loop._requests or inner.has_unfinished_requests()):
                        break
                if index >= WARM_UP - 1:
                    await asyncio.sleep(0.05)
                    held.append(held_by(inner))
            # Arrivals decide the batches, and torch keeps a little for each new size: up to 800 blocks were seen.
            assert check(held[0], held[-1], most=1000) == []
            assert [*consumers._open, *consumers._completions, *consumers._to_wake] == []
            assert [*loop._requests, *loop._numbers, *loop._unstarted] == []
            assert loop._commands.empty()
            assert inner.scheduler.block_manager.num_used_blocks == 0

    asyncio.run(main())
