"""Records: a sentence for a person and named fields for a machine, made by one call so that they cannot disagree.

A record has, beside what `logging` gives it, `event` (a dotted name), `fields` (a dict) and `mono` (the monotonic
clock in seconds, as `time.monotonic` gives it). `log_event` makes one of its parts. An `Event` is declared once, with
its sentence, and is then logged by its fields alone: nanovllm's own are in `events.py`.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any, TypeVar

__all__ = ["Event", "ItemList", "Listing", "add_missing_attributes", "first_items", "log_event"]

T = TypeVar("T")
Place = tuple[str, int, str]  # file, line, function of the code that logs


def log_event(logger: logging.Logger, level: int, event: str, message: str, **fields: Any) -> None:
    """Log one event: `message` is a `str.format` template over `fields`, filled only when the record is taken.

    Arguments are evaluated by Python before the call; guard costly ones with `logger.isEnabledFor(level)`.
    The record's file, line and function are the caller's.
    """
    if logger.isEnabledFor(level):
        emit(logger, level, event, message.format(**fields), fields, place_of(sys._getframe(1)))


@dataclass(frozen=True)
class Event:
    """What the log can say: a name, a sentence over fields, and which module says it at which level.

    Its fields are the placeholders of the sentence and those of `more` and `optional`, with spaces between.
    """

    name: str
    levels: int | tuple[int, ...]  # several: the first is that of `log`
    loggers: str  # names below nanovllm, with spaces between; none: whichever it is called with
    sentence: str  # a `str.format` template
    more: str = ""
    optional: str = ""  # fields that are left out where they do not apply
    others: str = ""  # which fields it has whose names depend on a configuration
    of_each_rank: bool = False  # whether a rank above 0 has something of its own to say with it at INFO
    unseen: str = ""  # why a run in one process on a CPU does not show it

    def log(self, logger: logging.Logger, **fields: Any) -> None:
        level = self.levels if isinstance(self.levels, int) else self.levels[0]
        if logger.isEnabledFor(level):
            self.emit(logger, level, fields, place_of(sys._getframe(1)))

    def log_at(self, level: int, logger: logging.Logger, **fields: Any) -> None:
        """For an event with several levels."""
        if logger.isEnabledFor(level):
            self.emit(logger, level, fields, place_of(sys._getframe(1)))

    def emit(self, logger: logging.Logger, level: int, fields: dict[str, Any], place: Place, **words: object) -> None:
        """For helpers that log for their caller: the level was asked, and `words` are in the sentence alone."""
        if "{all_fields}" in self.sentence:
            words["all_fields"] = Listing(fields)
        emit(logger, level, self.name, self.sentence.format(**fields, **words), fields, place)


def place_of(frame: FrameType) -> Place:
    return frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name


def emit(logger: logging.Logger, level: int, event: str, sentence: str, fields: dict[str, Any], place: Place) -> None:
    filename, line, function = place
    extra = {"event": event, "fields": fields, "mono": time.monotonic()}
    logger.handle(logger.makeRecord(logger.name, level, filename, line, sentence, (), None, function, extra))


def add_missing_attributes(record: logging.LogRecord) -> bool:
    """A filter that lets all pass; a plain `logger.info(...)` gets the attributes that formatters rely on."""
    if not hasattr(record, "event"):
        record.event, record.fields, record.mono = "", {}, time.monotonic()
    return True


class ItemList(list[str]):
    """A list that reads `[a, b, c]` in a sentence, without quotation marks."""

    def __format__(self, format_spec: str) -> str:
        return format("[" + ", ".join(self) + "]", format_spec)


class Listing(dict[str, Any]):
    """A mapping that reads `a=1, b=2` in a sentence."""

    def __format__(self, format_spec: str) -> str:
        return format(", ".join(f"{name}={value}" for name, value in self.items()), format_spec)


def first_items(items: Sequence[T], render: Callable[[T], str], limit: int = 16) -> ItemList:
    """The first `limit` items as text, then `… +240 more`; only those shown are rendered."""
    shown = ItemList(render(item) for item in items[:limit])
    if len(items) > limit:
        shown.append(f"… +{len(items) - limit} more")
    return shown
