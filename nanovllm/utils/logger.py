"""Structured logging: each record carries a sentence for a person and named fields for a machine.

    logger = setup_logger(__name__)
    log_event(logger, logging.INFO, "kv_cache.allocated", "Allocating {num_blocks} KV cache blocks", num_blocks=512)

Both come from the one call, so they cannot disagree: the sentence is a `str.format` template over the fields,
filled only when the logger takes the record. A record has, beside what `logging` gives it, `event` (a dotted
name) and `fields` (a dict). LOGGING.md lists every event.

Who prints: the logger `nanovllm` has one console handler, a handler of last resort. It writes to standard error,
so that a program's own output stays clean, and only when no other handler takes the record; thus a user's
`logging.basicConfig(...)`, called before or after the import, decides the format and no line appears twice.

This module needs no torch; it uses torch's CUDA calls only where torch is already imported.
"""

from __future__ import annotations

import atexit
import logging
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import FrameType, TracebackType
from typing import Any, TypeVar

from nanovllm.utils import env
from nanovllm.utils.device_memory import cuda_index, describe_memory
from nanovllm.utils.log_levels import LEVELS, levels_by_logger, parse_level, parse_level_spec

__all__ = [
    "ItemList",
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
    "timed_section",
]

PACKAGE = "nanovllm"
TEXT_FORMAT = "[%(asctime)s] [%(name)s] [%(levelname)s] %(message)s"
T = TypeVar("T")


# ---- who prints, and from which level on -----------------------------------------------------------------


class ConsoleHandler(logging.Handler):
    """Writes to standard error what no other handler takes; remembers which levels the environment set."""

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(logging.Formatter(TEXT_FORMAT))
        self.level_spec: str | None = None  # as last read, so that one mistake is reported once
        self.levels_set: dict[str, int] = {}  # logger name -> level that we, not the user, gave it

    def emit(self, record: logging.LogRecord) -> None:
        if self._another_handler_takes(record):
            return
        try:
            # sys.stderr is looked up now and not kept: it may have been replaced since (pytest, notebooks).
            with _progress_bars_cleared():
                print(self.format(record), file=sys.stderr, flush=True)
        except Exception:
            self.handleError(record)

    def _another_handler_takes(self, record: logging.LogRecord) -> bool:
        logger: logging.Logger | None = logging.getLogger(record.name)
        while logger is not None:
            if any(handler is not self for handler in logger.handlers):
                return True
            logger = logger.parent if logger.propagate else None
        return False


def _progress_bars_cleared() -> AbstractContextManager[object]:
    """Takes tqdm's bars off the terminal for a line, and draws them again below it."""
    tqdm = sys.modules.get("tqdm")
    return tqdm.tqdm.external_write_mode(file=sys.stderr) if tqdm is not None else nullcontext()


# Process-wide as all of `logging` is: the counterpart of its own `lastResort`.
_CONSOLE = ConsoleHandler()


def setup_logger(name: str, level: int | str | None = None) -> logging.Logger:
    """The logger `name`, put below `nanovllm` when it is not there already; a stdlib logger in every respect.

    Its level is `level` when given, else what `NANOVLLM_LOG_LEVEL` says for this part, else INFO. A level that a
    user set with `setLevel`, before or after, stays. An unknown level is a warning that names the valid ones,
    then INFO.
    """
    if name != PACKAGE and not name.startswith(PACKAGE + "."):
        name = f"{PACKAGE}.{name}"
    logger = logging.getLogger(name)
    logger.addFilter(_add_missing_attributes)
    configure_logging()
    if level is not None:
        number, problem = parse_level(level)
        logger.setLevel(number)
        if problem:
            _warn_about_level("level", problem)
    return logger


def configure_logging() -> None:
    """Read the environment again and apply it: `setup_logger` does, and so does each new engine.

    Levels that a user set with `setLevel` stay as they are. With `NANOVLLM_CONFIGURE_LOGGING=0` what an earlier
    call did is taken back and logging is left alone.
    """
    package_logger = logging.getLogger(PACKAGE)
    if not env.configure_logging():
        package_logger.removeHandler(_CONSOLE)
        _CONSOLE.level_spec = None
        _apply_levels({})
        return
    if _CONSOLE not in package_logger.handlers:
        package_logger.addHandler(_CONSOLE)
    text = env.log_level()
    spec = parse_level_spec(text)
    existing = [name for name in list(logging.root.manager.loggerDict) if name.startswith(PACKAGE + ".")]
    _apply_levels(levels_by_logger(spec, PACKAGE, existing))
    if text != _CONSOLE.level_spec:
        _CONSOLE.level_spec = text
        problems = spec.problems + spec.unknown_parts(existing)
        if problems:
            _warn_about_level("NANOVLLM_LOG_LEVEL", "; ".join(problems))


def _apply_levels(wanted: Mapping[str, int]) -> None:
    """Give loggers the levels in `wanted`, and take back those set earlier that are no longer wanted."""
    ours = _CONSOLE.levels_set
    for name in wanted.keys() | ours.keys():
        logger = logging.getLogger(name)
        if logger.level not in (logging.NOTSET, ours.get(name)):
            continue  # the user's own setLevel, or for a while a test's
        ours.pop(name, None)
        logger.setLevel(wanted.get(name, logging.NOTSET))
        if name in wanted:
            ours[name] = wanted[name]


def _warn_about_level(source: str, problem: str) -> None:
    logger = logging.getLogger(__name__)
    message = "{source}: {problem}. Valid levels: {valid_levels}"
    valid = ", ".join(LEVELS)
    log_event(logger, logging.WARNING, "logging.level", message, source=source, problem=problem, valid_levels=valid)


def _add_missing_attributes(record: logging.LogRecord) -> bool:
    """A filter that lets all pass; a plain `logger.info(...)` gets the attributes that formatters rely on."""
    if not hasattr(record, "event"):
        record.event, record.fields = "", {}
    return True


# ---- events ----------------------------------------------------------------------------------------------


def log_event(logger: logging.Logger, level: int, event: str, message: str, **fields: Any) -> None:
    """Log one event: `message` is a `str.format` template over `fields`, filled only when the record is taken.

    Arguments are evaluated by Python before the call; guard costly ones with `logger.isEnabledFor(level)`.
    The record's file, line and function are the caller's.
    """
    if logger.isEnabledFor(level):
        _emit(logger, level, event, message.format(**fields), fields, _place(sys._getframe(1)))


def log_rule(logger: logging.Logger, character: str = "=") -> None:
    """A line of 80 characters at INFO that sets off what follows for the eye."""
    if logger.isEnabledFor(logging.INFO):
        _emit(logger, logging.INFO, "rule", character * 80, {}, _place(sys._getframe(1)))


Place = tuple[str, int, str]  # file, line, function of the code that logs


def _place(frame: FrameType) -> Place:
    return frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name


def _emit(logger: logging.Logger, level: int, event: str, sentence: str, fields: dict[str, Any], place: Place) -> None:
    filename, line, function = place
    extra = {"event": event, "fields": fields}
    logger.handle(logger.makeRecord(logger.name, level, filename, line, sentence, (), None, function, extra))


class ItemList(list[str]):
    """A list that reads `[a, b, c]` in a sentence, without quotation marks."""

    def __format__(self, format_spec: str) -> str:
        return format("[" + ", ".join(self) + "]", format_spec)


def first_items(items: Sequence[T], render: Callable[[T], str], limit: int = 16) -> ItemList:
    """The first `limit` items as text, then `… +240 more`; only those shown are rendered."""
    shown = ItemList(render(item) for item in items[:limit])
    if len(items) > limit:
        shown.append(f"… +{len(items) - limit} more")
    return shown


# ---- shapes and communication ----------------------------------------------------------------------------


def shape_of(value: Any) -> Any:
    """A tensor's or array's shape as a list of integers; of lists and mappings element by element; else the value."""
    if hasattr(value, "shape"):
        return [int(size) for size in value.shape]
    if isinstance(value, Mapping):
        return {name: shape_of(element) for name, element in value.items()}
    if isinstance(value, (list, tuple)):
        return [shape_of(element) for element in value]
    return value


def log_tensor_shapes(
    logger: logging.Logger, tensors: Mapping[str, Any], prefix: str = "", *, event: str = "tensors", **fields: Any
) -> None:
    """One DEBUG line `PREFIX tensors: input_ids=[156], positions=[156]`; a tensor that is None is left out.

    `tensors` maps names to tensors, lists of tensors or scalars. The record's field `shapes` maps the same names to
    shapes (a scalar to itself); `fields` are added to it.
    """
    if not logger.isEnabledFor(logging.DEBUG):
        return
    shapes = {name: shape_of(value) for name, value in tensors.items() if value is not None}
    listed = ", ".join(f"{name}={shape}" for name, shape in shapes.items())
    sentence = f"{prefix} tensors: {listed}" if prefix else f"tensors: {listed}"
    _emit(logger, logging.DEBUG, event, sentence, {"shapes": shapes, **fields}, _place(sys._getframe(1)))


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
    sentence = f"[Rank {rank}/{world_size}] {operation}: {what}={size}"
    if elapsed_ms is not None:
        sentence += f", elapsed={elapsed_ms:.2f}ms"
    fields = {
        "operation": operation,
        what: size,
        "rank": rank,
        "world_size": world_size,
        "elapsed_ms": elapsed_ms,
    }
    _emit(logger, logging.DEBUG, "communication", sentence, fields, _place(sys._getframe(1)))


# ---- memory ----------------------------------------------------------------------------------------------


def log_gpu_memory(
    logger: logging.Logger, prefix: str = "", device: object = 0, *, event: str = "memory", level: int = logging.INFO
) -> None:
    """One line with the device's memory in GB (10⁹ bytes; the fields are exact, in bytes). Never raises.

    `device`: an index, a name such as `"cuda:1"` or a `torch.device`. Where that is no GPU of this process, the line
    gives the resident memory of the process instead, and says so.
    """
    if not logger.isEnabledFor(level):
        return
    try:
        sentence, fields = describe_memory(device)
    except Exception as error:  # a report on memory must not end the work that it reports on
        sentence, fields = f"Memory not known: {error!r}", {}
    _emit(logger, level, event, f"{prefix} - {sentence}" if prefix else sentence, fields, _place(sys._getframe(1)))


# ---- time ------------------------------------------------------------------------------------------------


def timed_section(
    logger: logging.Logger, name: str, level: int = logging.DEBUG, device: object = None
) -> AbstractContextManager[object]:
    """Logs `[START] name` and, also when the body raises, `[END] name - Elapsed: 12.34ms`.

    `device` is where the body's work runs; None means the current CUDA device if this process uses one. On a CPU
    `Elapsed` is wall time. On CUDA it is GPU time between two events, and the line adds the wall time apart, which
    is then about the time to launch: nothing waits for the GPU here. The line itself follows when the events are
    known to have passed: at the next section, in `flush_timed_sections()`, or when Python exits.
    While a CUDA graph is being captured nothing runs on the GPU, so that there is only wall time.
    Fields: `section`, `wall_ms`, `gpu_ms` (None where not measured), `failed`.
    """
    if not logger.isEnabledFor(level):
        return _NO_SECTION
    return _TimedSection(logger, name, level, device, _place(sys._getframe(1)))


def flush_timed_sections() -> None:
    """Wait for the GPU work of sections that have ended, and log their `[END]` lines: call it where waiting is fine."""
    _log_passed_sections(wait=True)


class _TimedSection:
    """One section: measures, then waits in `_PENDING` until the GPU has passed its end."""

    def __init__(self, logger: logging.Logger, name: str, level: int, device: object, place: Place) -> None:
        self.logger, self.name, self.level, self.place = logger, name, level, place
        self.device = device
        self.start: Any = None  # torch.cuda.Event, where there is GPU time to measure
        self.end: Any = None

    def __enter__(self) -> None:
        _log_passed_sections(wait=False)
        _emit(self.logger, self.level, "section.start", f"[START] {self.name}", {"section": self.name}, self.place)
        self.start = _record_cuda_event(self.device)
        self.began = time.perf_counter()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.wall_ms = (time.perf_counter() - self.began) * 1e3
        self.failed = error is not None
        if self.start is not None:
            try:
                self.end = _record_cuda_event(self.device)
            except RuntimeError:  # CUDA itself has failed; the error of the body is the one to see
                self.end = None
        if self.end is not None:
            _PENDING.append(self)
        else:
            self.log_end(None)

    def log_end(self, gpu_ms: float | None) -> None:
        if not self.logger.isEnabledFor(self.level):
            return
        if gpu_ms is None:
            elapsed = f"{self.wall_ms:.2f}ms"
        else:
            elapsed = f"{gpu_ms:.2f}ms (GPU time; wall time {self.wall_ms:.2f}ms)"
        fields = {"section": self.name, "wall_ms": self.wall_ms, "gpu_ms": gpu_ms, "failed": self.failed}
        _emit(self.logger, self.level, "section.end", f"[END] {self.name} - Elapsed: {elapsed}", fields, self.place)


# Switched off, a section is this one object: nothing is made, measured or recorded.
_NO_SECTION = nullcontext()
# Sections that have ended on the CPU, oldest first; log output that is due, not state that anything depends on.
_PENDING: deque[_TimedSection] = deque()
atexit.register(flush_timed_sections)


def _log_passed_sections(*, wait: bool) -> None:
    """Log the end of pending sections in order, up to the first that the GPU has not passed yet (or wait for all)."""
    if not _PENDING or sys.modules["torch"].cuda.is_current_stream_capturing():  # capture forbids asking events
        return
    while _PENDING:
        section = _PENDING.popleft()
        try:
            if wait:
                section.end.synchronize()
            elif not section.end.query():
                _PENDING.appendleft(section)
                return
            gpu_ms = section.start.elapsed_time(section.end)
        except RuntimeError:  # a CUDA error is raised where the work is used, not by a log line
            gpu_ms = None
        section.log_end(gpu_ms)


def _record_cuda_event(device: object) -> Any:
    """A timing event recorded on the current stream of `device`; None where there is no GPU time to be had."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized() or torch.cuda.is_current_stream_capturing():
        return None
    index = torch.cuda.current_device() if device is None else cuda_index(device)
    if index is None:
        return None
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(index))
    return event
