"""NaN or infinity in the weights: the requests that meet it end with an error, and nobody else notices.

One token's embedding is broken. A request that never has this token is computed as ever.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from nanovllm import LLM, AsyncLLM, InvalidLogitsError, RequestOutput, SamplingParams
from tests.models.qwen3_checkpoints import make_qwen3_checkpoint
from tests.small_llm import assert_empty, generate, load, token_ids

BROKEN = 300  # the token whose embedding is broken
DRAWN = SamplingParams(seed=3, max_tokens=8, ignore_eos=True, logit_bias={BROKEN: -100})
PARAMS = [
    replace(DRAWN, logit_bias=None, temperature=0),
    replace(DRAWN, logit_bias=None, allowed_token_ids=list(range(3, 200))),
    DRAWN,
    replace(DRAWN, top_k=5),
    replace(DRAWN, top_p=0.7, logprobs=3),
    replace(DRAWN, min_p=0.1, logprobs=0, prompt_logprobs=2),
    replace(DRAWN, repetition_penalty=1.3, frequency_penalty=0.5),
    replace(DRAWN, temperature=0, logprobs=-1),
]
HEALTHY = [[*range(10, 30 + seq), 100 + seq] for seq in range(len(PARAMS))]


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_qwen3_checkpoint(tmp_path_factory.mktemp("healthy"))


@pytest.fixture(scope="module", params=[torch.nan, torch.inf])
def broken(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_qwen3_checkpoint(tmp_path_factory.mktemp("broken"))
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"][BROKEN] = request.param
    save_file(weights, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def expected(healthy: Path) -> list[list[int]]:
    with load(healthy) as llm:
        return token_ids(generate(llm, HEALTHY, PARAMS))


def check_failed(output: RequestOutput, tokens: list[int]) -> None:
    assert isinstance(output.error, InvalidLogitsError)
    assert [completion.finish_reason for completion in output.outputs] == ["abort"] * len(output.outputs)
    assert [completion.token_ids for completion in output.outputs] == [tokens] * len(output.outputs)
    assert output.finished


def check_both_kinds(llm: LLM, expected: list[list[int]]) -> None:
    """Healthy requests beside broken ones, and after them, on the same blocks."""
    prompts = [prompt for healthy in HEALTHY for prompt in (healthy, [*healthy[:-1], BROKEN, 5])]
    outputs = generate(llm, prompts, [params for params in PARAMS for _ in range(2)])
    assert token_ids(outputs[::2]) == expected
    for output in outputs[1::2]:
        check_failed(output, [])
    assert token_ids(generate(llm, HEALTHY, PARAMS)) == expected
    assert_empty(llm)


@pytest.mark.parametrize(
    "settings",
    [
        {"pipeline_depth": 1},
        {"pipeline_depth": 3, "kvcache_block_size": 4, "num_kvcache_blocks": 26},
        {"pipeline_depth": 2, "max_num_batched_tokens": 9, "enable_prefix_caching": False},
    ],
    ids=["plain", "preempted", "chunks"],
)
def test_a_request_that_meets_it_fails_and_the_others_get_their_tokens(
    broken: Path, expected: list[list[int]], settings: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    with load(broken, **settings) as llm, caplog.at_level("DEBUG", logger="nanovllm"):
        check_both_kinds(llm, expected)
    events = [record.event for record in caplog.records]
    assert events.count("logits.invalid") == 1
    assert events.count("request.failed") == len(PARAMS)
    assert sum("reason=failed" in record.message for record in caplog.records) == len(PARAMS)


@pytest.mark.parametrize("depth", [1, 2])
def test_a_request_that_meets_it_later_keeps_the_tokens_before(broken: Path, depth: int) -> None:
    forced = SamplingParams(temperature=0, max_tokens=8, logit_bias={BROKEN: 100}, logprobs=1, ignore_eos=True)
    with load(broken, pipeline_depth=depth) as llm:
        (output,) = generate(llm, [HEALTHY[0]], forced)
        check_failed(output, [BROKEN])
        assert output.outputs[0].logprobs is not None
        assert len(output.outputs[0].logprobs) == 1
        (output,) = generate(llm, [[BROKEN]], SamplingParams(n=3, seed=0))
        check_failed(output, [])
        assert len(output.outputs) == 3
        last = list(llm.stream([[BROKEN]], DRAWN))[-1]
        check_failed(last, [])
        assert_empty(llm)


def test_keys_and_values_in_fp8_do_not_hide_it(broken: Path, healthy: Path) -> None:
    with load(healthy, kv_cache_dtype="fp8") as llm:
        expected = token_ids(generate(llm, HEALTHY, PARAMS))
    with load(broken, kv_cache_dtype="fp8") as llm:
        check_both_kinds(llm, expected)


def test_ranks_agree_on_it(broken: Path, expected: list[list[int]]) -> None:
    with load(broken, tensor_parallel_size=2, pipeline_depth=2) as llm:
        check_both_kinds(llm, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("settings", [{}, {"enforce_eager": True}, {"kv_cache_dtype": "fp8"}])
def test_on_a_gpu(broken: Path, healthy: Path, settings: dict[str, Any]) -> None:
    on_gpu = {"device": "cuda", "attention_backend": "triton", "dtype": "float32", **settings}
    with load(healthy, **on_gpu) as llm:
        expected = token_ids(generate(llm, HEALTHY, PARAMS))
    with load(broken, **on_gpu) as llm:
        check_both_kinds(llm, expected)


@pytest.mark.parametrize("in_process", [False, True])
def test_an_asynchronous_request_raises_it(broken: Path, in_process: bool) -> None:
    async def run() -> None:
        settings: dict[str, Any] = {"skip_tokenizer_init": True, "engine_process": in_process}
        engine = AsyncLLM(str(broken), device="cpu", num_kvcache_blocks=64, **settings)
        try:
            with pytest.raises(InvalidLogitsError, match="logits are NaN or infinite"):
                async for _ in engine.generate([BROKEN], DRAWN, "broken"):
                    pass
            async for output in engine.generate(HEALTHY[0], PARAMS[0], "healthy"):
                assert output.error is None
        finally:
            engine.shutdown()

    asyncio.run(run())


def test_a_checkpoint_of_nothing_but_nan_fails_every_request(healthy: Path, tmp_path: Path) -> None:
    for file in ("config.json", "generation_config.json"):
        (tmp_path / file).write_bytes((healthy / file).read_bytes())
    weights = load_file(healthy / "model.safetensors")
    for weight in weights.values():
        weight.fill_(torch.nan)
    save_file(weights, tmp_path / "model.safetensors")
    with load(tmp_path) as llm:
        for output in generate(llm, HEALTHY, PARAMS):
            check_failed(output, [])
        assert_empty(llm)
