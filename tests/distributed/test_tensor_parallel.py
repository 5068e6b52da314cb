"""Several ranks give the tokens of one, under any schedule; each tells of itself in the log."""

from __future__ import annotations

import json
import logging
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanovllm import LLM, InvalidArgumentError, SamplingParams
from tests.distributed.rank_processes import (
    ONLY_LINUX,
    executor_of,
    folder,
    nothing_stays_behind,
    pids_of,
    start_script,
)
from tests.end_to_end.test_real_schedules import DETERMINISTIC
from tests.engine.test_schedules import Request, run
from tests.models.qwen3_checkpoints import make_qwen3_checkpoint
from tests.processes import WATCHDOG
from tests.small_llm import assert_empty, generate, load, token_ids

__all__ = ["folder", "nothing_stays_behind"]  # fixtures
pytestmark = [ONLY_LINUX, pytest.mark.usefixtures("nothing_stays_behind")]


# ---- the same tokens


# A common start makes prefixes shared; tokens stay clear of the end-of-sequence ids 1 and 2.
requests = st.builds(
    lambda prompt, params, arrival, ends: Request(prompt, params, arrival, None if ends is None else arrival + ends),
    st.builds(
        lambda common, own: [*range(10, 10 + common), *own],
        st.integers(0, 40) | st.just(32),
        st.lists(st.integers(3, 315), min_size=1, max_size=20),
    ),
    st.builds(
        SamplingParams,
        temperature=st.sampled_from([0.0, 0.0, 0.7, 1.3]),
        top_k=st.sampled_from([0, 0, 0, 20]),
        top_p=st.sampled_from([1.0, 1.0, 1.0, 0.7]),
        min_p=st.sampled_from([0.0, 0.0, 0.0, 0.1]),
        # What a rank keeps of a row's earlier tokens, and must have again after a preemption.
        frequency_penalty=st.sampled_from([0.0, 0.0, 0.0, 0.9]),
        repetition_penalty=st.sampled_from([1.0, 1.0, 1.0, 1.3]),
        logit_bias=st.sampled_from([None, None, None, {5: 4.0, 310: 3.0}]),
        min_tokens=st.sampled_from([0, 0, 1]),
        allowed_token_ids=st.sampled_from([None, None, None, None, (3, 80, 81, 160, 161, 300)]),
        seed=st.integers(0, 2**63 - 1),
        max_tokens=st.integers(1, 30) | st.integers(20, 30),
        ignore_eos=st.booleans(),
    ),
    st.integers(0, 6),
    st.sampled_from([None, None, None, 1, 8]),
)
TIGHT: dict[str, Any] = {"kvcache_block_size": 4, "num_kvcache_blocks": 24, "max_num_seqs": 8}
ROOMY: dict[str, Any] = {"kvcache_block_size": 16, "num_kvcache_blocks": 100, "max_num_seqs": 3}


@pytest.mark.parametrize(
    ("shape", "size", "arguments"),
    [
        ("tiny", 2, {**TIGHT, "max_num_batched_tokens": 10, "pipeline_depth": 2}),
        # One KV head on both ranks, three query heads each; the vocabularies are not divisible.
        (
            {"num_attention_heads": 6, "num_key_value_heads": 1, "vocab_size": 317},
            2,
            {**ROOMY, "enable_prefix_caching": False},
        ),
        # KV heads on two ranks each, biases, one table for embedding and head.
        (
            {"num_key_value_heads": 2, "vocab_size": 321, "attention_bias": True, "tie_word_embeddings": True},
            4,
            {**TIGHT, "max_num_batched_tokens": 17},
        ),
    ],
    ids=["tiny", "one KV head", "two KV heads"],
)
def test_the_same_tokens_as_one_rank_under_random_schedules(
    tmp_path: Path, shape: Any, size: int, arguments: dict[str, Any]
) -> None:
    model = shape if shape == "tiny" else str(make_qwen3_checkpoint(tmp_path, **shape))
    common: dict[str, Any] = {"device": "cpu", "dtype": "float32", "skip_tokenizer_init": True, "max_model_len": 96}
    seen: Counter[str] = Counter()
    with (
        LLM(model, **common, num_kvcache_blocks=400, max_num_seqs=32, enable_prefix_caching=False) as one,
        LLM(model, **common, **arguments, tensor_parallel_size=size) as several,
    ):
        assert len(pids_of(several)) == size - 1

        @settings(DETERMINISTIC, max_examples=6 if size == 2 else 4)
        @given(st.lists(requests, min_size=7, max_size=10))
        def check(drawn: list[Request]) -> None:
            run(several.llm_engine, drawn)
            alone = generate(one, [request.prompt for request in drawn], [request.params for request in drawn])
            for request, expected in zip(drawn, token_ids(alone), strict=True):
                assert request.output is not None
                if request.finish_reason == "abort":
                    assert request.output == expected[: len(request.output)]
                else:
                    assert request.output == expected
                seen[request.finish_reason or ""] += 1
            assert_empty(several)

        check()
        statistics = several.llm_engine.statistics
        assert seen["abort"] >= 3
        assert seen["length"] >= 10
        assert (statistics.num_preemptions >= 5) == (arguments["num_kvcache_blocks"] == 24), statistics
        assert (statistics.num_prefix_hits >= 20) == arguments.get("enable_prefix_caching", True), statistics


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


def test_a_rank_reads_its_own_part_of_the_weights_and_fewer_blocks_on_one_are_fewer_on_all(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Rank 0 alone finds little memory here: the workers, which would take more, must agree."""
    from nanovllm.runner import startup

    monkeypatch.setattr(startup, "num_cpu_blocks", lambda *_: 7)
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
        llm.memory_report()
        llm.llm_engine.executor.synchronize()
"""
    environment = {"NANOVLLM_LOG_LEVEL": "DEBUG", "NANOVLLM_LOG_FILE": str(log), "NANOVLLM_LOG_FORMAT": "json"}
    process = start_script(script, tmp_path, **environment)
    process.communicate(timeout=WATCHDOG)
    assert process.returncode == 0
    told: list[set[str]] = []
    for rank, path in enumerate((log, Path(f"{log}.rank1"))):
        records = [json.loads(line) for line in path.read_text().splitlines()]
        assert {record["rank"] for record in records} == {rank}
        operations = {record["operation"] for record in records if record["event"] == "communication"}
        assert operations >= {"all_reduce", "all_gather"}
        messages = [record for record in records if record["event"] == "communication"]
        steps = [
            record["step"] for record in messages if record["operation"] == ("receive STEP" if rank else "send STEP")
        ]
        assert steps == list(range(1, len(steps) + 1))
        assert {record.get("step") for record in messages if record["operation"] == "all_reduce"} >= set(steps)
        for record in messages:
            if "wait_ms" in record:
                assert 0 <= record["wait_ms"] <= record["elapsed_ms"]
                assert record["move_ms"] == record["elapsed_ms"] - record["wait_ms"]
        waits = [record["wait_ms"] for record in messages if record["operation"] == "receive STEP"]
        assert all(wait is not None for wait in waits)
        told.append(operations)
    commands = {"JOIN", "STEP", "DIAGNOSE", "SYNCHRONIZE", "SHUTDOWN"}
    reports = {"ATTACHED", "READY", "ANSWER"}
    assert told[0] >= {f"send {kind}" for kind in commands} | {f"receive {kind} from rank 1" for kind in reports}
    assert told[1] >= {f"receive {kind}" for kind in commands} | {f"send {kind}" for kind in reports}


# ---- arguments


def test_a_size_that_the_model_can_not_be_cut_into(folder: Path) -> None:
    with pytest.raises(InvalidArgumentError, match="tensor_parallel_size=3 .* one of 1, 2, 4 for this model") as caught:
        load(folder, tensor_parallel_size=3)
    assert "num_attention_heads=4 and intermediate_size=96" in str(caught.value)
