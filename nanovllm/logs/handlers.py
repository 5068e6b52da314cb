"""Where records go: to standard error when nobody else takes them, and to a file when one is asked for."""

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
    """The formatter that `NANOVLLM_LOG_FORMAT` names."""
    return JsonFormatter(rank) if log_format == "json" else TextFormatter(colour=colour)


class LogFileHandler(logging.FileHandler):
    """Appends every record to a file, each a whole line as soon as it is logged. Rank 1's file ends in `.rank1`."""

    def __init__(self, path: Path, rank: int = 0) -> None:
        path = Path(f"{path}.rank{rank}") if rank else path
        try:
            super().__init__(path, encoding="utf-8", errors="backslashreplace")
        except OSError as error:
            allowed = "the path of a file that can be written"
            raise InvalidArgumentError("NANOVLLM_LOG_FILE", str(path), allowed, str(error)) from None


class ConsoleHandler(logging.Handler):
    """Writes to standard error what no other handler takes, save our own file."""

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(formatter_of("text"))
        self.terminal_formatter: logging.Formatter | None = None  # for a terminal, where it is another
        self.rank = 0

    def emit(self, record: logging.LogRecord) -> None:
        if self._another_handler_takes(record) or (self.rank and _says_what_rank_0_says(record)):
            return
        try:
            # sys.stderr is looked up now and not kept: it may have been replaced since (pytest, notebooks).
            is_terminal = getattr(sys.stderr, "isatty", bool)()
            formatter = self.terminal_formatter if is_terminal else None
            with _progress_bars_cleared():
                # One write a line: the lines of several ranks do not mix.
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


def _says_what_rank_0_says(record: logging.LogRecord) -> bool:
    """At INFO all ranks would say the same; who asks for DEBUG wants to see each."""
    event = EVENTS.get(getattr(record, "event", ""))
    at_info = record.levelno == logging.INFO and not logging.getLogger(record.name).isEnabledFor(logging.DEBUG)
    return at_info and event is not None and not event.of_each_rank


def _progress_bars_cleared() -> AbstractContextManager[object]:
    """Takes tqdm's bars off the terminal for a line, and draws them again below it."""
    tqdm = sys.modules.get("tqdm")
    if tqdm is None or not tqdm.tqdm._instances:  # a third of a line's cost is saved where there is no bar
        return nullcontext()
    cleared: AbstractContextManager[object] = tqdm.tqdm.external_write_mode(file=sys.stderr)
    return cleared
