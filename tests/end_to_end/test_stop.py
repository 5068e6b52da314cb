"""What ends an output: stop strings and stop tokens, the same under any schedule, and nothing left behind."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nanovllm import LLM, InvalidArgumentError, RequestOutput, SamplingParams
from tests.models.qwen3_checkpoints import make_qwen3_checkpoint
from tests.small_llm import assert_empty, generate, load

PROMPT = "introduce yourself"


@pytest.fixture(scope="module", params=[1, 2], ids=["depth 1", "depth 2"])
def tiny(request: pytest.FixtureRequest) -> Iterator[LLM]:
    with LLM("tiny", device="cpu", max_num_seqs=8, pipeline_depth=request.param) as llm:
        yield llm
        assert_empty(llm)


def params(**changes: Any) -> SamplingParams:
    return SamplingParams(**{"temperature": 0, "max_tokens": 30, **changes})


def one(llm: LLM, **changes: Any) -> RequestOutput:
    (output,) = generate(llm, [PROMPT], params(**changes))
    return output


def test_a_stop_string_ends_the_text_before_it(tiny: LLM) -> None:
    free = one(tiny).outputs[0]
    stop = free.text[4:16]
    cut = one(tiny, stop=stop).outputs[0]
    assert (cut.text, cut.finish_reason, cut.stop_reason) == (free.text[:4], "stop", stop)
    assert cut.token_ids == free.token_ids[: len(cut.token_ids)]
    assert len(cut.token_ids) < len(free.token_ids)
    assert stop in tiny.get_tokenizer().decode(cut.token_ids)
    assert stop not in tiny.get_tokenizer().decode(cut.token_ids[:-1])
    assert one(tiny, stop=["xyzzy", stop], include_stop_str_in_output=True)["text"] == free.text[:16]


def test_a_stop_token_stays_in_token_ids_and_not_in_text(tiny: LLM) -> None:
    free = one(tiny).outputs[0]
    ids, tokenizer = free.token_ids[:4], tiny.get_tokenizer()
    cut = one(tiny, stop_token_ids=[ids[-1]]).outputs[0]
    assert (cut.token_ids, cut.finish_reason, cut.stop_reason) == (ids, "stop", ids[-1])
    assert cut.text == tokenizer.decode(ids[:-1])
    kept = one(tiny, stop_token_ids=[ids[-1]], include_stop_str_in_output=True).outputs[0]
    assert kept.text == tokenizer.decode(ids)


def test_eos_has_no_stop_reason_even_where_it_is_a_stop_token(tiny: LLM) -> None:
    free = one(tiny, max_tokens=64).outputs[0]
    assert (free.finish_reason, free.stop_reason) == ("stop", None)
    eos = free.token_ids[-1]
    assert one(tiny, max_tokens=64, stop_token_ids=[eos]).outputs == [free]
    ignoring = one(tiny, max_tokens=64, stop_token_ids=[eos], ignore_eos=True).outputs[0]
    assert (ignoring.token_ids, ignoring.stop_reason) == (free.token_ids, eos)


def test_a_stop_string_in_the_last_token_allowed_counts(tiny: LLM) -> None:
    free = one(tiny, max_tokens=4).outputs[0]
    last = tiny.get_tokenizer().decode(free.token_ids[-1:])
    cut = one(tiny, max_tokens=4, stop=last).outputs[0]
    assert (free.finish_reason, cut.finish_reason, cut.stop_reason) == ("length", "stop", last)


def test_detokenize_and_special_tokens(tiny: LLM) -> None:
    free = one(tiny, max_tokens=64, ignore_eos=True)
    assert one(tiny, max_tokens=64, ignore_eos=True, detokenize=False).outputs[0].text == ""
    shown = one(tiny, max_tokens=64, ignore_eos=True, skip_special_tokens=False)
    assert shown["token_ids"] == free["token_ids"]
    assert "<|endoftext|>" in shown["text"]
    assert "<|endoftext|>" not in free["text"]
    assert one(tiny, max_tokens=64, ignore_eos=True, skip_special_tokens=False, stop="<|endoftext|>").outputs[
        0
    ].stop_reason == ("<|endoftext|>")


def test_prefix_tokens_alone_or_in_a_crowd(tiny: LLM) -> None:
    """Requests with and without stop rules side by side: each gives what it gives alone."""
    text = one(tiny).outputs[0].text
    many = [params(stop=text[i : i + 3]) if i % 2 else params() for i in range(20)]
    crowd = generate(tiny, [PROMPT] * 20, many)
    assert [output.outputs for output in crowd] == [generate(tiny, PROMPT, param)[0].outputs for param in many]


def test_logprobs_are_those_of_the_tokens_kept(tiny: LLM) -> None:
    free = one(tiny, logprobs=2).outputs[0]
    cut = one(tiny, logprobs=2, stop=free.text[4:16]).outputs[0]
    assert free.logprobs is not None
    assert cut.stop_reason == free.text[4:16]
    assert cut.logprobs == free.logprobs[: len(cut.token_ids)]


def test_stop_strings_under_preemption() -> None:
    """A preempted request is computed again, but its text has seen each token once."""
    free = params(max_tokens=60, ignore_eos=True)
    prompts = [f"{PROMPT} {i}" for i in range(8)]
    few: dict[str, Any] = {
        "num_kvcache_blocks": 14,
        "kvcache_block_size": 16,
        "max_model_len": 128,
        "pipeline_depth": 2,
    }
    with LLM("tiny", device="cpu", max_num_seqs=8) as llm:
        texts = [output["text"] for output in generate(llm, prompts, free)]
        many = [params(max_tokens=60, ignore_eos=True, stop=text[-12:-4]) for text in texts]
        alone = [generate(llm, prompt, param)[0].outputs for prompt, param in zip(prompts, many, strict=True)]
    assert all(outputs[0].stop_reason for outputs in alone)
    with LLM("tiny", device="cpu", max_num_seqs=8, **few) as llm:
        outputs = generate(llm, prompts, many)
        assert llm.llm_engine.statistics.num_preemptions > 0, "the test needs preemption"
        assert_empty(llm)
    assert [output.outputs for output in outputs] == alone


def test_what_this_engine_can_not_watch_is_refused_by_name(tiny: LLM, tmp_path: Path) -> None:
    with pytest.raises(InvalidArgumentError, match="stop_token_ids=999999"):
        generate(tiny, PROMPT, params(stop_token_ids=[1, 999999]))
    assert_empty(tiny)
    with load(make_qwen3_checkpoint(tmp_path)) as llm, pytest.raises(InvalidArgumentError, match="no tokenizer"):
        generate(llm, [[1, 2]], params(stop="a"))
