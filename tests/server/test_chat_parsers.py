"""/v1/chat/completions with parsers of reasoning and tool calls: OpenAI's client against the app."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.server.live import ScriptedEngine, live_server, scripted_service

TOOLS: Any = [{"type": "function", "function": {"name": name, "parameters": {"type": "object"}}} for name in ("f", "g")]
QUESTION: Any = [{"role": "user", "content": "Call."}]
FIELDS: Any = {"model": "scripted", "messages": QUESTION, "tools": TOOLS}
F, G = '{"name": "f", "arguments": {"a": "é"}}', '{"name": "g", "arguments": {}}'
HERMES = f"<tool_call>{F}</tool_call>\n<tool_call>{G}</tool_call>"
TEXTS = {"hermes": HERMES, "llama3_json": f"{F}; {G}", "mistral": f"[TOOL_CALLS][{F}, {G}]"}
CALLS = [("f", '{"a": "é"}'), ("g", "{}")]


@pytest.fixture(scope="module")
def servers() -> Iterator[dict[str, tuple[ScriptedEngine, openai.OpenAI]]]:
    """A server for each form of tool calls."""
    with ExitStack() as stack:
        servers = {}
        for form in TEXTS:
            engine = ScriptedEngine()
            settings = {"reasoning_parser": "qwen3", "tool_call_parser": form, "enable_auto_tool_choice": True}
            url = stack.enter_context(live_server(scripted_service(engine, **settings)))
            client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
            servers[form] = engine, stack.enter_context(client)
        yield servers


@pytest.mark.parametrize("form", TEXTS)
@pytest.mark.parametrize("streams", [False, True])
def test_calls_follow_the_reasoning(servers: Any, form: str, streams: bool) -> None:
    engine, client = servers[form]
    engine.text = f"<think>\nHmm.\n</think>\n\n{TEXTS[form]}"
    if streams:
        with client.chat.completions.stream(**FIELDS) as stream:
            choice = stream.get_final_completion().choices[0]
    else:
        choice = client.chat.completions.create(**FIELDS).choices[0]
    calls = choice.message.tool_calls
    assert [(call.function.name, call.function.arguments) for call in calls] == CALLS
    assert len({call.id for call in calls}) == 2
    assert choice.finish_reason == "tool_calls"
    assert not choice.message.content
    assert choice.message.reasoning == choice.message.reasoning_content == "Hmm."
    assert engine.params[-1].skip_special_tokens is (form == "hermes")


def test_calls_are_found_in_structural_tags(servers: Any) -> None:
    engine, client = servers["hermes"]
    engine.text = f"<think>\nHmm.\n</think>\n\n{HERMES}"
    structures = [{"begin": "<tool_call>", "schema": {"type": "object"}, "end": "</tool_call>"}]
    form: Any = {"type": "structural_tag", "structures": structures, "triggers": ["<tool_call>"]}
    message = client.chat.completions.create(**FIELDS, response_format=form).choices[0].message
    assert [(call.function.name, call.function.arguments) for call in message.tool_calls] == CALLS
    assert message.reasoning == "Hmm."


def test_a_stream_names_the_call_first(servers: Any) -> None:
    engine, client = servers["hermes"]
    engine.text = HERMES
    chunks = client.chat.completions.create(**FIELDS, stream=True)
    parts = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or ()]
    for index, (name, arguments) in enumerate(CALLS):
        first, *rest = (part for part in parts if part.index == index)
        assert first.id
        assert (first.type, first.function.name) == ("function", name)
        assert all(part.id is None and part.function.name is None for part in rest)
        assert first.function.arguments + "".join(part.function.arguments for part in rest) == arguments


@pytest.mark.parametrize("streams", [False, True])
def test_logprobs_survive(servers: Any, streams: bool) -> None:
    """Each token has its log-probability, also where its text waits, or is a tag."""
    engine, client = servers["hermes"]
    engine.text = f"<think>a</think>{HERMES}"
    answer = client.chat.completions.create(**FIELDS, logprobs=True, stream=streams)
    chunks = answer if streams else [answer]
    rows = [row for chunk in chunks if chunk.choices[0].logprobs for row in chunk.choices[0].logprobs.content]
    assert "".join(row.token for row in rows) == engine.text


def test_without_parallel_calls_the_first_is_kept(servers: Any) -> None:
    engine, client = servers["hermes"]
    engine.text = HERMES
    message = client.chat.completions.create(**FIELDS, parallel_tool_calls=False).choices[0].message
    assert [call.function.name for call in message.tool_calls] == ["f"]


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize(
    ("cut", "calls"),
    [
        ('[{"name": "f", "parameters": {"a": "b', [("f", '{"a": "b')]),
        ('[{"name": "f", "param', [("f", "")]),
        ('[{"name": "f", "parameters": {}}, {"na', [("f", "{}")]),
        ('[{"name": "', []),
    ],
)
def test_a_required_call_that_max_tokens_cuts_is_no_content(
    servers: Any, monkeypatch: pytest.MonkeyPatch, cut: str, calls: list[tuple[str, str]], streams: bool
) -> None:
    engine, client = servers["hermes"]
    monkeypatch.setattr(engine, "text", cut)
    monkeypatch.setattr(engine, "finish_reason", "length")
    fields = {**FIELDS, "tool_choice": "required"}
    answer = client.chat.completions.create(**fields, stream=streams)
    chunks = answer if streams else [answer]
    choices = [choice for chunk in chunks for choice in chunk.choices]
    parts = [choice.delta if streams else choice.message for choice in choices]
    assert not any(part.content for part in parts)
    functions = [call.function for part in parts for call in part.tool_calls or ()]
    assert [each.name for each in functions if each.name] == [name for name, _ in calls]
    assert "".join(each.arguments for each in functions) == "".join(arguments for _, arguments in calls)
    assert choices[-1].finish_reason == "length"


def test_tool_choice_none_leaves_text(servers: Any) -> None:
    engine, client = servers["hermes"]
    engine.text = HERMES
    choice = client.chat.completions.create(**FIELDS, tool_choice="none").choices[0]
    assert (choice.message.content, choice.message.tool_calls, choice.finish_reason) == (HERMES, None, "stop")
    assert "[tool" not in engine.prompts[-1]


@pytest.mark.parametrize(
    ("last", "text", "reasoning", "content"),
    [("<think>\nI", " add.\n</think>\n\nFour.", " add.", "Four."), ("It is", " <think>.", None, " <think>.")],
)
def test_a_continued_message(servers: Any, last: str, text: str, reasoning: str | None, content: str) -> None:
    engine, client = servers["hermes"]
    engine.text = text
    fields = {**FIELDS, "messages": [*QUESTION, {"role": "assistant", "content": last}]}
    extra = {"continue_final_message": True, "add_generation_prompt": False}
    message = client.chat.completions.create(**fields, extra_body=extra).choices[0].message
    assert engine.prompts[-1].endswith(last)
    assert (message.reasoning, message.content) == (reasoning, content)


def test_without_thinking_all_is_content(servers: Any) -> None:
    engine, client = servers["hermes"]
    engine.text = "<think> is a tag."
    extra = {"chat_template_kwargs": {"enable_thinking": False}}
    assert client.chat.completions.create(**FIELDS, extra_body=extra).choices[0].message.content == engine.text


def test_reasoning_may_be_left_out(servers: Any) -> None:
    engine, client = servers["hermes"]
    engine.text = "<think>\nHmm.\n</think>\n\nFour."
    message = client.chat.completions.create(**FIELDS, extra_body={"include_reasoning": False}).choices[0].message
    assert (message.reasoning, message.content) == (None, "Four.")


def test_a_text_of_a_given_form_is_not_parsed(servers: Any) -> None:
    engine, client = servers["hermes"]
    engine.text = "<think>a</think>"
    extra = {"structured_outputs": {"choice": [engine.text]}}
    assert client.chat.completions.create(**FIELDS, extra_body=extra).choices[0].message.content == engine.text


def test_without_parsers_all_is_content() -> None:
    engine = ScriptedEngine()
    engine.text = f"<think>a</think>{HERMES}"
    with live_server(scripted_service(engine)) as url, openai.OpenAI(base_url=f"{url}/v1", api_key="none") as client:
        answer = client.chat.completions.create(model="scripted", messages=QUESTION)
    assert answer.choices[0].message.content == engine.text


def test_the_servers_template_its_variables_and_its_defaults(tmp_path: Path) -> None:
    engine = ScriptedEngine()
    engine.text = "Four."
    (tmp_path / "template.jinja").write_text("{{ style }}|{{ messages[-1].content }}|{{ size }}|")
    service = scripted_service(
        engine,
        chat_template=str(tmp_path / "template.jinja"),
        default_chat_template_kwargs={"style": "brief", "size": 1},
        override_generation_config={"temperature": 0.25, "top_k": 7},
    )
    with live_server(service) as url, openai.OpenAI(base_url=f"{url}/v1", api_key="none") as client:
        for extra in ({}, {"chat_template_kwargs": {"size": 2}, "top_k": 3}):
            client.chat.completions.create(model="scripted", messages=QUESTION, extra_body=extra)
    assert engine.prompts == ["brief|Call.|1|", "brief|Call.|2|"]
    assert [(params.temperature, params.top_k) for params in engine.params] == [(0.25, 7), (0.25, 3)]
