"""The parts of the page with charts: over time, latencies, requests, slowest steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from nanovllm.report.charts import Bins, Scale, Series, duration_text, histogram, seconds_text, time_chart
from nanovllm.report.gantt import gantt
from nanovllm.report.quantiles import QuantileSketch
from nanovllm.report.requests import DRAWN
from nanovllm.report.run import Run
from nanovllm.report.steps import UNEXPLAINED
from nanovllm.report.tables import table
from nanovllm.report.words import clock_text, plural

_QUANTILES = ((0.5, "p50"), (0.9, "p90"), (0.99, "p99"))


@dataclass(frozen=True)
class _Chart:
    """A chart over time. Without a value it is not drawn."""

    title: str
    unit: str
    series: list[Series]
    note: str
    scale: Scale = "linear"
    stacked: bool = False

    @property
    def has_values(self) -> bool:
        return any(value is not None for one in self.series for value in one.values)

    def svg(self, run: Run, *, end: float = 0.0, width: int = 560, like: Sequence[Series] = ()) -> str:
        """Draws it. end: seconds that the axis shows at least. like: series of a chart with the same y axis."""
        return time_chart(
            self.title,
            self.unit,
            self.series,
            Bins(run.timeline.width, max(run.duration, end)),
            scale=self.scale,
            stacked=self.stacked,
            width=width,
            since=_since(run),
            like=like,
        )


def time_panels(run: Run) -> str:
    """Returns charts over time, each from the most detailed events in the log."""
    panels = [
        f'<div class="panel"><h3>{escape(chart.title)}</h3>{chart.svg(run, width=560 if index else 1160)}'
        f'<p class="note">{escape(chart.note)}</p></div>'
        for index, chart in enumerate(_charts(run))
    ]
    return f'{_ZOOM}{panels[0]}<div class="grid2">{"".join(panels[1:])}</div>' if panels else ""


def comparison_charts(first: Run, second: Run, names: tuple[str, str]) -> str:
    """Returns the charts that both runs have, side by side, with the same axes."""
    others = {chart.title: chart for chart in _charts(second)}
    panels, end = [], max(first.duration, second.duration)
    for one in _charts(first):
        two = others.get(one.title)
        if two is not None:
            for run, name, chart, like in ((first, names[0], one, two.series), (second, names[1], two, one.series)):
                title = f'<h3>{escape(chart.title)}</h3><p class="note"><code>{escape(name)}</code></p>'
                panels.append(f'<div class="panel">{title}{chart.svg(run, end=end, like=like)}</div>')
    if not panels:
        return ""
    return f'<section><h2>Charts of both runs</h2>{_ZOOM}<div class="grid2">{"".join(panels)}</div></section>'


_ZOOM = (
    '<div class="zoom" role="group" aria-label="Zoom of the charts over time" hidden>'
    '<button type="button" name="in">Zoom in</button><button type="button" name="out">Zoom out</button>'
    '<button type="button" name="back">Earlier</button><button type="button" name="on">Later</button>'
    '<button type="button" name="all">Reset</button> <output></output></div>'
)


def _charts(run: Run) -> list[_Chart]:
    if run.origin is None:
        return []
    makers = (_throughput, _composition, _kv_cache, _queue, _latency_over_time, _step_times, _device)
    return [chart for chart in (maker(run) for maker in makers) if chart.has_values]


def _throughput(run: Run) -> _Chart:
    timeline, title = run.timeline, "Throughput"
    series: list[Series] = []
    note = "The tokens of a step are spread over its duration."
    if run.at_debug:
        series = [
            Series("prompt tokens computed", timeline.rates("prompt"), 2),
            Series("tokens sampled", timeline.rates("output"), 1, area=True),
        ]
    elif "line_prompt" in timeline or "line_output" in timeline:
        series = [
            Series("prompt tokens scheduled", timeline.rates("line_prompt"), 2),
            Series("decode tokens", timeline.rates("line_output"), 1, area=True),
        ]
        note = "From the batch lines; steps after the last decode line are not included."
    elif "stat_output" in timeline:
        series = [
            Series("prompt tokens", timeline.means("stat_prompt", hold=True), 2),
            Series("tokens generated", timeline.means("stat_output", hold=True), 1, area=True),
        ]
        note = "From the statistics lines."
    return _Chart(title, "tokens/s", series, note)


def _composition(run: Run) -> _Chart:
    names = ("prefill_in_step", "decode_in_step") if run.at_debug else ("line_prompt_in_step", "line_decode")
    series = [
        Series("prefill tokens", run.timeline.means(names[0]), 2),
        Series("decode tokens", run.timeline.means(names[1]), 1),
    ]
    note = "Mean over the steps of each bin." if run.at_debug else "Of the batches that INFO shows."
    return _Chart("Batch composition", "tokens in a step", series, note, stacked=True)


def _kv_cache(run: Run) -> _Chart:
    timeline, note = run.timeline, ""
    series: list[Series] = []
    if "kv_use" in timeline:
        series.append(Series("blocks in use, mean", timeline.means("kv_use", hold=True), 3, area=True))
        series.append(Series("peak", timeline.peaks("kv_use"), 5))
    elif "stat_kv_use" in timeline:
        series.append(Series("blocks in use", timeline.means("stat_kv_use", hold=True), 3, area=True))
        if "stat_kv_peak" in timeline:
            series.append(Series("peak", timeline.peaks("stat_kv_peak"), 5))
    hits = "hit_rate" if "hit_rate" in timeline else "stat_hit_rate"
    if hits in timeline:
        series.append(Series("prefix hit rate", timeline.means(hits), 6))
        note = (
            "Hit rate: the cached fraction of a prompt when first scheduled, mean over requests; a gap where none was."
            if hits == "hit_rate"
            else "Hit rate: from the statistics lines."
        )
    return _Chart("KV cache", "per cent", series, note, scale="share")


def _queue(run: Run) -> _Chart:
    timeline = run.timeline
    prefix = "" if "running" in timeline else "stat_"
    series = [
        Series("running", timeline.means(prefix + "running", hold=True), 1, area=True),
        Series("waiting", timeline.means(prefix + "waiting", hold=True), 4),
    ]
    if "preempted" in timeline:
        series.append(Series("preemptions (at that moment)", timeline.sums("preempted"), 5, bars=True))
    return _Chart("Requests running and waiting", "requests", series, "Each value holds until the next step.")


def _step_times(run: Run) -> _Chart:
    series = [
        Series("slowest", run.timeline.peaks("step_ms"), 4),
        Series("mean", run.timeline.means("step_ms"), 1),
    ]
    kinds = ", ".join(
        f"{kind} {duration_text(sketch.quantile(0.5))} (p99 {duration_text(sketch.quantile(0.99))}, "
        f"{plural(sketch.count, 'step')})"
        for kind, sketch in sorted(run.step_times.items())
    )
    note = f"Wall time, from launch to tokens read. Median: {kinds}."
    return _Chart("Step time", "ms", series, note, scale="logarithmic")


def _latency_over_time(run: Run) -> _Chart:
    timeline = run.timeline
    series = [
        Series(label, timeline.means(name) if name != "stall_ms" else timeline.peaks(name), colour)
        for name, label, colour in (
            ("ttft_ms", "time to first token, mean", 2),
            ("itl_ms", "between tokens, mean", 1),
            ("stall_ms", "longest wait between two tokens", 5),
        )
        if name in timeline
    ]
    note = "Time to first token: when the token came. Between tokens: when the request ended."
    return _Chart("Time to first token, and between tokens", "ms", series, note, scale="logarithmic")


def _device(run: Run) -> _Chart:
    walls, devices = run.timeline.means("step_ms"), run.timeline.means("gpu_ms")
    hosts = [
        None if wall is None or device is None else max(wall - device, 0.0)
        for wall, device in zip(walls, devices, strict=True)
    ]
    series = [Series("device works", devices, 3), Series("device waits", hosts, 2)]
    note = "Mean of the steps of each bin. With steps in flight together, a step also waits for the one before it."
    return _Chart("Host against device", "ms a step", series, note, stacked=True)


def _since(run: Run) -> str:
    if run.start is None or run.origin is None:
        return "time since the first request"
    return f"time since the first request, {clock_text(run.start, run.origin)[:8]} UTC"


def latency_panels(run: Run) -> str:
    """Returns a histogram for each latency, and a table of all of them."""
    latencies = run.requests.latencies
    distributions = [
        ("Time to first token", latencies["ttft_ms"], "requests"),
        ("Inter-token latency, mean of each request", latencies["itl_ms"], "requests"),
        ("End to end", latencies["e2e_ms"], "requests"),
        ("Queue time", latencies["queue_ms"], "requests"),
        ("Longest wait between two tokens", latencies["stall_ms"], "requests"),
        ("Inter-token latency, each token", run.token_gaps, "tokens"),
    ]
    distributions = [entry for entry in distributions if entry[1].count]
    if not distributions:
        return ""
    aborted = run.requests.num_aborted
    note = "Quantiles are accurate to 0.5 %." + (f" Without {plural(aborted, 'aborted request')}." if aborted else "")
    panels = [_latency(title, sketch, what) for title, sketch, what in distributions]
    table = _quantile_table([(title, sketch) for title, sketch, _ in distributions])
    panels.append(f'<div class="panel whole-row"><h3>All latencies</h3>{table}<p class="note">{escape(note)}</p></div>')
    return f'<div class="grid3">{"".join(panels)}</div>'


def _latency(title: str, sketch: QuantileSketch, what: str) -> str:
    quantiles = [(name, sketch.quantile(share)) for share, name in _QUANTILES]
    summary = " · ".join(f"{name} <b>{duration_text(ms)}</b>" for name, ms in quantiles)
    chart = histogram(title, sketch.histogram(40), quantiles, what)
    return f'<div class="panel"><h3>{escape(title)}</h3><p class="soft">{summary}</p>{chart}</div>'


def _quantile_table(distributions: list[tuple[str, QuantileSketch]]) -> str:
    rows = []
    for title, sketch in distributions:
        values = [*(sketch.quantile(share) for share, _ in _QUANTILES), sketch.mean, sketch.most]
        cells = "".join(f'<td class="num">{duration_text(ms)}</td>' for ms in values)
        rows.append(f"<tr><td>{escape(title)}</td>{cells}</tr>")
    head = "".join(f'<th class="num">{name}</th>' for name in ("p50", "p90", "p99", "mean", "max"))
    return f'<table class="tight"><tr><th></th>{head}</tr>{"".join(rows)}</table>'


def request_panel(run: Run) -> str:
    lives = run.requests.drawn()
    if not lives or run.origin is None:
        return ""
    total = run.requests.sample.num_offered + len(run.requests.pending)
    note = "Point at a row to see its figures."
    if total > len(lives):
        note = f"{len(lives):,} of {total:,} requests, a random sample (a page shows at most {DRAWN}). {note}"
    if run.requests.pending:
        note += " Pale rows are requests that had not finished when the log ended."
    return (
        f'<div class="panel"><h3>Requests, in order of arrival</h3><p class="note">{escape(note)}</p>'
        f"{gantt(lives, run.origin, run.end)}</div>"
    )


def slow_step_panel(run: Run) -> str:
    steps = run.slow_steps.slowest_first()
    if not steps:
        return ""
    typical_prefill = run.num_prefill_tokens / run.num_prefill_steps if run.num_prefill_steps else 0.0
    rows, num_unexplained = [], 0
    for slow in steps:
        sketch = run.step_times.get(slow.kind)
        reasons = slow.reasons(sketch.quantile(0.5) if sketch else 0.0, typical_prefill)
        num_unexplained += UNEXPLAINED in reasons
        items = "".join(f"<li>{escape(reason)}</li>" for reason in reasons if reason != UNEXPLAINED)
        rows.append(
            [
                f"{slow.step:,}",
                seconds_text(slow.at),
                f"<b>{duration_text(slow.wall_ms)}</b>",
                "" if slow.gpu_ms is None else duration_text(slow.gpu_ms),
                escape(slow.contents()),
                f"<ul>{items}</ul>" if items else "",
            ]
        )
    heads = ("step", "at", "wall time", "GPU time", "contents", "reasons")
    note = f'<p class="note">Of {num_unexplained} of them, {UNEXPLAINED}.</p>' if num_unexplained else ""
    ids = [f"run{run.number}-step-{slow.step}" for slow in steps]
    return f'<div class="panel"><h3>The slowest steps</h3>{table(heads, rows, ids)}{note}</div>'
