"""A process that is forked while an engine lives: it neither uses nor ends the parent's engine."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from tests.distributed.rank_processes import ONLY_LINUX, folder, is_alive, session_of, start_script
from tests.processes import WATCHDOG, until

__all__ = ["folder"]  # fixture
pytestmark = ONLY_LINUX

SCRIPT = """
import asyncio, gc, multiprocessing, os, signal, sys
from nanovllm import AsyncLLM, InvalidStateError
from tests.small_llm import *

def ends(child):
    "Forks a process that runs `child` and ends as Python does, with finalizers."
    process = os.fork()
    if process == 0:
        signal.alarm(120)
        child()
        sys.exit(7)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 7

def is_refused(call):
    try:
        call()
    except InvalidStateError as error:
        assert str(error).startswith(f"This engine belongs to process {os.getppid()}, from which this one, ")
    else:
        raise AssertionError("it is used")

def uses():
    is_refused(lambda: generate(llm, [[1, 2]]))
    is_refused(llm.memory_report)

def closes():
    with llm:
        pass

def forgets():
    global llm
    del llm
    gc.collect()

async def first(llm):
    return [output async for output in llm.generate([1, 2], GREEDY)]

if __name__ == "__main__":
    with load({folder!r}, tensor_parallel_size={size}) as llm:
        expected = token_ids(generate(llm, [[1, 2]]))
        for child in (uses, closes, forgets, lambda: None):
            ends(child)
            assert token_ids(generate(llm, [[1, 2]])) == expected
        process = multiprocessing.get_context("fork").Process(target=forgets)
        process.start()
        process.join()
        assert process.exitcode == 0
        assert token_ids(generate(llm, [[1, 2]])) == expected
    if {size} == 1:
        for in_process in (False, True):
            settings = dict(skip_tokenizer_init=True, num_kvcache_blocks=64, engine_process=in_process)
            with AsyncLLM({folder!r}, device="cpu", **settings) as engine:
                asyncio.run(first(engine))
                ends(lambda: is_refused(lambda: asyncio.run(first(engine))))
                ends(lambda: is_refused(lambda: engine.metrics))
                ends(engine.exit)
                assert token_ids(asyncio.run(first(engine))[-1:]) == expected
    print("the parent goes on")
"""


@pytest.mark.parametrize("size", [1, 2])
def test_a_forked_child_leaves_the_engine_to_its_parent(folder: Path, tmp_path: Path, size: int) -> None:
    script = SCRIPT.replace("{folder!r}", repr(str(folder))).replace("{size}", str(size))
    trace = tmp_path / "trace.json"
    process = start_script(script, tmp_path, NANOVLLM_TRACE_FILE=str(trace), PYTHONWARNINGS="ignore")
    output, errors = process.communicate(timeout=WATCHDOG)
    assert process.returncode == 0, errors
    assert output.endswith("the parent goes on\n")
    assert "Traceback" not in errors
    slices = [json.dumps(event) for event in json.loads(trace.read_text()) if event["ph"] == "X"]
    assert len(set(slices)) == len(slices), "a child writes its copy of them"


ORPHANS = """
import os, signal, time
from tests.small_llm import *
if __name__ == "__main__":
    llm = load({folder!r}, tensor_parallel_size=2)
    if not os.fork():
        time.sleep(600)
    print(*(process.pid for process in llm.llm_engine.executor._workers._processes.values()), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_ranks_end_with_rank_0_while_its_child_lives(folder: Path, tmp_path: Path) -> None:
    process = start_script(ORPHANS.format(folder=str(folder)), tmp_path, PYTHONWARNINGS="ignore")
    try:
        assert process.stdout is not None
        (worker,) = map(int, process.stdout.readline().split())
        assert process.wait(WATCHDOG) == -signal.SIGKILL
        assert until(lambda: not is_alive(worker))
        assert len(session_of(process.pid)) >= 1, "the child"
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
