"""The Gantt chart of requests: one row each, coloured by phase."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from nanovllm.report.charts import BOTTOM, Frame, TimeAxis, drawing, duration_text, legend
from nanovllm.report.requests import RequestLife

PHASES = (("queued", 4), ("prefill", 2), ("decode", 1), ("preempted", 5))
_COLOURS = dict(PHASES)
_WIDTH, _TALLEST = 1160, 900

Span = tuple[str, float, float]  # phase, from, to


def spans(life: RequestLife, end: float) -> list[Span]:
    """Returns the phases of a request, up to `end` if it had not finished. Preemptions are drawn over other phases."""
    finish = end if life.finished is None else life.finished
    scheduled = finish if life.first_scheduled is None else min(life.first_scheduled, finish)
    token = finish if life.first_token is None else min(max(life.first_token, scheduled), finish)
    phases = [("queued", life.arrival, scheduled), ("prefill", scheduled, token), ("decode", token, finish)]
    phases += [("preempted", start, min(finish if stop is None else stop, finish)) for start, stop in life.preempted]
    return [span for span in phases if span[2] > span[1]]


def gantt(lives: Sequence[RequestLife], run_origin: float, end: float) -> str:
    """Returns the chart. `run_origin`, `end`: in the log's monotonic seconds; `lives` are in the order of rows."""
    if not lives:
        return ""
    origin = min(run_origin, lives[0].arrival)
    row = min(16.0, _TALLEST / len(lives))
    axis = TimeAxis(end - origin)
    height = round(row * len(lives)) + BOTTOM + 14
    frame = Frame("A row for each request, from its arrival to its end", _WIDTH, height, axis.end, 1)
    top = 8.0
    for index, life in enumerate(lives):
        y, thickness = top + index * row, max(row - (1.5 if row > 4 else 0.2), 0.8)
        frame.draw(f"<g><title>{escape(_tooltip(life, end))}</title>")
        for phase, start, stop in spans(life, end):
            x = frame.x(start - origin)
            width = max(frame.x(stop - origin) - x, 0.7)
            faded = " open" if life.finished is None else ""
            frame.draw(
                f'<rect class="fill c{_COLOURS[phase]}{faded}" x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" '
                f'height="{thickness:.1f}"/>'
            )
        frame.draw("</g>")
    every = next(number for number in (1, 2, 5, 10, 20, 50) if number * row >= 18)  # or the numbers would overlap
    for index in range(every - 1, len(lives), every):
        y = top + index * row + max(row - 3.5, 8)
        frame.add(f'<text class="tick" x="52" y="{y:.1f}" text-anchor="end">{index + 1}</text>')
    frame.time_axis(axis, "time since the first request", start=origin - run_origin)
    return legend(PHASES) + drawing(frame.svg())


def _tooltip(life: RequestLife, end: float) -> str:
    lines = [
        f"{life.request_id}: {life.num_prompt_tokens:,} prompt tokens ({life.num_cached_tokens:,} cached), "
        f"{life.output_len:,} out" + (f", {life.cause}" if life.cause else "")
    ]
    if life.finished is None:
        lines = [f"{life.request_id}: {life.num_prompt_tokens:,} prompt tokens; not finished when the log ends"]
    lines += [f"{phase}: {duration_text((stop - start) * 1e3)}" for phase, start, stop in spans(life, end)]
    if life.num_preemptions:
        lines.append(f"preempted {life.num_preemptions} ×")
    return "\n".join(lines)
