"""Formatters: a record as a line for people, or as a JSON object for programs."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Mapping
from datetime import datetime, timezone
from typing import Any

__all__ = ["JsonFormatter", "TextFormatter"]

TEXT_FORMAT = "[%(asctime)s] [%(name)s] [%(levelname)s] %(message)s"
_COLOURS = {"DEBUG": "36", "INFO": "32", "WARNING": "33", "ERROR": "31", "CRITICAL": "1;31"}


class TextFormatter(logging.Formatter):
    """`[time] [logger] [level] sentence`, with the level in colour if `colour` is set."""

    def __init__(self, *, colour: bool = False) -> None:
        level = "\33[%(colour)sm%(levelname)s\33[0m" if colour else "%(levelname)s"
        super().__init__(TEXT_FORMAT.replace("%(levelname)s", level))

    def format(self, record: logging.LogRecord) -> str:
        record.colour = _COLOURS.get(record.levelname, "0")
        return super().format(record)


class JsonFormatter(logging.Formatter):
    """One object a line: ts (RFC 3339, UTC), mono, level, logger, event, message, pid, rank, then the fields.

    A line is written whatever the fields hold: values that JSON cannot represent become text. Tensors on a GPU are not
    read.
    """

    def __init__(self, rank: int = 0) -> None:
        super().__init__()
        self.rank = rank

    def format(self, record: logging.LogRecord) -> str:
        fields: Mapping[str, Any] = getattr(record, "fields", {})
        when = datetime.fromtimestamp(record.created, timezone.utc)
        entry = {
            "ts": when.isoformat(timespec="microseconds").replace("+00:00", "Z"),
            "mono": getattr(record, "mono", None) or time.monotonic(),
            "level": record.levelname,
            "logger": record.name,
            "event": getattr(record, "event", ""),
            "message": record.getMessage(),
            "pid": record.process or os.getpid(),
            "rank": fields.get("rank", self.rank),
        }
        for name, value in fields.items():
            entry.setdefault(name, value)
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        try:
            return _encode(entry)
        except Exception:  # NaN, a key that is not text, a list that contains itself: convert value by value
            return json.dumps({str(name): _anything(value) for name, value in entry.items()})


def _plain(value: Any) -> Any:
    """Returns the closest JSON value to one that the encoder does not know."""
    shape = getattr(value, "shape", None)
    if shape is not None and (len(shape) or getattr(getattr(value, "device", None), "type", "cpu") != "cpu"):
        return {"shape": [int(size) for size in shape], "dtype": str(value.dtype)}
    if hasattr(value, "item"):  # a scalar of numpy or torch
        return value.item()
    return list(value) if isinstance(value, (set, frozenset)) else str(value)


_encode = json.JSONEncoder(default=_plain, allow_nan=False).encode


def _anything(value: Any) -> Any:
    try:
        return json.loads(_encode(value))
    except Exception:
        pass
    try:
        return str(value)
    except Exception as error:
        return f"<{type(value).__name__} that cannot be shown: {type(error).__name__}>"
