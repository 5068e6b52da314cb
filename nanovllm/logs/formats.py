"""Formatters: a record as a line for people, or as a JSON object for programs."""

from __future__ import annotations

import json
import logging
import math
import os
import re
import sys
import textwrap
import time
import weakref
from collections.abc import Mapping
from typing import Any

from nanovllm.logs.events import EVENTS

__all__ = ["JsonFormatter", "TerminalFormatter", "TextFormatter", "strict_json"]

_COLOURS = {"DEBUG": "36", "INFO": "32", "WARNING": "33", "ERROR": "31", "CRITICAL": "1;31"}


_WIDTH = 120  # columns of a line on a terminal
_COLOUR = re.compile("\33\\[[\\d;]*m")
_DEEPEST = 8  # levels of lists and mappings in a field


class _LineFormatter(logging.Formatter):
    """Makes the line of a record once, for all handlers that share this formatter."""

    def __init__(self) -> None:
        super().__init__()
        self._last: tuple[weakref.ref[logging.LogRecord], str] | None = None

    def format(self, record: logging.LogRecord) -> str:
        last = self._last
        if last is None or last[0]() is not record:
            last = self._last = weakref.ref(record), self.line(record)
        return last[1]

    def line(self, record: logging.LogRecord) -> str:
        """Returns the line of a record."""
        return super().format(record)


class TextFormatter(_LineFormatter):
    """`[time and zone] [logger] [level] sentence`, with the level in colour if `colour` is set."""

    def __init__(self, *, colour: bool = False) -> None:
        super().__init__()
        self._colour = colour
        self._second = -1, "", ""  # the last one formatted: its number, date and time, and zone

    def formatMessage(self, record: logging.LogRecord) -> str:
        level = record.levelname
        if self._colour:
            level = f"\33[{_COLOURS.get(level, '0')}m{level}\33[0m"
        return f"[{self.formatTime(record)}] [{record.name}] [{level}] {record.message}"

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:
        """Returns the local time with its offset: `2026-11-28 08:08:17,754+0100`."""
        second, milliseconds = int(record.created), int(record.created % 1 * 1000)
        number, begin, zone = self._second
        if second != number:
            local = time.localtime(second)
            begin, zone = time.strftime("%Y-%m-%d %H:%M:%S", local), time.strftime("%z", local)
            self._second = second, begin, zone
        return f"{begin},{milliseconds:03d}{zone}"


class TerminalFormatter(TextFormatter):
    """Lines of at most 120 columns: lists at the end of a sentence are cut, other sentences wrapped. Tables stay."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        line, message = super().formatMessage(record), record.message
        head = line[: len(line) - len(message)]
        used = len(_COLOUR.sub("", head))
        event = EVENTS.get(getattr(record, "event", ""))
        if event is not None and event.name == "rule":
            return head + message[0] * max(_columns() - used, 1)
        if used + len(message) <= _WIDTH or "\n" in message:
            return line
        if event is not None and event.sentence.endswith(("{seqs}", "{all_fields}")):
            return head + message[: _WIDTH - used - 1].rpartition(" ")[0] + " …"
        wrapped = textwrap.fill(
            message, _WIDTH, initial_indent=" " * used, subsequent_indent="    ", break_on_hyphens=False
        )
        return head + wrapped[used:]


def _columns() -> int:
    """Returns the width of the terminal that standard error is."""
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns
    except (AttributeError, OSError, ValueError):
        return _WIDTH


class JsonFormatter(_LineFormatter):
    """One object a line: ts (RFC 3339, UTC), mono, level, logger, event, message, pid, rank, then the fields.

    A line is written whatever the fields hold: NaN and infinity become null, other values that JSON cannot represent
    text. Tensors on a GPU are not read.
    """

    def __init__(self, rank: int = 0) -> None:
        super().__init__()
        self.rank = rank
        self._second = -1, ""  # the last one formatted: its number, date and time

    def line(self, record: logging.LogRecord) -> str:
        fields: Mapping[str, Any] = getattr(record, "fields", {})
        entry = {
            "ts": self._utc(record.created),
            "mono": getattr(record, "mono", None) or time.monotonic(),
            "level": record.levelname,
            "logger": record.name,
            "event": getattr(record, "event", ""),
            "message": record.getMessage(),
            "pid": record.process or os.getpid(),
            "rank": fields.get("rank", self.rank),
        }
        if (engine_id := getattr(record, "engine_id", None)) is not None:
            entry["engine_id"] = engine_id
        entry = {**entry, **fields, **entry}  # no field hides the envelope
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return strict_json(entry)

    def _utc(self, created: float) -> str:
        """Returns the time as in RFC 3339: `2026-11-28T07:08:17.754321Z`."""
        second, microseconds = divmod(round(created * 1e6), 10**6)
        number, begin = self._second
        if second != number:
            begin = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second))
            self._second = second, begin
        return f"{begin}.{microseconds:06d}Z"


def strict_json(value: Any, *, compact: bool = False) -> str:
    """Returns JSON that any reader takes, whatever `value` holds."""
    try:
        text = (_encode_compactly if compact else _encode)(value)
        if _SURROGATE not in text:
            return text
    except Exception:  # NaN, a key that is not text, a list that contains itself
        pass
    return json.dumps(_strict(value))


def _plain(value: Any) -> Any:
    """Returns the closest JSON value to one that the encoder does not know."""
    shape = getattr(value, "shape", None)
    if shape is not None and (len(shape) or getattr(getattr(value, "device", None), "type", "cpu") != "cpu"):
        return {"shape": [int(size) for size in shape], "dtype": str(value.dtype)}
    if hasattr(value, "item"):  # a scalar of numpy or torch
        return value.item()
    return list(value) if isinstance(value, (set, frozenset)) else str(value)


# A list that contains itself is a RecursionError, so the encoder need not look for one.
_encode = json.JSONEncoder(default=_plain, allow_nan=False, check_circular=False).encode
_encode_compactly = json.JSONEncoder(
    default=_plain, allow_nan=False, check_circular=False, separators=(",", ":")
).encode
_SURROGATE = "\\ud"  # may be half of a pair without the other, which strict readers refuse


def _strict(value: Any, depth: int = 0) -> Any:
    """Returns the closest value that any reader of JSON takes."""
    try:
        if isinstance(value, str):
            return value.encode("utf-8", "backslashreplace").decode("utf-8")
        if value is None or isinstance(value, bool):
            return value
        if isinstance(value, float):
            return value if math.isfinite(value) else None
        if isinstance(value, int):
            str(value)  # raises for a number of too many digits, as writing it would
            return value
        if isinstance(value, Mapping) and depth < _DEEPEST:
            return {_strict(str(name)): _strict(item, depth + 1) for name, item in value.items()}
        if isinstance(value, (list, tuple)) and depth < _DEEPEST:
            return [_strict(item, depth + 1) for item in value]
        return _strict(str(value) if depth >= _DEEPEST else _plain(value), depth + 1)
    except Exception as error:
        return f"<{type(value).__name__} that cannot be shown: {type(error).__name__}>"
