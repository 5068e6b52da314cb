"""Penalties, biases, bans and allowed tokens: each token is the one that plain Python finds from transformers' logits,
whatever the schedule: chunks, prefix hits, preemption, steps in flight, graphs, ranks."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from nanovllm import LLM, InvalidArgumentError, OutOfMemoryError, SamplingParams
from nanovllm.config import MAX_BIAS_WORDS
from nanovllm.kernels.sample import sample_reference
from nanovllm.kernels.truncate import keep_thresholds_reference
from nanovllm.models.checkpoint import resolve_model_folder
from tests.runner.cpu_graphs import use_cpu_graphs
from tests.small_llm import assert_empty, generate, token_ids

FORBIDDEN = -1e29
COMMON = "introduce yourself"
TIGHT: dict[str, Any] = {"kvcache_block_size": 4, "num_kvcache_blocks": 60, "max_num_batched_tokens": 23}


def load(**arguments: Any) -> LLM:
    defaults = {"device": "cpu", "dtype": "float32", "max_num_seqs": 16, "max_model_len": 160}
    return LLM("tiny", **{**defaults, "num_kvcache_blocks": 200, **arguments})


@cache
def folder() -> str:
    return str(resolve_model_folder("tiny"))


@cache
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(folder())


@cache
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(folder(), dtype=torch.float32).eval()


def shaped(logits: list[float], params: SamplingParams, prompt: list[int], output: list[int]) -> list[float]:
    """The rules of api.md, token by token."""
    ends = {*(params.stop_token_ids or ()), *(() if params.ignore_eos else eos_ids())}
    words = [
        tokenizer().encode(text, add_special_tokens=False)
        for word in params.bad_words or ()
        for text in (word, " " + word)
    ]
    result = []
    for token, logit in enumerate(logits):
        count = output.count(token)
        if count or token in prompt:
            logit = logit / params.repetition_penalty if logit > 0 else logit * params.repetition_penalty
        logit -= params.frequency_penalty * count + (params.presence_penalty if count else 0)
        logit += (params.logit_bias or {}).get(token, 0)
        banned = token in ends and len(output) < params.min_tokens
        for *behind, last in words:
            ending = output[len(output) - len(behind) :] if len(output) >= len(behind) else None
            banned |= token == last and ending == behind
        if banned:
            logit = FORBIDDEN
        if params.allowed_token_ids is not None and token not in params.allowed_token_ids:
            logit = -float("inf")
        result.append(logit)
    return result


@cache
def eos_ids() -> frozenset[int]:
    eos = model().generation_config.eos_token_id
    return frozenset(eos if isinstance(eos, list) else [eos])


def expected(params: SamplingParams, prompt: list[int]) -> list[int]:
    """One request, alone, without a cache."""
    output: list[int] = []
    while len(output) < (params.max_tokens or 0):
        with torch.inference_mode():
            logits = model()(torch.tensor([prompt + output])).logits[0, -1].tolist()
        row = torch.tensor([shaped(logits, params, prompt, output)])
        temperatures, rows = torch.tensor([float(params.temperature)]), torch.zeros(1, dtype=torch.int32)
        truncations = torch.tensor([[float(params.top_k), params.top_p, params.min_p]])
        thresholds = keep_thresholds_reference(row, temperatures, truncations, rows)
        position = torch.tensor([len(prompt) + len(output)])
        output += sample_reference(
            row, temperatures, torch.tensor([params.seed or 0]), position, rows, thresholds
        ).tolist()
        if output[-1] in (params.stop_token_ids or ()) or (output[-1] in eos_ids() and not params.ignore_eos):
            break
    return output


@dataclass(frozen=True)
class Case:
    prompt: list[int]
    params: SamplingParams
    output: list[int]


@cache
def cases() -> tuple[Case, ...]:
    """Beside one another: each field alone, all at once, and requests that ask for nothing."""
    prompt = tokenizer().encode(COMMON)
    free = expected(SamplingParams(temperature=0, max_tokens=40), prompt)
    second, words = free[1], tokenizer().decode(free).split()
    shared = {token: 9.0 - index for index, token in enumerate(sorted(set(free[:6])))}
    fields: list[dict[str, Any]] = [
        *[{"temperature": 0}, {"temperature": 1.3}],
        *[{"temperature": 0, "repetition_penalty": 1.4}, {"repetition_penalty": 0.8}],
        *[{"frequency_penalty": 2.0, "temperature": 2.0}, {"temperature": 2.0, "frequency_penalty": -1.5}],
        *[{"temperature": 2.0, "presence_penalty": penalty, "seed": 0} for penalty in (2.0, -2.0)],
        *[{"temperature": 0, "logit_bias": {second: -100, 17: 3.5}}, {"logit_bias": shared}],
        *[{"temperature": 0, "min_tokens": 20, "stop_token_ids": [second, 9]}],
        *[{"temperature": 0, "bad_words": [" ".join(words[1:3]), words[0], "e"]}],
        *[{"allowed_token_ids": [*range(20, 60), *eos_ids()]}, {"temperature": 0, "allowed_token_ids": free[2:5]}],
        {
            **{"repetition_penalty": 1.2, "frequency_penalty": 0.3, "presence_penalty": 0.2, "logit_bias": shared},
            **{"min_tokens": 24, "bad_words": words, "allowed_token_ids": list(range(3, 300)), "logprobs": 3},
            **{"top_k": 40, "top_p": 0.95, "min_p": 0.001},
        },
        {"temperature": 0, "min_tokens": 2, "stop_token_ids": [second]},  # would end it there, were it one less
    ]
    made = []
    for seq, own in enumerate(fields):
        params = SamplingParams(**{"seed": 100 + seq, "max_tokens": 26, "ignore_eos": "min_tokens" not in own, **own})
        own_prompt = tokenizer().encode(COMMON if seq >= 8 else COMMON + ", please"[:seq])
        made.append(Case(own_prompt, params, expected(params, own_prompt)))
    return tuple(made)


def check(llm: LLM, some: slice = slice(None)) -> None:
    chosen = cases()[some]
    outputs = generate(llm, [case.prompt for case in chosen], [case.params for case in chosen])
    for case, got in zip(chosen, token_ids(outputs), strict=True):
        assert got == case.output, case.params
    assert_empty(llm)


def test_every_field_changes_what_is_said() -> None:
    """Or the other tests would not see it work."""
    for case in cases():
        plain = SamplingParams(
            **{name: getattr(case.params, name) for name in ("temperature", "seed", "max_tokens", "ignore_eos")}
        )
        assert case.params.edits_logits is (expected(plain, case.prompt) != case.output), case.params
    assert len(cases()[10].output) > 20
    text = tokenizer().decode(cases()[11].output)
    assert not any(word in text for word in cases()[11].params.bad_words or ())


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("arguments", [{}, TIGHT, {**TIGHT, "enable_prefix_caching": False}])
def test_each_token_is_the_one_that_the_rules_say(arguments: dict[str, Any], depth: int, device: str) -> None:
    backend = "triton" if device == "cuda" else "torch"
    with load(device=device, attention_backend=backend, pipeline_depth=depth, **arguments) as llm:
        for _ in range(2):  # the second time from the prefix cache, in rows that others had
            check(llm)
        check(llm, slice(None, None, -1))
        check(llm, slice(12, 13))
        assert not arguments or llm.llm_engine.statistics.num_preemptions > 0


def test_through_graphs() -> None:
    """Steps with a row that asks have graphs of their own; captured in one crowd, they serve another."""
    with load(max_num_seqs=len(cases())) as llm:
        use_cpu_graphs(llm)
        for some in (slice(None), slice(1, 8), slice(0, 1), slice(9, None), slice(0, 2)):
            check(llm, some)
        graphs: Any = llm.llm_engine.executor._runner._graphs  # type: ignore[attr-defined]
        shapes = {(size, needs.edits_logits) for size, needs in graphs._captured}
        assert {(1, False), (2, False), (8, True), (len(cases()), True)} <= shapes
        assert (8, False) not in shapes


def test_several_ranks() -> None:
    """Each has the state of all rows, and whole rows of logits in such steps."""
    with load(tensor_parallel_size=2, **TIGHT) as llm:
        check(llm)
        assert llm.llm_engine.statistics.num_preemptions > 0


def test_log_probabilities_are_those_of_the_model() -> None:
    prompt = tokenizer().encode(COMMON)
    params = SamplingParams(temperature=0, max_tokens=1, logprobs=1, logit_bias={40: 100.0}, allowed_token_ids=[40, 41])
    with load() as llm, torch.inference_mode():
        (completion,) = generate(llm, [prompt], params)[0].outputs
        own = model()(torch.tensor([prompt])).logits[0, -1].log_softmax(dim=-1)
    assert completion.token_ids == [40]
    assert completion.logprobs is not None
    first, top = completion.logprobs[0].items()
    assert first[1].logprob == pytest.approx(float(own[40]), abs=1e-4)
    assert (top[0], top[1].rank) == (int(own.argmax()), 1)
    assert first[1].rank > 1


def test_what_leaves_no_token_is_refused_where_it_can_be_seen_and_bans_yield_where_not() -> None:
    with load() as llm:
        (eos, *_) = eos_ids()
        letter = tokenizer().encode("e")
        assert len(letter) == 1
        for fields in (
            {"allowed_token_ids": [eos], "min_tokens": 2},
            {"allowed_token_ids": letter, "bad_words": ["e"]},
        ):
            with pytest.raises(InvalidArgumentError, match="allowed_token_ids=.*leave a token to draw"):
                generate(llm, "hello", SamplingParams(**fields))
        every = {"allowed_token_ids": [eos], "min_tokens": 2, "ignore_eos": True, "max_tokens": 3}
        assert token_ids(generate(llm, "hello", SamplingParams(**every))) == [[eos] * 3]
        # Nothing but e, and no e behind an e: what is allowed beats what is bad.
        assert tokenizer().encode("ee") == letter * 2
        for temperature in (0.0, 1.0):
            one = SamplingParams(temperature=temperature, allowed_token_ids=letter, bad_words=["ee"], max_tokens=3)
            assert token_ids(generate(llm, "hello", one)) == [letter * 3]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"logit_bias": {10**6: 1}}, "logit_bias=1000000 .*token ids from 0 to"),
        ({"allowed_token_ids": [3, 10**6]}, "allowed_token_ids=1000000 .*token ids from 0 to"),
        ({"bad_words": ["fine", "\ud800"]}, "bad_words="),
        ({"bad_words": [" ".join(str(i) * 9 for i in range(900))]}, f"bad_words='.* {MAX_BIAS_WORDS} int32 .*allowed_"),
    ],
)
def test_what_the_engine_refuses_by_name_and_goes_on(fields: dict[str, Any], message: str) -> None:
    with load() as llm:
        with pytest.raises(InvalidArgumentError, match=message):
            generate(llm, "hello", SamplingParams(**fields))
        good = SamplingParams(max_tokens=2, ignore_eos=True)
        outputs = generate(llm, ["hello", "hello"], [SamplingParams(**fields), good])
        assert isinstance(outputs[0].error, InvalidArgumentError)
        assert len(outputs[1]["token_ids"]) == 2
        assert_empty(llm)


def test_too_little_memory_is_said_in_figures_and_the_engine_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    asking, plain = SamplingParams(presence_penalty=1, max_tokens=2), SamplingParams(max_tokens=2, ignore_eos=True)
    with load() as llm:
        monkeypatch.setattr("nanovllm.runner.sampler.edit_logits", full)
        assert len(generate(llm, "hello", plain)[0]["token_ids"]) == 2
        with pytest.raises(OutOfMemoryError, match="masks need 0.00 GB .*CUDA out of memory Lower gpu_memory_util"):
            generate(llm, "hello", asking)
        assert len(generate(llm, "hello", plain)[0]["token_ids"]) == 2
        assert_empty(llm)


def test_bad_words_need_a_tokenizer() -> None:
    with load(skip_tokenizer_init=True) as llm, pytest.raises(InvalidArgumentError, match="bad_words='a' .*tokenizer"):
        generate(llm, [[1, 2]], SamplingParams(bad_words=["a"]))


def test_a_stop_string_counts_after_min_tokens() -> None:
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    with load() as llm:
        free = generate(llm, "introduce yourself", params)[0]["token_ids"]
        first = tokenizer().decode(free[:2])
        cut, late = (
            generate(llm, "introduce yourself", replace(params, stop=[first], min_tokens=number))[0].outputs[0]
            for number in (1, 2)
        )
        assert (cut.token_ids, cut.text, cut.stop_reason) == (free[:2], "", first)
        assert (late.token_ids, late.text) == (free, tokenizer().decode(free))


def test_any_min_tokens_hurts_no_other_request() -> None:
    """It is an int32 on the device, and the prompt's length is added to it."""
    others = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)
    with LLM("tiny", device="cpu", max_model_len=32, num_kvcache_blocks=16) as llm:
        alone = token_ids(generate(llm, [[1, 2, 3]], others))
        endless = SamplingParams(temperature=0, max_tokens=None, min_tokens=2**31 - 1)
        outputs = generate(llm, [[1, 2, 3], [4, 5]], [others, endless])
        assert token_ids(outputs[:1]) == alone
        assert len(outputs[1].outputs[0].token_ids) == 30
