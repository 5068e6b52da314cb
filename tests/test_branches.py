"""n > 1: several completions of one prompt, each as it would be alone, of a prompt that is computed once."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nanovllm import AsyncLLM, InvalidArgumentError, SamplingParams
from tests.models.qwen3_checkpoints import make_qwen3_checkpoint
from tests.small_llm import assert_empty, generate, load

PROMPT = [(7 * position) % 300 + 5 for position in range(37)]
SEEDED = SamplingParams(n=4, seed=11, max_tokens=9, ignore_eos=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_qwen3_checkpoint(tmp_path_factory.mktemp("qwen3"))


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"max_num_batched_tokens": 10, "pipeline_depth": 2, "max_num_seqs": 3},
        {"kvcache_block_size": 4, "num_kvcache_blocks": 26},  # preemption
        {"enable_prefix_caching": False},
    ],
)
def test_each_is_what_its_seed_gives_alone(folder: Path, arguments: dict[str, Any]) -> None:
    with load(folder, dtype="float32", max_model_len=96) as llm:
        alone = [generate(llm, [PROMPT], replace(SEEDED, n=1, seed=11 + index))[0] for index in range(4)]
    with load(folder, dtype="float32", max_model_len=96, **arguments) as llm:
        output, other = generate(llm, [PROMPT, PROMPT[:3]], [SEEDED, replace(SEEDED, n=1)])
        assert [completion.index for completion in output.outputs] == [0, 1, 2, 3]
        assert [completion.token_ids for completion in output.outputs] == [each["token_ids"] for each in alone]
        assert len({tuple(completion.token_ids) for completion in output.outputs}) == 4
        assert output["token_ids"] == output.outputs[0].token_ids
        assert output.prompt_token_ids == PROMPT
        assert len(other.outputs) == 1
        assert output.metrics is not None
        assert output.metrics.num_output_tokens == 36
        assert output.request_id == "generate-0"
        assert_empty(llm)


def test_without_a_seed_they_differ_and_the_engine_repeats_them(folder: Path) -> None:
    runs = []
    for _ in range(2):
        with load(folder, dtype="float32", max_model_len=96, seed=5) as llm:
            runs.append([each.token_ids for each in generate(llm, [PROMPT], replace(SEEDED, seed=None))[0].outputs])
    assert runs[0] == runs[1]
    assert len(set(map(tuple, runs[0]))) == 4


def test_the_prompt_is_computed_once_and_its_blocks_are_shared(folder: Path) -> None:
    with load(folder, dtype="float32", max_model_len=96, kvcache_block_size=4) as llm:
        engine = llm.llm_engine
        engine.add_request("a", PROMPT, SEEDED)
        engine.step()
        assert engine.statistics.num_prompt_tokens == 37 + 3 * 1  # each computes what is in no full block
        # Nine full blocks in common, and the four's own last ones; depth 2 has asked for no more yet.
        assert engine.scheduler.block_manager.num_used_blocks == 9 + 4
        tables = [sequence.block_table.blocks for sequence in engine.scheduler.rows.running()]
        assert len(tables) == 4
        assert all(table[:9] == tables[0][:9] for table in tables)
        engine.abort_request("a")
        outputs = []
        while engine.has_unfinished_requests():
            outputs += engine.step()
        (output,) = outputs
        assert [each.finish_reason for each in output.outputs] == ["abort"] * 4
        assert_empty(llm)


def test_logprobs_of_each_and_of_the_prompt_once(folder: Path) -> None:
    with load(folder, dtype="float32", max_model_len=96) as llm:
        output = generate(llm, [PROMPT], replace(SEEDED, logprobs=1, prompt_logprobs=0))[0]
        assert output.prompt_logprobs is not None
        assert len(output.prompt_logprobs) == 37
        assert all(each.logprobs is not None and len(each.logprobs) == 9 for each in output.outputs)


def test_stop_rules_end_each_by_itself(folder: Path) -> None:
    with load(folder, dtype="float32", max_model_len=96) as llm:
        free = generate(llm, [PROMPT], SEEDED)[0]
        stop = free.outputs[2].token_ids[4]
        output = generate(llm, [PROMPT], replace(SEEDED, stop_token_ids=[stop]))[0]
        for each, whole in zip(output.outputs, free.outputs, strict=True):
            ends = whole.token_ids.index(stop) + 1 if stop in whole.token_ids else 9
            assert each.token_ids == whole.token_ids[:ends]
        assert output.outputs[2].stop_reason == stop


def test_ids_are_taken_as_long_as_it_runs(folder: Path) -> None:
    with load(folder, dtype="float32", max_model_len=96) as llm:
        engine = llm.llm_engine
        engine.add_request("a/1", PROMPT, replace(SEEDED, n=1))
        with pytest.raises(InvalidArgumentError, match="request_id='a/1'"):
            engine.add_request("a", PROMPT, SEEDED)
        engine.discard_requests(["a/1"])
        engine.add_request("a", PROMPT, SEEDED)
        for name in ("a", "a/0", "a/3"):
            with pytest.raises(InvalidArgumentError, match=f"request_id='{name}'"):
                engine.add_request(name, PROMPT)
        engine.discard_requests(["a"])
        while engine.has_unfinished_requests():
            assert engine.step() == []
        assert_empty(llm)
        engine.add_request("a", PROMPT, SEEDED)
        engine.discard_requests(["a"])


def test_what_is_refused(folder: Path) -> None:
    with pytest.raises(InvalidArgumentError, match=r"seed=.* at most 2\*\*63 - n"):
        SamplingParams(n=2, seed=2**63 - 1)
    with pytest.raises(InvalidArgumentError, match="n=2 .* 1 with temperature 0.*all the same"):
        SamplingParams(n=2, temperature=0)
    with load(folder, dtype="float32", max_model_len=96) as llm:
        with pytest.raises(InvalidArgumentError, match="n=4 .*1 in a stream"):
            list(llm.stream([PROMPT], SEEDED))
        assert_empty(llm)

    async def stream() -> None:
        with AsyncLLM(str(folder), device="cpu", skip_tokenizer_init=True, num_kvcache_blocks=64) as engine:
            outputs = engine.generate(PROMPT, SEEDED)
            with pytest.raises(InvalidArgumentError, match="n=4 .*1 in a stream"):
                await anext(outputs)

    asyncio.run(stream())
