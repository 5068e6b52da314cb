"""Tokenization: prompts in every form; what can never fit is refused before it is encoded whole."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from nanovllm import LLM, InvalidArgumentError, ModelLoadError, RequestTooLargeError
from nanovllm.requests.tokenization import Tokenization
from tests.models.qwen3_checkpoints import make_qwen3_checkpoint
from tests.small_llm import GREEDY, generate, token_ids


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM("tiny", device="cpu", max_model_len=128) as llm:
        yield llm


class Counting:
    """A tokenizer that counts the characters it encodes."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.count = tokenizer, 0

    def encode(self, text: str, **settings: Any) -> Any:
        self.count += len(text)
        return self.tokenizer.encode(text, **settings)


# ---- lengths


@pytest.mark.parametrize("text", ["word ", "漢", "x", "😀"])
def test_a_text_that_can_never_fit_is_refused_soon(llm: LLM, text: str) -> None:
    counting: Any = Counting(llm.get_tokenizer())
    with pytest.raises(RequestTooLargeError, match="characters' is not allowed: it must be at most 127 tokens long"):
        Tokenization(counting, llm.llm_engine.resolved).read(text * (10_000_000 // len(text)))
    assert counting.count <= 20_000


def test_a_long_text_of_few_tokens_passes(llm: LLM) -> None:
    """This tokenizer drops spaces, and makes one token of a word of any length."""
    words = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenization = Tokenization(PreTrainedTokenizerFast(tokenizer_object=words), llm.llm_engine.resolved)
    for text in ("a" + " " * 1_000_000 + "a", "b" * 1_000_000 + " a"):
        assert len(tokenization.read(text)[1]) == 2


# ---- forms


@pytest.mark.parametrize("make", [torch.tensor, np.array, tuple, list])
def test_token_ids_in_any_container(llm: LLM, make: Any) -> None:
    expected = token_ids(generate(llm, [[5, 6, 7]]))
    for prompt in (make([5, 6, 7]), [make([5, 6, 7])], {"prompt_token_ids": make([5, 6, 7])}):
        assert token_ids(generate(llm, prompt)) == expected


@pytest.mark.parametrize("make", [torch.tensor, np.array])
def test_rows_are_prompts(llm: LLM, make: Any) -> None:
    assert token_ids(generate(llm, make([[5, 6], [7, 8]]))) == token_ids(generate(llm, [[5, 6], [7, 8]]))


class Bad:
    def __repr__(self) -> str:
        raise RuntimeError("no repr")

    def __array__(self, *arguments: Any) -> Any:
        raise RuntimeError("no array")


LOOP: list[Any] = []
LOOP.append(LOOP)


@pytest.mark.parametrize(
    "prompt",
    [
        {1: 2, "a": 3},
        torch.tensor([0.5]),
        torch.tensor(5),
        torch.tensor([True]),
        np.array(["a"]),
        [1, "a"],
        [1, [2]],
        [1, None],
        Bad(),
        [Bad()],
        {"prompt": Bad()},
        {"prompt_token_ids": Bad()},
        LOOP,
    ],
    ids=lambda prompt: type(prompt).__name__,
)
def test_what_is_no_prompt_is_refused(llm: LLM, prompt: Any) -> None:
    with pytest.raises(InvalidArgumentError, match="prompt.* is not allowed: it must be"):
        llm.llm_engine.add_request("mine", prompt, GREEDY)


# ---- tokenizers that are none


@pytest.mark.parametrize("kind", ["Qwen2Tokenizer", "LlamaTokenizer", "GemmaTokenizer", "GPT2Tokenizer"])
def test_a_tokenizer_without_a_vocabulary_is_refused(tmp_path: Path, kind: str) -> None:
    folder = make_qwen3_checkpoint(tmp_path)
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": kind}))
    with pytest.raises(ModelLoadError, match="gives no tokenizer: it has no vocabulary"):
        LLM(str(folder), device="cpu", num_kvcache_blocks=8)
