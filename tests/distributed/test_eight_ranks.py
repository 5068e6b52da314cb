"""Eight ranks: the tokens of one, their logs, and their end when one of them is lost. Tests share the slow starts."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from nanovllm import LLM, EngineDeadError, SamplingParams, WorkerError
from nanovllm.distributed import worker_pool
from nanovllm.engine.batch import ScheduledBatch
from tests.distributed.faulty_worker import Fault, plant
from tests.distributed.rank_processes import (
    ONLY_LINUX,
    executor_of,
    is_alive,
    nothing_stays_behind,
    pids_of,
    segments,
)
from tests.engine.test_schedules import Request, run
from tests.models.checkpoints import make_checkpoint
from tests.processes import until
from tests.quantization.published import gptq, make_quantized
from tests.quantization.test_published import GPTQ
from tests.small_llm import assert_empty, generate, load, token_ids

__all__ = ["nothing_stays_behind"]  # a fixture
pytestmark = [
    ONLY_LINUX,
    pytest.mark.usefixtures("nothing_stays_behind"),
    pytest.mark.heavy("starts eight processes"),
]

SIZE = 8
HEADS = {"num_attention_heads": 8, "vocab_size": 321}  # the last rank has fewer tokens than the others
# Prompts in chunks, and too few blocks for all requests.
TIGHT: dict[str, Any] = {
    "kvcache_block_size": 4,
    "num_kvcache_blocks": 12,
    "max_num_batched_tokens": 10,
    "pipeline_depth": 2,
    "max_model_len": 96,
    "tensor_parallel_size": SIZE,
}
PARAMS = [
    {"temperature": 0},
    {"temperature": 0.8, "seed": 3},
    {"temperature": 1.2, "seed": 4, "top_k": 20},
    {"temperature": 0, "repetition_penalty": 1.3},
    {"temperature": 0, "logprobs": 2},
]


def assert_the_tokens_of_one_rank(folder: Path, eight: LLM) -> None:
    """Prompts begin alike and arrive one after another."""
    drawn = [
        Request([*range(10, 26), 100 + 7 * index], SamplingParams(max_tokens=12, ignore_eos=True, **params), index)
        for index, params in enumerate(PARAMS)
    ]
    run(eight.llm_engine, drawn)
    with load(folder, enable_prefix_caching=False) as one:
        alone = generate(one, [request.prompt for request in drawn], [request.params for request in drawn])
        params = SamplingParams(temperature=0, max_tokens=2, logprobs=3)
        expected, outputs = ([output.outputs[0] for output in generate(llm, [[5, 6]], params)] for llm in (one, eight))
    assert [request.output for request in drawn] == token_ids(alone)
    for output, wanted in zip(outputs, expected, strict=True):
        for mine, theirs in zip(output.logprobs or (), wanted.logprobs or (), strict=True):
            assert {token: x.logprob for token, x in mine.items()} == pytest.approx(
                {token: x.logprob for token, x in theirs.items()}, abs=1e-4
            )
    statistics = eight.llm_engine.statistics
    assert statistics.num_preemptions
    assert statistics.num_prefix_hits
    assert_empty(eight)


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("log") / "log.jsonl"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("qwen3"), "qwen3", head_dim=32, num_key_value_heads=8, **HEADS)


@pytest.fixture(scope="module")
def eight(folder: Path, log: Path) -> Iterator[LLM]:
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("NANOVLLM_LOG_FILE", str(log))
        patched.setenv("NANOVLLM_LOG_FORMAT", "json")
        patched.setenv("NANOVLLM_LOG_LEVEL", "INFO")
        llm = load(folder, **TIGHT)
    with llm:
        yield llm


def test_eight_kv_heads(folder: Path, eight: LLM) -> None:
    assert len(set(pids_of(eight))) == SIZE - 1
    assert segments(os.getpid()) == []
    assert_the_tokens_of_one_rank(folder, eight)


def test_each_rank_has_a_log(eight: LLM, log: Path) -> None:
    for rank in range(1, SIZE):
        records = [json.loads(line) for line in Path(f"{log}.rank{rank}").read_text().splitlines()]
        assert {record["rank"] for record in records} == {rank}
        assert "model.config" in {record["event"] for record in records}


def test_a_rank_that_is_killed_in_a_step(eight: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """It ends the engine that the tests above use."""
    monkeypatch.setattr(worker_pool, "_GRACE_SECONDS", 10.0)
    pids, executor, batches = pids_of(eight), executor_of(eight), []
    submit = executor.submit

    def kill_in_the_third(batch: ScheduledBatch) -> Any:
        batches.append(batch.step)
        if len(batches) == 3:
            os.kill(pids[4], signal.SIGKILL)
        return submit(batch)

    monkeypatch.setattr(executor, "submit", kill_in_the_third)
    with pytest.raises(WorkerError) as caught:
        generate(eight, [[1, 2, 3]])
    assert (caught.value.rank, caught.value.problem) == (5, "was killed by SIGKILL.")
    assert until(lambda: not any(map(is_alive, pids)))
    with pytest.raises(EngineDeadError, match="Rank 5 was killed by SIGKILL"):
        generate(eight, [[1, 2, 3]])


def test_experts_and_four_kv_heads(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, "qwen3_moe", num_key_value_heads=4, **HEADS)
    with load(folder, **TIGHT) as llm:
        assert_the_tokens_of_one_rank(folder, llm)


def test_quantised_weights_and_two_kv_heads(tmp_path: Path) -> None:
    """Groups of 32 inputs on ranks that have 24 each."""
    quantize, config = partial(gptq, symmetric=False), GPTQ | {"sym": False}
    shape = {"hidden_size": 192, "intermediate_size": 192, "head_dim": 24, "num_key_value_heads": 2}
    folder = make_quantized(tmp_path, quantize, config, **shape, **HEADS)[1]
    with load(folder, **TIGHT) as llm:
        assert_the_tokens_of_one_rank(folder, llm)


def test_a_rank_that_is_killed_while_it_loads(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, Fault(7, "load", "kill", tmp_path / "diary"))
    with pytest.raises(WorkerError) as caught:
        load(folder, tensor_parallel_size=SIZE)
    assert (caught.value.rank, caught.value.problem) == (7, "was killed by SIGKILL.")
