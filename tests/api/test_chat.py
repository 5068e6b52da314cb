"""chat(): conversations, options and tools reach the checkpoint's template as they are, within its limits."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nanovllm import LLM, AsyncLLM, InvalidArgumentError, RequestOutput, UnknownArgumentError
from nanovllm.requests import chat
from tests.requests.tokenizer_kinds import LLAMA
from tests.small_llm import GREEDY, assert_empty

TEMPLATE = (
    "{% for tool in tools or [] %}[{{ tool['function']['name'] }}]{% endfor %}"
    "{% for message in messages %}{{ message['content'] }}<{{ message['role'] }}>{% endfor %}"
    "{% if shout %}!{% endif %}{% if add_generation_prompt %}>{% endif %}"
)
TOOLS = [{"type": "function", "function": {"name": name}} for name in ("add", "count")]
HI = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM("tiny", device="cpu") as llm:
        llm.get_tokenizer().chat_template = TEMPLATE
        yield llm


def prompt(llm: LLM, messages: Any = HI, **options: Any) -> str | None:
    return llm.chat(messages, GREEDY, False, **options)[0].prompt


def refusal(llm: LLM, messages: Any = HI, **options: Any) -> str:
    with pytest.raises(InvalidArgumentError) as caught:
        llm.chat(messages, GREEDY, use_tqdm=False, **options)
    assert_empty(llm)
    return str(caught.value)


# ---- options


def test_tools_go_to_the_template(llm: LLM) -> None:
    assert prompt(llm, tools=TOOLS) == "[add][count]hi<user>>"
    assert prompt(llm, tools=TOOLS, chat_template_kwargs={"shout": True}) == "[add][count]hi<user>!>"
    assert prompt(llm, chat_template_kwargs={"tools": TOOLS}) == "[add][count]hi<user>>"
    assert prompt(llm) == prompt(llm, tools=[]) == "hi<user>>"


@pytest.mark.parametrize("tools", [{"type": "function"}, "add", [1], [{"a": object()}]])
def test_other_tools_are_refused(llm: LLM, tools: Any) -> None:
    assert refusal(llm, tools=tools).startswith("tools=")


def test_how_the_prompt_ends(llm: LLM) -> None:
    begun = [*HI, {"role": "assistant", "content": "Hello, "}]
    assert prompt(llm, add_generation_prompt=False) == "hi<user>"
    ends = {"add_generation_prompt": False, "continue_final_message": True}
    assert prompt(llm, begun, **ends) == "hi<user>Hello, "
    trimmed = TEMPLATE.replace("message['content']", "message['content'] | trim")
    assert prompt(llm, begun, chat_template=trimmed, **ends) == "hi<user>Hello,"
    assert "whose last message has content" in refusal(llm, [{"role": "user"}], **ends)
    assert "last message the chat template writes" in refusal(llm, begun, chat_template="no messages", **ends)
    assert "add_generation_prompt=True is not allowed" in refusal(llm, begun, continue_final_message=True)


def test_the_prompts_are_those_of_transformers() -> None:
    begun = [*HI, {"role": "assistant", "content": "Hello, "}]
    every = [
        {},
        {"add_generation_prompt": False},
        {"chat_template_kwargs": {"enable_thinking": False}},
        {"add_generation_prompt": False, "continue_final_message": True},
    ]
    with LLM("tiny", device="cpu") as llm:
        template = llm.get_tokenizer().apply_chat_template
        for options in every:
            settings = {"add_generation_prompt": True, **options}
            settings |= settings.pop("chat_template_kwargs", {})  # type: ignore[arg-type]
            for messages in (HI, begun):
                assert prompt(llm, messages, **options) == template(messages, tokenize=False, **settings)


EVERYTHING = """
{%- macro row(name, values) -%}
  {%- for value in values if value %}{{ name ~ '=' ~ value }}{{ ',' if not loop.last }}{% else %}none{% endfor -%}
{%- endmacro -%}
{%- macro framed() %}<{{ caller() }}>{% endmacro -%}
{{- bos_token if bos_token is defined and bos_token }}
{%- set ns = namespace(count=0, text='') -%}
{%- for message in messages -%}
  {%- set ns.count = ns.count + 1 -%}
  {%- if message.role == 'system' %}{% continue %}{% endif -%}
  {%- generation %}{{ message.content | trim | upper }}{% endgeneration -%}
  {{ loop.index0 * 2 }}{{ loop.previtem.role if loop.previtem is defined }}
  {%- set ns.text = ns.text ~ message['content'][:2] + '|' -%}
{%- endfor -%}
{%- for key, value in (tools[0] if tools else {'a': [1, {'b': 2}]}).items() recursive -%}
  {{ key }}:{{ loop(value.items()) if value is mapping else value | tojson }};
{%- endfor -%}
{%- call framed() %}{% for i in range(5) %}{% if i == 3 %}{% break %}{% endif %}{{ i }}{% endfor %}{% endcall -%}
{%- set block %}{{ row('x', [1, none, 'é']) }}{{ row('y', []) }}{% endset -%}
{{ block }}{{ ns.text }}{{ ns.count ** 2 }}{{ messages | map(attribute='role') | join('-') }}
{%- if add_generation_prompt %}{{ '\n' + 'assistant' }}{% endif -%}
"""


def test_a_template_with_everything_is_as_in_transformers(llm: LLM) -> None:
    messages = [{"role": "system", "content": "s"}, *HI, {"role": "assistant", "content": " ok ", "tool_calls": None}]
    for tools in (None, TOOLS):
        for generation in (True, False):
            expected = llm.get_tokenizer().apply_chat_template(
                messages, tools, chat_template=EVERYTHING, add_generation_prompt=generation, tokenize=False
            )
            options = {"chat_template": EVERYTHING, "tools": tools, "add_generation_prompt": generation}
            assert prompt(llm, messages, **options) == expected != ""


def test_another_template(llm: LLM) -> None:
    assert prompt(llm, chat_template="{{ messages[0]['content'] }}{{ eos_token }}") == "hi<|im_end|>"
    assert refusal(llm, chat_template="{% for %}").startswith("chat_template='{% for %}' is not allowed")
    llm.get_tokenizer().chat_template = None
    try:
        assert prompt(llm, chat_template="hello") == "hello"
        assert "one with a chat template. Give chat_template, or use generate." in refusal(llm)
    finally:
        llm.get_tokenizer().chat_template = TEMPLATE


@pytest.mark.parametrize("name", ["add_generation_prompt", "tokenize", "messages", "chat_template", "return_tensors"])
def test_reserved_names_are_no_variables(llm: LLM, name: str) -> None:
    error = refusal(llm, chat_template_kwargs={name: True})
    assert error.startswith("chat_template_kwargs=")
    assert f"without {name!r}" in error


def test_an_unknown_option_names_the_nearest(llm: LLM) -> None:
    with pytest.raises(UnknownArgumentError, match="Did you mean 'add_generation_prompt'"):
        prompt(llm, add_generation_promt=True)


def test_tools_that_the_template_ignores_are_reported_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.handler.setLevel(logging.WARNING)
    with LLM("tiny", device="cpu") as fresh:
        assert prompt(fresh, tools=TOOLS, chat_template=TEMPLATE) == "[add][count]hi<user>>"
        assert not caplog.messages
        for _ in range(2):
            prompt(fresh, tools=TOOLS, chat_template="{{ messages[0]['content'] }}")
    (line,) = caplog.messages
    assert "does not read tools" in line


# ---- messages


def test_text_parts_are_joined(llm: LLM) -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}, "three"]
    assert prompt(llm, [{"role": "user", "content": parts}]) == "one\ntwo\nthree<user>>"


@pytest.mark.parametrize(
    ("message", "words"),
    [
        (
            {"content": [{"type": "image_url", "image_url": {"url": "x"}}]},
            "Parts of type 'image_url' are not supported",
        ),
        (
            {"content": [{"type": "text", "text": "a"}, {"type": "text"}]},
            "messages.0.content.1={'type': 'text'} is not",
        ),
        ({"content": 5}, "messages.0.content=5 is not allowed"),
        ({"content": "a", "extra": {1, 2}}, "set is no JSON value"),
    ],
)
def test_what_is_no_text_is_refused(llm: LLM, message: dict[str, Any], words: str) -> None:
    assert words in refusal(llm, [{"role": "user", **message}])


class Bad:
    """An object that cannot be shown, nor read as a mapping."""

    def __repr__(self) -> str:
        raise RuntimeError("no repr")

    def keys(self) -> Any:
        raise RuntimeError("no keys")


def test_objects_that_cannot_be_shown_are_refused(llm: LLM) -> None:
    loop: list[Any] = []
    loop.append(loop)
    for bad in (Bad(), loop):
        assert "is not allowed" in refusal(llm, [{"role": "user", "content": bad}])
        assert "is not allowed" in refusal(llm, [{"role": "user", "content": "a", "extra": bad}])
        assert "is not allowed" in refusal(llm, [bad])


# ---- limits of templates

LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
LIST = "{% set l = range(9999) | list %}" + "{% for a in l %}" * 3 + "{% endfor %}" * 3
MACRO = "{% macro twice(n) %}{% if n %}{{ twice(n - 1) }}{{ twice(n - 1) }}{% endif %}{% endmacro %}{{ twice(60) }}"
DOUBLED = "{% set n = namespace(x='a') %}{% for i in range(40) %}{% set n.x = ? %}{% endfor %}"
LONG = "{% for a in range(99999) %}{{ messages[0]['content'] * 1000 }}{% endfor %}"


@pytest.mark.parametrize("template", [LOOP, LIST, MACRO])
def test_a_template_that_does_not_end_is_refused(llm: LLM, template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "_MAX_SECONDS", 0.1)
    assert "it takes longer than 0.1 s" in refusal(llm, chat_template=template)


@pytest.mark.parametrize(
    ("template", "operator"),
    [
        ("{{ 'a' * 10 ** 12 }}", "*"),
        ("{{ 2 ** (10 ** 9) }}", "**"),
        ("{{ 10 ** 9 * [1] }}", "*"),
        (DOUBLED.replace("?", "n.x ~ n.x"), "+"),
        (DOUBLED.replace("?", "n.x + n.x"), "+"),
        (DOUBLED.replace("'a'", "7").replace("?", "n.x * n.x"), "*"),
        (DOUBLED.replace("'a'", "[1]").replace("?", "n.x + n.x"), "+"),
    ],
)
def test_a_template_that_computes_too_much_is_refused(llm: LLM, template: str, operator: str) -> None:
    assert f"it computes {operator!r} of values that are too large" in refusal(llm, chat_template=template)


def test_arithmetic_stays(llm: LLM) -> None:
    template = "{{ 1 + 2.5 }} {{ 'a' ~ 1 ~ none ~ [2] }} {{ [1] + [2] }} {{ 'ab' * 2 }} {{ 2 ** 10 }} {{ 2 ** -1 }}"
    assert prompt(llm, chat_template=template) == "3.5 a1None[2] [1, 2] abab 1024 0.5"


def test_a_template_that_writes_too_much_is_refused(llm: LLM) -> None:
    assert "it writes more than 16000000 characters" in refusal(llm, chat_template=LONG)


# ---- special tokens


def test_the_template_s_special_tokens_are_the_only_ones(tmp_path: Path) -> None:
    from tokenizers import processors

    tokenizer = LLAMA.__class__(tokenizer_object=LLAMA.backend_tokenizer, bos_token="<s>", eos_token="</s>")
    bos = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", bos)])
    tokenizer.chat_template = "{{ bos_token }}{{ messages[0]['content'] }}"
    tokenizer.save_pretrained(tmp_path)
    with LLM("tiny", tokenizer=str(tmp_path), device="cpu") as llm:
        (plain,) = llm.generate("a", GREEDY, use_tqdm=False)
        (chatted,) = llm.chat([{"role": "user", "content": "a"}], GREEDY, use_tqdm=False)
        assert plain.prompt_token_ids == chatted.prompt_token_ids
        assert plain.prompt_token_ids.count(bos) == 1
        assert (chatted.prompt, type(chatted.prompt)) == ("<s>a", str)


# ---- streams


def test_streamed_chats_are_chats(llm: LLM) -> None:
    chats = [HI, [{"role": "user", "content": "count from 3 to 9"}]]
    expected = llm.chat(chats, GREEDY, use_tqdm=False, chat_template_kwargs={"shout": True})
    texts = dict.fromkeys([output.prompt for output in expected], "")
    for output in llm.stream_chat(chats, GREEDY, chat_template_kwargs={"shout": True}):
        texts[output.prompt] += output["text"]
    assert texts == {output.prompt: output["text"] for output in expected}


def test_async_chat(llm: LLM) -> None:
    expected = llm.chat(HI, GREEDY, use_tqdm=False, chat_template=TEMPLATE)[0]

    async def ask(engine: AsyncLLM, **options: Any) -> list[RequestOutput]:
        return [output async for output in engine.chat(HI, GREEDY, chat_template=TEMPLATE, **options)]

    async def main() -> None:
        with AsyncLLM("tiny", device="cpu") as engine:
            outputs = await ask(engine)
            assert (outputs[-1].prompt, outputs[-1]["token_ids"]) == (expected.prompt, expected["token_ids"])
            parts = await ask(engine, delta=True, request_id="mine")
            assert "".join(part["text"] for part in parts) == expected["text"]
            assert {part.request_id for part in parts} == {"mine"}
            with pytest.raises(InvalidArgumentError, match="messages="):
                _ = [output async for output in engine.chat([], GREEDY)]
            async for _ in engine.chat(HI, GREEDY):
                break
            assert len(await ask(engine)) > 0

    asyncio.run(main())
