"""Command lines: short usage, errors of one line, and vLLM's habits."""

from __future__ import annotations

import argparse
import difflib
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

__all__ = ["CommandParser", "FlexibleArgumentParser", "Switch", "option_texts"]

_SWITCH_VALUES = ("true", "false")


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Shows a switch without the values that it may take."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if isinstance(action, Switch):
            return ", ".join(action.option_strings)
        return super()._format_action_invocation(action)


class CommandParser(argparse.ArgumentParser):
    """An ArgumentParser with a usage of one line. An error is one line too, and names the nearest option."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("formatter_class", HelpFormatter)
        super().__init__(*args, **kwargs)

    @property
    def known_options(self) -> list[str]:
        """The options that it has, such as `--model`."""
        return list(self._option_string_actions)

    def format_help(self) -> str:
        if self.usage is None:
            positional = [self._formatted(action) for action in self._actions if not action.option_strings]
            self.usage = " ".join(["%(prog)s [-h] [options]", *positional])
        return super().format_help()

    def parse_args(  # type: ignore[override]  # argparse's overloads are about the namespace's type
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> argparse.Namespace:
        parsed: argparse.Namespace
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            options = [text.partition("=")[0] for text in unknown if text.startswith("-")]
            nearest = difflib.get_close_matches(options[0], self.known_options, 1, cutoff=0.75) if options else []
            hint = f". Did you mean {nearest[0]}?" if nearest else ""
            self.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
        return parsed

    def error(self, message: str) -> NoReturn:
        if not self.exit_on_error:
            raise argparse.ArgumentError(None, message)
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")

    @staticmethod
    def _formatted(action: argparse.Action) -> str:
        name = str(action.metavar or action.dest)
        return f"[{name}]" if action.nargs == "?" else name


class FlexibleArgumentParser(CommandParser):
    """An ArgumentParser that takes `--max_model_len` for `--max-model-len`, and two more forms of vLLM's.

    `--config FILE`: options in a YAML file, by their long names. Those of the command line come before them.
    `--hf-overrides.rope_theta 2`: a field of an option whose value is a JSON object.
    """

    def parse_known_args(  # type: ignore[override]  # argparse's overloads are about the namespace's type
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> tuple[Any, list[str]]:
        given = [_with_dashes(text) for text in (sys.argv[1:] if args is None else args)]
        given = self._with_objects(self._with_config_file(given))
        following = [*given[1:], ""] if given else []
        expanded = [self._expanded(text, after) for text, after in zip(given, following, strict=True)]
        return super().parse_known_args(expanded, namespace)

    def _with_config_file(self, given: list[str]) -> list[str]:
        """Returns the texts, with the options of the file that `--config` names at their beginning."""
        at = next((at for at, text in enumerate(given) if text.partition("=")[0] == "--config"), None)
        if at is None or "--config" in self._option_string_actions:
            return given
        _, equals, path = given[at].partition("=")
        rest = given[at + 1 :]
        if not equals:
            path, rest = (rest[0], rest[1:]) if rest else ("", [])
        import yaml  # not for every import of the package

        try:
            options = yaml.safe_load(Path(path).read_text("utf-8")) or {}
        except (OSError, ValueError, yaml.YAMLError) as error:
            self.error(f"argument --config: the file cannot be read ({type(error).__name__})")
        if not isinstance(options, dict):
            self.error("argument --config: the file must have a YAML mapping")
        return [*option_texts(options), *given[:at], *rest]

    def _with_objects(self, given: list[str]) -> list[str]:
        """Returns the texts, with `--option.field value` as `--option={"field": value}`."""
        texts: list[str] = []
        objects: dict[str, dict[str, Any]] = {}
        rest = iter(given)
        for text in rest:
            name, equals, value = text.partition("=")
            option, *path = name.split(".")
            if not path or option not in self._option_string_actions:
                texts.append(text)
                continue
            value = value if equals else next(rest, "")
            place = objects.setdefault(option, {})
            for field in path[:-1]:
                place = place.setdefault(field.replace("-", "_"), {})
            try:
                place[path[-1].replace("-", "_")] = json.loads(value)
            except ValueError:
                place[path[-1].replace("-", "_")] = value
        return [*texts, *(f"{option}={json.dumps(value)}" for option, value in objects.items())]

    def _expanded(self, text: str, after: str) -> str:
        """Returns `--switch=true` for a switch whose next text is not its value."""
        is_switch = isinstance(self._option_string_actions.get(text), Switch)
        return f"{text}=true" if is_switch and after.lower() not in _SWITCH_VALUES else text


class Switch(argparse.Action):
    """The action of an option that is on without a value, and takes true or false, as some versions of vLLM have it.

    `--no-…` is off.
    """

    def __init__(self, option_strings: Sequence[str], dest: str, default: Any = None, help: str | None = None) -> None:
        off = [f"--no-{option.removeprefix('--')}" for option in option_strings]
        super().__init__([*option_strings, *off], dest, "?", True, default, str, metavar="{true,false}", help=help)

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        if str(values).lower() not in _SWITCH_VALUES:
            raise argparse.ArgumentError(self, f"{values!r} is not true or false")
        is_on = str(values).lower() == "true"
        setattr(namespace, self.dest, is_on != str(option).startswith("--no-"))


def option_texts(options: Mapping[str, Any]) -> list[str]:
    """Returns the command line that gives options by their long names. Those that are None are left out."""
    texts: list[str] = []
    for name, value in options.items():
        option = _with_dashes(f"--{name}")
        if isinstance(value, (list, tuple)):
            texts += [option, *map(str, value)]
        elif value is not None:
            texts.append(f"{option}={json.dumps(value) if isinstance(value, (bool, dict)) else value}")
    return texts


def _with_dashes(text: str) -> str:
    """Returns an option with dashes in its name, and other text as it is."""
    name, equals, value = text.partition("=")
    return name.replace("_", "-") + equals + value if text.startswith("--") else text
