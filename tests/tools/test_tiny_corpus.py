"""The corpus, the tokenizer and the files of the checkpoint that ships: what was kept out of training really is."""

from __future__ import annotations

import importlib
import json
import re
import sys
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from tests.processes import ROOT

CHECKPOINT = ROOT / "nanovllm" / "assets" / "tiny-qwen3"
sys.path.append(str(ROOT / "tools"))
corpus = importlib.import_module("tiny_corpus")
tokenization = importlib.import_module("tiny_tokenizer")
training = importlib.import_module("train_tiny")

SHIPPED = Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))
ADDITION = re.compile(r"(\d+) \+ (\d+) = (\d+)")


@pytest.fixture(scope="module")
def documents() -> list[Any]:
    return list(corpus.Corpus(seed=0).documents(30_000))


@pytest.fixture(scope="module")
def turns(documents: list[Any]) -> list[Any]:
    return [turn for document in documents if not isinstance(document, str) for turn in document.turns]


def test_500_additions_are_kept_out_and_right() -> None:
    pairs = corpus.heldout_pairs()
    assert len({frozenset(pair) for pair in pairs}) == 500
    assert all(0 <= a < 100 and 0 <= b < 100 for a, b in pairs)
    for (prompt, answer), pair in zip(corpus.heldout_additions(), pairs, strict=True):
        first, second, total = map(int, ADDITION.fullmatch(answer).groups())
        assert first + second == total
        assert {first, second} == set(pair)
        assert Counter(re.findall(r"\d+", prompt)) == Counter([str(first), str(second)])


def test_the_list_in_tests_data_is_the_one_kept_out() -> None:
    written = json.loads((ROOT / "tests" / "data" / "heldout_additions.json").read_text(encoding="utf-8"))
    assert [(pair["prompt"], pair["answer"]) for pair in written] == corpus.heldout_additions()


def test_training_never_shows_a_sum_that_is_kept_out(documents: list[Any], turns: list[Any]) -> None:
    kept_out = {frozenset(pair) for pair in corpus.heldout_pairs()}
    shown = [text for text in documents if isinstance(text, str)] + [turn.answer for turn in turns]
    sums = [tuple(map(int, match.groups())) for text in shown for match in ADDITION.finditer(text)]
    assert len(sums) > 10_000
    assert all(a + b == total for a, b, total in sums)
    assert not kept_out & {frozenset((a, b)) for a, b, _ in sums}


def test_the_generator_can_only_draw_pairs_that_are_not_kept_out() -> None:
    pairs = set(corpus.Corpus(seed=1).pairs)
    kept_out = set(corpus.heldout_pairs())
    assert not pairs & (kept_out | {(b, a) for a, b in kept_out})
    doubles = sum(a == b for a, b in kept_out)
    assert len(pairs) == 10_000 - (2 * 500 - doubles)


def test_training_never_reverses_a_word_that_is_kept_out(documents: list[Any], turns: list[Any]) -> None:
    reversed_words = {word[::-1] for word in corpus.heldout_words()}
    answers = {turn.answer.lower() for turn in turns if turn.kind == "reverse"}
    endings = {text.split()[-1].lower() for text in documents if isinstance(text, str)}
    assert len(reversed_words) == 60
    assert len(answers) > 5_000
    assert not reversed_words & (answers | endings)


def test_every_kind_of_turn_comes_with_its_share_and_its_right_answer(turns: list[Any]) -> None:
    found = Counter(turn.kind for turn in turns)
    assert {kind: count / len(turns) for kind, count in found.items()} == pytest.approx(corpus.SHARES, abs=0.02)
    assert sum(corpus.SHARES.values()) == pytest.approx(1.0)
    for turn in turns:
        if turn.kind == "reverse":
            assert turn.answer[::-1] in turn.prompt
        elif turn.kind == "count":
            numbers = list(map(int, turn.answer.split(", ")))
            asked = [int(number) for number in re.findall(r"\d+", turn.prompt)]
            assert [numbers[0], numbers[-1]] == (asked if len(asked) == 2 else [1, *asked])
            step = 1 if numbers[-1] >= numbers[0] else -1
            assert numbers == list(range(numbers[0], numbers[-1] + step, step))
        elif turn.kind == "primes":
            limit = int(re.findall(r"\d+", turn.prompt)[-1])
            below = re.search("below|less|smaller|under", turn.prompt.lower()) is not None
            assert turn.answer == corpus.join_numbers(corpus.primes_upto(limit - below))


def test_primes() -> None:
    assert corpus.primes_upto(1) == []
    assert corpus.primes_upto(30) == [2, 3, 5, 7, 11, 13, 17, 19, 23, 29]
    assert len(corpus.primes_upto(100)) == 25


def test_a_seed_fixes_the_corpus() -> None:
    def draw(seed: int) -> list[Any]:
        return list(corpus.Corpus(seed).documents(200))

    assert draw(7) == draw(7)
    assert draw(7) != draw(8)


def test_the_shipped_tokenizer_is_the_one_the_script_builds() -> None:
    built = json.loads(tokenization.build_tokenizer(seed=0).to_str())
    assert built == json.loads((CHECKPOINT / "tokenizer.json").read_text(encoding="utf-8"))
    assert len(built["model"]["vocab"]) + len(built["added_tokens"]) == tokenization.VOCAB_SIZE


@pytest.mark.parametrize("empty_thought", [False, True])
def test_training_text_is_what_the_chat_template_writes(documents: list[Any], empty_thought: bool) -> None:
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
    switch = {"enable_thinking": False} if empty_thought else {}
    for document in documents[:300]:
        pieces = list(tokenization.render(document, empty_thought))
        text = "".join(piece for piece, _ in pieces)
        by_piece = [token for piece, _ in pieces for token in SHIPPED.encode(piece).ids]
        assert by_piece == tokenizer(text).input_ids
        if isinstance(document, str):
            continue
        messages = [] if document.system is None else [{"role": "system", "content": document.system}]
        for turn in document.turns:
            messages += [{"role": "user", "content": turn.prompt}, {"role": "assistant", "content": turn.answer}]
        prompt = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True, **switch)
        assert text == prompt + document.turns[-1].answer + "<|im_end|>\n"


def test_chat_template_leaves_earlier_thoughts_out_and_refuses_unknown_roles() -> None:
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
    chat = [
        {"role": "user", "content": [{"type": "text", "text": "hi"}]},
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\nhello"},
    ]
    text = tokenizer.apply_chat_template(chat, tokenize=False)
    assert text == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nhello<|im_end|>\n"
    with pytest.raises(Exception, match="role must be system, user or assistant, not tool"):
        tokenizer.apply_chat_template([{"role": "tool", "content": "x"}], tokenize=False)


@given(st.text(max_size=40))
def test_every_text_comes_back_from_its_tokens(text: str) -> None:
    normal = SHIPPED.normalizer.normalize_str(text)  # NFC, as in Qwen3
    assert SHIPPED.decode(SHIPPED.encode(text).ids, skip_special_tokens=False) == normal


@given(st.lists(st.integers(0, 511), max_size=40))
def test_every_token_sequence_decodes_to_text(token_ids: list[int]) -> None:
    SHIPPED.decode(token_ids, skip_special_tokens=False).encode("utf-8")


def test_digits_and_letters_of_new_words_are_single_tokens() -> None:
    assert SHIPPED.encode("27+58").tokens == ["2", "7", "+", "5", "8"]
    assert SHIPPED.encode('"lantern"').tokens == list('"lantern"')
    merged = [token for token in SHIPPED.get_vocab() if len(token) > 1 and not token.startswith("<")]
    assert len(merged) == tokenization.NUM_MERGES
    assert all(token.startswith("Ġ") for token in merged)


def test_checkpoint_is_a_small_qwen3_that_two_ranks_can_split() -> None:
    config = json.loads((CHECKPOINT / "config.json").read_text(encoding="utf-8"))
    assert config["architectures"] == ["Qwen3ForCausalLM"]
    assert config["tie_word_embeddings"]
    assert (config["head_dim"], config["num_key_value_heads"], config["num_attention_heads"]) == (64, 2, 4)
    assert config["vocab_size"] == SHIPPED.get_vocab_size(with_added_tokens=True)
    stop = [SHIPPED.token_to_id("<|im_end|>"), SHIPPED.token_to_id("<|endoftext|>")]
    assert json.loads((CHECKPOINT / "generation_config.json").read_text(encoding="utf-8"))["eos_token_id"] == stop
    assert (CHECKPOINT / "model.safetensors").stat().st_size <= 6_000_000
    with safe_open(CHECKPOINT / "model.safetensors", framework="pt") as weights:
        names = list(weights.keys())
        tensors = [weights.get_tensor(name) for name in names]
    assert "lm_head.weight" not in names
    assert {tensor.dtype for tensor in tensors} == {torch.bfloat16}
    assert all(torch.isfinite(tensor).all() for tensor in tensors)


def test_training_writes_nothing_into_the_checkout_unless_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["train_tiny.py"])
    args = training.parse_arguments()
    args.out.rmdir()
    assert not any(path.is_relative_to(ROOT) for path in (args.out, args.heldout))
    monkeypatch.setattr(sys, "argv", ["train_tiny.py", "--score-only"])
    assert training.parse_arguments().out == CHECKPOINT
