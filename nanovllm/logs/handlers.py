"""Handlers: standard error for records that no other handler takes, and a file."""

from __future__ import annotations

import logging
import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from nanovllm.errors import InvalidArgumentError
from nanovllm.logs.events import EVENTS
from nanovllm.logs.formats import JsonFormatter, TextFormatter

__all__ = ["ConsoleHandler", "LogFileHandler", "formatter_of"]


def formatter_of(log_format: str, rank: int = 0, *, colour: bool = False) -> logging.Formatter:
    """Returns the formatter for a value of `NANOVLLM_LOG_FORMAT`."""
    return JsonFormatter(rank) if log_format == "json" else TextFormatter(colour=colour)


class LogFileHandler(logging.FileHandler):
    """Appends each record to a file as a whole line when it is logged. The name of rank 1's file ends in `.rank1`."""

    def __init__(self, path: Path, rank: int = 0) -> None:
        path = Path(f"{path}.rank{rank}") if rank else path
        try:
            super().__init__(path, encoding="utf-8", errors="backslashreplace")
        except OSError as error:
            allowed = "the path of a file that can be written"
            raise InvalidArgumentError("NANOVLLM_LOG_FILE", str(path), allowed, str(error)) from None


class ConsoleHandler(logging.Handler):
    """Writes records to standard error if no other handler takes them; LogFileHandler does not count."""

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(formatter_of("text"))
        self.terminal_formatter: logging.Formatter | None = None  # used on a terminal if set
        self.rank = 0

    def emit(self, record: logging.LogRecord) -> None:
        if self._another_handler_takes(record) or (self.rank and _repeats_rank_0(record)):
            return
        try:
            # sys.stderr is looked up for each record: it may have been replaced (pytest, notebooks).
            is_terminal = getattr(sys.stderr, "isatty", bool)()
            formatter = self.terminal_formatter if is_terminal else None
            with _progress_bars_cleared():
                # One write per line, so that the lines of several ranks do not mix.
                sys.stderr.write((formatter or self).format(record) + "\n")
                sys.stderr.flush()
        except Exception:
            self.handleError(record)

    def _another_handler_takes(self, record: logging.LogRecord) -> bool:
        logger: logging.Logger | None = logging.getLogger(record.name)
        while logger is not None:
            if any(handler is not self and not isinstance(handler, LogFileHandler) for handler in logger.handlers):
                return True
            logger = logger.parent if logger.propagate else None
        return False


def _repeats_rank_0(record: logging.LogRecord) -> bool:
    """Returns whether rank 0 logs the same record. All ranks do at INFO; a logger at DEBUG shows each rank."""
    event = EVENTS.get(getattr(record, "event", ""))
    at_info = record.levelno == logging.INFO and not logging.getLogger(record.name).isEnabledFor(logging.DEBUG)
    return at_info and event is not None and not event.of_each_rank


def _progress_bars_cleared() -> AbstractContextManager[object]:
    """Removes tqdm's bars from the terminal while a line is written, and draws them again below it."""
    tqdm = sys.modules.get("tqdm")
    if tqdm is None or not tqdm.tqdm._instances:  # saves a third of the cost of a line
        return nullcontext()
    cleared: AbstractContextManager[object] = tqdm.tqdm.external_write_mode(file=sys.stderr)
    return cleared
