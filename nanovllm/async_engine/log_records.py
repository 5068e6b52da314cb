"""The log of a process that another one writes: records as messages."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from nanovllm.async_engine.encoding import LogRecord
from nanovllm.logs import events
from nanovllm.logs.formats import strict_json

logger = logging.getLogger(__name__)


class RecordSender(logging.Handler):
    """A handler of the process whose log it is. send: sends a message to the process that writes it."""

    def __init__(self, send: Callable[[LogRecord], None]) -> None:
        super().__init__()
        self._send = send

    def emit(self, record: logging.LogRecord) -> None:
        attributes: dict[str, Any] = {**vars(record), "msg": record.getMessage(), "args": None, "exc_info": None}
        if record.exc_info:
            attributes["exc_text"] = logging.Formatter().formatException(record.exc_info)
        self._send(LogRecord(json.loads(strict_json(attributes))))


def report_dropped(num_lost: int) -> None:
    """Logs how many records were dropped while the process that writes the log did not read them."""
    events.log_dropped.log(logger, num_lost=num_lost)


def write_record(message: LogRecord, engine_id: int | None, prefix: str = "") -> None:
    """Logs a record of another process here. engine_id: what this process calls the engine that a record is of.

    prefix: begins its sentence.
    """
    record = logging.makeLogRecord(message.attributes)
    if getattr(record, "engine_id", None) is not None:
        record.engine_id = engine_id
    if prefix and getattr(record, "event", "") != events.rule.name:
        record.msg = f"{prefix}{record.msg}"
    logger = logging.getLogger(record.name)
    if logger.isEnabledFor(record.levelno):
        with suppress(OSError, ValueError):  # a handler's stream is closed
            logger.handle(record)
