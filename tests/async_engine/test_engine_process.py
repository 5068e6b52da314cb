"""An AsyncLLM whose engine is a process: however either side ends, the other one notices and nothing is left."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import os
import signal
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from nanovllm import AsyncLLM, EngineDeadError, InvalidArgumentError, ModelLoadError, SamplingParams
from nanovllm.async_engine.engine_process import EngineProcess
from tests.distributed.rank_processes import (
    ONLY_LINUX,
    folder,
    is_alive,
    processes,
    segments,
    session_of,
    zombies,
)
from tests.processes import WATCHDOG, run_python, start_python, until

__all__ = ["folder"]  # fixture
pytestmark = ONLY_LINUX
LONG = SamplingParams(temperature=0, max_tokens=100_000, ignore_eos=True)
SHORT = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)


def make(**settings: Any) -> AsyncLLM:
    return AsyncLLM("tiny", device="cpu", engine_process=True, num_kvcache_blocks=512, **settings)


def pid_of(engine: AsyncLLM) -> int:
    assert isinstance(engine._connection, EngineProcess)
    assert engine._connection._process is not None
    return engine._connection._process.pid


def sockets() -> set[str]:
    """The open sockets of this process."""
    found = set()
    for name in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):  # the descriptor with which the folder was read
            found.add(os.readlink(f"/proc/self/fd/{name}"))
    return {name for name in found if name.startswith("socket")}


async def text_of(engine: AsyncLLM, params: SamplingParams = SHORT) -> str:
    text = ""
    async for output in engine.generate("introduce yourself", params, delta=True):
        text += output["text"]
    return text


def test_a_process_that_is_killed_is_told_to_every_consumer(caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        tasks = [asyncio.create_task(text_of(engine, LONG)) for _ in range(4)]
        while engine.metrics.num_running < 4:
            await asyncio.sleep(0.01)
        os.kill(pid_of(engine), signal.SIGKILL)
        errors = await asyncio.gather(*tasks, return_exceptions=True)
        assert [type(error) for error in errors] == [EngineDeadError] * 4
        assert len({id(error) for error in errors}) == 4, "a traceback of one's own"
        await engine.abort("async-0")
        with pytest.raises(EngineDeadError, match=rf"process {pid_of(engine)} was ended by SIGKILL.*make a new one"):
            await text_of(engine)

    before = sockets()
    engine = make()
    asyncio.run(asyncio.wait_for(test(), WATCHDOG))
    lost = [record for record in caplog.records if getattr(record, "event", "") == "engine_process.lost"]
    assert [record.levelno for record in lost] == [logging.ERROR]
    assert engine.metrics.num_running == 4, "the last ones"
    engine.exit()
    engine.exit()
    assert not is_alive(pid_of(engine))
    assert zombies() == []
    assert sockets() <= before


def test_exit_ends_the_process_and_frees_its_descriptors() -> None:
    before = sockets()
    engine = make()
    pid = pid_of(engine)
    asyncio.run(text_of(engine))
    engine.exit()
    engine.exit()
    assert not is_alive(pid)
    assert zombies() == []
    assert engine.metrics.generation_tokens == 6, "the last ones"
    assert sockets() <= before


def test_forgotten_it_ends_too() -> None:
    engine = make()
    pid = pid_of(engine)
    del engine
    gc.collect()
    assert until(lambda: not is_alive(pid))


@pytest.mark.parametrize("number", [signal.SIGKILL, None])
def test_its_ranks_end_with_it(folder: Path, number: signal.Signals | None) -> None:
    settings: dict[str, Any] = {"skip_tokenizer_init": True, "num_kvcache_blocks": 64, "tensor_parallel_size": 2}
    engine = AsyncLLM(str(folder), device="cpu", engine_process=True, **settings)
    pid = pid_of(engine)
    children = [child for child, _, parent, _ in processes() if parent == pid]
    assert children
    if number is not None:
        os.kill(pid, number)
    engine.exit()
    assert until(lambda: not any(map(is_alive, children)))
    assert segments(pid) == []


SCRIPT = """
import asyncio, os
from nanovllm import AsyncLLM, SamplingParams

engine = AsyncLLM("tiny", device="cpu", engine_process=True, num_kvcache_blocks=512)

async def main():
    params = SamplingParams(temperature=0, max_tokens={max_tokens}, ignore_eos=True)
    async for output in engine.generate("introduce yourself", params, delta=True):
        print(engine._connection._process.pid, flush=True)

asyncio.run(main())
"""


def test_a_script_needs_no_guard_and_no_exit() -> None:
    done = run_python("-c", SCRIPT.format(max_tokens=2), NANOVLLM_LOG_LEVEL="WARNING")
    assert (done.returncode, done.stderr) == (0, "")
    assert not is_alive(int(done.stdout.split()[0]))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_program_that_is_ended_leaves_no_process(number: signal.Signals) -> None:
    process = start_python("-c", SCRIPT.format(max_tokens=50_000), NANOVLLM_LOG_LEVEL="WARNING")
    assert process.stdout is not None
    pid = int(process.stdout.readline())
    assert is_alive(pid)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=WATCHDOG)
    assert until(lambda: not session_of(process.pid))
    if number == signal.SIGINT:
        assert stderr.strip().endswith("KeyboardInterrupt")


def test_what_making_it_raises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelLoadError, match=r"config\.json"):
        AsyncLLM(str(tmp_path), device="cpu", engine_process=True)
    with pytest.raises(InvalidArgumentError) as caught:
        make(max_model_len=100_000_000)
    assert caught.value.field == "max_model_len"
    assert caught.value.value == 100_000_000
    monkeypatch.setenv("NANOVLLM_ENGINE_PROCESS", "perhaps")
    with pytest.raises(InvalidArgumentError, match="NANOVLLM_ENGINE_PROCESS"):
        AsyncLLM("tiny", device="cpu")
    assert zombies() == []


def test_the_log_file_has_the_records_of_both_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "run.jsonl"
    monkeypatch.setenv("NANOVLLM_LOG_FILE", str(file))
    monkeypatch.setenv("NANOVLLM_LOG_FILE_FORMAT", "json")
    with make() as engine:
        asyncio.run(text_of(engine))
        logging.getLogger("nanovllm").info("from the program")
        pid = pid_of(engine)
    records = [json.loads(line) for line in file.read_text().splitlines()]
    ours = [record for record in records if record["pid"] != pid]
    theirs = [record for record in records if record["pid"] == pid]
    assert [record["message"] for record in ours] == ["from the program"]
    assert len({record["engine_id"] for record in theirs}) == 1
    names = [record["event"] for record in records]
    assert names.index("engine.init") < names.index("request.finished") < names.index("") < names.index("engine.exit")
    assert names.count("engine.init") == names.count("engine.exit") == 1
    assert names.count("engine.statistics") >= 1
    assert [record["mono"] for record in theirs] == sorted(record["mono"] for record in theirs)


def test_each_record_is_on_the_console_once() -> None:
    done = run_python("-c", SCRIPT.format(max_tokens=2), NANOVLLM_LOG_LEVEL="INFO", NANOVLLM_ENGIN_PROCESS="1")
    assert done.stderr.count("Initializing LLMEngine") == 1
    assert done.stderr.count("NANOVLLM_ENGIN_PROCESS") == 1
    assert done.stderr.count("Engine ended: clean") == 1
