"""FunctionTrace: every Python call inside nanovllm, written to a file as it happens. `NANOVLLM_TRACE_FUNCTION=1`.

    5012.340117 MainThread      call      2  engine/scheduler.py:112 schedule
    5012.340131 MainThread      call      3    engine/scheduler.py:157 _schedule_decode
    5012.340140 MainThread      return    3    engine/scheduler.py:157 _schedule_decode

For a process that hangs (the last calls without a return are where it stands) and for learning the way of a
request. Columns: seconds of the monotonic clock, which is the `mono` of JSON logs; thread; call or return; depth within
nanovllm; file, line and function. Each line goes to the operating system before the call goes on, so that killing the
process loses nothing. That costs some microseconds a call: not for measuring.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from datetime import datetime, timezone
from pathlib import Path
from types import FrameType

from nanovllm.engine.observer import EngineObserver
from nanovllm.errors import InvalidArgumentError
from nanovllm.utils import env

__all__ = ["FunctionTrace", "start_function_trace"]

_PACKAGE = str(Path(__file__).parents[1]) + os.sep


def start_function_trace(rank: int) -> FunctionTrace | None:
    """Starts a trace if the environment asks for one and none runs in this process yet.

    Raises InvalidArgumentError when the file can not be written, or another profiler (cProfile …) is in the way.
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
        return FunctionTrace(path, rank)
    except OSError as error:
        allowed = f"0, 1, or the path of a file that can be written ({error.strerror})"
        raise InvalidArgumentError("NANOVLLM_TRACE_FUNCTION", str(path), allowed) from None


class FunctionTrace(EngineObserver):
    """Traces this thread and all that start from now on, until `stop`. A file that is there is continued."""

    def __init__(self, path: Path, rank: int) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        self._thread = threading.local()  # .depth: calls within nanovllm that have not returned
        started = datetime.now(timezone.utc).isoformat(timespec="microseconds")
        self._write(f"# nanovllm function trace, pid {os.getpid()}, rank {rank}, started {started}\n")
        threading.setprofile(self._on_event)
        sys.setprofile(self._on_event)

    def engine_exited(self) -> None:
        self.stop()

    def stop(self) -> None:
        """Ends the trace; calling it again does nothing. Threads that it runs in end theirs at their next call."""
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
            sys.setprofile(None)  # of this thread
            return
        depth = getattr(self._thread, "depth", 0)
        if event == "call":
            depth += 1
        place = f"{code.co_filename[len(_PACKAGE) :]}:{code.co_firstlineno} {code.co_name}"
        thread, now = threading.current_thread().name, time.monotonic()
        self._write(f"{now:.6f} {thread:<15} {event:<6} {depth:>4}  {'  ' * (depth - 1)}{place}\n")
        # The frames that the trace began in return without a call: their depth is that of the outermost.
        self._thread.depth = depth if event == "call" else max(depth - 1, 0)

    def _write(self, line: str) -> None:
        os.write(self._file, line.encode())
