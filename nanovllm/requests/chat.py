"""Chat: turns conversations into prompts through a chat template, within limits of time and length."""

from __future__ import annotations

import functools
import json
import re
import time
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias, TypedDict

import jinja2
from jinja2 import meta, nodes, runtime, visitor

from nanovllm.errors import InvalidArgumentError, checks_argument_names
from nanovllm.logs import events
from nanovllm.requests.tokenization import TemplatedText
from nanovllm.utils.arguments import SWITCH, Rule, argument, check_arguments, lists_arguments
from nanovllm.utils.logger import setup_logger

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = setup_logger(__name__)

Conversation: TypeAlias = "Seq[Mapping[str, Any]]"

_MAX_SECONDS = 10.0  # a template takes milliseconds
_MAX_CHARACTERS = 16_000_000  # more than any model's context
_MAX_QUOTED = 300  # characters of another library's error
# Undefined variables and attributes. jinja names the types of objects, never their values.
_UNDEFINED = re.compile(r"(?:'[\w. ]+' has no attribute )?'(\w+)'(?: is undefined)?|list object has no element \d{1,3}")
_END_MARK = "END_OF_THE_FINAL_MESSAGE "  # templates may strip the space, and with it those before
_MESSAGES = "a list of messages, each {'role': …, 'content': …}"
# Arguments of transformers' apply_chat_template that chat does not pass on, and names that it sets itself.
_RESERVED = {
    "add_generation_prompt",
    "chat_template",
    "continue_final_message",
    "conversation",
    "max_length",
    "messages",
    "padding",
    "return_assistant_tokens_mask",
    "return_dict",
    "return_tensors",
    "sanitize_control_tokens",
    "tokenize",
    "tokenizer_kwargs",
    "truncation",
}


def _accepts_template_kwargs(value: object) -> bool:
    return isinstance(value, Mapping) and all(isinstance(name, str) for name in value)


def _accepts_tools(value: object) -> bool:
    return isinstance(value, (list, tuple)) and all(isinstance(tool, Mapping) for tool in value)


class ChatArguments(TypedDict, total=False):
    """The keywords of `LLM.chat` that make a ChatOptions."""

    chat_template: str | None
    add_generation_prompt: bool
    continue_final_message: bool
    tools: Seq[Mapping[str, Any]] | None
    chat_template_kwargs: Mapping[str, Any] | None


@checks_argument_names
@lists_arguments
@dataclass(frozen=True)
class ChatOptions:
    """How a conversation becomes a prompt."""

    chat_template: str | None = argument(
        None,
        Rule("a Jinja template", lambda value: isinstance(value, str) and value != "").or_none(" for the checkpoint's"),
        "The template, or the name of one of the checkpoint's.",
    )
    add_generation_prompt: bool = argument(
        True, SWITCH, "End the prompt with the beginning of the assistant's next message."
    )
    continue_final_message: bool = argument(
        False,
        SWITCH,
        "End the prompt inside the last message, so that the model continues it. Needs add_generation_prompt=False.",
    )
    tools: Seq[Mapping[str, Any]] | None = argument(
        None,
        Rule("a list of {'type': 'function', 'function': {…}}", _accepts_tools).or_none(),
        "What the model may call. Tool calls are part of the output's text.",
    )
    chat_template_kwargs: Mapping[str, Any] | None = argument(
        None,
        Rule("a dictionary of the template's variables", _accepts_template_kwargs).or_none(),
        "Further variables of the template. Qwen3's reads `enable_thinking`.",
    )

    def __post_init__(self) -> None:
        check_arguments(self)
        if self.continue_final_message and self.add_generation_prompt:
            raise InvalidArgumentError(
                "add_generation_prompt",
                True,
                "False with continue_final_message=True",
                "The prompt ends either inside the last message or with the beginning of the next one.",
            )
        for name in sorted(_RESERVED.intersection(self.chat_template_kwargs or ())):
            allowed = f"without {name!r}, which is no variable of the template"
            hint = "Give it as an argument of its own." if name in ChatArguments.__annotations__ else "Leave it out."
            raise InvalidArgumentError("chat_template_kwargs", self.chat_template_kwargs, allowed, hint)


class ChatRenderer:
    """Renders conversations with chat templates, which it keeps compiled."""

    def __init__(self) -> None:
        self._compiled = functools.lru_cache(maxsize=8)(_Template)
        self._warned = False

    def prompts(
        self,
        tokenizer: PreTrainedTokenizerBase,
        messages: Conversation | Seq[Conversation],
        options: ChatOptions,
    ) -> list[TemplatedText | InvalidArgumentError]:
        """Returns the prompt of each conversation, or the error if it is not allowed.

        messages: one conversation or a list of them. Raises InvalidArgumentError if there is no usable template.
        """
        conversations: list[Any] = list(messages) if isinstance(messages, (list, tuple)) else [messages]
        if conversations and isinstance(conversations[0], Mapping):
            conversations = [conversations]
        prompts: list[TemplatedText | InvalidArgumentError] = []
        for conversation in conversations:
            try:
                prompts.append(self.prompt(tokenizer, conversation, options))
            except InvalidArgumentError as error:
                if error.field.split(".")[0] != "messages":
                    raise
                prompts.append(error)
        return prompts

    def prompt(
        self, tokenizer: PreTrainedTokenizerBase, conversation: Conversation, options: ChatOptions
    ) -> TemplatedText:
        """Returns the prompt of one conversation. Raises InvalidArgumentError if it is not allowed."""
        template = self._template(tokenizer, options)
        messages = _read_messages(conversation)
        variables = {**tokenizer.special_tokens_map, "documents": None, "tools": None}
        variables |= _plain("chat_template_kwargs", options.chat_template_kwargs or {})
        if options.tools:
            variables["tools"] = _plain("tools", options.tools)
        if variables["tools"] and "tools" not in template.variables and not self._warned:
            self._warned = True
            events.chat_tools_ignored.log(logger, model=tokenizer.name_or_path)
        if options.continue_final_message:
            if not isinstance(messages[-1].get("content"), str):
                raise InvalidArgumentError("messages", conversation, "a conversation whose last message has content")
            messages[-1]["content"] += _END_MARK
        variables |= {"messages": messages, "add_generation_prompt": options.add_generation_prompt}
        try:
            text = template.render(variables)
        except Exception as error:  # templates raise any kind for input that they do not take
            allowed = f"what the chat template takes ({template.why(error)})"
            raise InvalidArgumentError("messages", conversation, allowed) from None
        return TemplatedText(_up_to_mark(conversation, text) if options.continue_final_message else text)

    def _template(self, tokenizer: PreTrainedTokenizerBase, options: ChatOptions) -> _Template:
        if not tokenizer.chat_template and options.chat_template is None:
            hint = "Give chat_template, or use generate."
            raise InvalidArgumentError("tokenizer", tokenizer.name_or_path, "one with a chat template", hint)
        source = options.chat_template
        try:
            source = tokenizer.get_chat_template(options.chat_template, options.tools or None)
            return self._compiled(source)
        except (ValueError, jinja2.TemplateError) as error:
            raise InvalidArgumentError("chat_template", source, f"a Jinja template ({_why(error)})") from None


class _TemplateLimitError(Exception):
    """A template takes too long or writes too much."""


class _Context(runtime.Context):
    """Variables of one rendering, and its time limit."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._deadline = time.monotonic() + _MAX_SECONDS

    def check_time(self) -> None:
        if time.monotonic() > self._deadline:
            raise _TemplateLimitError(f"it takes longer than {_MAX_SECONDS:g} s")


def _size(value: object) -> int:
    """Returns the length of a text or list. An integer counts as its bits squared, which is what products cost."""
    if isinstance(value, int):
        return value.bit_length() ** 2
    return len(value) if isinstance(value, (str, list, tuple)) else 0


def _size_of_product(left: object, right: object) -> int:
    for one, other in ((left, right), (right, left)):
        if isinstance(other, int) and not isinstance(one, int):
            return _size(one) * other
    return _size(left) + _size(right)


# Upper bounds on the size of a result.
_SIZES: dict[str, Callable[[Any, Any], int]] = {
    "+": lambda left, right: _size(left) + _size(right),
    "*": _size_of_product,
    "**": lambda left, right: _size(left) * right if isinstance(right, int) else 0,
}


def _call_binop(context: runtime.Context, operator: str, left: Any, right: Any) -> Any:
    if _SIZES[operator](left, right) > _MAX_CHARACTERS:
        raise _TemplateLimitError(f"it computes {operator!r} of values that are too large")
    return context.environment.binop_table[operator](left, right)  # type: ignore[attr-defined]  # a sandbox's


class _SumsForConcatenations(visitor.NodeTransformer):
    """Replaces `a ~ b`, which a sandbox does not intercept, by a sum of texts."""

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        texts: list[nodes.Expr] = [nodes.Filter(each, "string", [], [], None, None) for each in node.nodes]
        return functools.reduce(nodes.Add, texts).set_lineno(node.lineno)


class _Template:
    """A compiled chat template.

    Each pass of a loop and each call of a macro checks the time, sums, products and powers their size before they are
    computed, and the output is counted as it is written. A single call of a filter has no limit.
    """

    def __init__(self, source: str) -> None:
        from transformers.utils.chat_template_utils import _compile_jinja_template

        # The sandbox in which transformers renders templates, with its filters and functions.
        environment = _compile_jinja_template("").environment.overlay()
        environment.context_class = _Context
        environment.intercepted_binops = frozenset(_SIZES)
        environment.call_binop = _call_binop
        tree = environment.parse(source)
        self.variables = meta.find_undeclared_variables(tree)
        texts = {const.value for const in tree.find_all(nodes.Const) if isinstance(const.value, str) and const.value}
        self._texts = sorted(texts, key=len, reverse=True)
        self._names = texts | {name.name for name in tree.find_all(nodes.Name)}
        self._names |= {attribute.attr for attribute in tree.find_all(nodes.Getattr)}
        for block in tree.find_all((nodes.For, nodes.Macro, nodes.CallBlock)):
            check = nodes.Getattr(nodes.ContextReference(), "check_time", "load")
            block.body.insert(0, nodes.ExprStmt(nodes.Call(check, [], [], None, None)).set_lineno(block.lineno))
        self._template = environment.from_string(_SumsForConcatenations().visit(tree).set_environment(environment))

    def render(self, variables: dict[str, Any]) -> str:
        pieces, num_characters = [], 0
        for piece in self._template.generate(variables):
            num_characters += len(piece)
            if num_characters > _MAX_CHARACTERS:
                raise _TemplateLimitError(f"it writes more than {_MAX_CHARACTERS} characters")
            pieces.append(piece)
        return "".join(pieces)

    def why(self, error: Exception) -> str:
        """Returns what an error of `render` says, in words of the template, Python and jinja alone.

        Logs and HTTP answers quote the result, so it must not quote the conversation.
        """
        kind, words = type(error).__name__, str(error)
        if isinstance(error, jinja2.UndefinedError):
            match = _UNDEFINED.fullmatch(words)
            is_ours = match is not None and (match[1] is None or match[1] in self._names)
        elif isinstance(error, TypeError):  # names types, never values, and perhaps keys of the conversation
            is_ours = "keyword argument" not in words
        else:
            is_ours = isinstance(error, _TemplateLimitError)
        if not is_ours:  # a template's own sentence may go on with what it refuses
            own = next((text for text in self._texts if words.startswith(text)), "")
            words = own if own == words else f"{own.rstrip()} …".lstrip()
        return f"{kind}: {words}"[:_MAX_QUOTED]


def _read_messages(conversation: object) -> list[dict[str, Any]]:
    """Returns the messages as plain JSON values, each content as one text."""
    if not isinstance(conversation, (list, tuple)) or not all(isinstance(each, Mapping) for each in conversation):
        raise InvalidArgumentError("messages", conversation, _MESSAGES)
    if not conversation:
        raise InvalidArgumentError("messages", conversation, "at least one message long")
    messages: list[dict[str, Any]] = _plain("messages", conversation)
    for index, message in enumerate(messages):
        content = message.get("content")
        if isinstance(content, list):
            content = message["content"] = "\n".join(_text_of(part, index, at) for at, part in enumerate(content))
        if not isinstance(content, str | None):
            field = f"messages.{index}.content"
            raise InvalidArgumentError(field, content, "a text, a list of parts {'type': 'text', 'text': …}, or None")
    return [{name: value for name, value in message.items() if value is not None} for message in messages]


def _text_of(part: object, index: int, at: int) -> str:
    """Returns the text of part number `at` of message number `index`."""
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, dict) else None
    if isinstance(part, dict) and kind == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    hint = "" if kind == "text" else f"Parts of type {kind!r:.40} are not supported."
    raise InvalidArgumentError(f"messages.{index}.content.{at}", part, "{'type': 'text', 'text': …}", hint)


def _plain(field: str, value: Any) -> Any:
    """Returns a copy of `value` in plain JSON types: templates see no objects whose methods they could call."""
    try:
        return json.loads(json.dumps(value, default=_as_dict))
    except Exception as error:  # a Mapping of the caller's may raise any kind
        raise InvalidArgumentError(field, value, f"made of JSON values ({_why(error)})") from None


def _as_dict(value: object) -> dict[Any, Any]:
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"{type(value).__name__} is no JSON value")


def _why(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:_MAX_QUOTED]


def _up_to_mark(conversation: object, text: str) -> str:
    """Returns the rendered text up to the end of the last message."""
    before, mark, after = text.rpartition(_END_MARK.strip())
    if not mark:
        allowed = "a conversation whose last message the chat template writes"
        raise InvalidArgumentError("messages", conversation, allowed, "Leave out continue_final_message.")
    return before if after.startswith(" ") else before.rstrip()
