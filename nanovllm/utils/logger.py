"""Structured logging: each record has a sentence for people and named fields for programs.

    logger = setup_logger(__name__)
    log_event(logger, logging.INFO, "kv_cache.allocated", "Allocating {num_blocks} KV cache blocks", num_blocks=512)

This is the module that the rest of the package uses; the parts are in `nanovllm.logs`. There is no background thread: a
record is written when the call that logs it returns, so that in a debugger the log ends where the program is. Nothing
here imports torch; its CUDA calls are used only if torch is already imported.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Mapping
from typing import Any

from nanovllm.logs import events
from nanovllm.logs.configuration import PACKAGE, configure_logging, warn_about_level
from nanovllm.logs.formats import JsonFormatter, TextFormatter
from nanovllm.logs.levels import parse_level
from nanovllm.logs.records import (
    MAX_ITEMS,
    Event,
    ItemList,
    Listing,
    add_missing_attributes,
    first_items,
    log_event,
    place_of,
)
from nanovllm.logs.timed_sections import flush_timed_sections, timed_section
from nanovllm.utils.device_memory import describe_memory

__all__ = [
    "MAX_ITEMS",
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


def setup_logger(name: str, level: int | str | None = None) -> logging.Logger:
    """Returns the standard library's logger `name`, below `nanovllm` if the name is not there already.

    Its level is `level` if given, otherwise the level in `NANOVLLM_LOG_LEVEL` for this part, otherwise INFO. A level
    that a user sets with `setLevel`, before or after, is kept. An unknown level gives a warning that names the valid
    ones, and counts as INFO.
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
            warn_about_level("level", problem)
    return logger


def log_rule(logger: logging.Logger, character: str = "=", *, in_summary: bool = True) -> None:
    """Logs a line of 80 characters at INFO, to set off the lines that follow. On a terminal it has the rest's width."""
    if logger.isEnabledFor(logging.INFO):
        events.rule.emit(logger, logging.INFO, {}, place_of(sys._getframe(1)), in_summary, line=character * 80)


def shape_of(value: Any) -> Any:
    """Returns the shape of a tensor or array as a list; maps lists and mappings element by element; else the value."""
    if hasattr(value, "shape"):
        return [int(size) for size in value.shape]
    if isinstance(value, Mapping):
        return {name: shape_of(element) for name, element in value.items()}
    if isinstance(value, (list, tuple)):
        return [shape_of(element) for element in value]
    return value


def shapes_of(tensors: Mapping[str, Any]) -> Listing:
    """Returns shapes by name, formatted as `input_ids=[156], positions=[156]`. Scalars stay, None is left out."""
    return Listing({name: shape_of(value) for name, value in tensors.items() if value is not None})


def log_tensor_shapes(logger: logging.Logger, tensors: Mapping[str, Any], prefix: str = "") -> None:
    """Logs a DEBUG line `PREFIX tensors: input_ids=[156], positions=[156]`. A tensor that is None is left out.

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
    wait_ms: float | None = None,
    started: float | None = None,
    step: int | None = None,
) -> None:
    """Logs a DEBUG line for a collective or a shared-memory message.

    `tensor_shapes`: tensors or their shapes, in a list or by name, or the size of the message in bytes. `wait_ms`: the
    part of `elapsed_ms` in which this rank waited for another. `started`: when this rank began, in seconds of
    `time.monotonic`, which all processes of a machine share; `elapsed_ms` is then the time since. `step`: the step that
    it belongs to.
    """
    if not logger.isEnabledFor(logging.DEBUG):
        return
    if started is not None and elapsed_ms is None:
        elapsed_ms = (time.monotonic() - started) * 1e3
    what = "bytes" if isinstance(tensor_shapes, int) else "shapes"
    size = shape_of(tensor_shapes)
    fields: dict[str, Any] = {
        "operation": operation,
        what: size,
        "rank": rank,
        "world_size": world_size,
        "elapsed_ms": elapsed_ms,
    }
    known = {"wait_ms": wait_ms, "started": started, "step": step}
    fields |= {name: value for name, value in known.items() if value is not None}
    details = f"{what}={size}" if elapsed_ms is None else f"{what}={size}, elapsed={elapsed_ms:.2f}ms"
    if elapsed_ms is not None and wait_ms is not None:
        fields["move_ms"] = elapsed_ms - wait_ms
        details += f", of which waiting={wait_ms:.2f}ms"
    events.communication.emit(logger, logging.DEBUG, fields, place_of(sys._getframe(1)), details=details)


def log_gpu_memory(
    logger: logging.Logger,
    prefix: str = "",
    device: object = 0,
    *,
    event: Event = events.memory,
    level: int = logging.INFO,
) -> None:
    """Logs a line with the memory of a device in GB (10⁹ bytes; the fields are exact, in bytes). Never raises.

    `device`: an index, a name such as `"cuda:1"` or a `torch.device`. If it is not a GPU that this process can use, the
    line has the resident memory of the process. `event`: an event of nanovllm with a prefix of its own.
    """
    if not logger.isEnabledFor(level):
        return
    try:
        sentence, fields = describe_memory(device)
    except Exception as error:  # a report must not end the work that it is about
        sentence, fields = f"Memory not known: {error!r}", {}
    prefix = f"{prefix} - " if prefix else ""
    event.emit(logger, level, fields, place_of(sys._getframe(1)), prefix=prefix, memory=sentence)
