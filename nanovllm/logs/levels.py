"""Reads level specifications: `DEBUG`, or with levels of parts, `INFO,scheduler=DEBUG,engine=WARNING`.

Pure functions of text and names; `nanovllm.logs.configuration` applies the result.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

__all__ = ["LEVELS", "LevelSpec", "levels_by_logger", "parse_level", "parse_level_spec"]

LEVELS: Mapping[str, int] = {
    "DEBUG": logging.DEBUG,
    "INFO": logging.INFO,
    "WARNING": logging.WARNING,
    "ERROR": logging.ERROR,
    "CRITICAL": logging.CRITICAL,
}
_ALIASES: Mapping[str, int] = {"WARN": logging.WARNING, "FATAL": logging.CRITICAL}  # `logging` takes these too


@dataclass(frozen=True)
class LevelSpec:
    """A parsed specification. `problems` lists what could not be read; it counts as INFO or is left out."""

    default: int
    parts: Mapping[str, int]  # module name ("scheduler") or path below the package ("engine.scheduler") -> level
    problems: tuple[str, ...] = ()

    def unknown_parts(self, logger_names: Iterable[str]) -> tuple[str, ...]:
        """Returns a problem for each part that is neither a module of the package nor part of a logger's name."""
        if not self.parts:
            return ()
        package = Path(__file__).parents[1]
        known = (
            {package.name}
            | {file.stem for file in package.rglob("*.py")}
            | {p.parent.name for p in package.rglob("*.py")}
        )
        known.update(component for name in logger_names for component in name.split("."))
        problems = []
        for part in self.parts:
            for component in part.split("."):
                if component not in known:
                    nearest = difflib.get_close_matches(component, known, n=1)
                    hint = f" (did you mean {nearest[0]!r}?)" if nearest else ""
                    problems.append(f"no part of {package.name} is called {component!r}{hint}")
        return tuple(problems)


def parse_level(level: int | str) -> tuple[int, str]:
    """Returns a level's number and a problem, empty for a known level. The number of an unknown level is INFO."""
    if isinstance(level, int):
        return level, ""
    number = {**LEVELS, **_ALIASES}.get(level.strip().upper())
    if number is None:
        return logging.INFO, f"unknown level {level.strip()!r}, using INFO"
    return number, ""


def parse_level_spec(text: str, unset: int = logging.INFO) -> LevelSpec:
    """Parses `LEVEL` and `PART=LEVEL` items, separated by commas, in any order, at most one of them without a part.

    unset: the default level of a text that has none.
    """
    default: int | None = None
    parts: dict[str, int] = {}
    problems: list[str] = []
    for item in filter(None, (item.strip() for item in text.split(","))):
        part, equals, level = item.rpartition("=")
        part = part.strip().removeprefix("nanovllm.")
        number, problem = parse_level(level)
        if problem:
            problems.append(f"{problem} for {part!r}" if part else problem)
        if not equals and default is None:
            default = number
        elif part:
            parts[part] = number
        else:
            problems.append(f"{item!r} is neither the one default level nor PART=LEVEL, ignored")
    return LevelSpec(unset if default is None else default, parts, tuple(problems))


def levels_by_logger(spec: LevelSpec, package: str, logger_names: Iterable[str]) -> dict[str, int]:
    """Returns the level of the package's logger, and of each logger and subpackage that `spec` names."""
    levels = {package: spec.default}
    for name in logger_names if spec.parts else ():
        components = name.split(".")
        for depth in range(1, len(components) + 1):
            path = ".".join(components[:depth])
            for part in (path.removeprefix(package + "."), components[depth - 1]):  # the path takes precedence
                if part in spec.parts:
                    levels[path] = spec.parts[part]
                    break
    return levels
