"""prompt_logprobs against transformers' log-softmax, under chunks, preemption, prefix caching and several ranks."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from nanovllm import LLM, Logprob, RequestOutput, SamplingParams
from tests.engine.test_schedules import check_integrity
from tests.models.qwen3_checkpoints import make_qwen3_checkpoint
from tests.small_llm import assert_empty, generate, load

PROMPTS = [[(7 * row + 3 * position) % 300 + 5 for position in range(n)] for row, n in enumerate((1, 2, 37, 20, 64))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_qwen3_checkpoint(tmp_path_factory.mktemp("qwen3"))


@pytest.fixture(scope="module")
def expected(folder: Path) -> list[torch.Tensor]:
    """Of each prompt, log-probabilities [num_tokens, vocab_size] of what follows each token."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        return [model(torch.tensor([prompt])).logits[0].log_softmax(-1) for prompt in PROMPTS]


def asking(number: int, max_tokens: int = 4) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, prompt_logprobs=number)


def check(output: RequestOutput, expected: torch.Tensor, number: int) -> None:
    prompt = output.prompt_token_ids
    assert output.prompt_logprobs is not None
    assert output.prompt_logprobs[0] is None
    assert len(output.prompt_logprobs) == len(prompt)
    for position, (token_id, row) in enumerate(zip(prompt[1:], output.prompt_logprobs[1:], strict=True)):
        assert row is not None
        assert next(iter(row)) == token_id
        likeliest = set(expected[position].topk(number).indices.tolist())
        assert set(row) == likeliest | {token_id}
        for token, logprob in row.items():
            assert isinstance(logprob, Logprob)
            assert logprob.logprob == pytest.approx(float(expected[position, token]), abs=1e-4)
        assert row[token_id].rank == int((expected[position] > expected[position, token_id]).sum()) + 1


SCHEDULES: list[dict[str, Any]] = [
    {},
    {"max_num_batched_tokens": 10, "pipeline_depth": 2},  # chunks, two steps in flight
    {"kvcache_block_size": 4, "num_kvcache_blocks": 26, "max_num_seqs": 4, "max_num_batched_tokens": 23},  # preemption
    {"tensor_parallel_size": 2, "max_num_batched_tokens": 33},
]


@pytest.mark.parametrize(
    "arguments", [*SCHEDULES, pytest.param({"device": "cuda", "max_num_batched_tokens": 33}, marks=pytest.mark.gpu)]
)
def test_those_of_transformers(folder: Path, expected: list[torch.Tensor], arguments: dict[str, Any]) -> None:
    with load(folder, dtype="float32", max_model_len=96, **arguments) as llm:
        for _ in range(2):  # the second time the prefix cache knows all prompts
            numbers = [3, 20, 0, 5, 2]
            outputs = generate(llm, PROMPTS, [asking(number, 20) for number in numbers])
            for output, logprobs, number in zip(outputs, expected, numbers, strict=True):
                check(output, logprobs, number)
                assert output.num_cached_tokens == 0
            plain = generate(llm, PROMPTS, SamplingParams(temperature=0, max_tokens=20, ignore_eos=True))
            assert [output["token_ids"] for output in plain] == [output["token_ids"] for output in outputs]
            assert all(output.prompt_logprobs is None for output in plain)
        if "num_kvcache_blocks" in arguments:
            assert llm.llm_engine.statistics.num_preemptions > 0
        assert_empty(llm)


def test_all_tokens_a_few_positions_a_step(folder: Path, expected: list[torch.Tensor], monkeypatch: Any) -> None:
    monkeypatch.setattr("nanovllm.engine.scheduler._MAX_PROMPT_LOGPROBS", 320 * 9)
    with load(folder, dtype="float32", max_model_len=96) as llm:
        output = generate(llm, [PROMPTS[2]], asking(-1))[0]
        check(output, expected[2], 320)
        assert llm.llm_engine.statistics.num_steps >= 5 + 3  # 37 tokens, nine at a time; then three more


def test_beside_rows_that_do_not_ask(folder: Path, expected: list[torch.Tensor]) -> None:
    """They find each other's prefixes as ever; who asks shares what it computed with who comes later."""
    plain = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)
    with load(folder, dtype="float32", max_model_len=96, kvcache_block_size=4) as llm:
        outputs = generate(llm, [PROMPTS[4], PROMPTS[4], PROMPTS[4]], [plain, asking(1), plain])
        assert [output.num_cached_tokens for output in outputs] == [0, 0, 60]
        check(outputs[1], expected[4], 1)


@pytest.mark.parametrize("seed", range(6))
def test_random_schedules(folder: Path, seed: int) -> None:
    """Those who ask and those who do not, with one and several completions, at any time, in a cache for few of them."""
    drawn = random.Random(seed)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    block_size = drawn.choice([1, 2, 4, 8])
    arguments: dict[str, Any] = {
        "kvcache_block_size": block_size,
        "num_kvcache_blocks": 104 // block_size + drawn.randrange(4),
        "max_num_seqs": drawn.randint(4, 8),
        "max_num_batched_tokens": drawn.randint(8, 16),  # prompts are preempted on the way, too
        "pipeline_depth": drawn.randint(1, 3),
        "enable_prefix_caching": seed % 3 != 0,
    }
    requests = {}
    for index in range(12):
        prompt = [*range(10, 10 + drawn.randrange(40)), *(drawn.randint(3, 319) for _ in range(drawn.randint(1, 24)))]
        asked, number = drawn.choice([None, 0, 2, 5, -1]), drawn.choice([1, 1, 3])
        params = SamplingParams(n=number, seed=index, max_tokens=drawn.randint(1, 20), prompt_logprobs=asked)
        requests[str(index)] = drawn.randrange(25), prompt, params
    with load(folder, dtype="float32", max_model_len=96, **arguments) as llm:
        engine = llm.llm_engine
        outputs: dict[str, RequestOutput] = {}
        step = 0
        while len(outputs) < len(requests):
            for name, (arrives_at, prompt, params) in requests.items():
                if arrives_at == step:
                    engine.add_request(name, prompt, params)
            outputs.update((output.request_id, output) for output in engine.step())
            check_integrity(engine)
            step += 1
        assert engine.statistics.num_preemptions > 0
        for name, (_, prompt, params) in requests.items():
            assert len(outputs[name].outputs) == params.n
            if params.prompt_logprobs is None:
                assert outputs[name].prompt_logprobs is None
                continue
            with torch.inference_mode():
                expected = model(torch.tensor([prompt])).logits[0].log_softmax(-1)
            number = params.prompt_logprobs
            check(outputs[name], expected, expected.shape[1] if number == -1 else number)


def test_an_aborted_request_has_what_there_is(folder: Path, expected: list[torch.Tensor]) -> None:
    with load(folder, dtype="float32", max_model_len=96, max_num_batched_tokens=16) as llm:
        engine = llm.llm_engine
        engine.add_request("a", PROMPTS[4], asking(0))
        engine.step()
        engine.step()
        engine.abort_request("a")
        (output,) = [output for _ in range(2) for output in engine.step()]
        scores = output.prompt_logprobs
        assert scores is not None
        assert 16 <= len(scores) - 1 < 63
        got = [row[token].logprob for row, token in zip(scores[1:], PROMPTS[4][1:], strict=False) if row]
        want = [float(expected[4][position, token]) for position, token in enumerate(PROMPTS[4][1 : len(scores)])]
        np.testing.assert_allclose(got, want, atol=1e-4)


def test_tokens_have_their_text() -> None:
    with LLM("tiny", device="cpu", num_kvcache_blocks=64) as llm:
        output = llm.generate("hello there", asking(1), use_tqdm=False)[0]
        assert output.prompt_logprobs is not None
        pairs = zip(output.prompt_logprobs, output.prompt_token_ids, strict=True)
        text = [row[token].decoded_token for row, token in pairs if row]
        assert text == [llm.get_tokenizer().decode([token]) for token in output.prompt_token_ids[1:]]
