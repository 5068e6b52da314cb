"""/v1/messages: Anthropic's client against the app."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import anthropic
import pytest

from nanovllm.errors import InvalidLogitsError
from tests.server.live import ScriptedEngine, live_server, scripted_service

QUESTION: Any = [{"role": "user", "content": "What is the weather?"}]
WEATHER: Any = {
    "name": "weather",
    "description": "The weather.",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
CALL = 'Wait.\n<tool_call>\n{"name": "weather", "arguments": {"city": "Zürich"}}\n</tool_call>'
FIELDS: Any = {"model": "scripted", "max_tokens": 100, "messages": QUESTION}


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[ScriptedEngine, str]]:
    engine = ScriptedEngine()
    settings = {"reasoning_parser": "qwen3", "tool_call_parser": "hermes", "enable_auto_tool_choice": True}
    with live_server(scripted_service(engine, **settings, api_key=("secret",))) as url:
        yield engine, url


@pytest.fixture
def engine(server: tuple[ScriptedEngine, str]) -> ScriptedEngine:
    server[0].reset()
    return server[0]


@pytest.fixture(scope="module")
def client(server: tuple[ScriptedEngine, str]) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=server[1], api_key="secret", max_retries=0) as client:
        yield client


def test_a_message(engine: ScriptedEngine, client: anthropic.Anthropic) -> None:
    engine.text = "Sunny."
    message = client.messages.create(
        **FIELDS, system="Be brief.", stop_sequences=["END"], extra_body={"temperature": 0.5, "top_k": 7}
    )
    assert [(block.type, block.text) for block in message.content if block.type == "text"] == [("text", "Sunny.")]
    assert (message.role, message.model, message.stop_reason) == ("assistant", "scripted", "end_turn")
    usage = message.usage
    assert (usage.input_tokens, usage.cache_read_input_tokens, usage.output_tokens) == (4, 16, 6)
    params = engine.params[-1]
    assert (params.max_tokens, params.temperature, params.top_k, params.stop) == (100, 0.5, 7, ("END",))
    assert "system Be brief.<|im_end|><|im_start|>user What is the weather?" in engine.prompts[-1]
    assert engine.prompts[-1].endswith("</think>\n\n"), "no thinking unless it is asked for"


@pytest.mark.parametrize(
    ("finish_reason", "stop", "expected"),
    [("stop", "END", ("stop_sequence", "END")), ("length", None, ("max_tokens", None))],
)
def test_the_reason_of_the_end(
    engine: ScriptedEngine, client: anthropic.Anthropic, finish_reason: Any, stop: Any, expected: object
) -> None:
    engine.text, engine.finish_reason, engine.stop_reason = "Sun", finish_reason, stop
    message = client.messages.create(**FIELDS)
    assert (message.stop_reason, message.stop_sequence) == expected


def test_an_aborted_message_is_an_error(engine: ScriptedEngine, client: anthropic.Anthropic) -> None:
    engine.text, engine.finish_reason = "Sunny.", "abort"
    with pytest.raises(anthropic.APIStatusError, match="The request was aborted") as raised:
        client.messages.create(**FIELDS)
    assert raised.value.status_code == 499
    texts = []
    aborted = pytest.raises(anthropic.APIStatusError, match="The request was aborted")
    with aborted, client.messages.stream(**FIELDS) as stream:
        texts += stream.text_stream
    assert "".join(texts) == "Sunny."


def test_the_id_of_a_request_is_anthropics_too(engine: ScriptedEngine, client: anthropic.Anthropic) -> None:
    message = client.messages.create(**FIELDS)
    assert message._request_id == message.id
    with pytest.raises(anthropic.BadRequestError) as raised:
        client.messages.create(**{**FIELDS, "max_tokens": 0}, extra_headers={"X-Request-Id": "order 66"})
    assert raised.value.request_id == "order 66"


def test_events_come_in_order(engine: ScriptedEngine, client: anthropic.Anthropic) -> None:
    engine.text = f"<think>\nHmm.\n</think>\n\n{CALL}"
    thinking: Any = {"type": "enabled", "budget_tokens": 1024}
    stream = client.messages.create(**FIELDS, tools=[WEATHER], thinking=thinking, stream=True)
    events = [event.to_dict() for event in stream]
    kinds: list[Any] = []
    for event in events:
        kind = (event["type"], event.get("index"), event.get("delta", event.get("content_block", {})).get("type"))
        if not kinds or kinds[-1] != kind:
            kinds.append(kind)
    assert kinds == [
        ("message_start", None, None),
        ("content_block_start", 0, "thinking"),
        ("content_block_delta", 0, "thinking_delta"),
        ("content_block_delta", 0, "signature_delta"),
        ("content_block_stop", 0, None),
        ("content_block_start", 1, "text"),
        ("content_block_delta", 1, "text_delta"),
        ("content_block_stop", 1, None),
        ("content_block_start", 2, "tool_use"),
        ("content_block_delta", 2, "input_json_delta"),
        ("content_block_stop", 2, None),
        ("message_delta", None, None),
        ("message_stop", None, None),
    ]
    assert events[-2]["delta"]["stop_reason"] == "tool_use"
    assert events[-2]["usage"]["output_tokens"] == len(engine.text)
    assert engine.prompts[-1].endswith("assistant\n")


def test_a_stream_and_a_message_hold_the_same(engine: ScriptedEngine, client: anthropic.Anthropic) -> None:
    engine.text = f"<think>\nHmm.\n</think>\n\n{CALL}"
    fields = {**FIELDS, "tools": [WEATHER], "thinking": {"type": "adaptive"}}
    whole = client.messages.create(**fields)
    with client.messages.stream(**fields) as stream:
        streamed = stream.get_final_message()
    left, right = whole.to_dict(), streamed.to_dict()
    for each in (left, right):
        each.pop("id")
        each.pop("stop_details", None)
        for block in each["content"]:  # type: ignore[attr-defined]
            block.pop("id", None), block.pop("signature", None), block.pop("parsed_output", None)
    assert left == right
    assert [block["type"] for block in left["content"]] == ["thinking", "text", "tool_use"]  # type: ignore[attr-defined]
    assert left["content"][2]["input"] == {"city": "Zürich"}  # type: ignore[index]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ('{"city": "Zür", "day": "Mon', {"city": "Zür"}),
        ('{"n": 1' + "0" * 30, {"n": 10**30}),
        ('{"a": }', {"INVALID_JSON": '{"a": }'}),
    ],
)
def test_arguments_that_are_cut_off_or_wrong(
    engine: ScriptedEngine, client: anthropic.Anthropic, arguments: str, expected: object
) -> None:
    engine.text = f'<tool_call>{{"name": "weather", "arguments": {arguments}'
    engine.finish_reason = "length"
    message = client.messages.create(**FIELDS, tools=[WEATHER])
    assert [block.input for block in message.content if block.type == "tool_use"] == [expected]
    assert message.stop_reason == "max_tokens"


def test_a_required_call_without_arguments_yet(engine: ScriptedEngine, client: anthropic.Anthropic) -> None:
    engine.text, engine.finish_reason = '[{"name": "weather", "param', "length"
    message = client.messages.create(**FIELDS, tools=[WEATHER], tool_choice={"type": "any"})
    assert [(block.type, block.name, block.input) for block in message.content] == [("tool_use", "weather", {})]
    assert message.stop_reason == "max_tokens"


def test_a_conversation_with_tools(engine: ScriptedEngine, client: anthropic.Anthropic) -> None:
    engine.text = "Sunny."
    messages: Any = [
        *QUESTION,
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "Hmm.", "signature": "x"},
                {"type": "redacted_thinking", "data": "x"},
                {"type": "text", "text": "Wait."},
                {"type": "tool_use", "id": "t1", "name": "weather", "input": {"city": "Bern"}},
                {"type": "tool_use", "id": "t2", "name": "weather", "input": {}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "t1", "content": "sun"},
                {"type": "tool_result", "tool_use_id": "t2", "content": [{"type": "text", "text": "rain"}]},
                {"type": "text", "text": "So?", "cache_control": {"type": "ephemeral"}},
            ],
        },
        {"role": "user", "content": "Tell."},
    ]
    client.messages.create(**{**FIELDS, "messages": messages}, tools=[WEATHER])
    assert (
        '[tool weather {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}]'
        "<|im_start|>user What is the weather?<|im_end|>"
        '<|im_start|>assistant think:Hmm. Wait. call:t1:weather:{"city": "Bern"} call:t2:weather:{}<|im_end|>'
        "<|im_start|>tool t1 sun<|im_end|><|im_start|>tool t2 rain<|im_end|>"
        "<|im_start|>user So?\nTell.<|im_end|>"
    ) in engine.prompts[-1]


def test_the_last_message_is_continued(engine: ScriptedEngine, client: anthropic.Anthropic) -> None:
    engine.text = "ny."
    prefilled: Any = [*QUESTION, {"role": "assistant", "content": "Sun"}]
    message = client.messages.create(**{**FIELDS, "messages": prefilled})
    assert engine.prompts[-1].endswith("<|im_start|>assistant Sun")
    assert message.content[0].to_dict()["text"] == "ny."


@pytest.mark.parametrize(
    ("choice", "schema"),
    [
        ({"type": "any", "disable_parallel_tool_use": True}, '"maxItems": 1'),
        ({"type": "tool", "name": "weather"}, '{"type": "object", "properties": {"city"'),
    ],
)
def test_tool_choice_is_enforced(engine: ScriptedEngine, client: anthropic.Anthropic, choice: Any, schema: str) -> None:
    arguments = '{"city": "Bern"}'
    forced = choice["type"] == "tool"
    engine.text = arguments if forced else f'[{{"name": "weather", "parameters": {arguments}}}]'
    message = client.messages.create(**FIELDS, tools=[WEATHER], tool_choice=choice)
    grammar = engine.params[-1].structured_outputs
    assert grammar is not None
    assert schema in str(grammar.json)
    assert [(block.name, block.input) for block in message.content if block.type == "tool_use"] == [
        ("weather", {"city": "Bern"})
    ]


def test_a_schema_of_the_output(engine: ScriptedEngine, client: anthropic.Anthropic) -> None:
    engine.text = "{}"
    client.messages.create(**FIELDS, output_config={"format": {"type": "json_schema", "schema": {"type": "object"}}})
    grammar = engine.params[-1].structured_outputs
    assert grammar is not None
    assert json.loads(str(grammar.json)) == {"type": "object"}


def test_tokens_are_counted(engine: ScriptedEngine, client: anthropic.Anthropic) -> None:
    counted = client.messages.count_tokens(model="scripted", messages=QUESTION, system="Be brief.")
    engine.text = "."
    client.messages.create(**FIELDS, system="Be brief.")
    tokenizer = engine.get_tokenizer()
    assert counted.input_tokens == len(tokenizer.encode(engine.prompts[-1], add_special_tokens=False))


IMAGE = {"type": "image", "source": {"type": "url", "url": "https://example.org"}}


@pytest.mark.parametrize(
    ("fields", "part"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": [IMAGE]}]}, "messages.0.content.0 must be a block of type 'text'"),
        ({"messages": [{"role": "judge", "content": ""}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": [{"type": "tool_result"}]}]}, "messages.0.content.0.tool_use_id"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"extra_body": {"max_tokens": "5"}}, "max_tokens"),
        ({"extra_body": {"temperature": 9.0}}, "temperature"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools.0.type"),
        ({"tools": [WEATHER], "tool_choice": {"type": "tool"}}, "tool_choice.name"),
        ({"tools": [WEATHER], "tool_choice": {"type": "tool", "name": "other"}}, "tool_choice"),
        ({"extra_body": {"mcp_servers": [{}]}}, "mcp_servers"),
        ({"extra_body": {"container": "c"}}, "container"),
        ({"thinking": {"type": "sometimes"}}, "thinking.type"),
    ],
)
def test_what_is_not_supported_is_refused(
    engine: ScriptedEngine, client: anthropic.Anthropic, fields: dict[str, Any], part: str
) -> None:
    with pytest.raises(anthropic.BadRequestError, match=part.replace(".", r"\.")) as caught:
        client.messages.create(**{**FIELDS, **fields})
    assert caught.value.type == "invalid_request_error"


def test_errors_have_anthropics_form(engine: ScriptedEngine, client: anthropic.Anthropic, server: Any) -> None:
    with pytest.raises(anthropic.NotFoundError) as missing:
        client.messages.create(**{**FIELDS, "model": "claude"})
    assert missing.value.body["type"] == "error"  # type: ignore[index]
    assert missing.value.type == "not_found_error"
    stranger = anthropic.Anthropic(base_url=server[1], api_key="wrong", max_retries=0)
    with pytest.raises(anthropic.AuthenticationError) as refused:
        stranger.messages.create(**FIELDS)
    assert refused.value.type == "authentication_error"


def test_an_error_ends_a_stream(engine: ScriptedEngine, client: anthropic.Anthropic) -> None:
    engine.text, engine.error = "Sunny.", InvalidLogitsError()
    stream = client.messages.create(**FIELDS, stream=True)
    assert next(stream).type == "message_start"
    with pytest.raises(anthropic.APIStatusError) as caught:
        list(stream)
    assert caught.value.type == "api_error"
