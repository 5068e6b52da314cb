"""FunctionTrace: every Python call inside nanovllm, written to a file as it happens. `NANOVLLM_TRACE_FUNCTION=1`.

    5012.340117 MainThread      call      2  engine/scheduler.py:112 schedule
    5012.340131 MainThread      call      3    engine/scheduler.py:157 _schedule_decode
    5012.340140 MainThread      return    3    engine/scheduler.py:157 _schedule_decode

It shows where a process hangs (in the last calls without a return) and how a request is processed. Columns: seconds of
the monotonic clock, which is `mono` in JSON logs; thread; call or return; depth within nanovllm; file, line and
function. Each line is written before the call continues, so that a killed process loses none. This costs some
microseconds per call, so do not measure time with it.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from datetime import datetime, timezone
from pathlib import Path
from types import FrameType

from nanovllm.config import EngineConfig
from nanovllm.engine.observer import EngineObserver
from nanovllm.errors import InvalidArgumentError
from nanovllm.logs import events
from nanovllm.logs.lost_lines import LostLines
from nanovllm.utils import env
from nanovllm.utils.logger import setup_logger

__all__ = ["FunctionTrace", "start_function_trace"]

logger = setup_logger(__name__)

_PACKAGE = str(Path(__file__).parents[1]) + os.sep


def start_function_trace(rank: int) -> FunctionTrace | None:
    """Starts a trace if NANOVLLM_TRACE_FUNCTION is set and none runs in this process yet.

    Raises InvalidArgumentError when the file cannot be written or another profiler (cProfile, …) is running.
    """
    path = env.trace_function()
    running = sys.getprofile()
    if path is None or isinstance(getattr(running, "__self__", None), FunctionTrace):
        return None
    if running is not None:
        hint = f"Another profiler runs: {running!r}. Unset the variable, or run without that profiler."
        raise InvalidArgumentError("NANOVLLM_TRACE_FUNCTION", str(path), "0 beside a profiler", hint)
    if rank:
        name = path.name.replace("rank0", f"rank{rank}") if "rank0" in path.name else f"{path.name}.rank{rank}"
        path = path.with_name(name)
    try:
        trace = FunctionTrace(path, rank)
    except OSError as error:
        allowed = f"0, 1, or the path of a file that can be written ({error.strerror})"
        raise InvalidArgumentError("NANOVLLM_TRACE_FUNCTION", str(path), allowed) from None
    if rank:
        trace.log_path()  # rank 0 does it when its engine starts, below the engine's first line
    return trace


class FunctionTrace(EngineObserver):
    """Traces this thread and all threads started later, until `stop`. Appends to an existing file.

    A line that the disk does not take is lost, and ends the trace with a warning.
    """

    def __init__(self, path: Path, rank: int) -> None:
        self._path, self._rank = path.absolute(), rank
        self._lock = threading.RLock()  # a line is not written to a file that `stop` has closed
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        self._thread = threading.local()  # .depth: calls within nanovllm that have not returned
        started = datetime.now(timezone.utc).isoformat(timespec="microseconds")
        self._write(f"# nanovllm function trace, pid {os.getpid()}, rank {rank}, started {started}\n")
        threading.setprofile(self._on_event)
        sys.setprofile(self._on_event)

    def log_path(self) -> None:
        """Logs where the file is."""
        events.function_trace.log(logger, rank=self._rank, path=str(self._path))

    def engine_starting(self, config: EngineConfig) -> None:
        self.log_path()

    def engine_start_failed(self, error: BaseException) -> None:
        self.stop()

    def engine_exited(self) -> None:
        self.stop()

    def stop(self) -> None:
        """Ends the trace; other threads stop at their next call. Calling it again does nothing."""
        with self._lock:
            if self._file < 0:
                return
            sys.setprofile(None)
            threading.setprofile(None)
            file, self._file = self._file, -1
            os.close(file)

    def _on_event(self, frame: FrameType, event: str, _argument: object) -> None:
        code = frame.f_code
        if event not in ("call", "return") or not code.co_filename.startswith(_PACKAGE):
            return
        if code.co_filename == __file__:
            return
        if self._file < 0:
            sys.setprofile(None)  # for this thread
            return
        depth = getattr(self._thread, "depth", 0)
        if event == "call":
            depth += 1
        place = f"{code.co_filename[len(_PACKAGE) :]}:{code.co_firstlineno} {code.co_name}"
        thread, now = threading.current_thread().name, time.monotonic()
        self._write(f"{now:.6f} {thread:<15} {event:<6} {depth:>4}  {'  ' * (depth - 1)}{place}\n")
        # Frames that were open when the trace began return without a call; their depth is the outermost.
        self._thread.depth = depth if event == "call" else max(depth - 1, 0)

    def _write(self, line: str) -> None:
        with self._lock:
            if self._file < 0:
                return
            try:
                os.write(self._file, line.encode("utf-8", "backslashreplace"))
                return
            except OSError as error:
                self.stop()
                lost = LostLines(self._path)
                lost.add(error)
        lost.warn()
