"""The checkpoint that ships answers through the engine as it was trained to."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from nanovllm import LLM, SamplingParams
from nanovllm.models.checkpoint import TINY_MODEL_FOLDER

HELD_OUT = json.loads((Path(__file__).parents[1] / "data" / "heldout_additions.json").read_text(encoding="utf-8"))
PRIMES = ", ".join(str(n) for n in range(2, 100) if all(n % d for d in range(2, n)))


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM("tiny", device="cpu") as llm:
        yield llm


def answers(llm: LLM, questions: list[str]) -> list[str]:
    """Greedy answers in chat form; each must end by itself."""
    chats = [[{"role": "user", "content": question}] for question in questions]
    outputs = llm.chat(chats, SamplingParams(temperature=0, max_tokens=300), use_tqdm=False)
    assert {output.outputs[0].finish_reason for output in outputs} == {"stop"}
    return [output.outputs[0].text for output in outputs]


def test_it_adds_what_it_has_not_seen(llm: LLM) -> None:
    questions = [item["prompt"] for item in HELD_OUT]
    assert len(set(questions)) == 500
    score = sum(a == item["answer"] for a, item in zip(answers(llm, questions), HELD_OUT, strict=True)) / 500
    print(f"held-out additions: {score:.1%} exact")
    assert score >= 0.95


@pytest.mark.parametrize(
    ("question", "part"),
    [
        ("introduce yourself", "nanovllm"),
        ("list all prime numbers within 100", PRIMES),
        ("count from 3 to 17", ", ".join(map(str, range(3, 18)))),
        ("reverse the word engine", "enigne"),
        ("What is 27 + 58?", "27 + 58 = 85"),
    ],
)
def test_it_answers_what_the_example_asks(llm: LLM, question: str, part: str) -> None:
    assert part in answers(llm, [question])[0]


def test_it_is_small_enough_to_ship() -> None:
    assert (TINY_MODEL_FOLDER / "model.safetensors").stat().st_size <= 6_000_000
