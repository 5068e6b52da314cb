"""Charts as inline SVG: lines, stacked bars, histograms. Colours are CSS variables, tooltips are `<title>`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Literal

LEFT, RIGHT, TOP, BOTTOM = 76, 14, 10, 46


@dataclass(frozen=True)
class Series:
    """One value for each bin; None leaves a gap. `colour` is the number of a colour of the page."""

    name: str
    values: Sequence[float | None]
    colour: int
    area: bool = False
    bars: bool = False  # for rare events, which a line would make too thin to see


def seconds_text(seconds: float) -> str:
    return duration_text(seconds * 1e3)


def duration_text(ms: float) -> str:
    """Formats a duration with about three digits, in a suitable unit."""
    if ms < 0.001:
        return "0 ms"
    if ms < 1:
        return f"{ms * 1e3:.0f} µs"
    if ms < 1000:
        return f"{ms:.3g} ms" if ms < 99.95 else f"{ms:.0f} ms"
    seconds = ms / 1e3
    if seconds < 120:
        return f"{seconds:.3g} s" if seconds < 99.95 else f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:.1f} h"


def number_text(value: float) -> str:
    """Formats a number: 1234 → 1,234; 0.123 → 0.12."""
    if abs(value) >= 100 or value == int(value):
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def ticks(most: float, wanted: int = 5) -> list[float]:
    """Returns round numbers from 0 to at least `most`: 1, 2 or 5 times a power of ten apart."""
    if not most > 0:
        return [0.0, 1.0]
    rough = most / wanted
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    return [index * step for index in range(math.ceil(most / step * 0.9999) + 1)]


def decades(values: Sequence[float]) -> list[float]:
    """Returns powers of ten around the values, at least two."""
    low = math.floor(math.log10(max(min(values, default=1.0), 1e-9)))
    high = max(math.ceil(math.log10(max(max(values, default=1.0), 1e-9))), low + 1)
    return [10.0**power for power in range(low, high + 1)]


def tick_text(value: float) -> str:
    for size, suffix in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if suffix == 'k' else size):g}{suffix}"
    return f"{value:.10g}"


@dataclass(frozen=True)
class TimeAxis:
    """An axis from 0 to `end` seconds, in a suitable unit."""

    end: float

    @property
    def unit(self) -> tuple[str, float]:
        for name, size in (("h", 3600.0), ("min", 60.0), ("s", 1.0)):
            if self.end >= (2 if name == "s" else 3) * size:
                return name, size
        return "ms", 0.001

    def ticks(self) -> list[tuple[float, str]]:
        """Returns (seconds, text) of each tick."""
        name, size = self.unit
        marks = [(mark * size, f"{mark:.10g}") for mark in ticks(self.end / size, 10) if mark * size <= self.end]
        return [*marks[:-1], (marks[-1][0], f"{marks[-1][1]} {name}")]

    def text(self, seconds: float) -> str:
        name, size = self.unit
        return f"{seconds / size:.4g} {name}"


class Frame:
    """An SVG drawing: a plot area with axes."""

    def __init__(
        self, label: str, width: int, height: int, x_end: float, y_end: float, *, log_from: float | None = None
    ) -> None:
        """`log_from`: the lower end of a logarithmic y axis; None: the axis is linear."""
        self.log_from = log_from
        self.label, self.width, self.height = label, width, height
        self.x_end, self.y_end = max(x_end, 1e-12), max(y_end, 1e-12)
        self.parts: list[str] = []
        self.plot: list[str] = []  # the page's script zooms these if there is a time axis
        self.time: tuple[float, float] | None = None  # of the x axis, in seconds since the run's origin

    @property
    def bottom(self) -> int:
        return self.height - BOTTOM

    def x(self, value: float) -> float:
        return LEFT + (self.width - LEFT - RIGHT) * min(max(value / self.x_end, 0.0), 1.0)

    def y(self, value: float) -> float:
        share = value / self.y_end
        if self.log_from is not None:
            share = math.log(max(value, self.log_from) / self.log_from) / math.log(self.y_end / self.log_from)
        return self.bottom - (self.bottom - TOP) * min(max(share, 0.0), 1.0)

    def add(self, part: str) -> None:
        self.parts.append(part)

    def draw(self, part: str) -> None:
        """Adds a part of the plot area, over those of `add`."""
        self.plot.append(part)

    def time_axis(self, axis: TimeAxis, unit: str, start: float = 0.0) -> None:
        """Draws an x axis of time that can be zoomed. start: seconds since the run's origin at its left end."""
        self.time = start, start + axis.end
        self.x_axis(axis.ticks(), unit)

    def y_axis(self, marks: Sequence[tuple[float, str]], unit: str) -> None:
        for value, text in marks:
            y = self.y(value)
            self.add(f'<line class="grid" x1="{LEFT}" x2="{self.width - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
            self.add(f'<text class="tick" x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{escape(text)}</text>')
        middle = (TOP + self.bottom) / 2
        self.add(
            f'<text class="unit" transform="translate(12 {middle:.1f}) rotate(-90)" text-anchor="middle">'
            f"{escape(unit)}</text>"
        )

    def x_axis(self, marks: Sequence[tuple[float, str]], unit: str) -> None:
        self.add(f'<g class="ticks" data-y="{self.bottom + 17}">')
        for value, text in marks:
            x = self.x(value)
            self.add(f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{self.bottom}" y2="{self.bottom + 4}"/>')
            self.add(
                f'<text class="tick" x="{x:.1f}" y="{self.bottom + 17}" text-anchor="middle">{escape(text)}</text>'
            )
        self.add("</g>")
        self.add(f'<line class="axis" x1="{LEFT}" x2="{self.width - RIGHT}" y1="{self.bottom}" y2="{self.bottom}"/>')
        middle = (LEFT + self.width - RIGHT) / 2
        self.add(
            f'<text class="unit" x="{middle:.1f}" y="{self.height - 6}" text-anchor="middle">{escape(unit)}</text>'
        )

    def tooltip(self, x: float, width: float, text: str) -> None:
        self.draw(
            f'<rect class="hover" x="{x:.1f}" y="{TOP}" width="{width:.2f}" height="{self.bottom - TOP}">'
            f"<title>{escape(text)}</title></rect>"
        )

    def svg(self) -> str:
        size = "broad" if self.width > 800 else "middle" if self.width > 400 else "small"
        plot = "".join(self.plot)
        if self.time is not None:
            start, end = self.time
            area = f'x="{LEFT}" y="0" width="{self.width - LEFT - RIGHT}" height="{self.bottom}"'
            view = f"{LEFT} 0 {self.width - LEFT - RIGHT} {self.bottom}"
            plot = (
                f'<svg class="plot" {area} viewBox="{view}" preserveAspectRatio="none" data-start="{start:.6f}" '
                f'data-end="{end:.6f}">{plot}</svg>'
            )
        return (
            f'<svg viewBox="0 0 {self.width} {self.height}" class="{size}" role="img" '
            f'aria-label="{escape(self.label)}">{"".join(self.parts)}{plot}</svg>'
        )


@dataclass(frozen=True)
class Bins:
    """The bins of a time chart: their width, and where the last one ends, in seconds."""

    width: float
    end: float

    def span(self, index: int) -> tuple[float, float]:
        return index * self.width, min((index + 1) * self.width, self.end)


Scale = Literal["linear", "logarithmic", "share"]


def time_chart(
    label: str,
    unit: str,
    series: Sequence[Series],
    bins: Bins,
    *,
    scale: Scale = "linear",
    stacked: bool = False,
    width: int = 560,
    since: str = "time since the first request",
    like: Sequence[Series] = (),
) -> str:
    """Returns lines, areas or stacked bars over time. All series have one value per bin.

    With scale "share", values from 0 to 1 are shown as per cent. like: series of another chart with the same y axis.
    """
    num_bins = max((len(one.values) for one in series), default=0)
    most = max(_most(series, stacked), _most(like, stacked))
    if scale == "share":
        marks = [0.0, 0.25, 0.5, 0.75, 1.0]
    elif scale == "logarithmic":
        marks = decades([value for one in (*series, *like) for value in one.values if value])
    else:
        marks = ticks(most)
    bins = Bins(bins.width, max(bins.end, bins.width))
    axis = TimeAxis(bins.end)
    frame = Frame(label, width, 230, bins.end, marks[-1], log_from=marks[0] if scale == "logarithmic" else None)
    frame.y_axis(
        [(mark, f"{mark * 100:.0f}" if scale == "share" else tick_text(mark)) for mark in marks],
        f"{unit}, logarithmic" if scale == "logarithmic" else unit,
    )
    if stacked:
        _draw_stacked(frame, series, bins, num_bins)
    else:
        for one in series:
            (_draw_bars if one.bars else _draw_line)(frame, one, bins)
    frame.time_axis(axis, since)
    for index in range(num_bins):
        start, stop = bins.span(index)
        lines = [
            f"{one.name}: {value * 100:.1f} %" if scale == "share" else f"{one.name}: {number_text(value)} {unit}"
            for one in series
            if (value := one.values[index]) is not None
        ]
        if lines and stop > start:
            left = frame.x(start)
            frame.tooltip(left, frame.x(stop) - left, "\n".join([f"{axis.text(start)} – {axis.text(stop)}", *lines]))
    return legend([(one.name, one.colour) for one in series]) + drawing(frame.svg())


def _most(series: Sequence[Series], stacked: bool) -> float:
    """Returns the largest value, or sum of a bin's values."""
    columns = zip(*([value or 0.0 for value in one.values] for one in series), strict=True)
    return max((sum(column) if stacked else max(column) for column in columns), default=0.0)


def _draw_line(frame: Frame, series: Series, bins: Bins) -> None:
    """Draws a line with a step at each bin, since a value belongs to a whole bin."""
    runs: list[list[tuple[float, float]]] = [[]]
    for index, value in enumerate(series.values):
        if value is None:
            runs.append([])
            continue
        y = frame.y(value)
        runs[-1] += [(frame.x(time), y) for time in bins.span(index)]
    for points in filter(None, runs):
        if points[-1][0] - points[0][0] < 5:  # between two gaps: a line would be too short to see
            x, y = (points[0][0] + points[-1][0]) / 2, points[0][1]
            frame.draw(f'<polyline class="dot c{series.colour}" points="{x:.1f},{y:.1f} {x + 0.1:.1f},{y:.1f}"/>')
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        if series.area:
            closed = f"{points[0][0]:.1f},{frame.bottom} {path} {points[-1][0]:.1f},{frame.bottom}"
            frame.draw(f'<polygon class="area c{series.colour}" points="{closed}"/>')
        frame.draw(f'<polyline class="line c{series.colour}" points="{path}"/>')


def _draw_bars(frame: Frame, series: Series, bins: Bins) -> None:
    for index, value in enumerate(series.values):
        if value:
            left, right = (frame.x(time) for time in bins.span(index))
            top = min(frame.y(value), frame.bottom - 12.0)  # a single event is to be seen beside hundreds of requests
            frame.draw(
                f'<rect class="fill c{series.colour}" x="{left:.1f}" y="{top:.1f}" '
                f'width="{max(right - left, 4.0):.1f}" height="{frame.bottom - top:.1f}"/>'
            )


def _draw_stacked(frame: Frame, series: Sequence[Series], bins: Bins, num_bins: int) -> None:
    for index in range(num_bins):
        left = frame.x(index * bins.width)
        width = max(frame.x((index + 1) * bins.width) - left - 0.4, 0.6)
        below = 0.0
        for one in series:
            value = one.values[index] or 0.0
            if value <= 0:
                continue
            top, bottom = frame.y(below + value), frame.y(below)
            frame.draw(
                f'<rect class="fill c{one.colour}" x="{left:.1f}" y="{top:.1f}" width="{width:.2f}" '
                f'height="{bottom - top:.2f}"/>'
            )
            below += value


def histogram(
    label: str, bars: Sequence[tuple[float, float, int]], quantiles: Sequence[tuple[str, float]], what: str = "requests"
) -> str:
    """Returns bars over a logarithmic axis of milliseconds, with a line at each quantile."""
    width, height = 360, 210
    if not bars:
        return ""
    low, high = bars[0][0], bars[-1][1]
    scale = math.log(high / low)

    def place(ms: float) -> float:
        return math.log(min(max(ms, low), high) / low)

    marks = ticks(max(count for _, _, count in bars), 4)
    frame = Frame(label, width, height, scale, marks[-1])
    frame.y_axis([(mark, tick_text(mark)) for mark in marks if mark == int(mark)], what)
    for start, stop, count in bars:
        left, right = frame.x(place(start)), frame.x(place(stop))
        if count:
            top = frame.y(count)
            frame.add(
                f'<rect class="fill c1" x="{left:.1f}" y="{top:.1f}" width="{max(right - left - 0.6, 0.6):.2f}" '
                f'height="{frame.bottom - top:.2f}"/>'
            )
        frame.tooltip(left, right - left, f"{duration_text(start)} – {duration_text(stop)}: {count:,} {what}")
    for number, (name, ms) in enumerate(quantiles):
        x = frame.x(place(ms))
        side = "end" if x > width * 0.7 else "start"
        frame.add(f'<line class="quantile" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{frame.bottom}"/>')
        frame.add(
            f'<text class="mark" x="{x + (-3 if side == "end" else 3):.1f}" y="{TOP + 10 + 18 * number}" '
            f'text-anchor="{side}">{escape(name)}</text>'
        )
    frame.x_axis([(place(ms), duration_text(ms)) for ms in _log_ticks(low, high)], "time, logarithmic")
    return drawing(frame.svg())


def _log_ticks(low: float, high: float) -> list[float]:
    """Returns at most six of 1, 2 and 5 times powers of ten in the range, or its ends if fewer than two fit."""
    found = [
        factor * 10.0**power
        for power in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        for factor in (1, 2, 5)
        if low <= factor * 10.0**power <= high
    ]
    if len(found) > 6:
        found = [mark for mark in found if f"{mark:e}".startswith("1")]
    if len(found) > 6:
        found = found[:: math.ceil(len(found) / 6)]
    return found if len(found) >= 2 else [low * 1.0, high * 1.0]


def share_bar(label: str, parts: Sequence[tuple[str, float]]) -> str:
    """Returns one divided bar. Parts too small for their name have it in the tooltip and the legend only."""
    total = sum(seconds for _, seconds in parts)
    if total <= 0:
        return ""
    width, x, drawn = 1160, 0.0, []
    for index, (name, seconds) in enumerate(parts):
        size = width * seconds / total
        text = f"{name} {seconds_text(seconds)}"
        drawn.append(
            f"<g><title>{escape(text)} ({100 * seconds / total:.0f} %)</title>"
            f'<rect class="fill c{index % 6 + 1}" x="{x:.1f}" y="4" width="{max(size - 1, 0.5):.1f}" height="34"/>'
        )
        if size > 10 * len(text):
            drawn.append(
                f'<text class="inbar" x="{x + size / 2:.1f}" y="26" text-anchor="middle">{escape(text)}</text>'
            )
        drawn.append("</g>")
        x += size
    svg = f'<svg viewBox="0 0 {width} 42" class="broad" role="img" aria-label="{escape(label)}">{"".join(drawn)}</svg>'
    return drawing(svg) + legend(
        [(f"{name} {seconds_text(seconds)}", index % 6 + 1) for index, (name, seconds) in enumerate(parts)]
    )


def drawing(svg: str) -> str:
    """Returns a drawing that can be scrolled sideways on a narrow screen."""
    return f'<div class="drawing">{svg}</div>'


def legend(items: Sequence[tuple[str, int]]) -> str:
    entries = "".join(f'<span><i class="c{colour}"></i>{escape(name)}</span>' for name, colour in items)
    return f'<div class="legend">{entries}</div>'
