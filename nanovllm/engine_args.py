"""EngineArgs and AsyncEngineArgs: the arguments of an engine as an object and as command-line options, as in vLLM."""

from __future__ import annotations

import argparse
import json
import textwrap
import typing
from collections.abc import Mapping
from dataclasses import MISSING, InitVar
from types import UnionType
from typing import Any, TypeVar

from nanovllm.compat.unsupported import ENGINE_ARGUMENTS, WRITTEN_IN, Unsupported
from nanovllm.config import ALIASES, EngineConfig, check_names
from nanovllm.errors import shown
from nanovllm.utils.argparse_utils import FlexibleArgumentParser, Switch
from nanovllm.utils.arguments import SWITCH, Argument, arguments_of

E = TypeVar("E", bound="EngineArgs")

DEFAULT_MODEL = "Qwen/Qwen3-0.6B"  # as in vLLM


class EngineArgs(EngineConfig):
    """The arguments of `LLM`, which can be assigned to.

        args = EngineArgs(model="tiny", max_num_seqs=8)
        args.max_model_len = 256
        llm = LLM(**dataclasses.asdict(args))  # or LLM.from_engine_args(args)

    Values are checked when the object is made, and again when an engine is made from it.
    """

    __hash__ = None  # type: ignore[assignment]  # EngineConfig has one, as it is frozen

    def __init__(self, model: str = DEFAULT_MODEL, **arguments: Any) -> None:
        super().__init__(model, **check_names(type(self).__name__, arguments))

    def __setattr__(self, name: str, value: object) -> None:
        """Sets an argument. Raises UnknownArgumentError for another name."""
        if check_names(type(self).__name__, {name: value}):  # else it has no effect
            object.__setattr__(self, ALIASES.get(name, name), value)

    @staticmethod
    def add_cli_args(parser: FlexibleArgumentParser) -> FlexibleArgumentParser:
        """Adds an option for each argument, `--max-model-len` for `max_model_len`, and returns the parser.

        The values of arguments that have no effect are kept only if they are given.
        """
        types = add_options(parser.add_argument_group("Engine"), EngineConfig)
        others = {name: entry for name, entry in ENGINE_ARGUMENTS.items() if name not in types}
        add_options_without_effect(parser, "Options of vLLM without effect", others)
        return parser

    @classmethod
    def from_cli_args(cls: type[E], args: argparse.Namespace) -> E:
        """Returns the arguments in a parsed command line. Ignores those that are not the engine's."""
        names = [each.name for each in arguments_of(EngineConfig)]
        return cls(**{name: value for name, value in vars(args).items() if name in names or name in ENGINE_ARGUMENTS})


class AsyncEngineArgs(EngineArgs):
    """The arguments of `AsyncLLM`, which are those of `LLM`."""


def add_options(group: argparse._ArgumentGroup, cls: type) -> dict[str, Any]:
    """Adds an option for each declared argument of a dataclass. Returns their types by name."""
    hints = typing.get_type_hints(cls).items()
    types = {name: hint.type if isinstance(hint, InitVar) else hint for name, hint in hints}
    for each in arguments_of(cls):
        _add_option(group, each, types[each.name])
    return types


def add_options_without_effect(parser: FlexibleArgumentParser, title: str, table: Mapping[str, Unsupported]) -> None:
    """Adds the options of a table that the parser has not, in a group that lists their names."""
    names = {option: name for name in table if (option := _option(name)) not in parser.known_options}
    text = f"Accepted where the value asks for what is the case anyway ({WRITTEN_IN}): {', '.join(names)}."
    group = parser.add_argument_group(title, textwrap.fill(text, 96, break_on_hyphens=False))
    for option, name in names.items():
        hidden: Any = {"dest": name, "default": argparse.SUPPRESS, "help": argparse.SUPPRESS}
        accepts = table[name].passes.accepts
        options = [option, *_SHORT.get(name, ())]
        if (accepts(True) or accepts(False)) and not accepts("text"):
            group.add_argument(*options, action=Switch, **hidden)
        else:
            group.add_argument(*options, type=_read_value, **hidden)


# vLLM's short names
_SHORT = {"tensor_parallel_size": ("-tp",), "pipeline_parallel_size": ("-pp",), "data_parallel_size": ("-dp",)}


def _add_option(group: argparse._ArgumentGroup, declared: Argument, type_hint: Any) -> None:
    default = DEFAULT_MODEL if declared.default is MISSING else declared.default
    is_union = typing.get_origin(type_hint) in (typing.Union, UnionType)
    kinds = [kind for kind in (typing.get_args(type_hint) if is_union else [type_hint]) if kind is not type(None)]
    option = _option(declared.name)
    help_text = _help_text(declared, default)
    if kinds == [bool]:
        group.add_argument(option, action=Switch, default=default, help=help_text)
        return

    def parse(text: str) -> Any:
        try:
            if typing.get_origin(kinds[0]) is Mapping:
                value = json.loads(text)
            else:
                value = _read_integer(text) if kinds[0] is int else kinds[0](text)
        except (ValueError, OverflowError):
            value = text
        if not declared.rule.accepts(value):
            raise argparse.ArgumentTypeError(f"{shown(text)} is not {declared.rule.allowed}")
        return value

    metavar = {int: "N", float: "X", Mapping: "JSON"}.get(typing.get_origin(kinds[0]) or kinds[0], "TEXT")
    if typing.get_origin(kinds[0]) is tuple:  # of texts
        texts = [*default] if isinstance(default, tuple) else []
        group.add_argument(option, nargs="+", action="extend", default=texts, metavar=metavar, help=help_text)
        return
    short = _SHORT.get(declared.name, ())
    group.add_argument(option, *short, type=parse, default=default, metavar=metavar, help=help_text)


def _help_text(declared: Argument, default: object) -> str:
    """Returns the meaning of an option, what is allowed and its default. None cannot be given on a command line."""
    allowed, _, of_none = declared.rule.allowed.partition(", or None")
    shown = default if isinstance(default, str) and default else "None given" if default == () else repr(default)
    if isinstance(default, bool):
        shown = "on" if default else "off"
    values = "" if allowed == SWITCH.allowed else f" Allowed: {allowed}."
    return f"{declared.help}{values} Default: {shown}{of_none}".replace("%", "%%")


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


_FACTORS = {"k": 1000, "K": 1024, "m": 10**6, "M": 2**20}


def _read_integer(text: str) -> int:
    """Reads an integer, and vLLM's `32k` for 32,000 and `32K` for 32,768. Raises ValueError."""
    if text[-1:] not in _FACTORS:
        return int(text)
    value = float(text[:-1]) * _FACTORS[text[-1]]
    if value != int(value):
        raise ValueError(text)
    return int(value)


def _read_value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None if text == "None" else text
