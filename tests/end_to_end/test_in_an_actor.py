"""What an engine respects inside an actor: a process of another system, whose main thread is not the engine's.

Pickled arguments are tested in tests/api/test_public_values.py, repeated ends in tests/api/test_llm_failures.py,
tests/async_engine/test_engine_process.py and tests/distributed/test_rank_faults.py.
"""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.rank_processes import ONLY_LINUX, folder, session_of, start_script
from tests.processes import WATCHDOG, until

__all__ = ["folder"]  # fixture
pytestmark = ONLY_LINUX

# As in an actor, one thread makes the engine, another one uses it and a third one ends it, twice.
ACTOR = """
import asyncio, json, os, signal, sys, threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from nanovllm import AsyncLLM, LLM, SamplingParams

PARAMS = SamplingParams(temperature=0, max_tokens={max_tokens}, ignore_eos=True)

def make():
    settings = dict(device="cpu", skip_tokenizer_init=True, num_kvcache_blocks=64, tensor_parallel_size={size})
    return AsyncLLM({folder!r}, engine_process=True, **settings) if {is_async} else LLM({folder!r}, **settings)

async def stream(engine):
    async for output in engine.generate([1, 2, 3], PARAMS):
        print("token", flush=True)
    return output

def use(engine):
    if {is_async}:
        return asyncio.run(stream(engine)).outputs[0].token_ids
    return engine.generate([[1, 2, 3]], PARAMS, use_tqdm=False)[0].outputs[0].token_ids

def in_thread(function, *arguments):
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function, *arguments).result()

def handlers():
    return [str(signal.getsignal(number)) for number in sorted(signal.valid_signals())]

def variables_of_children():
    found = set()
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(path.read_text().rpartition(")")[2].split()[1])
            environment = path.with_name("environ").read_bytes().split(b"\\0")
        except OSError:
            continue
        if parent == os.getpid():
            found |= {{each.decode() for each in environment if each.startswith(b"CUDA_VISIBLE_DEVICES=")}}
    return sorted(found)

if __name__ == "__main__":
    before = handlers(), dict(os.environ)
    engine = in_thread(make)
    tokens = in_thread(use, engine)
    children = variables_of_children()
    in_thread(engine.exit)
    in_thread(engine.exit)
    same = [before[0] == handlers(), before[1] == dict(os.environ)]
    print(json.dumps(dict(tokens=tokens, children=children, same=same)), flush=True)
"""


def start(folder: Path, tmp_path: Path, **values: Any) -> Any:
    script = ACTOR.format(**{"folder": str(folder), "max_tokens": 5, **values})
    return start_script(script, tmp_path, NANOVLLM_LOG_LEVEL="ERROR", CUDA_VISIBLE_DEVICES="GPU-5ab,3")


def test_actors_side_by_side_in_other_threads_and_with_gpus_as_given(folder: Path, tmp_path: Path) -> None:
    """Two actors of each kind run at the same time: each has ports, shared memory and processes of its own."""
    kinds: list[dict[str, Any]] = [
        {"is_async": is_async, "size": size} for is_async, size in [(False, 1), (False, 2), (True, 1), (True, 2)]
    ]
    actors = []
    for number, kind in enumerate(kinds):
        place = tmp_path / str(number)
        place.mkdir()
        actors.append(start(folder, place, **kind))
    answers = []
    for kind, actor in zip(kinds, actors, strict=True):
        output, errors = actor.communicate(timeout=WATCHDOG)
        assert (actor.returncode, errors) == (0, ""), kind
        answers.append(json.loads(output.splitlines()[-1]))
        assert answers[-1]["same"] == [True, True], "signal handlers and environment"
        has_children = kind["is_async"] or kind["size"] > 1
        assert answers[-1]["children"] == (["CUDA_VISIBLE_DEVICES=GPU-5ab,3"] if has_children else [])
        # The resource tracker that multiprocessing starts ends a moment after its parent.
        assert until(lambda pid=actor.pid: not session_of(pid))  # type: ignore[misc]
    assert len({tuple(answer["tokens"]) for answer in answers}) == 1


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_the_ranks_of_an_engine_process_end_with_the_actor(
    folder: Path, tmp_path: Path, number: signal.Signals
) -> None:
    actor = start(folder, tmp_path, is_async=True, size=2, max_tokens=100_000)
    assert actor.stdout is not None
    assert actor.stdout.readline() == "token\n"
    assert len(session_of(actor.pid)) >= 3, "the actor, the engine's process and rank 1"
    actor.send_signal(number)
    actor.communicate(timeout=WATCHDOG)
    assert until(lambda: not session_of(actor.pid))
