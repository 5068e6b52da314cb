"""Handlers: standard error for records that no other handler takes, and a file. Neither raises into the engine."""

from __future__ import annotations

import functools
import logging
import os
import sys
from pathlib import Path

from nanovllm.errors import InvalidArgumentError
from nanovllm.logs import events
from nanovllm.logs.formats import JsonFormatter, TextFormatter
from nanovllm.logs.lost_lines import LostLines
from nanovllm.logs.progress_bar import clear_progress_bar
from nanovllm.logs.recent_events import RecentEvents

__all__ = ["ConsoleHandler", "LogFileHandler", "formatter_of"]


_logger_of = functools.cache(logging.getLogger)  # which takes a lock


def formatter_of(log_format: str, rank: int = 0) -> logging.Formatter:
    """Returns the formatter for a value of `NANOVLLM_LOG_FORMAT`."""
    return JsonFormatter(rank) if log_format == "json" else TextFormatter()


class LogFileHandler(logging.Handler):
    """Appends each record to a file as a whole line when it is logged. The name of rank 1's file ends in `.rank1`.

    A file that was renamed or removed, as logrotate does, is opened again under its name.
    """

    def __init__(self, path: Path, rank: int = 0) -> None:
        super().__init__()
        absolute = Path(f"{path}.rank{rank}" if rank else path).absolute()
        self._path = str(absolute)
        self._lost = LostLines(absolute)
        self._begins_line = True
        try:
            self._file = self._open()
        except OSError as error:
            allowed = "the path of a file that can be written"
            raise InvalidArgumentError("NANOVLLM_LOG_FILE", str(self._path), allowed, str(error)) from None

    def _open(self) -> int:
        file = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        self._opened = _identity(os.fstat(file))
        return file

    def handle(self, record: logging.LogRecord) -> bool:
        taken = bool(super().handle(record))
        self._lost.warn()
        return taken

    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = f"{self.format(record)}\n".encode("utf-8", "backslashreplace")
            self._follow_renaming()
            self._write(line)
        except Exception as error:
            self._lost.add(error)

    def _follow_renaming(self) -> None:
        """Opens the file again if another one, or none, has its name, or if `logging.config` has closed it."""
        if self._file >= 0:
            try:
                if _identity(os.stat(self._path)) == self._opened:
                    return
            except FileNotFoundError:
                pass
        opened = self._open()
        self._close_file()
        self._file, self._begins_line = opened, True

    def _write(self, line: bytes) -> None:
        """Writes the line with one system call, so that lines of several processes do not mix."""
        line = line if self._begins_line else b"\n" + line
        written = 0
        try:
            while written < len(line):  # a full disk takes a part, and then raises
                written += os.write(self._file, line[written:])
        finally:
            if written:
                self._begins_line = written == len(line)

    def close(self) -> None:
        self.acquire()
        try:
            self._close_file()
        finally:
            self.release()
        super().close()

    def _close_file(self) -> None:
        file, self._file = self._file, -1
        if file >= 0:
            os.close(file)


def _identity(status: os.stat_result) -> tuple[int, int]:
    """Returns what no other file has while this one is open."""
    return status.st_dev, status.st_ino


class ConsoleHandler(logging.Handler):
    """Writes records to standard error if no other handler takes them; LogFileHandler and RecentEvents do not count."""

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(formatter_of("text"))
        self.terminal_formatter: logging.Formatter | None = None  # used on a terminal if set
        self.rank = 0
        self.shows_summary = False  # whether some INFO records are left out
        self._versions: logging.LogRecord | None = None  # is held back until the line that introduces it

    def emit(self, record: logging.LogRecord) -> None:
        if self._another_handler_takes(record):
            clear_progress_bar()
            return
        if not self._shows(record):
            return
        event = getattr(record, "event", "")
        if event == events.engine_versions.name and isinstance(self.formatter, TextFormatter):
            self._versions = record
            return
        self._write(record)
        if event == events.engine_init.name and self._versions is not None:
            self._write(self._versions)
            self._versions = None

    def _write(self, record: logging.LogRecord) -> None:
        try:
            # sys.stderr is looked up for each record: it may have been replaced (pytest, notebooks).
            formatter = self.terminal_formatter
            on_terminal = formatter is not None and getattr(sys.stderr, "isatty", bool)()
            # One write per line, so that the lines of several ranks do not mix.
            sys.stderr.write((formatter if formatter and on_terminal else self).format(record) + "\n")
            sys.stderr.flush()
        except Exception:  # standard error is closed, or a pipe that nobody reads: the engine goes on
            return

    def _shows(self, record: logging.LogRecord) -> bool:
        event = events.EVENTS.get(getattr(record, "event", ""))
        if event is None:
            return True
        if not event.on_console and isinstance(self.formatter, TextFormatter):
            return False
        # A logger at DEBUG shows all of its records, of every rank.
        if record.levelno != logging.INFO or _logger_of(record.name).isEnabledFor(logging.DEBUG):
            return True
        repeats_rank_0 = self.rank > 0 and not event.of_each_rank
        left_out = self.shows_summary and not getattr(record, "in_summary", True)
        return not repeats_rank_0 and not left_out

    def _another_handler_takes(self, record: logging.LogRecord) -> bool:
        logger: logging.Logger | None = _logger_of(record.name)
        while logger is not None:
            for handler in logger.handlers:
                if handler is not self and not isinstance(handler, (LogFileHandler, RecentEvents)):
                    return True
            logger = logger.parent if logger.propagate else None
        return False
