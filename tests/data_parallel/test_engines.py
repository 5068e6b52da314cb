"""DataParallelLLM: two engines answer as one does, and go on when one of them dies."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
from collections.abc import Coroutine, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nanovllm import AsyncLLM, EngineDeadError, InvalidArgumentError, ModelLoadError, ReplicaLostError, SamplingParams
from nanovllm.config import EngineConfig
from nanovllm.data_parallel.engines import DataParallelLLM
from nanovllm.outputs import RequestOutput
from tests.distributed.rank_processes import ONLY_LINUX, is_alive, zombies
from tests.processes import WATCHDOG, until

pytestmark = ONLY_LINUX
SETTINGS: dict[str, Any] = {"device": "cpu", "num_kvcache_blocks": 512, "max_num_seqs": 8, "kvcache_block_size": 16}
PROMPT = "list all prime numbers within 100, then count from 3 to 9, then reverse the word planet"
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
LONG = SamplingParams(temperature=0, max_tokens=3000, ignore_eos=True)


@pytest.fixture(scope="module")
def engines() -> Iterator[DataParallelLLM]:
    engines = DataParallelLLM(EngineConfig("tiny", **SETTINGS), 2)
    yield engines
    engines.exit()


def pid_of(engines: DataParallelLLM, index: int) -> int:
    process = engines.replicas[index].connection._process
    assert process is not None
    return process.pid


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(work, WATCHDOG))


async def is_true(condition: Any) -> None:
    while not condition():
        await asyncio.sleep(0.01)


async def final(engines: DataParallelLLM | AsyncLLM, params: SamplingParams = GREEDY, **options: Any) -> RequestOutput:
    outputs = [output async for output in engines.generate(options.pop("prompt", PROMPT), params, **options)]
    assert [output.finished for output in outputs] == [False] * (len(outputs) - 1) + [True]
    return outputs[-1]


async def begun(engines: DataParallelLLM, name: str, params: SamplingParams = LONG) -> asyncio.Task[RequestOutput]:
    """Returns a task that reads a long request, once this has an output."""
    has_output = asyncio.Event()

    async def read() -> RequestOutput:
        outputs = []
        async for output in engines.generate("count", params, name):
            outputs.append(output)
            has_output.set()
        return outputs[-1]

    task = asyncio.create_task(read())
    await has_output.wait()
    return task


def unfinished(engines: DataParallelLLM) -> list[int]:
    return [state["unfinished"] for state in engines.states()]


def test_tokens_are_those_of_one_engine_whatever_replica_computes_them(engines: DataParallelLLM) -> None:
    prompts = [PROMPT, "count from 3 to 9", "introduce yourself"]
    seeded = SamplingParams(temperature=1, seed=7, max_tokens=12, ignore_eos=True)

    async def tokens(engine: DataParallelLLM | AsyncLLM) -> list[list[int]]:
        both = [final(engine, params, prompt=prompt) for params in (GREEDY, seeded) for prompt in prompts]
        return [output.outputs[0].token_ids for output in await asyncio.gather(*both)]

    async def test() -> None:
        assert await tokens(engines) == expected
        assert await tokens(engines) == expected

    with AsyncLLM("tiny", **SETTINGS) as single:
        expected = asyncio.run(tokens(single))
    run(test())
    assert all(metrics.generation_tokens for metrics in engines.replica_metrics())


def test_requests_without_a_seed_differ(engines: DataParallelLLM) -> None:
    async def test() -> None:
        params = SamplingParams(temperature=2, max_tokens=12, ignore_eos=True)
        outputs = await asyncio.gather(*(final(engines, params) for _ in range(4)))
        assert len({tuple(output.outputs[0].token_ids) for output in outputs}) == 4

    run(test())


def test_a_cached_prefix_attracts_unless_it_is_forgotten(engines: DataParallelLLM) -> None:
    async def num_cached(salt: str) -> int:
        output = await final(engines, prompt={"prompt": f"{PROMPT}, {PROMPT}, {PROMPT}", "cache_salt": salt})
        return output.num_cached_tokens

    async def test() -> None:
        assert [await num_cached("ours") for _ in range(3)] == [0, 80, 80]
        assert await num_cached("theirs") == 0
        engines.reset_prefix_cache()
        assert await num_cached("ours") == 0

    run(test())


def test_errors_of_one_request(engines: DataParallelLLM) -> None:
    async def test() -> None:
        with pytest.raises(InvalidArgumentError, match="prompt"):
            await final(engines, prompt=[-1])
        with pytest.raises(InvalidArgumentError, match="request_id"):
            await final(engines, request_id=5)
        task = await begun(engines, "same")
        with pytest.raises(InvalidArgumentError, match="request_id"):
            await final(engines, request_id="same")
        task.cancel()
        await is_true(lambda: unfinished(engines) == [0, 0])
        await is_true(lambda: engines.metrics.used_blocks == 0)

    before = engines.metrics.finished["error"]
    run(test())
    assert engines.metrics.finished["error"] == before + 1, "the one that reached an engine"


def test_abort_reaches_every_replica_and_requests_that_are_being_prepared(engines: DataParallelLLM) -> None:
    async def test() -> None:
        tasks = [await begun(engines, str(index)) for index in range(4)]
        assert unfinished(engines) == [2, 2]
        tasks.append(asyncio.create_task(final(engines, LONG, request_id="new")))
        await is_true(lambda: "new" in engines._open)
        await engines.abort(["0", "1", "2", "3", "new", "unknown"])
        outputs = await asyncio.gather(*tasks)
        assert {output.outputs[0].finish_reason for output in outputs} == {"abort"}
        assert unfinished(engines) == [0, 0]

    run(test())


def test_the_others_go_on_when_one_is_killed(engines: DataParallelLLM, caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        params = SamplingParams(temperature=0, max_tokens=500, ignore_eos=True)
        tasks = await asyncio.gather(*(begun(engines, str(index), params) for index in range(6)))
        os.kill(pid_of(engines, 0), signal.SIGKILL)
        await is_true(lambda: engines.num_live == 1)
        assert (engines.is_dead, engines.is_degraded) == (False, True)
        assert engines.resolved.max_num_seqs == 8
        assert len((await final(engines)).outputs[0].token_ids) == 12
        results = await asyncio.gather(*tasks, return_exceptions=True)
        lost = [result for result in results if isinstance(result, ReplicaLostError)]
        assert len(lost) == 3
        assert "replica 0" in str(lost[0])
        assert "SIGKILL" in str(lost[0])
        assert sum(isinstance(result, RequestOutput) and result.finished for result in results) == 3
        await is_true(lambda: not engines.is_degraded)
        await is_true(lambda: len([record for record in caplog.records if record.msg.startswith("Replica 0 is back")]))
        await asyncio.gather(*(final(engines) for _ in range(4)))
        after = engines.replica_metrics()[0]
        assert after.num_running == 0
        assert after.generation_tokens >= before.generation_tokens, "counters never go back"
        assert after.finished["error"] == before.finished["error"] + 3

    before = engines.replica_metrics()[0]
    run(test())
    events = [getattr(record, "event", "") for record in caplog.records]
    assert events.count("replica.lost") == events.count("replica.restarted") == 1


def test_a_request_without_an_output_runs_again_elsewhere(
    engines: DataParallelLLM, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "nanovllm.data_parallel.engines")

    def routed() -> list[int]:
        routes = [record for record in caplog.records if getattr(record, "event", "") == "request.routed"]
        return [record.fields["replica"] for record in routes]  # type: ignore[attr-defined]

    async def test() -> None:
        expected = (await final(engines)).outputs[0].token_ids
        pid = pid_of(engines, 1)
        os.kill(pid, signal.SIGSTOP)
        caplog.clear()
        tasks = [asyncio.create_task(final(engines)) for _ in range(8)]
        await is_true(lambda: len(routed()) == 8)
        waiting = routed().count(1)  # it answers none of them
        os.kill(pid, signal.SIGKILL)
        outputs = await asyncio.gather(*tasks)
        assert [output.outputs[0].token_ids for output in outputs] == [expected] * 8
        repeated = [record for record in caplog.records if getattr(record, "event", "") == "request.repeated"]
        assert len(repeated) == waiting > 0
        await is_true(lambda: not engines.is_degraded)

    run(test())


def test_all_dead_is_dead_until_one_is_back(engines: DataParallelLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DataParallelLLM, "restarted", lambda *_: None)  # told late: a replica counts once it is alive

    async def test() -> None:
        task = await begun(engines, "lost")
        for index in range(2):
            os.kill(pid_of(engines, index), signal.SIGKILL)
        with pytest.raises((EngineDeadError, ReplicaLostError)):
            await task
        await is_true(lambda: engines.is_dead)
        with pytest.raises(EngineDeadError):
            await final(engines)
        await is_true(lambda: not engines.is_dead)
        await final(engines)
        await is_true(lambda: not engines.is_degraded)

    run(test())


@pytest.mark.heavy("waits for a step's deadline")
def test_a_replica_that_hangs_is_ended_and_replaced(caplog: pytest.LogCaptureFixture) -> None:
    """Its process is stopped. Requests with an output are lost, the others run elsewhere."""
    engines = DataParallelLLM(EngineConfig("tiny", **SETTINGS, step_timeout=5.0), 2)

    async def test() -> None:
        tasks = [await begun(engines, str(index), replace(LONG, max_tokens=1000)) for index in range(2)]
        pid = pid_of(engines, 0)
        os.kill(pid, signal.SIGSTOP)
        retried = [asyncio.create_task(final(engines)) for _ in range(4)]
        for task in tasks:
            task.add_done_callback(lambda task: task.cancelled() or task.exception())
        outputs = await asyncio.gather(*retried)
        assert {len(output.outputs[0].token_ids) for output in outputs} == {12}
        await is_true(lambda: not engines.is_degraded and pid_of(engines, 0) != pid)
        results = await asyncio.gather(*tasks, return_exceptions=True)
        (lost,) = [result for result in results if isinstance(result, ReplicaLostError)]
        assert f"the process of replica 0, {pid} made no step for step_timeout=5 s and was ended" in str(lost)
        assert not is_alive(pid)
        assert len((await final(engines)).outputs[0].token_ids) == 12

    try:
        run(test())
    finally:
        engines.exit()

    def count(event: str) -> int:
        return sum(getattr(record, "event", "") == event for record in caplog.records)

    assert until(lambda: count("replica.restarted") == 1)
    assert count("replica.lost") == 1


def test_exit_ends_all_processes_and_is_idempotent(caplog: pytest.LogCaptureFixture) -> None:
    engines = DataParallelLLM(EngineConfig("tiny", **SETTINGS), 2)
    pids = [pid_of(engines, index) for index in range(2)]
    replicas = {record.msg[:11] for record in caplog.records if record.name.startswith("nanovllm.engine.model_runner")}
    assert replicas == {"[Replica 0]", "[Replica 1]"}
    assert {record.engine_id for record in caplog.records if getattr(record, "event", "") == "engine.init"} == {0, 1}
    caplog.clear()
    engines.exit()
    engines.exit()
    assert until(lambda: not any(map(is_alive, pids)))
    assert zombies() == []
    assert engines.is_dead
    gc.collect()
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_what_making_it_raises(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"config\.json"):
        DataParallelLLM(EngineConfig(str(tmp_path), device="cpu"), 2)
    assert zombies() == []
