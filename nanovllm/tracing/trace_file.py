"""TraceFile: writes Chrome's trace format, which https://ui.perfetto.dev opens.

It has slices, moments and arrows on named tracks, and counters.

The file is a JSON array of events. Every write leaves it complete, so it can be read even if the process is killed.
Format: Google, "Trace Event Format", 2016, https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nanovllm.errors import InvalidArgumentError

__all__ = ["TraceFile"]

_FLUSH_EVENTS = 500  # events kept in memory before they are written; a step of the engine makes about ten
_END = b"\n]\n"
# Files that this process has written: a second engine takes another name rather than overwrite the first one's trace.
_written: set[Path] = set()


class TraceFile:
    """Writes events to a file. Times are seconds of one monotonic clock.

    Raises InvalidArgumentError if `path` cannot be written.
    """

    def __init__(self, path: Path) -> None:
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
        self._write(b"[\n")

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
        if self._events and not self._file.closed:
            lines = [json.dumps(event, separators=(",", ":")) for event in self._events]
            self._events.clear()
            self._write((",\n" if self._size > 2 else "").encode() + ",\n".join(lines).encode())

    def close(self) -> None:
        """Closes the file; later events are dropped. Calling it again does nothing."""
        self.flush()
        self._file.close()

    def _add(self, event: dict[str, Any]) -> None:
        self._events.append(event)
        if len(self._events) >= _FLUSH_EVENTS:
            self.flush()

    def _write(self, text: bytes) -> None:
        self._file.seek(self._size)
        self._file.write(text + _END)
        self._size += len(text)


def _microseconds(seconds: float) -> float:
    """Returns microseconds, rounded to the nanosecond so that equal ends of nested slices stay equal."""
    return round(seconds * 1e6, 3)
