"""Timed sections: how long a block of code took on the host and on the GPU, without waiting for the GPU."""

from __future__ import annotations

import atexit
import logging
import sys
import threading
import time
from collections import deque
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType
from typing import Any

from nanovllm.logs import events
from nanovllm.logs.records import Place, place_of
from nanovllm.utils.device_memory import cuda_index

__all__ = ["flush_timed_sections", "timed_section"]


def timed_section(
    logger: logging.Logger, name: str, level: int = logging.DEBUG, device: object = None, **fields: Any
) -> AbstractContextManager[object]:
    """Logs `[START] name` and `[END] name - Elapsed: 12.34ms`, the latter also if the body raises.

    `device` is where the body's work runs; None is the current CUDA device if this process uses one. On a CPU `Elapsed`
    is wall time. On a GPU it is GPU time between two CUDA events, and the line also gives the wall time, which is about
    the time to launch the work: nothing waits for the GPU here. The `[END]` line is logged when both events are known
    to be complete: at the next section, in `flush_timed_sections()`, or when Python exits. While a CUDA graph is being
    captured nothing runs on the GPU, so there is only wall time.

    Fields: `section`, `wall_ms`, `gpu_ms` (None if not measured), `failed`, and `fields` on both lines.
    """
    if not logger.isEnabledFor(level):
        return _NO_SECTION
    return _TimedSection(logger, level, device, {"section": name, **fields}, place_of(sys._getframe(1)))


def flush_timed_sections() -> None:
    """Waits for the GPU work of ended sections and logs their `[END]` lines. Call it where waiting is fine."""
    _log_finished_sections(wait=True)


class _TimedSection:
    """One section. After its body it is in `_PENDING` until the GPU has finished its work."""

    def __init__(
        self, logger: logging.Logger, level: int, device: object, fields: dict[str, Any], place: Place
    ) -> None:
        self.logger, self.level, self.device, self.fields, self.place = logger, level, device, fields, place
        self.start: Any = None  # torch.cuda.Event, if there is GPU time to measure
        self.end: Any = None

    def __enter__(self) -> None:
        _log_finished_sections(wait=False)
        events.section_start.emit(self.logger, self.level, self.fields, self.place)
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
            except RuntimeError:  # CUDA itself has failed: the error of the body matters
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
        fields = {**self.fields, "wall_ms": self.wall_ms, "gpu_ms": gpu_ms, "failed": self.failed}
        events.section_end.emit(self.logger, self.level, fields, self.place, elapsed=elapsed)


# A section whose level is off: nothing is created, measured or recorded.
_NO_SECTION = nullcontext()
# Sections that have ended on the host, oldest first: pending log output, on which nothing else depends.
_PENDING: deque[_TimedSection] = deque()
_LOGGING_ENDS = (
    threading.RLock()
)  # held by the thread that logs them, so that their order stays; a handler may time, too
atexit.register(flush_timed_sections)


def _log_finished_sections(*, wait: bool) -> None:
    """Logs the ends of pending sections in order: all with `wait`, else up to the first that the GPU still runs."""
    if not _PENDING or sys.modules["torch"].cuda.is_current_stream_capturing():  # a capture forbids querying events
        return
    if not _LOGGING_ENDS.acquire(blocking=wait):  # another thread logs them
        return
    try:
        while _PENDING:
            section = _PENDING[0]
            try:
                if wait:
                    section.end.synchronize()
                elif not section.end.query():
                    return
                gpu_ms = section.start.elapsed_time(section.end)
            except RuntimeError:  # a log line does not raise CUDA errors: the code that uses the work does
                gpu_ms = None
            _PENDING.popleft()
            section.log_end(gpu_ms)
    finally:
        _LOGGING_ENDS.release()


def _record_cuda_event(device: object) -> Any:
    """Records and returns a timing event on the current stream of `device`; None if GPU time cannot be measured."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized() or torch.cuda.is_current_stream_capturing():
        return None
    index = torch.cuda.current_device() if device is None else cuda_index(device)
    if index is None:
        return None
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(index))
    return event
