"""Text of outputs with tokenizers of other kinds than the tiny checkpoint's."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from nanovllm import LLM, SamplingParams
from tests.requests.tokenizer_kinds import LLAMA
from tests.small_llm import generate


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    folder: Path = tmp_path_factory.mktemp("llama_tokenizer")
    LLAMA.save_pretrained(folder)
    with LLM("tiny", tokenizer=str(folder), device="cpu") as llm:
        yield llm


def only(token: str, **settings: object) -> SamplingParams:
    allowed = [LLAMA.convert_tokens_to_ids(token)]
    return SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, allowed_token_ids=allowed, **settings)  # type: ignore[arg-type]


def test_a_stop_string_in_text_that_waits_for_its_end_is_found(llm: LLM) -> None:
    """Byte tokens are decoded when no more of them follow, which may be after the last token."""
    for include, text in ((False, ""), (True, "\ufffd\ufffd")):
        params = only("<0xFF>", stop="\ufffd\ufffd", include_stop_str_in_output=include)
        (whole,) = generate(llm, "a", params)
        completion = whole.outputs[0]
        assert (completion.text, completion.finish_reason, completion.stop_reason) == (text, "stop", "\ufffd\ufffd")
        streamed = list(llm.stream("a", params))
        assert "".join(output["text"] for output in streamed) == text
        assert streamed[-1].outputs[0].finish_reason == "stop"


@pytest.mark.parametrize(("token", "text"), [("<0xFF>", "\ufffd" * 6), ("▁a", "a a a a a a"), ("</s>", "")])
def test_streamed_text_is_the_final_text(llm: LLM, token: str, text: str) -> None:
    (whole,) = generate(llm, "a", only(token))
    assert whole["text"] == text
    assert "".join(output["text"] for output in llm.stream("a", only(token))) == text
