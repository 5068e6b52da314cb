"""TraceFile: writes Chrome's trace format, which https://ui.perfetto.dev opens.

It has slices, moments and arrows on named tracks, and counters.

The file is a JSON array of events, each on a line of its own, and every write leaves it complete. SIGKILL may cut a
write short: viewers open such a file up to the last whole event, as the format's closing bracket is optional.
Nothing here raises while the engine runs: what a full disk does not take is lost, and so is what exceeds the limit.
Format: Google, "Trace Event Format", 2016, https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

from nanovllm.errors import InvalidArgumentError
from nanovllm.logs import events
from nanovllm.logs.formats import strict_json
from nanovllm.logs.lost_lines import LostLines
from nanovllm.utils import env
from nanovllm.utils.logger import setup_logger

__all__ = ["TraceFile"]

logger = setup_logger(__name__)

_FLUSH_EVENTS = 500  # events kept in memory before they are written; a step of the engine makes about ten
_END = b"\n]\n"
# Files that this process has written: a second engine takes another name rather than overwrite the first one's trace.
_written: set[Path] = set()


class TraceFile:
    """Writes events to a file. Times are seconds of one monotonic clock.

    max_mb: the size at which it ends; None: `NANOVLLM_TRACE_MAX_MB`. Raises InvalidArgumentError if `path` cannot be
    written.
    """

    def __init__(self, path: Path, max_mb: int | None = None) -> None:
        path = path.absolute()
        self.path, number = path, 1
        while self.path in _written:
            number += 1
            self.path = path.with_name(f"{path.stem}.{number}{path.suffix}")
        try:
            self._file = self.path.open("wb", buffering=0)  # one write is one system call
        except OSError as error:
            raise InvalidArgumentError(
                "NANOVLLM_TRACE_FILE", str(path), f"the path of a file that can be written ({error})"
            ) from None
        _written.add(self.path)
        self._events: list[dict[str, Any]] = []
        self._size = 0  # bytes of the file without the closing bracket
        self._max_mb = env.trace_max_mb() if max_mb is None else max_mb
        self._lost = LostLines(self.path)
        self._is_full = False
        self._append(b"[\n", 0)

    def name_track(self, process: int, thread: int, process_name: str, thread_name: str) -> None:
        """Names a track, which is a thread of a process."""
        for kind, name in (("process_name", process_name), ("thread_name", thread_name)):
            self._add({"ph": "M", "name": kind, "pid": process, "tid": thread, "args": {"name": name}})
        self._add(
            {"ph": "M", "name": "thread_sort_index", "pid": process, "tid": thread, "args": {"sort_index": thread}}
        )

    def slice(self, process: int, thread: int, name: str, start: float, end: float, **arguments: Any) -> None:
        """Adds a slice to a track. Slices of a track must not overlap, unless one contains the other."""
        begin = _microseconds(start)
        event = {"ph": "X", "name": name, "pid": process, "tid": thread, "ts": begin}
        event["dur"] = round(max(_microseconds(end) - begin, 0.0), 3)
        self._add(event | ({"args": arguments} if arguments else {}))

    def instant(self, process: int, thread: int, name: str, time: float, **arguments: Any) -> None:
        """Adds a moment to a track."""
        self._add(
            {"ph": "i", "s": "t", "name": name, "pid": process, "tid": thread, "ts": _microseconds(time)}
            | ({"args": arguments} if arguments else {})
        )

    def arrow(self, number: int, name: str, start: tuple[int, int], end: tuple[int, int], time: float) -> None:
        """Adds an arrow between the slices that two tracks, each a process and a thread, have at `time`."""
        for kind, (process, thread) in (("s", start), ("f", end)):
            event = {"ph": kind, "cat": "flow", "id": number, "name": name, "pid": process, "tid": thread}
            self._add({**event, "ts": _microseconds(time)} | ({"bp": "e"} if kind == "f" else {}))

    def counter(self, process: int, name: str, time: float, **values: float) -> None:
        """Adds the values of a counter at `time`."""
        self._add({"ph": "C", "name": name, "pid": process, "tid": 0, "ts": _microseconds(time), "args": values})

    def flush(self) -> None:
        """Writes the events kept so far."""
        if not self._events or self._file.closed or self._is_full:
            self._events.clear()
            return
        lines = [strict_json(event, compact=True) for event in self._events]
        self._events.clear()
        text = (",\n" if self._size > 2 else "").encode() + ",\n".join(lines).encode()
        if self._size + len(text) > self._max_mb * 10**6:
            self._is_full = True
            events.trace_full.log(logger, path=str(self.path), megabytes=self._max_mb)
        else:
            self._append(text, len(lines))

    def close(self) -> None:
        """Closes the file; later events are dropped. Calling it again does nothing."""
        self.flush()
        self._file.close()
        self._events.clear()

    def _add(self, event: dict[str, Any]) -> None:
        self._events.append(event)
        if len(self._events) >= _FLUSH_EVENTS:
            self.flush()

    def _append(self, text: bytes, num_events: int) -> None:
        """Writes text over the closing bracket, and a new one. A file that does not take it stays as it was."""
        try:
            self._write_at(self._size, text + _END)
            self._size += len(text)
        except OSError as error:
            self._lost.add(error, num_events)
            with suppress(OSError):
                self._write_at(self._size, _END)
                self._file.truncate()
        self._lost.warn()

    def _write_at(self, position: int, text: bytes) -> None:
        self._file.seek(position)
        written = 0
        while written < len(text):  # a full disk takes a part, and then raises
            written += self._file.write(text[written:])


def _microseconds(seconds: float) -> float:
    """Returns microseconds, rounded to the nanosecond so that equal ends of nested slices stay equal."""
    return round(seconds * 1e6, 3)
