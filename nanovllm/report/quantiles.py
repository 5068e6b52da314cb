"""Statistics of a log of any length in a fixed size: quantiles, bins over time, and a sample."""

from __future__ import annotations

import math
import random
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Generic, TypeVar

T = TypeVar("T")

_GAMMA = 1.01  # each bucket is 1 % wide, so quantiles are accurate to 0.5 %
_SMALLEST, _LARGEST = 1e-3, 1e12  # milliseconds


class QuantileSketch:
    """Quantiles of positive values, from counts in a few thousand logarithmic buckets.

    As in DDSketch (Masson, Rim, Lee, VLDB 2019), buckets that grow by a constant factor bound the relative error of
    every quantile. `count`, `total`, `least` and `most` are exact.
    """

    def __init__(self) -> None:
        self.count = 0
        self.total = 0.0
        self.least = math.inf
        self.most = -math.inf
        self._buckets: defaultdict[int, int] = defaultdict(int)

    def add(self, value: float, weight: int = 1) -> None:
        if weight <= 0:
            return
        value = max(value, 0.0)
        self.count += weight
        self.total += value * weight
        self.least, self.most = min(self.least, value), max(self.most, value)
        clamped = min(max(value, _SMALLEST), _LARGEST)
        self._buckets[math.ceil(math.log(clamped) / math.log(_GAMMA))] += weight

    @property
    def mean(self) -> float:
        return self.total / self.count if self.count else 0.0

    def quantile(self, share: float) -> float:
        """Returns the value that a fraction `share` of the values does not exceed; 0 if there are no values."""
        if not self.count:
            return 0.0
        wanted, seen = max(1, math.ceil(share * self.count)), 0
        for bucket in sorted(self._buckets):
            seen += self._buckets[bucket]
            if seen >= wanted:
                return min(max(_middle(bucket), self.least), self.most)
        return self.most

    def histogram(self, num_bars: int) -> list[tuple[float, float, int]]:
        """Returns (from, to, count) of bars that grow by a constant factor, from the smallest value to the largest."""
        if not self.count:
            return []
        low = max(self.least, _SMALLEST) / _GAMMA
        high = max(self.most, _SMALLEST) * _GAMMA
        factor = math.log(high / low) / num_bars
        counts = [0] * num_bars
        for bucket, weight in self._buckets.items():
            counts[min(max(int(math.log(_middle(bucket) / low) / factor), 0), num_bars - 1)] += weight
        edges = [low * math.exp(factor * index) for index in range(num_bars + 1)]
        return list(zip(edges[:-1], edges[1:], counts, strict=True))


def _middle(bucket: int) -> float:
    return float(2 * _GAMMA**bucket / (_GAMMA + 1))


@dataclass
class _Column:
    sums: list[float]
    counts: list[int]
    peaks: list[float]


@dataclass
class Timeline:
    """Named quantities over time, from 0, in at most `limit` bins, an even number.

    When time passes the last bin, neighbouring bins are joined, so that each is twice as wide. So between `limit / 2`
    and `limit` bins are in use, however long the log is.
    """

    limit: int = 160
    width: float = 0.001  # seconds
    end: float = 0.0  # the latest time
    _columns: dict[str, _Column] = field(default_factory=dict)

    def add(self, time: float, name: str, value: float) -> None:
        index, column = self._index(time), self._column(name)
        column.sums[index] += value
        column.counts[index] += 1
        column.peaks[index] = max(column.peaks[index], value)

    def spread(self, start: float, end: float, name: str, total: float) -> None:
        """Spreads `total` evenly from `start` to `end`, such as the tokens of a step over its duration."""
        start = max(0.0, min(start, end))
        last, column = self._index(end), self._column(name)
        if end <= start:
            column.sums[last] += total
            return
        for index in range(int(start / self.width), last + 1):
            overlap = min(end, (index + 1) * self.width) - max(start, index * self.width)
            column.sums[index] += total * max(overlap, 0.0) / (end - start)

    def __contains__(self, name: str) -> bool:
        return name in self._columns

    @property
    def num_bins(self) -> int:
        return min(int(self.end / self.width) + 1, self.limit)

    def sums(self, name: str) -> list[float]:
        return self._column(name).sums[: self.num_bins]

    def rates(self, name: str) -> list[float]:
        """Returns sums per second. The last bin is divided by the part of it that has passed."""
        rates = [value / self.width for value in self.sums(name)]
        filled = self.end - (self.num_bins - 1) * self.width
        if len(rates) > 1 and filled < self.width / 2:
            rates[-1] = rates[-2]
        elif filled > 0:
            rates[-1] *= self.width / filled
        return rates

    def means(self, name: str, *, hold: bool = False) -> list[float | None]:
        """Returns the mean of each bin. An empty bin has None, or with `hold` the previous mean."""
        column, last = self._column(name), None
        means: list[float | None] = []
        for value, number in zip(column.sums[: self.num_bins], column.counts, strict=False):
            last = value / number if number else (last if hold else None)
            means.append(last)
        return means

    def peaks(self, name: str) -> list[float | None]:
        column = self._column(name)
        return [
            peak if number else None for peak, number in zip(column.peaks[: self.num_bins], column.counts, strict=False)
        ]

    def _column(self, name: str) -> _Column:
        column = self._columns.get(name)
        if column is None:
            column = self._columns[name] = _Column([0.0] * self.limit, [0] * self.limit, [0.0] * self.limit)
        return column

    def _index(self, time: float) -> int:
        time = max(time, 0.0)
        self.end = max(self.end, time)
        while time >= self.width * self.limit:
            self.width *= 2
            for column in self._columns.values():
                pairs, padding = range(0, self.limit, 2), self.limit // 2
                column.sums = [column.sums[i] + column.sums[i + 1] for i in pairs] + [0.0] * padding
                column.counts = [column.counts[i] + column.counts[i + 1] for i in pairs] + [0] * padding
                column.peaks = [max(column.peaks[i], column.peaks[i + 1]) for i in pairs] + [0.0] * padding
        return int(time / self.width)


class Sample(Generic[T]):
    """A uniform sample of at most `size` of the items offered (reservoir sampling), with a fixed seed."""

    def __init__(self, size: int) -> None:
        self.items: list[T] = []
        self.num_offered = 0
        self._size = size
        self._random = random.Random(0)

    def offer(self, item: T) -> None:
        self.num_offered += 1
        if len(self.items) < self._size:
            self.items.append(item)
        else:
            place = self._random.randrange(self.num_offered)
            if place < self._size:
                self.items[place] = item
