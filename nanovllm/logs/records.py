"""Records: a sentence for people and named fields for programs, made by one call so that they cannot disagree.

In addition to the attributes that `logging` sets, a record has `event` (a dotted name), `fields` (a dict), `mono`
(seconds of `time.monotonic`), `in_summary` (whether the console shows it at its default level) and `engine_id` (which
engine of the process it is about, if that is known). `log_event` makes a record from its parts. An `Event` is declared
once, with its sentence, and is then logged with its fields only. nanovllm's own events are in `events.py`.
"""

from __future__ import annotations

import logging
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import FrameType
from typing import Any, TypeVar

__all__ = [
    "MAX_ITEMS",
    "Event",
    "ItemList",
    "Listing",
    "add_missing_attributes",
    "current_engine",
    "first_items",
    "in_engine",
    "log_event",
]

T = TypeVar("T")
MAX_ITEMS = 16  # of a list, in a sentence and in a field
Place = tuple[str, int, str]  # file, line, function of the code that logs
# Control characters, separators and marks that change the direction of text, and halves of surrogate pairs.
_UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_UNSAFE_BUT_NEWLINES = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


class _CurrentEngine(threading.local):
    """The engine that this thread runs: `nanovllm.engine.observer` sets it, since most code that logs knows no engine.

    Not a ContextVar. Up to Python 3.11, setting one may run a garbage collection. If that ends an engine, which sets
    the variable, too, the interpreter reads memory that it has freed.
    """

    number: int | None = None


current_engine = _CurrentEngine()


def log_event(logger: logging.Logger, level: int, event: str, message: str, **fields: Any) -> None:
    """Logs one event. `message` is a `str.format` template over `fields`, filled only if the level is enabled.

    Python evaluates arguments before the call: guard expensive ones with `logger.isEnabledFor(level)`. The record's
    file, line and function are the caller's.
    """
    if logger.isEnabledFor(level):
        emit(logger, level, event, filled(message, fields), fields, place_of(sys._getframe(1)))


@dataclass(frozen=True)
class Event:
    """A declared event: its name, levels, loggers, sentence and fields.

    Its fields are the placeholders of the sentence, and the names in `more` and `optional`, separated by spaces.
    """

    name: str
    levels: int | tuple[int, ...]  # if several, `log` uses the first
    loggers: str  # names below nanovllm, separated by spaces; empty: any logger
    sentence: str  # a `str.format` template
    more: str = ""  # fields that are not in the sentence
    optional: str = ""  # fields that are not in the sentence, and are left out where they do not apply
    others: str = ""  # describes fields whose names depend on the configuration
    of_each_rank: bool = False  # whether its content differs between ranks, so that all show it at INFO
    in_summary: bool = True  # whether the console shows it at its default level
    on_console: bool = True  # whether the console shows it at all
    unseen: str = ""  # what it takes to see it, if a run in one process on a CPU does not show it

    def log(self, logger: logging.Logger, *, in_summary: bool = True, **fields: Any) -> None:
        """Logs an event. in_summary: whether the console shows it at its default level, if it shows such events."""
        level = self.levels if isinstance(self.levels, int) else self.levels[0]
        if logger.isEnabledFor(level):
            self.emit(logger, level, fields, place_of(sys._getframe(1)), in_summary)

    def log_at(self, level: int, logger: logging.Logger, *, in_summary: bool = True, **fields: Any) -> None:
        """Logs an event that has several levels at one of them."""
        if logger.isEnabledFor(level):
            self.emit(logger, level, fields, place_of(sys._getframe(1)), in_summary)

    def emit(
        self,
        logger: logging.Logger,
        level: int,
        fields: dict[str, Any],
        place: Place,
        in_summary: bool = True,
        **words: object,
    ) -> None:
        """For helpers that log for their caller and have checked the level. `words` are in the sentence only."""
        if "{all_fields}" in self.sentence:
            words["all_fields"] = Listing(fields)
        sentence = filled(self.sentence, {**fields, **words} if words else fields)
        emit(logger, level, self.name, sentence, fields, place, in_summary and self.in_summary)


def place_of(frame: FrameType) -> Place:
    return frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name


def emit(
    logger: logging.Logger,
    level: int,
    event: str,
    sentence: str,
    fields: dict[str, Any],
    place: Place,
    in_summary: bool = True,
) -> None:
    filename, line, function = place
    record = logger.makeRecord(logger.name, level, filename, line, sentence, (), None, function)
    record.event, record.fields, record.mono = event, fields, time.monotonic()
    record.in_summary, record.engine_id = in_summary, current_engine.number
    with suppress(OSError, ValueError):  # a handler's stream is closed, and so is the one that would say it
        logger.handle(record)


@contextmanager
def in_engine(number: int | None) -> Iterator[None]:
    """Marks the records that this thread makes in the block as those of an engine."""
    before, current_engine.number = current_engine.number, number
    try:
        yield
    finally:
        current_engine.number = before


def add_missing_attributes(record: logging.LogRecord) -> bool:
    """A filter that passes all records and adds the attributes that a plain `logger.info(...)` does not set."""
    if not hasattr(record, "event"):
        record.event, record.fields, record.mono = "", {}, time.monotonic()
        record.in_summary, record.engine_id = True, current_engine.number
    return True


def filled(template: str, values: Mapping[str, Any]) -> str:
    """Returns the template with its values. Only the template can break a line or move a terminal's cursor."""
    sentence = template.format_map(values)
    return sentence if sentence.isprintable() else escaped(sentence, newlines="\n" not in template)


def escaped(text: str, newlines: bool = True) -> str:
    """Returns `text` with the characters that a terminal or a reader of lines acts on written as `\\n`, `\\x1b` …"""
    unsafe = _UNSAFE if newlines else _UNSAFE_BUT_NEWLINES
    return unsafe.sub(lambda match: match[0].encode("unicode_escape").decode("ascii"), text)


class ItemList(list[str]):
    """A list that is formatted as `[a, b, c]`, without quotation marks."""

    def __format__(self, format_spec: str) -> str:
        return format("[" + ", ".join(self) + "]", format_spec)


class Listing(dict[str, Any]):
    """A mapping that is formatted as `a=1, b=2`."""

    def __format__(self, format_spec: str) -> str:
        return format(", ".join(f"{name}={value}" for name, value in self.items()), format_spec)


def first_items(items: Sequence[T], render: Callable[[T], str], limit: int = MAX_ITEMS) -> ItemList:
    """Returns the first `limit` items as text, then `… +240 more`. Only these items are rendered."""
    shown = ItemList(render(item) for item in items[:limit])
    if len(items) > limit:
        shown.append(f"… +{len(items) - limit} more")
    return shown
