"""Log-probabilities: exact against transformers under any schedule, raw, and in the form that api.md gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from nanovllm import LLM, Logprob, RequestOutput, SamplingParams
from tests.models.qwen3_checkpoints import make_qwen3_checkpoint
from tests.small_llm import assert_empty, generate, load

VOCAB_SIZE = 320
COMMON = list(range(10, 50))
PROMPTS = [[*COMMON[: 8 * (seq % 5)], *range(100 + seq, 104 + 2 * seq)] for seq in range(8)]
ASKED = [5, None, 0, -1, 20, 1, None, 3]
PARAMS = [
    SamplingParams(temperature=[0.0, 1.3][seq % 2], top_k=[0, 0, 40][seq % 3], seed=seq, max_tokens=12, logprobs=asked)
    for seq, asked in enumerate(ASKED)
]
TIGHT: dict[str, Any] = {"kvcache_block_size": 4, "num_kvcache_blocks": 26, "max_num_batched_tokens": 17}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_qwen3_checkpoint(tmp_path_factory.mktemp("qwen3"))


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def check(model: Any, output: RequestOutput, asked: int | None) -> None:
    completion = output.outputs[0]
    if asked is None:
        assert completion.logprobs is None
        assert completion.cumulative_logprob is None
        return
    assert completion.logprobs is not None
    assert len(completion.logprobs) == len(completion.token_ids)
    with torch.inference_mode():
        logits = model(torch.tensor([output.prompt_token_ids + completion.token_ids])).logits[0]
    expected = logits[len(output.prompt_token_ids) - 1 : -1].log_softmax(dim=-1)
    num_top = VOCAB_SIZE if asked == -1 else asked
    for token_id, row, own in zip(completion.token_ids, completion.logprobs, expected, strict=True):
        assert next(iter(row)) == token_id
        ranks = [item.rank for item in row.values()]
        assert sorted({*ranks, *range(1, num_top + 1)}) == sorted(ranks)  # the likeliest, and its own if not among them
        assert ranks[1:] == sorted(ranks[1:])
        for top_id, item in row.items():
            assert item.logprob == pytest.approx(float(own[top_id]), abs=1e-4)
            # Rounding may swap tokens that are level but for it.
            above, level = int((own > own[top_id] + 1e-5).sum()), int((own >= own[top_id] - 1e-5).sum())
            assert above < item.rank <= level
            assert item.decoded_token is None  # no tokenizer
    total = sum(float(own[token_id]) for token_id, own in zip(completion.token_ids, expected, strict=True))
    assert completion.cumulative_logprob == pytest.approx(total, abs=1e-3)


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("arguments", [{}, TIGHT, {**TIGHT, "enable_prefix_caching": False}])
def test_logprobs_are_those_of_transformers(folder: Path, model: Any, depth: int, arguments: dict[str, Any]) -> None:
    """Greedy and drawn, truncated or not; chunks, prefix hits, preemption and overlap."""
    with load(folder, dtype="float32", max_model_len=96, pipeline_depth=depth, **arguments) as llm:
        for _ in range(2):  # the second time from the prefix cache
            outputs = generate(llm, PROMPTS, PARAMS)
            for output, asked in zip(outputs, ASKED, strict=True):
                check(model, output, asked)
        assert not arguments or llm.llm_engine.statistics.num_preemptions > 0
        assert bool(outputs[4].num_cached_tokens) is arguments.get("enable_prefix_caching", True)
        assert_empty(llm)


def test_tokens_are_the_same_with_and_without(folder: Path) -> None:
    with load(folder, dtype="float32", max_model_len=96) as llm:
        plain = SamplingParams(seed=3, max_tokens=9, ignore_eos=True)
        asking = SamplingParams(seed=3, max_tokens=5, ignore_eos=True, logprobs=2)
        alone = generate(llm, PROMPTS[:1], plain)[0]["token_ids"]
        together = generate(llm, [PROMPTS[0], PROMPTS[0]], [plain, asking])
        assert [output["token_ids"] for output in together] == [alone, alone[:5]]


def test_tokens_are_decoded_and_an_aborted_request_keeps_what_it_has() -> None:
    with LLM("tiny", device="cpu", num_kvcache_blocks=64, max_num_seqs=2) as llm:
        engine = llm.llm_engine
        engine.add_request("a", "introduce yourself", SamplingParams(temperature=0, max_tokens=50, logprobs=1))
        for _ in range(4):
            engine.step()
        engine.abort_request("a")
        (output,) = [output for _ in range(3) for output in engine.step()]
        completion = output.outputs[0]
        assert completion.logprobs is not None
        assert len(completion.logprobs) == len(completion.token_ids) > 0
        first = completion.logprobs[0][completion.token_ids[0]]
        assert isinstance(first, Logprob)
        assert first.rank == 1
        assert first.decoded_token == llm.get_tokenizer().decode(completion.token_ids[:1])
