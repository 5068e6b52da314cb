"""LogFile: the records of a JSON log, one line in memory at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from nanovllm.errors import InvalidArgumentError

Record: TypeAlias = "dict[str, Any]"

_LONGEST_LINE = 1 << 20  # bytes; a longer one is no record, and is never held whole
_TRIED_LINES = 1000  # without a record among so many, the file is something else
_LARGEST = 1e15  # no engine counts or measures so far
_HINT = (
    "Run with NANOVLLM_LOG_FORMAT=json and NANOVLLM_LOG_FILE=run.jsonl (and NANOVLLM_LOG_LEVEL=DEBUG for the whole "
    "picture), then read run.jsonl."
)


@dataclass
class LineCounts:
    """What was read. A broken line is one that is no JSON object with an `event` and a time `mono`."""

    lines: int = 0
    bytes: int = 0
    records: int = 0
    broken: int = 0
    first_broken: str = ""  # where, and how it begins


class LogFile:
    """Raises InvalidArgumentError when there is no such file, or nothing in it, or no record in its first lines."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.counts = LineCounts()

    def records(self) -> Iterator[Record]:
        """Every record, in the file's order; broken lines are counted and passed over."""
        if not self.path.exists():
            raise InvalidArgumentError("log", str(self.path), "a file that exists", _HINT)
        if self.path.is_dir():
            raise InvalidArgumentError("log", str(self.path), "a file, not a folder", _HINT)
        counts = self.counts
        try:
            for line in self._lines():
                counts.lines += 1
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
        if not counts.records:
            what = f"one of JSON records; {counts.first_broken!r} is none" if counts.broken else "one with lines in it"
            raise InvalidArgumentError("log", str(self.path), what, _HINT)

    def _lines(self) -> Iterator[bytes]:
        with self.path.open("rb") as file:
            while line := file.readline(_LONGEST_LINE):
                self.counts.bytes += len(line)
                yield line
                while len(line) == _LONGEST_LINE and not line.endswith(b"\n"):  # the rest of a line too long
                    line = file.readline(_LONGEST_LINE)
                    self.counts.bytes += len(line)


def _parse(line: bytes) -> Record | None:
    try:
        record = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError):
        return None
    if isinstance(record, dict) and isinstance(record.get("event"), str) and number(record, "mono") is not None:
        return record
    return None


def number(record: Record, field: str) -> float | None:
    """The field as a number; None where it is missing, null, beyond all measure, or something else."""
    value = record.get(field)
    if isinstance(value, (int, float)) and not isinstance(value, bool) and -_LARGEST <= value <= _LARGEST:
        return value
    return None


def count(record: Record, field: str) -> int:
    """The field as a count; 0 where there is none."""
    return max(int(number(record, field) or 0), 0)
