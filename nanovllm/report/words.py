"""How answers and the page write numbers, times and lists."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta


@dataclass(frozen=True)
class Unit:
    """A unit in which the parts of a time are written, so that they can be added by eye."""

    name: str
    size: float  # seconds
    digits: int

    @classmethod
    def of(cls, seconds: float) -> Unit:
        """Returns the unit for a time and its parts."""
        if seconds >= 10:
            return cls("s", 1.0, 1)
        return cls("s", 1.0, 2) if seconds >= 1 else cls("ms", 1e-3, 1)

    def number(self, seconds: float) -> str:
        return f"{seconds / self.size:.{self.digits}f}"

    def text(self, seconds: float) -> str:
        return f"{self.number(seconds)} {self.name}"


def time_text(seconds: float) -> str:
    return Unit.of(seconds).text(seconds)


def plural(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def times_text(number: int) -> str:
    return {1: "once", 2: "twice"}.get(number, f"{number} times")


def per_cent(share: float) -> str:
    return f"{100 * share:.0f} %"


def listed(items: Sequence[str], limit: int = 6) -> str:
    """Returns "a, b and c". Of more than `limit` items the last ones are counted only."""
    shown = list(items[:limit])
    if len(items) > limit:
        shown.append(f"{len(items) - limit} more")
    return shown[0] if len(shown) == 1 else f"{', '.join(shown[:-1])} and {shown[-1]}" if shown else ""


def clock_text(start: datetime | None, seconds: float) -> str:
    """Returns the time of day `seconds` after `start`, in UTC; without `start`, the seconds alone."""
    if start is None:
        return f"{seconds:.3f} s"
    return (start + timedelta(seconds=seconds)).strftime("%H:%M:%S.%f")[:-3]
