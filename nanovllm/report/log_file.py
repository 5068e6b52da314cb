"""LogFile: reads the records of a JSON log, with one line in memory at a time."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

from nanovllm.errors import InvalidArgumentError

Record: TypeAlias = "dict[str, Any]"

STANDARD_INPUT = "-"
_PAUSE = 0.2  # seconds until a file that has ended is read again
_LONGEST_LINE = 1 << 20  # bytes; a longer line is not a record, and is never read as a whole
_TRIED_LINES = 1000  # a file without a record in its first lines is not a log
_LARGEST = 1e15  # larger values are not those of an engine
# The lines that a log at DEBUG has most of, and that no figure needs. They are not parsed, which would take long.
_UNUSED = re.compile(
    rb'\{"ts": "[^"]*", "mono": [0-9.]+, "level": "DEBUG", "logger": "[^"]*", "event": "'
    rb"(attention\.(forward|store|decode|output)|section\.|runner\.|tensors|blocks\.(allocating|freed)|batch\.postprocess)"
)
_HINT = (
    "Run with NANOVLLM_LOG_FORMAT=json and NANOVLLM_LOG_FILE=run.jsonl (and NANOVLLM_LOG_LEVEL=DEBUG for all "
    "details), then read run.jsonl."
)


@dataclass
class LineCounts:
    """Counts of what was read. A broken line is not a JSON object with `event` and `mono`."""

    lines: int = 0
    bytes: int = 0
    records: int = 0
    broken: int = 0
    first_broken: str = ""  # its place and its beginning


class LogFile:
    """A JSON log. Reading raises InvalidArgumentError if the file does not exist or has no record near its start."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.counts = LineCounts()

    def records(self, at_end: Callable[[], bool] | None = None) -> Iterator[Record]:
        """Yields the records in the order of the file, without those that no figure needs, except the very last one.

        Broken lines are counted and skipped. Where the file ends, `at_end` says whether to wait until it has grown.
        """
        is_file = str(self.path) != STANDARD_INPUT
        if is_file and not self.path.exists():
            raise InvalidArgumentError("log", str(self.path), "a file that exists", _HINT)
        if is_file and self.path.is_dir():
            raise InvalidArgumentError("log", str(self.path), "a file, not a folder", _HINT)
        counts = self.counts
        unused = b""
        try:
            for line in self._lines(at_end or _never):
                counts.lines += 1
                if _UNUSED.match(line) and line.endswith(b"}\n"):
                    counts.records += 1
                    unused = line
                    continue
                unused = b""
                record = _parse(line)
                if record is not None:
                    counts.records += 1
                    yield record
                elif line.strip():
                    counts.broken += 1
                    if counts.broken == 1:
                        counts.first_broken = f"line {counts.lines}: {line[:80].decode('utf-8', 'replace').strip()}"
                if counts.lines == _TRIED_LINES and not counts.records:
                    break
        except OSError as error:
            raise InvalidArgumentError("log", str(self.path), f"a file that can be read ({error.strerror})") from None
        if unused and (last := _parse(unused)) is not None:  # it says when the log ends
            yield last
        if not counts.records:
            what = (
                f"a file of JSON records; {counts.first_broken!r} is not one"
                if counts.broken
                else "a file that is not empty"
            )
            raise InvalidArgumentError("log", str(self.path), what, _HINT)

    def _lines(self, at_end: Callable[[], bool]) -> Iterator[bytes]:
        with self._opened() as file:
            while line := self._line(file, at_end):
                self.counts.bytes += len(line)
                yield line
                # Skips the rest of a line that is too long.
                while len(line) == _LONGEST_LINE and not line.endswith(b"\n"):
                    line = file.readline(_LONGEST_LINE)
                    self.counts.bytes += len(line)

    def _line(self, file: BinaryIO, at_end: Callable[[], bool]) -> bytes:
        """Returns the next line; at the end of the file, what there is of it."""
        line = file.readline(_LONGEST_LINE)
        while not line.endswith(b"\n") and len(line) < _LONGEST_LINE and at_end():
            time.sleep(_PAUSE)
            line += file.readline(_LONGEST_LINE - len(line))
        return line

    def _opened(self) -> AbstractContextManager[BinaryIO]:
        if str(self.path) == STANDARD_INPUT:
            return nullcontext(sys.stdin.buffer)
        return self.path.open("rb")


def _never() -> bool:
    return False


def _parse(line: bytes) -> Record | None:
    try:
        record = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError):
        return None
    if isinstance(record, dict) and isinstance(record.get("event"), str) and number(record, "mono") is not None:
        return record
    return None


def number(record: Record, field: str) -> float | None:
    """Returns the field as a number; None if it is missing, null, too large, or not a number."""
    value = record.get(field)
    if isinstance(value, (int, float)) and not isinstance(value, bool) and -_LARGEST <= value <= _LARGEST:
        return value
    return None


def count(record: Record, field: str) -> int:
    """Returns the field as a count; 0 if it is missing."""
    return max(int(number(record, field) or 0), 0)
