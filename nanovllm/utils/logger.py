"""Structured logging: each record carries a sentence for a person and named fields for a machine.

    logger = setup_logger(__name__)
    log_event(logger, logging.INFO, "kv_cache.allocated", "Allocating {num_blocks} KV cache blocks", num_blocks=512)

This is the face: `log_records.py` makes records, `events.py` declares those of nanovllm, `log_handlers.py` and
`log_formats.py` write them, `timed_sections.py` takes times.

Who prints: the logger `nanovllm` has one console handler, a handler of last resort. It writes to standard error,
so that a program's own output stays clean, and only when no other handler takes the record; thus a user's
`logging.basicConfig(...)`, called before or after the import, decides the format and no line appears twice. A file
asked for with `NANOVLLM_LOG_FILE` is always written. There is no thread in the background, and a record is written
when the call that logs it returns: what a debugger shows is where the program stands.

This module needs no torch; it uses torch's CUDA calls only where torch is already imported.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nanovllm.logs import events
from nanovllm.logs.formats import JsonFormatter, TextFormatter
from nanovllm.logs.handlers import ConsoleHandler, LogFileHandler, formatter_of
from nanovllm.logs.levels import LEVELS, levels_by_logger, parse_level, parse_level_spec
from nanovllm.logs.records import (
    Event,
    ItemList,
    Listing,
    add_missing_attributes,
    first_items,
    log_event,
    place_of,
)
from nanovllm.logs.timed_sections import flush_timed_sections, timed_section
from nanovllm.utils import env
from nanovllm.utils.device_memory import describe_memory

__all__ = [
    "Event",
    "ItemList",
    "JsonFormatter",
    "Listing",
    "TextFormatter",
    "configure_logging",
    "first_items",
    "flush_timed_sections",
    "log_communication",
    "log_event",
    "log_gpu_memory",
    "log_rule",
    "log_tensor_shapes",
    "setup_logger",
    "shape_of",
    "shapes_of",
    "timed_section",
]

PACKAGE = "nanovllm"


# ---- who prints, and from which level on -----------------------------------------------------------------


@dataclass
class _Configuration:
    """What was done to `logging` so far."""

    console: ConsoleHandler = field(default_factory=ConsoleHandler)
    file: LogFileHandler | None = None
    file_of: tuple[Path | None, int] = (None, 0)  # path as the environment has it, rank
    rank: int = 0
    level_spec: str | None = None  # as last read, so that one mistake is reported once
    levels_set: dict[str, int] = field(default_factory=dict)  # logger name -> level that we, not the user, gave it


# Process-wide as all of `logging` is: the console handler is the counterpart of its own `lastResort`.
_STATE = _Configuration()


def setup_logger(name: str, level: int | str | None = None) -> logging.Logger:
    """The logger `name`, put below `nanovllm` when it is not there already; a stdlib logger in every respect.

    Its level is `level` when given, else what `NANOVLLM_LOG_LEVEL` says for this part, else INFO. A level that a
    user set with `setLevel`, before or after, stays. An unknown level is a warning that names the valid ones,
    then INFO.
    """
    if name != PACKAGE and not name.startswith(PACKAGE + "."):
        name = f"{PACKAGE}.{name}"
    logger = logging.getLogger(name)
    logger.addFilter(add_missing_attributes)
    configure_logging()
    if level is not None:
        number, problem = parse_level(level)
        logger.setLevel(number)
        if problem:
            _warn_about_level("level", problem)
    return logger


def configure_logging(rank: int | None = None) -> None:
    """Read the environment again and apply it: `setup_logger` does, and so does each new engine.

    Levels that a user set with `setLevel` stay as they are. With `NANOVLLM_CONFIGURE_LOGGING=0` what an earlier
    call did is taken back and logging is left alone. `rank`: of this process, from now on; records and the name of
    the log file have it. Raises InvalidArgumentError for a variable whose value is not allowed.
    """
    _STATE.rank = _STATE.rank if rank is None else rank
    package_logger = logging.getLogger(PACKAGE)
    if not env.configure_logging():
        package_logger.removeHandler(_STATE.console)
        _open_file(None)
        _STATE.level_spec = None
        _apply_levels({})
        return
    log_format, console = env.log_format(), _STATE.console
    console.rank = _STATE.rank
    console.setFormatter(formatter_of(log_format, _STATE.rank))
    console.terminal_formatter = None if env.no_color() else formatter_of(log_format, _STATE.rank, colour=True)
    if console not in package_logger.handlers:
        package_logger.addHandler(console)
    _open_file(env.log_file())
    if _STATE.file is not None:
        _STATE.file.setFormatter(formatter_of(log_format, _STATE.rank))
    text = env.log_level()
    spec = parse_level_spec(text)
    existing = [name for name in list(logging.root.manager.loggerDict) if name.startswith(PACKAGE + ".")]
    _apply_levels(levels_by_logger(spec, PACKAGE, existing))
    if text != _STATE.level_spec:
        _STATE.level_spec = text
        problems = spec.problems + spec.unknown_parts(existing)
        if problems:
            _warn_about_level("NANOVLLM_LOG_LEVEL", "; ".join(problems))


def _open_file(path: Path | None) -> None:
    """Makes `path`, of this rank, the file that records go to; None for no file."""
    if _STATE.file_of == (path, _STATE.rank):
        return
    package_logger = logging.getLogger(PACKAGE)
    opened = None if path is None else LogFileHandler(path, _STATE.rank)
    if _STATE.file is not None:
        package_logger.removeHandler(_STATE.file)
        _STATE.file.close()
    if opened is not None:
        package_logger.addHandler(opened)
    _STATE.file, _STATE.file_of = opened, (path, _STATE.rank)


def _apply_levels(wanted: Mapping[str, int]) -> None:
    """Give loggers the levels in `wanted`, and take back those set earlier that are no longer wanted."""
    ours = _STATE.levels_set
    for name in wanted.keys() | ours.keys():
        logger = logging.getLogger(name)
        if logger.level not in (logging.NOTSET, ours.get(name)):
            continue  # the user's own setLevel, or for a while a test's
        ours.pop(name, None)
        logger.setLevel(wanted.get(name, logging.NOTSET))
        if name in wanted:
            ours[name] = wanted[name]


def _warn_about_level(source: str, problem: str) -> None:
    valid = ", ".join(LEVELS)
    events.logging_level.log(logging.getLogger(__name__), source=source, problem=problem, valid_levels=valid)


# ---- shapes and communication ----------------------------------------------------------------------------


def log_rule(logger: logging.Logger, character: str = "=") -> None:
    """A line of 80 characters at INFO that sets off what follows for the eye."""
    if logger.isEnabledFor(logging.INFO):
        events.rule.emit(logger, logging.INFO, {}, place_of(sys._getframe(1)), line=character * 80)


def shape_of(value: Any) -> Any:
    """A tensor's or array's shape as a list of integers; of lists and mappings element by element; else the value."""
    if hasattr(value, "shape"):
        return [int(size) for size in value.shape]
    if isinstance(value, Mapping):
        return {name: shape_of(element) for name, element in value.items()}
    if isinstance(value, (list, tuple)):
        return [shape_of(element) for element in value]
    return value


def shapes_of(tensors: Mapping[str, Any]) -> Listing:
    """Shapes (of scalars themselves) by name, which read `input_ids=[156], positions=[156]`; None is left out."""
    return Listing({name: shape_of(value) for name, value in tensors.items() if value is not None})


def log_tensor_shapes(logger: logging.Logger, tensors: Mapping[str, Any], prefix: str = "") -> None:
    """One DEBUG line `PREFIX tensors: input_ids=[156], positions=[156]`; a tensor that is None is left out.

    `tensors` maps names to tensors, lists of tensors or scalars; the record's field `shapes` maps them to shapes.
    """
    if logger.isEnabledFor(logging.DEBUG):
        fields, prefix = {"shapes": shapes_of(tensors)}, f"{prefix} " if prefix else ""
        events.tensors.emit(logger, logging.DEBUG, fields, place_of(sys._getframe(1)), prefix=prefix)


def log_communication(
    logger: logging.Logger,
    operation: str,
    tensor_shapes: Any,
    rank: int,
    world_size: int,
    *,
    elapsed_ms: float | None = None,
) -> None:
    """One DEBUG line for a collective or a shared-memory message.

    `tensor_shapes`: tensors or their shapes, in a list or by name, or the message's size in bytes as an integer.
    """
    if not logger.isEnabledFor(logging.DEBUG):
        return
    what = "bytes" if isinstance(tensor_shapes, int) else "shapes"
    size = shape_of(tensor_shapes)
    fields = {"operation": operation, what: size, "rank": rank, "world_size": world_size, "elapsed_ms": elapsed_ms}
    details = f"{what}={size}" if elapsed_ms is None else f"{what}={size}, elapsed={elapsed_ms:.2f}ms"
    events.communication.emit(logger, logging.DEBUG, fields, place_of(sys._getframe(1)), details=details)


# ---- memory ----------------------------------------------------------------------------------------------


def log_gpu_memory(
    logger: logging.Logger,
    prefix: str = "",
    device: object = 0,
    *,
    event: Event = events.memory,
    level: int = logging.INFO,
) -> None:
    """One line with the device's memory in GB (10⁹ bytes; the fields are exact, in bytes). Never raises.

    `device`: an index, a name such as `"cuda:1"` or a `torch.device`. Where that is no GPU of this process, the line
    gives the resident memory of the process instead, and says so. `event`: one of nanovllm's own, which brings its
    own prefix.
    """
    if not logger.isEnabledFor(level):
        return
    try:
        sentence, fields = describe_memory(device)
    except Exception as error:  # a report on memory must not end the work that it reports on
        sentence, fields = f"Memory not known: {error!r}", {}
    prefix = f"{prefix} - " if prefix else ""
    event.emit(logger, level, fields, place_of(sys._getframe(1)), prefix=prefix, memory=sentence)
