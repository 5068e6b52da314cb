"""Several ranks give the tokens of one, and whatever becomes of a rank, rank 0 says so and nothing stays behind."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nanovllm import LLM, EngineDeadError, InvalidArgumentError, SamplingParams, WorkerError
from nanovllm.engine.batch import VERSION
from nanovllm.engine.worker import MessageKind
from nanovllm.engine.worker_pool import WorkerPool
from tests.models.qwen3_checkpoints import make_qwen3_checkpoint
from tests.small_llm import GREEDY, assert_empty, generate, load, token_ids
from tests.test_real_schedules import Request, answers, answers_as_they_arrive

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc and /dev/shm")

SHARED_MEMORY = Path("/dev/shm")
# More heads than ranks, KV heads on two ranks each, a vocabulary that the ranks can not share evenly.
SMALL = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 321, "attention_bias": True}


def leftovers() -> list[str]:
    return [path.name for path in SHARED_MEMORY.glob(f"nanovllm-{os.getpid()}-*")]


def executor_of(llm: LLM) -> Any:
    return llm.llm_engine.executor


def pids_of(llm: LLM) -> list[int]:
    return [process.pid for process in executor_of(llm)._workers._processes.values()]


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def until(condition: Callable[[], bool], seconds: float = 5.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return condition()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_qwen3_checkpoint(tmp_path_factory.mktemp("qwen3"), **SMALL)


@pytest.fixture(autouse=True)
def _nothing_stays_behind() -> Iterator[None]:
    yield
    assert leftovers() == []
    assert multiprocessing.active_children() == []


# ---- the same tokens


def random_requests(seed: int, num_requests: int = 10) -> list[Request]:
    """Common starts, greedy and drawn, arriving over time."""
    generator = np.random.default_rng(seed)
    requests = []
    for _ in range(num_requests):
        own = generator.integers(3, 319, size=generator.integers(1, 20)).tolist()
        prompt = [*range(10, 10 + int(generator.integers(0, 40))), *own]
        params = SamplingParams(
            temperature=float(generator.choice([0.0, 0.0, 0.7, 1.3])),
            seed=int(generator.integers(0, 2**63)),
            max_tokens=int(generator.integers(1, 30)),
            ignore_eos=bool(generator.integers(0, 2)),
        )
        requests.append(Request(prompt, params, int(generator.integers(0, 12))))
    return requests


TIGHT: dict[str, Any] = {"kvcache_block_size": 4, "num_kvcache_blocks": 26, "max_num_seqs": 8}


@pytest.mark.parametrize(
    ("model", "size", "arguments"),
    [
        ("tiny", 2, {**TIGHT, "max_num_batched_tokens": 10, "pipeline_depth": 2}),
        ("tiny", 2, {"kvcache_block_size": 16, "max_num_seqs": 3, "enable_prefix_caching": False}),
        ("small", 4, {**TIGHT, "max_num_batched_tokens": 17, "pipeline_depth": 1}),
    ],
)
def test_the_same_tokens_as_one_rank_under_random_schedules(
    folder: Path, model: str, size: int, arguments: dict[str, Any]
) -> None:
    name = "tiny" if model == "tiny" else str(folder)
    common: dict[str, Any] = {"device": "cpu", "dtype": "float32", "skip_tokenizer_init": True, "max_model_len": 96}
    if "num_kvcache_blocks" not in arguments:
        arguments = {**arguments, "num_kvcache_blocks": 100}
    with (
        LLM(name, **common, max_num_seqs=32, enable_prefix_caching=False) as one,
        LLM(name, **common, **arguments, tensor_parallel_size=size) as several,
    ):
        assert len(pids_of(several)) == size - 1
        for seed in range(4 if size == 2 else 2):
            requests = random_requests(seed)
            assert answers_as_they_arrive(several, requests) == answers(one, requests), f"seed {seed}"
        if arguments["num_kvcache_blocks"] == 26:
            assert several.llm_engine.scheduler.num_preemptions >= 5
        abort_some(one, several)


def test_what_needs_a_whole_row_of_logits_gives_what_one_rank_gives(folder: Path) -> None:
    """Ranks gather the rows of such a step alone; the other steps' winners only, as ever."""
    drawn = SamplingParams(seed=3, max_tokens=6, ignore_eos=True)
    params = [
        drawn,
        replace(drawn, top_k=5),
        replace(drawn, top_p=0.7, logprobs=3),
        replace(drawn, min_p=0.2, logprobs=0),
        replace(drawn, temperature=0, logprobs=-1, max_tokens=9),
    ]
    prompts = [[5, 6, 7 + index] for index in range(len(params))]
    with load(folder) as one, load(folder, tensor_parallel_size=2) as several:
        expected, outputs = generate(one, prompts, params), generate(several, prompts, params)
        assert token_ids(outputs) == token_ids(expected)
        for output, reference in zip(outputs, expected, strict=True):
            for token, wanted in zip(
                output.outputs[0].logprobs or (), reference.outputs[0].logprobs or (), strict=True
            ):
                values = {token_id: x.logprob for token_id, x in token.items()}
                assert values == pytest.approx({token_id: x.logprob for token_id, x in wanted.items()}, abs=1e-4)
        assert expected[4].outputs[0].logprobs
        assert_empty(several)


def abort_some(one: LLM, several: LLM) -> None:
    """Requests that end early leave the others their tokens."""
    requests = random_requests(99, 8)
    engine = several.llm_engine
    for index, request in enumerate(requests):
        engine.add_request(str(index), request.prompt, request.params)
    done: dict[str, list[int]] = {}
    for step in range(2000):
        done.update((output.request_id, output.outputs[0].token_ids) for output in engine.step())
        if step in (1, 3):
            engine.abort_request(str(step))
        if not engine.has_unfinished_requests():
            break
    expected = answers(one, requests)
    for index in (0, 2, 4, 5, 6, 7):
        assert done[str(index)] == expected[index]
    for index in (1, 3):
        assert done[str(index)] == expected[index][: len(done[str(index)])]
    assert_empty(several)


def test_a_rank_reads_its_own_part_of_the_weights_and_fewer_blocks_on_one_are_fewer_on_all(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Rank 0 alone finds little memory here: the workers, which would take more, must agree."""
    from nanovllm.engine import model_runner

    monkeypatch.setattr(model_runner, "num_cpu_blocks", lambda *_: 7)
    with caplog.at_level(logging.INFO, "nanovllm"), load(folder, num_kvcache_blocks=None) as one:
        whole = one.llm_engine.executor._runner.model  # type: ignore[attr-defined]
        num_whole = sum(parameter.numel() for parameter in whole.parameters())
    with load(folder, num_kvcache_blocks=None, tensor_parallel_size=2, max_model_len=64) as llm:
        assert llm.llm_engine.resolved.num_blocks == 7
        model = executor_of(llm)._runner.model
        assert sum(parameter.numel() for parameter in model.parameters()) < 0.55 * num_whole
        assert len(generate(llm, [[5] * 40] * 4)) == 4


def test_collectives_and_messages_are_logged_with_their_rank(folder: Path, tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    script = f"""
from tests.small_llm import *
if __name__ == "__main__":
    with load({str(folder)!r}, tensor_parallel_size=2) as llm:
        generate(llm, [[1, 2, 3]])
"""
    environment = {"NANOVLLM_LOG_LEVEL": "DEBUG", "NANOVLLM_LOG_FILE": str(log), "NANOVLLM_LOG_FORMAT": "json"}
    process = run_script(script, tmp_path, environment)
    process.communicate(timeout=60)
    assert process.returncode == 0
    for rank, path in enumerate((log, Path(f"{log}.rank1"))):
        records = [json.loads(line) for line in path.read_text().splitlines()]
        assert {record["rank"] for record in records} == {rank}
        operations = {record["operation"] for record in records if record["event"] == "communication"}
        assert operations >= {"all_reduce", "all_gather", "receive STEP" if rank else "send STEP"}
        assert ("send READY" if rank else "receive READY from rank 1") in operations


# ---- arguments


def test_a_size_that_the_model_can_not_be_cut_into(folder: Path) -> None:
    with pytest.raises(InvalidArgumentError, match="tensor_parallel_size=3 .* one of 1, 2, 4 for this model") as caught:
        load(folder, tensor_parallel_size=3)
    assert "num_attention_heads=4 and intermediate_size=96" in str(caught.value)


# ---- the end of a rank


def raises_worker_error(function: Callable[[], Any], seconds: float = 1.0) -> WorkerError:
    started = time.monotonic()
    with pytest.raises(WorkerError) as caught:
        function()
    assert time.monotonic() - started < seconds
    return caught.value


def kill_later(pid: int, seconds: float) -> threading.Timer:
    timer = threading.Timer(seconds, os.kill, (pid, signal.SIGKILL))
    timer.start()
    return timer


@pytest.mark.parametrize("phase", ["idle", "prefill", "decode"])
def test_a_killed_rank_is_an_error_within_a_second(folder: Path, phase: str) -> None:
    """In prefill and decode it is stopped first, so that rank 0 sits in a collective with it when it dies."""
    with load(folder, tensor_parallel_size=4 if phase == "decode" else 2) as llm:
        engine, pids = llm.llm_engine, pids_of(llm)
        if phase == "decode":
            engine.add_request("a", [1, 2, 3], GREEDY)
            engine.step()
        if phase == "idle":
            os.kill(pids[-1], signal.SIGKILL)
            assert until(lambda: executor_of(llm)._workers.failure is not None, 1)
        else:
            os.kill(pids[-1], signal.SIGSTOP)
            kill_later(pids[-1], 0.3)
        engine.add_request("b", [4] * 10, GREEDY)
        error = raises_worker_error(engine.step, 1.3)
        assert error.rank == len(pids)
        assert str(error) == f"Rank {error.rank} was killed by SIGKILL."
        assert until(lambda: not any(map(is_alive, pids)), 1)
        with pytest.raises(EngineDeadError, match="was killed by SIGKILL"):
            engine.add_request("c", [1], GREEDY)


@pytest.mark.parametrize("when", ["at once", "while loading"])
def test_a_rank_that_is_killed_while_it_starts(folder: Path, monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    wait = WorkerPool.wait_until_attached

    def kill_and_wait(pool: WorkerPool) -> None:
        if when == "while loading":
            wait(pool)
        os.kill(pool._processes[1].pid, signal.SIGKILL)
        wait(pool)

    monkeypatch.setattr(WorkerPool, "wait_until_attached", kill_and_wait)
    error = raises_worker_error(lambda: load(folder, tensor_parallel_size=2), 5)
    assert str(error) == "Rank 1 was killed by SIGKILL."


def test_a_rank_that_is_killed_while_it_ends(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = load(folder, tensor_parallel_size=2)
    generate(llm, [[1, 2]])
    (pid,) = pids_of(llm)
    os.kill(pid, signal.SIGSTOP)  # it does not listen any more
    timer = kill_later(pid, 0.3)
    started = time.monotonic()
    llm.exit()
    timer.join()
    assert time.monotonic() - started < 2
    llm.exit()
    assert not is_alive(pid)


def test_a_rank_that_raises_is_an_error_with_its_traceback(folder: Path) -> None:
    with load(folder, tensor_parallel_size=2) as llm:
        engine = llm.llm_engine
        workers = executor_of(llm)._workers
        workers.send(MessageKind.STEP, np.array([99, 98, 97], dtype=np.int32))
        engine.add_request("a", [1, 2], GREEDY)
        error = raises_worker_error(engine.step)
        assert error.rank == 1
        assert error.problem == f"failed: ValueError: not a scheduled batch of version {VERSION}: [99, 98, 97]"
        assert "On rank 1:\nTraceback (most recent call last):" in str(error)
        assert "in from_buffer" in error.traceback


def test_start_up_has_a_deadline_that_names_the_missing_rank(folder: Path) -> None:
    started = time.monotonic()
    with pytest.raises(WorkerError, match=r"Rank 1 is not ready after startup_timeout=0\.05 s \(rank 1 (has not|is) "):
        load(folder, tensor_parallel_size=2, startup_timeout=0.05)
    assert time.monotonic() - started < 5


def test_an_error_of_rank_0_ends_the_others(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with load(folder, tensor_parallel_size=2) as llm:
        pids = pids_of(llm)
        monkeypatch.setattr(executor_of(llm)._runner, "submit", lambda batch: 1 / 0)
        started = time.monotonic()
        with pytest.raises(ZeroDivisionError):
            generate(llm, [[1, 2]])
        assert time.monotonic() - started < 1
        assert not any(map(is_alive, pids))
        with pytest.raises(EngineDeadError, match="division by zero"):
            generate(llm, [[1, 2]])


def test_two_engines_and_one_that_is_interrupted_and_one_that_is_never_used(folder: Path) -> None:
    with load(folder) as one:
        expected = token_ids(generate(one, [[1, 2, 3], [4, 5]]))
    first, second = (load(folder, tensor_parallel_size=2, pipeline_depth=depth) for depth in (1, 2))
    assert leftovers() == []  # the names are gone as soon as all are attached
    assert token_ids(generate(first, [[1, 2, 3], [4, 5]])) == expected
    kill = threading.Timer(0.15, os.kill, (os.getpid(), signal.SIGINT))
    kill.start()
    with pytest.raises(KeyboardInterrupt):
        generate(first, [[7, 8]] * 8, SamplingParams(max_tokens=250, ignore_eos=True))
    assert token_ids(generate(first, [[1, 2, 3], [4, 5]])) == expected
    second.exit()
    second.exit()
    assert token_ids(generate(first, [[1, 2, 3], [4, 5]])) == expected
    first.exit()


# ---- the end of rank 0


def run_script(script: str, folder: Path, environment: dict[str, str] | None = None) -> subprocess.Popen[str]:
    path = folder / "script.py"
    path.write_text(script)
    root = str(Path(__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1", **(environment or {})}
    return subprocess.Popen(
        [sys.executable, str(path)],
        cwd=root,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


@pytest.mark.parametrize(
    "end", ["SIGKILL", "SIGKILL while loading", "SIGINT", "SIGINT while loading", "exception", "unused"]
)
def test_nothing_outlives_rank_0(folder: Path, tmp_path: Path, end: str) -> None:
    script = f"""
import multiprocessing, sys, time
from tests.small_llm import *
if __name__ == "__main__":
    if {end!r}.endswith("while loading"):
        from nanovllm.engine.worker_pool import WorkerPool
        WorkerPool.wait_until_attached = lambda pool: (print("ready", flush=True), time.sleep(60))
    llm = load({str(folder)!r}, tensor_parallel_size=2)
    if {end!r} == "unused":
        sys.exit()
    generate(llm, [[1, 2]])
    print("ready", flush=True)
    if {end!r} == "exception":
        raise LookupError("the user's")
    while True:
        generate(llm, [[1, 2]] * 8, SamplingParams(max_tokens=200, ignore_eos=True))
"""
    process = run_script(script, tmp_path, {"NANOVLLM_LOG_LEVEL": "ERROR"})
    session = process.pid
    try:
        assert process.stdout is not None
        assert (process.stdout.readline() == "ready\n") == (end != "unused")
        if end.startswith("SIG"):
            time.sleep(0.1)
            if end.startswith("SIGINT"):
                os.killpg(session, signal.SIGINT)  # as a terminal does: to all of them
            else:
                process.kill()
        _, errors = process.communicate(timeout=20)
        assert until(lambda: not processes_of(session))
        assert list(SHARED_MEMORY.glob(f"nanovllm-{session}-*")) == []
        assert "leaked" not in errors
        assert "rank 1" not in errors.lower()
        status = {"SIGINT": -2, "SIGKILL": -9, "exception": 1, "unused": 0}
        assert process.returncode == status[end.split()[0]]
        assert ("LookupError: the user's" in errors) == (end == "exception")
    finally:
        with suppress(ProcessLookupError):
            os.killpg(session, signal.SIGKILL)


def processes_of(session: int) -> list[int]:
    """Processes of a session that have not ended; the group's number is the third field after the name."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, _, _, its_session = path.read_text().rpartition(")")[2].split()[:4]
            if int(its_session) == session and state != "Z":
                found.append(int(path.parent.name))
    return found
