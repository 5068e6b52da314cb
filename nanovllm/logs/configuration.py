"""Applies the environment's logging settings to the logger `nanovllm`.

The logger `nanovllm` has one console handler, a handler of last resort. It writes to standard error, so that a
program's own output stays clean, and only records that no other handler takes. So a user's `logging.basicConfig(...)`,
called before or after the import, decides the format, and no line appears twice. `NANOVLLM_LOG_FILE` names a file that
always gets every record.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from nanovllm.logs import events
from nanovllm.logs.formats import TerminalFormatter
from nanovllm.logs.handlers import ConsoleHandler, LogFileHandler, formatter_of
from nanovllm.logs.levels import LEVELS, levels_by_logger, parse_level_spec
from nanovllm.utils import env

__all__ = ["PACKAGE", "attached", "configure_logging", "forward_records", "warn_about_level"]

PACKAGE = "nanovllm"


@dataclass
class _Configuration:
    """What nanovllm has changed in `logging` so far."""

    console: ConsoleHandler = field(default_factory=ConsoleHandler)
    file: LogFileHandler | None = None
    file_of: tuple[Path | None, int] = (None, 0)  # path as in the environment, rank
    rank: int = 0
    forwards: bool = False  # whether another process writes the log
    level_spec: str | None = None  # as last read, so that a mistake is reported once
    levels_set: dict[str, int] = field(default_factory=dict)  # logger name -> the level that nanovllm set
    unknown_variables: set[str] = field(default_factory=set)  # of the environment, each reported once


# Process-wide as all of `logging` is: the console handler is the counterpart of its own `lastResort`.
_STATE = _Configuration()


def configure_logging(rank: int | None = None) -> None:
    """Reads the environment and applies it. `setup_logger` and each new engine call this.

    Levels that a user set with `setLevel` are kept. Loggers that `logging.config` has disabled are enabled again. With
    `NANOVLLM_CONFIGURE_LOGGING=0` the changes of earlier calls are undone, and logging is left alone. `rank` is the
    rank of this process from now on, for records and the name of the log file. Raises InvalidArgumentError for a
    variable whose value is not allowed.
    """
    _STATE.rank = _STATE.rank if rank is None else rank
    package_logger = logging.getLogger(PACKAGE)
    if not env.configure_logging():
        package_logger.removeHandler(_STATE.console)
        _open_file(None)
        _STATE.level_spec = None
        _apply_levels({})
        _warn_about_variables()
        return
    log_format, console = env.log_format(), _STATE.console
    console.rank = _STATE.rank
    console.setFormatter(formatter_of(log_format, _STATE.rank))
    console.terminal_formatter = TerminalFormatter(colour=not env.no_color()) if log_format == "text" else None
    console.shows_summary = log_format == "text" and not env.log_level.is_set
    if console not in package_logger.handlers and not _STATE.forwards:
        package_logger.addHandler(console)
    _open_file(None if _STATE.forwards else env.log_file())
    if _STATE.file is not None:
        file_format = env.log_file_format() or log_format
        shared = console.formatter if file_format == log_format else None
        _STATE.file.setFormatter(shared or formatter_of(file_format, _STATE.rank))
    existing = [name for name in list(logging.root.manager.loggerDict) if name.startswith(PACKAGE + ".")]
    for name in (PACKAGE, *existing):
        logging.getLogger(name).disabled = False
    text = env.log_level() if env.log_level.is_set else ""
    # basicConfig(level=DEBUG) asks for more than INFO, its default level WARNING does not ask for less.
    spec = parse_level_spec(text, unset=min(logging.INFO, logging.root.level))
    _apply_levels(levels_by_logger(spec, PACKAGE, existing))
    _warn_about_variables()
    if text != _STATE.level_spec:
        _STATE.level_spec = text
        problems = spec.problems + spec.unknown_parts(existing)
        if problems and not _STATE.forwards:
            warn_about_level("NANOVLLM_LOG_LEVEL", "; ".join(problems))


def forward_records() -> None:
    """Lets another process, with the same environment, write the log. A handler of this process sends it the records.

    Is called before the rest of nanovllm is imported.
    """
    _STATE.forwards = True


@contextmanager
def attached(handler: logging.Handler) -> Iterator[None]:
    """Gives a handler the package's records while the block runs."""
    package_logger = logging.getLogger(PACKAGE)
    package_logger.addHandler(handler)
    try:
        yield
    finally:
        package_logger.removeHandler(handler)


def _open_file(path: Path | None) -> None:
    """Makes `path` the log file of this rank; None: no file."""
    package_logger = logging.getLogger(PACKAGE)
    if _STATE.file_of == (path, _STATE.rank):
        if _STATE.file is not None:
            package_logger.addHandler(_STATE.file)  # `logging.config` may have removed it
        return
    opened = None if path is None else LogFileHandler(path, _STATE.rank)
    if _STATE.file is not None:
        package_logger.removeHandler(_STATE.file)
        _STATE.file.close()
    if opened is not None:
        package_logger.addHandler(opened)
    _STATE.file, _STATE.file_of = opened, (path, _STATE.rank)


def _apply_levels(wanted: Mapping[str, int]) -> None:
    """Gives loggers the levels in `wanted`, and resets levels set earlier that are no longer wanted."""
    levels_set = _STATE.levels_set
    for name in wanted.keys() | levels_set.keys():
        logger = logging.getLogger(name)
        if logger.level not in (logging.NOTSET, levels_set.get(name)):
            continue  # set by the user, or temporarily by a test
        levels_set.pop(name, None)
        logger.setLevel(wanted.get(name, logging.NOTSET))
        if name in wanted:
            levels_set[name] = wanted[name]


def _warn_about_variables() -> None:
    """Logs each variable NANOVLLM_… that nanovllm does not read, once."""
    process = sys.modules.get("multiprocessing.process")
    if _STATE.forwards or (process is not None and process.current_process().name != "MainProcess"):
        return  # the process that started this one has the same environment, and reports it
    for name in env.unknown_variables():
        if name not in _STATE.unknown_variables:
            _STATE.unknown_variables.add(name)
            nearest = env.nearest_variable(name)
            hint = f" Did you mean {nearest}?" if nearest else ""
            events.unknown_variable.log(logging.getLogger(__name__), variable=name, hint=hint)


def warn_about_level(source: str, problem: str) -> None:
    """Logs a mistake in a level, with the valid levels."""
    valid = ", ".join(LEVELS)
    events.logging_level.log(logging.getLogger(__name__), source=source, problem=problem, valid_levels=valid)
