"""/v1/responses: OpenAI's client against the app."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from pydantic import BaseModel

from nanovllm.errors import InvalidLogitsError
from tests.server.live import ScriptedEngine, live_server, scripted_service

WEATHER: Any = {
    "type": "function",
    "name": "weather",
    "description": "The weather.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    "strict": True,
}
ALL = (
    "<think>\nHmm.\n</think>\n\nWait.\n"
    '<tool_call>\n{"name": "weather", "arguments": {"city": "Zürich"}}\n</tool_call>\n'
    '<tool_call>\n{"name": "weather", "arguments": {}}\n</tool_call>'
)


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[ScriptedEngine, str]]:
    engine = ScriptedEngine()
    settings = {"reasoning_parser": "qwen3", "tool_call_parser": "hermes", "enable_auto_tool_choice": True}
    with live_server(scripted_service(engine, **settings)) as url:
        yield engine, url


@pytest.fixture
def engine(server: tuple[ScriptedEngine, str]) -> ScriptedEngine:
    server[0].reset()
    return server[0]


@pytest.fixture(scope="module")
def client(server: tuple[ScriptedEngine, str]) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server[1]}/v1", api_key="none", max_retries=0) as client:
        yield client


def create(client: openai.OpenAI, **fields: Any) -> Any:
    return client.responses.create(**{"model": "scripted", "input": "What is the weather?", **fields})


def test_a_response(engine: ScriptedEngine, client: openai.OpenAI) -> None:
    engine.text = "Sunny."
    response = create(client, instructions="Be brief.", temperature=0.5, max_output_tokens=9, metadata={"a": "b"})
    assert (response.output_text, response.status, response.model) == ("Sunny.", "completed", "scripted")
    assert (response.temperature, response.max_output_tokens, response.metadata) == (0.5, 9, {"a": "b"})
    usage = response.usage
    assert (usage.input_tokens, usage.output_tokens, usage.total_tokens) == (20, 6, 26)
    assert usage.input_tokens_details.cached_tokens == 16
    assert (engine.params[-1].temperature, engine.params[-1].max_tokens) == (0.5, 9)
    assert "system Be brief.<|im_end|><|im_start|>user What is the weather?" in engine.prompts[-1]


def test_without_a_limit_the_model_writes_as_much_as_fits(engine: ScriptedEngine, client: openai.OpenAI) -> None:
    create(client)
    assert engine.params[-1].max_tokens is None


def test_events_come_in_order(engine: ScriptedEngine, client: openai.OpenAI) -> None:
    engine.text = ALL
    events = [event.to_dict() for event in create(client, tools=[WEATHER], stream=True)]
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    kinds: list[object] = []
    for event in events:
        kind = (event["type"].removeprefix("response."), event.get("output_index"))
        if not kinds or kinds[-1] != kind:
            kinds.append(kind)
    calls = [
        ("output_item.added", "function_call_arguments.delta", "function_call_arguments.done", "output_item.done"),
    ] * 2
    begin, end = ("output_item.added", "content_part.added"), ("content_part.done", "output_item.done")
    texts = [(*begin, f"{kind}.delta", f"{kind}.done", *end) for kind in ("reasoning_text", "output_text")]
    items = [(kind, index) for index, item in enumerate([*texts, *calls]) for kind in item]
    assert kinds == [("created", None), ("in_progress", None), *items, ("completed", None)]
    usage = events[-1]["response"]["usage"]
    assert 0 < usage["output_tokens_details"]["reasoning_tokens"] < usage["output_tokens"] == len(ALL)


def test_a_stream_and_a_response_hold_the_same(engine: ScriptedEngine, client: openai.OpenAI) -> None:
    engine.text = ALL
    whole = create(client, tools=[WEATHER]).to_dict()
    with client.responses.stream(model="scripted", input="What is the weather?", tools=[WEATHER]) as stream:
        for _ in stream:
            pass
        streamed = stream.get_final_response().to_dict()
    items = []
    for response in (whole, streamed):
        for item in response["output"]:
            item.pop("id"), item.pop("call_id", None), item.pop("parsed_arguments", None)
            for part in item.get("content") or ():
                part.pop("parsed", None)
        items.append(response["output"])
    assert items[0] == items[1]
    assert [item["type"] for item in items[0]] == ["reasoning", "message", "function_call", "function_call"]
    assert items[0][0]["content"] == [{"type": "reasoning_text", "text": "Hmm."}]
    assert json.loads(items[0][2]["arguments"]) == {"city": "Zürich"}


def test_an_answer_that_is_cut_off(engine: ScriptedEngine, client: openai.OpenAI) -> None:
    engine.text, engine.finish_reason = "Sun", "length"
    response = create(client)
    assert (response.status, response.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert response.output[0].status == "incomplete"


def test_the_output_is_an_input(engine: ScriptedEngine, client: openai.OpenAI) -> None:
    """A client sends back the items that it got, with the results of the calls."""
    engine.text = ALL
    first = create(client, tools=[WEATHER])
    ids = [item.call_id for item in first.output if item.type == "function_call"]
    results: Any = [{"type": "function_call_output", "call_id": call_id, "output": "sun"} for call_id in ids]
    items = [
        {"role": "developer", "content": [{"type": "input_text", "text": "Be nice."}]},
        {"role": "user", "content": "What is the weather?"},
        *[item.to_dict() for item in first.output],
        *results,
    ]
    create(client, instructions="Be brief.", input=items, tools=[WEATHER])
    assert (
        "<|im_start|>system Be brief.\nBe nice.<|im_end|><|im_start|>user What is the weather?<|im_end|>"
        f'<|im_start|>assistant think:Hmm. Wait. call:{ids[0]}:weather:{{"city": "Zürich"}}'
        f" call:{ids[1]}:weather:{{}}<|im_end|>"
        f"<|im_start|>tool {ids[0]} sun<|im_end|><|im_start|>tool {ids[1]} sun<|im_end|><|im_start|>assistant"
    ) in engine.prompts[-1]


@pytest.mark.parametrize(
    ("choice", "text"),
    [
        ("required", '[{"name": "weather", "parameters": {"city": "Bern"}}]'),
        ({"type": "function", "name": "weather"}, '{"city": "Bern"}'),
    ],
)
def test_tool_choice_is_enforced(engine: ScriptedEngine, client: openai.OpenAI, choice: Any, text: str) -> None:
    engine.text = text
    response = create(client, tools=[WEATHER], tool_choice=choice)
    assert [(item.name, item.arguments) for item in response.output] == [("weather", '{"city": "Bern"}')]
    assert engine.params[-1].structured_outputs is not None


def test_a_parsed_output(engine: ScriptedEngine, client: openai.OpenAI) -> None:
    class Answer(BaseModel):
        sunny: bool

    engine.text = '{"sunny": true}'
    response = client.responses.parse(model="scripted", input="Is it sunny?", text_format=Answer)
    assert response.output_parsed == Answer(sunny=True)
    grammar = engine.params[-1].structured_outputs
    assert grammar is not None
    assert "sunny" in str(grammar.json)


def test_logprobs_cover_the_text(engine: ScriptedEngine, client: openai.OpenAI) -> None:
    engine.text = "<think>a</think>A < b <tool_cal"
    fields: Any = {"include": ["message.output_text.logprobs"], "top_logprobs": 1, "tools": [WEATHER]}
    part = create(client, **fields).output[1].content[0]
    assert "".join(each.token for each in part.logprobs).endswith(part.text)
    streamed = list(create(client, **fields, stream=True))
    done = next(event for event in streamed if event.type == "response.output_text.done")
    assert "".join(each.token for each in done.logprobs).endswith(part.text)
    deltas = [event for event in streamed if event.type == "response.output_text.delta"]
    assert [each.token for event in deltas for each in event.logprobs] == [each.token for each in done.logprobs]


def test_effort_none_is_no_thinking(engine: ScriptedEngine, client: openai.OpenAI) -> None:
    create(client, reasoning={"effort": "none"})
    assert engine.prompts[-1].endswith("</think>\n\n")
    create(client, reasoning={"effort": "high", "summary": "auto"})
    assert engine.prompts[-1].endswith("assistant\n")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"store": True}, "store"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"prompt": {"id": "p"}}, "prompt"),
        ({"background": True}, "background"),
        ({"truncation": "auto"}, "truncation"),
        ({"service_tier": "flex"}, "service_tier"),
        ({"include": ["file_search_call.results"]}, "include.0"),
        ({"text": {"verbosity": "low"}}, "text.verbosity"),
        ({"text": {"format": {"type": "xml"}}}, "text.format.type"),
        ({"text": {"format": {"type": "json_schema", "name": "a"}}}, "text.format.schema"),
        ({"reasoning": {"summary": "detailed"}}, "reasoning.summary"),
        ({"tools": [{"type": "web_search"}]}, "tools.0.type"),
        ({"tools": [{"type": "function"}]}, "tools.0.name"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [WEATHER], "tool_choice": {"type": "mcp"}}, "tool_choice.type"),
        ({"tools": [WEATHER], "tool_choice": "sometimes"}, "tool_choice"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input.0.type"),
        ({"input": [{"role": "judge", "content": ""}]}, "input.0.role"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input.0.content.0.type"),
        ({"input": [{"type": "function_call", "name": "f", "arguments": "{}"}]}, "input.0.call_id"),
        ({"input": []}, "input"),
        ({"input": 5}, "input"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(
    engine: ScriptedEngine, client: openai.OpenAI, fields: dict[str, Any], param: str
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        create(client, **fields)
    assert caught.value.param == param
    assert "Traceback" not in str(caught.value)


def test_what_is_the_case_anyway_passes(engine: ScriptedEngine, client: openai.OpenAI) -> None:
    create(client, store=False, background=False, truncation="disabled", service_tier="auto", parallel_tool_calls=True)
    create(client, include=["reasoning.encrypted_content"], text={"verbosity": "medium"}, tool_choice="auto")


def test_an_error_ends_a_stream(engine: ScriptedEngine, client: openai.OpenAI) -> None:
    engine.text, engine.error = "Sunny.", InvalidLogitsError()
    events = list(create(client, stream=True))
    assert events[-1].type == "response.failed"
    assert events[-1].response.status == "failed"
    assert events[-1].response.error.code == "server_error"


def test_an_aborted_response_has_failed(engine: ScriptedEngine, client: openai.OpenAI) -> None:
    engine.text, engine.finish_reason = "Sunny.", "abort"
    *_, done, last = create(client, stream=True)
    assert (done.type, done.item.status, done.item.content[0].text) == (
        "response.output_item.done",
        "incomplete",
        "Sunny.",
    )
    assert (last.type, last.response.status, last.response.incomplete_details) == ("response.failed", "failed", None)
    assert last.response.error.message == "The request was aborted."
    assert last.response.output_text == "Sunny."
    with pytest.raises(openai.APIStatusError, match="The request was aborted") as raised:
        create(client)
    assert raised.value.status_code == 499
