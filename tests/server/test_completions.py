"""POST /v1/completions, as OpenAI defines it and with vLLM's extras."""

from __future__ import annotations

from typing import Any

import pytest

from nanovllm.sampling_params import SamplingParams
from tests.server.running_server import CONTINUATION, PROMPT, RunningServer, error_of

PATH = "/v1/completions"


def texts(answer: dict[str, Any]) -> list[str]:
    return [choice["text"] for choice in answer["choices"]]


def joined(chunks: list[dict[str, Any]]) -> dict[int, str]:
    """The text of each choice."""
    text: dict[int, str] = {}
    for chunk in chunks:
        for choice in chunk["choices"]:
            text[choice["index"]] = text.get(choice["index"], "") + choice["text"]
    return text


def test_an_answer(server: RunningServer) -> None:
    answer = server.complete(model="tiny")
    assert answer["id"].startswith("cmpl-")
    assert (answer["object"], answer["model"]) == ("text_completion", "tiny")
    assert answer["choices"] == [
        {"index": 0, "text": CONTINUATION, "logprobs": None, "finish_reason": "stop", "stop_reason": None}
    ]
    assert answer["usage"]["prompt_tokens"] == 9
    assert answer["usage"]["total_tokens"] == 9 + answer["usage"]["completion_tokens"]


def test_the_default_of_max_tokens_is_that_of_openai(server: RunningServer) -> None:
    answer = server.complete("count from 1 to", ignore_eos=True)
    assert answer["usage"]["completion_tokens"] == 16
    assert answer["choices"][0]["finish_reason"] == "length"


def test_a_stream(server: RunningServer) -> None:
    chunks = server.stream(PATH, prompt=PROMPT)
    assert joined(chunks) == {0: CONTINUATION}
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks][-1] == "stop"
    assert all(chunk["usage"] is None for chunk in chunks)


def test_the_usage_of_a_stream(server: RunningServer) -> None:
    *chunks, last = server.stream(PATH, prompt=PROMPT, stream_options={"include_usage": True})
    assert last["choices"] == []
    assert last["usage"]["total_tokens"] == server.complete()["usage"]["total_tokens"]
    assert all(chunk["choices"] for chunk in chunks)


def test_continuous_usage(server: RunningServer) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    *chunks, last = server.stream(PATH, prompt=PROMPT, stream_options=options)
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts)
    assert counts[-1] == last["usage"]["completion_tokens"]


@pytest.mark.parametrize("stream", [False, True])
def test_several_prompts_with_several_completions_come_in_order(server: RunningServer, stream: bool) -> None:
    prompts = ["27 + 58 =", "1 + 1 =", "5 + 5 ="]
    fields = {"n": 2, "temperature": 1, "seed": 3, "max_tokens": 5}
    alone = [server.complete(prompt, **fields) for prompt in prompts]
    expected = [choice["text"] for answer in alone for choice in answer["choices"]]
    if stream:
        assert joined(server.stream(PATH, prompt=prompts, **fields)) == dict(enumerate(expected))
        return
    answer = server.complete(prompts, **fields)
    assert [choice["index"] for choice in answer["choices"]] == list(range(6))
    assert texts(answer) == expected
    assert answer["usage"]["prompt_tokens"] == sum(each["usage"]["prompt_tokens"] for each in alone)


def test_prompts_as_token_ids(server: RunningServer) -> None:
    tokens = server.post("/tokenize", prompt=PROMPT).json()["tokens"]
    assert texts(server.complete(tokens)) == [CONTINUATION]
    assert texts(server.complete([tokens, tokens])) == [CONTINUATION] * 2


@pytest.mark.parametrize("stream", [False, True])
def test_echo(server: RunningServer, stream: bool) -> None:
    tokens = server.post("/tokenize", prompt=PROMPT).json()["tokens"]
    for prompt in (PROMPT, tokens):
        if stream:
            assert joined(server.stream(PATH, prompt=prompt, echo=True)) == {0: PROMPT + CONTINUATION}
        else:
            assert texts(server.complete(prompt, echo=True)) == [PROMPT + CONTINUATION]


def test_echo_of_the_prompt_alone(server: RunningServer) -> None:
    answer = server.complete(echo=True, max_tokens=0, logprobs=1)
    assert texts(answer) == [PROMPT]
    assert len(answer["choices"][0]["logprobs"]["tokens"]) == 9


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_with_echo_are_those_of_the_engine(server: RunningServer, stream: bool) -> None:
    """What lm-eval asks for a log-likelihood."""
    tokens = server.post("/tokenize", prompt=PROMPT).json()["tokens"]
    fields: dict[str, Any] = {"echo": True, "max_tokens": 1, "logprobs": 1}
    if stream:
        (choice,) = [choice for chunk in server.stream(PATH, prompt=tokens, **fields) for choice in chunk["choices"]]
    else:
        (choice,) = server.complete(tokens, **fields)["choices"]
    found = choice["logprobs"]
    assert "".join(found["tokens"]) == PROMPT + CONTINUATION[:1] == choice["text"]
    assert found["text_offset"] == list(range(len(tokens) + 1))
    assert (found["token_logprobs"][0], found["top_logprobs"][0]) == (None, None)
    assert all(logprob <= 0 for logprob in found["token_logprobs"][1:])
    rows = list(zip(found["tokens"], found["token_logprobs"], found["top_logprobs"], strict=True))
    for token, logprob, top in rows[1:]:
        assert top[token] == logprob
        assert max(top.values()) >= logprob


def test_prompt_logprobs(server: RunningServer) -> None:
    first, *rows = server.complete(prompt_logprobs=2)["choices"][0]["prompt_logprobs"]
    assert first is None
    assert len(rows) == 8
    for row in rows:
        assert len(row) in (2, 3)
        assert all(set(each) == {"logprob", "rank", "decoded_token"} for each in row.values())


def test_tokens_as_ids(server: RunningServer) -> None:
    choice = server.complete(return_token_ids=True, logprobs=0, return_tokens_as_token_ids=True)["choices"][0]
    assert choice["logprobs"]["tokens"] == [f"token_id:{token}" for token in choice["token_ids"]]
    assert len(choice["prompt_token_ids"]) == 9
    echoed = server.complete(echo=True, logprobs=0, max_tokens=1, return_tokens_as_token_ids=True)["choices"][0]
    expected = [*choice["prompt_token_ids"], choice["token_ids"][0]]
    assert echoed["logprobs"]["tokens"] == [f"token_id:{token}" for token in expected]
    first, *rest = server.stream(PATH, prompt=PROMPT, return_token_ids=True)
    assert first["choices"][0]["prompt_token_ids"] == choice["prompt_token_ids"]
    assert not any("prompt_token_ids" in chunk["choices"][0] for chunk in rest)
    streamed = [token for chunk in (first, *rest) for token in chunk["choices"][0]["token_ids"]]
    assert streamed == choice["token_ids"]


def test_sampling_fields_reach_the_engine(server: RunningServer) -> None:
    choice = server.complete(stop="8")["choices"][0]
    assert (choice["text"], choice["stop_reason"]) == (" ", "8")
    assert texts(server.complete(stop=["8"], include_stop_str_in_output=True)) == [" 8"]
    assert texts(server.complete(bad_words=["85"], max_tokens=3)) != [CONTINUATION]
    assert texts(server.complete(allowed_token_ids=[17], max_tokens=3)) == ["222"]
    assert texts(server.complete(logit_bias={"17": 100}, max_tokens=3)) == ["222"]
    assert texts(server.complete(min_tokens=6, max_tokens=6)) != [CONTINUATION]
    seeded = [server.complete("a", seed=7, temperature=2, top_k=50, top_p=0.9, min_p=0.01) for _ in range(2)]
    assert texts(seeded[0]) == texts(seeded[1])


def test_structured_outputs(server: RunningServer) -> None:
    choice = {"choice": ["forty", "four"]}
    for fields in ({"structured_outputs": choice}, {"guided_choice": choice["choice"]}):
        assert texts(server.complete(max_tokens=20, **fields))[0] in choice["choice"]
    assert texts(server.complete(guided_regex="[ab]{3}", max_tokens=20))[0] in {"aaa", "bbb", "aab", "abb", "bab"} | {
        "aba",
        "baa",
        "bba",
    }
    error = error_of(server.post(PATH, prompt="x", guided_regex="a", guided_choice=["b"]), 400)
    assert error["param"] == "guided_choice"


def test_values_that_ask_for_what_is_the_case_pass(server: RunningServer) -> None:
    fields: dict[str, Any] = {
        "best_of": 1,
        "suffix": None,
        "priority": 0,
        "user": "someone",
        "metadata": {"a": "b"},
        "use_beam_search": False,
        "response_format": {"type": "text"},
        "add_special_tokens": True,
        "stream_options": None,
        "spaces_between_special_tokens": True,
        "truncate_prompt_tokens": None,
    }
    assert texts(server.complete(**fields)) == [CONTINUATION]


def test_defaults_of_the_checkpoint_apply_where_a_request_is_silent(server: RunningServer) -> None:
    defaults = server.service.defaults
    server.service.defaults = SamplingParams(temperature=0, top_k=3)
    try:
        answers = [server.complete("count", temperature=None, max_tokens=8) for _ in range(3)]
    finally:
        server.service.defaults = defaults
    assert len({texts(answer)[0] for answer in answers}) == 1


def test_a_cache_salt_separates_prefixes(server: RunningServer) -> None:
    prompt = "count from 1 to 40, then reverse the word planet"
    cached = [
        server.complete(prompt, cache_salt=salt, max_tokens=1)["usage"]["prompt_tokens_details"]["cached_tokens"]
        for salt in ("a", "a", "b")
    ]
    assert cached[1] > 0
    assert (cached[0], cached[2]) == (0, 0)
