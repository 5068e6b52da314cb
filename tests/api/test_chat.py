"""chat(): tools reach the checkpoint's template as they are."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from nanovllm import LLM, InvalidArgumentError
from tests.small_llm import GREEDY

TEMPLATE = (
    "{% for tool in tools or [] %}[{{ tool['function']['name'] }}]{% endfor %}"
    "{% for message in messages %}{{ message['content'] }}{% endfor %}{% if shout %}!{% endif %}"
)
TOOLS = [{"type": "function", "function": {"name": name}} for name in ("add", "count")]


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM("tiny", device="cpu") as llm:
        llm.get_tokenizer().chat_template = TEMPLATE
        yield llm


def prompt(llm: LLM, **arguments: Any) -> str | None:
    messages = [{"role": "user", "content": "hi"}]
    return llm.chat(messages, GREEDY, use_tqdm=False, **arguments)[0].prompt


def test_tools_go_to_the_template(llm: LLM) -> None:
    assert prompt(llm, tools=TOOLS) == "[add][count]hi"
    assert prompt(llm, tools=TOOLS, chat_template_kwargs={"shout": True}) == "[add][count]hi!"
    assert prompt(llm, chat_template_kwargs={"tools": TOOLS}) == "[add][count]hi"
    assert prompt(llm) == prompt(llm, tools=[]) == "hi"


@pytest.mark.parametrize("tools", [{"type": "function"}, "add", [1]])
def test_other_tools_are_refused(llm: LLM, tools: Any) -> None:
    with pytest.raises(InvalidArgumentError, match="tools="):
        prompt(llm, tools=tools)
