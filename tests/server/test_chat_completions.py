"""POST /v1/chat/completions, as OpenAI defines it and with vLLM's extras."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.server.running_server import ANSWER, QUESTION, RunningServer, error_of, running_server

PATH = "/v1/chat/completions"
ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds two numbers.",
        "parameters": {
            "type": "object",
            "properties": {"a": {"enum": [27, 58]}, "b": {"type": "string", "enum": ["{", "]", '"']}},
            "required": ["a", "b"],
        },
    },
}
NOW = {"type": "function", "function": {"name": "now"}}


def content_of(chunks: list[dict[str, Any]], index: int = 0) -> str:
    choices = [choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == index]
    return "".join(choice["delta"].get("content", "") for choice in choices)


def test_an_answer(server: RunningServer) -> None:
    answer = server.chat(model="tiny")
    assert answer["id"].startswith("chatcmpl-")
    (choice,) = answer["choices"]
    assert choice["message"] == {"role": "assistant", "content": ANSWER, "reasoning": None, "reasoning_content": None}
    assert (choice["finish_reason"], choice["logprobs"]) == ("stop", None)
    assert answer["usage"]["prompt_tokens"] == 33


def test_a_stream(server: RunningServer) -> None:
    first, *chunks = server.stream(PATH, messages=QUESTION)
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert content_of(chunks) == ANSWER
    assert not any("role" in chunk["choices"][0]["delta"] for chunk in chunks)
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"


def test_several_messages(server: RunningServer) -> None:
    fields: dict[str, Any] = {"n": 3, "temperature": 1, "seed": 1, "max_tokens": 8}
    answer = server.chat(**fields)
    expected = [choice["message"]["content"] for choice in answer["choices"]]
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    *chunks, usage = server.stream(PATH, messages=QUESTION, stream_options={"include_usage": True}, **fields)
    assert [content_of(chunks, index) for index in range(3)] == expected
    assert usage["usage"]["completion_tokens"] == answer["usage"]["completion_tokens"]


def test_the_length_is_bounded_by_the_model_alone(server: RunningServer) -> None:
    for name in ("max_tokens", "max_completion_tokens"):
        answer = server.chat(ignore_eos=True, **{name: 70})
        assert answer["usage"]["completion_tokens"] == 70
    assert server.chat([{"role": "user", "content": "count from 1 to 40"}])["usage"]["completion_tokens"] > 64


@pytest.mark.parametrize(
    "content", [QUESTION[0]["content"], [{"type": "text", "text": QUESTION[0]["content"]}], [QUESTION[0]["content"]]]
)
def test_forms_of_content(server: RunningServer, content: Any) -> None:
    assert server.chat([{"role": "user", "content": content}])["choices"][0]["message"]["content"] == ANSWER


def test_other_parts_are_refused_by_name(server: RunningServer) -> None:
    part = {"type": "image_url", "image_url": {"url": "http://example.com/secret.png"}}
    response = server.post(PATH, messages=[{"role": "user", "content": [{"type": "text", "text": "a"}, part]}])
    error = error_of(response, 400)
    assert error["param"] == "messages.0.content.1"
    assert "image_url" in error["message"]
    assert "secret" not in response.text


def test_the_role_of_a_developer_is_that_of_the_system(server: RunningServer) -> None:
    prompts = [
        server.post("/tokenize", messages=[{"role": role, "content": "Be brief."}, *QUESTION]).json()["tokens"]
        for role in ("developer", "system")
    ]
    assert prompts[0] == prompts[1]


def test_logprobs(server: RunningServer) -> None:
    content = server.chat(logprobs=True, top_logprobs=2)["choices"][0]["logprobs"]["content"]
    assert "".join(entry["token"] for entry in content if entry["token"][0] != "<") == ANSWER
    for entry in content:
        assert bytes(entry["bytes"]).decode() == entry["token"]
        assert len(entry["top_logprobs"]) == 2
        assert entry["top_logprobs"][0]["logprob"] >= entry["logprob"]
    chunks = server.stream(PATH, messages=QUESTION, logprobs=True)
    parts = [chunk["choices"][0]["logprobs"] for chunk in chunks]
    streamed = [entry for part in parts if part is not None for entry in part["content"]]
    assert [entry["token"] for entry in streamed] == [entry["token"] for entry in content]
    assert all(entry["top_logprobs"] == [] for entry in streamed)


def test_a_message_is_continued(server: RunningServer) -> None:
    messages = [*QUESTION, {"role": "assistant", "content": "27 + 58 ="}]
    answer = server.chat(messages, continue_final_message=True, add_generation_prompt=False)
    assert answer["choices"][0]["message"]["content"] == " 85"


def test_variables_of_the_template(server: RunningServer) -> None:
    counts = [
        server.chat(chat_template_kwargs=variables, max_tokens=1)["usage"]["prompt_tokens"]
        for variables in ({}, {"enable_thinking": False})
    ]
    assert counts[1] > counts[0]


def test_templates_of_requests_are_refused_unless_trusted(
    server: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nanovllm.requests.chat._MAX_SECONDS", 0.2)
    template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    body = {"messages": [{"role": "user", "content": "27 + 58 ="}], "chat_template": template, "temperature": 0}
    assert error_of(server.post(PATH, **body), 400)["param"] == "chat_template"
    with running_server(server.engine, trust_request_chat_template=True) as trusting:
        answer = trusting.post(PATH, **body).json()
        assert answer["choices"][0]["message"]["content"] == " 85"
        endless = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
        assert error_of(trusting.post(PATH, **{**body, "chat_template": endless}), 400)["param"] == "messages"
        quotes = "{{ raise_exception('not ' ~ messages[0].content) }}"
        message = error_of(trusting.post(PATH, **{**body, "chat_template": quotes}), 400)["message"]
        assert message == "messages must be what the chat template takes (TemplateError: not …)."


def test_json(server: RunningServer) -> None:
    wanted = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"enum": [17, "x"]}, "strict": True}}
    assert json.loads(server.chat(response_format=wanted)["choices"][0]["message"]["content"]) in (17, "x")
    error = error_of(server.post(PATH, messages=QUESTION, response_format={"type": "json_schema"}), 400)
    assert error["param"] == "response_format.json_schema"
    assert error_of(server.post(PATH, messages=QUESTION, response_format={"type": "xml"}), 400)["param"] == (
        "response_format.type"
    )


def test_structural_tags(server: RunningServer) -> None:
    structures = [{"begin": "<n>", "schema": {"enum": [17]}, "end": "</n>"}]
    content = {"type": "json_schema", "json_schema": {"enum": [17]}}
    one = {"type": "tag", "begin": "<n>", "content": content, "end": "</n>"}
    for wanted, expected in (({"format": one}, "<n>17</n>"), ({"structures": structures, "triggers": ["<n>"]}, ANSWER)):
        answer = server.chat(response_format={"type": "structural_tag", **wanted})
        assert answer["choices"][0]["message"]["content"] == expected
    error = error_of(server.post(PATH, messages=QUESTION, response_format={"type": "structural_tag"}), 400)
    assert error["param"] == "response_format"


def calls_in(chunks: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The tool calls of a stream, put together as openai's clients do."""
    calls: dict[int, dict[str, Any]] = {}
    for chunk in chunks:
        for part in chunk["choices"][0]["delta"].get("tool_calls", ()):
            if part["index"] not in calls:
                calls[part["index"]] = {**part, "function": {"name": "", "arguments": ""}}
            function = calls[part["index"]]["function"]
            function["name"] += part["function"].get("name", "")
            function["arguments"] += part["function"]["arguments"]
    return iter(calls.values())


@pytest.mark.parametrize("seed", range(3))
def test_required_tools(server: RunningServer, seed: int) -> None:
    fields: dict[str, Any] = {"tools": [ADD, NOW], "tool_choice": "required", "seed": seed, "temperature": 1}
    fields["max_tokens"] = 200
    fields["parallel_tool_calls"] = False
    choice = server.chat(**fields)["choices"][0]
    (call,) = choice["message"]["tool_calls"]
    assert call["type"] == "function"
    assert choice["message"]["content"] is None
    if choice["finish_reason"] == "length":  # the tiny model writes names of properties without end
        return
    assert choice["finish_reason"] == "tool_calls"
    arguments = json.loads(call["function"]["arguments"])
    if call["function"]["name"] == "add":
        assert arguments["a"] in (27, 58)
    chunks = server.stream(PATH, messages=QUESTION, **fields)
    (streamed,) = calls_in(chunks)
    assert streamed["function"] == call["function"]
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"


def test_a_named_tool(server: RunningServer) -> None:
    fields: dict[str, Any] = {"tools": [NOW, ADD], "tool_choice": {"type": "function", "function": {"name": "add"}}}
    fields["max_tokens"] = 100
    choice = server.chat(**fields)["choices"][0]
    (call,) = choice["message"]["tool_calls"]
    assert call["function"]["name"] == "add"
    (streamed,) = calls_in(server.stream(PATH, messages=QUESTION, **fields))
    assert streamed["function"] == call["function"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [ADD], "tool_choice": "auto"}, "tool_choice"),
        ({"tools": [ADD]}, "tool_choice"),
        ({"tool_choice": "required"}, "tools"),
        (
            {"tools": [ADD], "tool_choice": {"type": "function", "function": {"name": "other"}}},
            "tool_choice.function",
        ),
        ({"tools": [ADD], "tool_choice": "perhaps"}, "tool_choice"),
        (
            {"tools": [{"function": {"name": "a", "parameters": {"type": "string"}}}], "tool_choice": "required"},
            "tools.0.function.parameters",
        ),
        ({"tools": [{"type": "web_search"}]}, "tools.0.type"),
    ],
)
def test_tools_that_cannot_be(server: RunningServer, fields: dict[str, Any], param: str) -> None:
    error = error_of(server.post(PATH, messages=QUESTION, **fields), 400)
    assert error["param"].startswith(param)


def test_a_chat_has_no_echo(server: RunningServer) -> None:
    assert server.chat(echo=False)
    assert error_of(server.post(PATH, messages=QUESTION, echo=True), 400)["param"] == "echo"


def test_no_tool_is_called_with_none(server: RunningServer) -> None:
    assert server.chat(tools=[ADD], tool_choice="none")["choices"][0]["message"]["content"] == ANSWER
