"""The page: a header, then figures, charts, requests, slowest steps and settings of each engine."""

from __future__ import annotations

import base64
import hashlib
from html import escape

from nanovllm.report.advice import cache_peak
from nanovllm.report.charts import duration_text, number_text, seconds_text, share_bar
from nanovllm.report.log_file import number
from nanovllm.report.run import Run
from nanovllm.report.sections import comparison_charts, latency_panels, request_panel, slow_step_panel, time_panels
from nanovllm.report.style import CSS, SCRIPT
from nanovllm.report.summary import MOST_RUNS, Summary
from nanovllm.report.tables import comparison_panel, memory_table, preemption_table, request_table, verdict_panel

_HEAD = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{hash}'">
<title>{title}</title><style>{css}</style></head><body>
"""


def render(summary: Summary, other: Summary | None = None) -> str:
    """Returns the whole page, with the last engine of `other` beside that of `summary`. All from a log is escaped."""
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    title = escape(f"nanovllm: {summary.path.name}")
    parts = [_HEAD.format(title=title, css=CSS, hash=digest), _header(summary)]
    if other is not None:
        names = (str(summary.path), str(other.path))
        runs = summary.runs[-1], other.runs[-1]
        parts.append(comparison_panel(*runs, names) + comparison_charts(*runs, names))
    parts += [_run(run, len(summary.runs) > 1) for run in summary.runs]
    parts.append(f"<script>{SCRIPT}</script></body></html>\n")
    return "".join(parts)


def _header(summary: Summary) -> str:
    counts = summary.counts
    size = f"{counts.bytes / 1e6:,.1f} MB" if counts.bytes >= 1e5 else f"{counts.bytes:,} bytes"
    runs = summary.runs
    lines = [
        "<h1>nanovllm run report</h1>",
        f'<p class="soft"><code>{escape(str(summary.path))}</code> · {size} · {counts.lines:,} lines'
        + (f" · {_moment(runs[0].first_ts)} to {_moment(runs[-1].last_ts)}" if runs[0].first_ts else "")
        + "</p>",
    ]
    if counts.broken:
        lines.append(
            f'<div class="panel warn"><b>{counts.broken:,} of {counts.lines:,} lines could not be read</b> and are '
            f"left out. The first: <code>{escape(counts.first_broken)}</code></div>"
        )
    notes = []
    if len(runs) > 1:
        notes.append(f"The log holds {len(runs)} engines. They are shown one after another, each with a time axis.")
    if summary.num_left_out:
        notes.append(f"{summary.num_left_out:,} more engines are left out: a page shows the first {MOST_RUNS}.")
    if summary.num_other_ranks:
        notes.append(
            f"{summary.num_other_ranks:,} lines of other ranks are not used for the steps: rank 0 logs every step. "
            "Their memory and messages are shown."
        )
    if summary.rank_files:
        notes.append(f"Read too: {', '.join(path.name for path in summary.rank_files[:16])}.")
    lines += [f'<p class="note">{escape(note)}</p>' for note in notes]
    if len(runs) > 1:
        links = "".join(f'<a href="#run{run.number}">Engine {run.number}</a>' for run in runs)
        lines.append(f"<nav>{links}</nav>")
    return "".join(lines)


def _moment(ts: str) -> str:
    """Returns an RFC 3339 timestamp shortened to seconds."""
    return escape(f"{ts[:19].replace('T', ' ')}{' UTC' if ts.endswith(('Z', '+00:00')) else ''}")


def _run(run: Run, is_one_of_many: bool) -> str:
    resolved = run.settings.get("engine.resolved", {})
    model = str(resolved.get("model") or run.settings.get("engine.model", {}).get("model") or "model not known")
    about = [
        f"<code>{escape(model)}</code>",
        *(escape(str(resolved[name])) for name in ("device", "dtype") if name in resolved),
    ]
    if run.pid is not None:
        about.append(f"process {run.pid}")
    title = f"Engine {run.number}" if is_one_of_many else "The run"
    parts = [f'<section id="run{run.number}"><h2>{title}</h2><p class="soft">{" · ".join(about)}</p>']
    parts += [verdict_panel(run), _cards(run)]
    parts += _notices(run)
    parts += [time_panels(run), latency_panels(run), request_panel(run), request_table(run)]
    parts += [preemption_table(run), slow_step_panel(run), memory_table(run)]
    parts += [_generations(run), _startup(run), _configuration(run), "</section>"]
    return "".join(parts)


def _cards(run: Run) -> str:
    requests = run.requests
    cards: list[tuple[str, str]] = []
    if run.origin is not None:
        cards.append((seconds_text(run.duration), "from the first request to the last line"))
    if requests.num_added or requests.num_finished:
        cards.append(
            (f"{requests.num_finished:,}", f"requests finished of {max(requests.num_added, requests.num_finished):,}")
        )
    for cause in ("failed", "refused", "abort", "left"):
        if requests.causes[cause]:
            cards.append((f"{requests.causes[cause]:,}", f"requests ended by cause: {cause}"))
    if run.num_steps:
        cards.append((f"{run.num_steps:,}", f"steps, {run.num_prefill_steps:,} with prefill"))
        cards.append((f"{run.num_prefill_tokens:,}", "prompt tokens computed"))
        cards.append((f"{run.num_output_tokens:,}", "tokens sampled"))
        if run.duration:
            cards.append(
                (number_text(run.num_output_tokens / run.duration), "tokens sampled per second, including idle time")
            )
    elif run.line_prompt_tokens:
        cards.append((f"{run.line_prompt_tokens:,}", "prompt tokens scheduled"))
        cards.append((f"{run.line_decode_tokens:,}", "tokens decoded up to the last decode line"))
    for name, label in (("ttft_ms", "time to first token, median"), ("itl_ms", "inter-token latency, median")):
        sketch = requests.latencies[name]
        if sketch.count:
            cards.append((duration_text(sketch.quantile(0.5)), label))
    rate = run.statistics.hit_rate()
    if rate is not None:
        cards.append((f"{100 * rate:.1f} %", "of prompt tokens looked up were in the prefix cache"))
    elif requests.num_prompt_tokens:
        share = requests.num_cached_tokens / requests.num_prompt_tokens
        cards.append((f"{100 * share:.1f} %", "of prompt tokens from the prefix cache"))
    peak = cache_peak(run)
    if peak is not None:
        blocks = run.number_setting("num_blocks") or run.num_blocks
        cards.append((f"{100 * peak:.1f} %", f"of {blocks:,.0f} KV blocks used at the peak"))
    cards.append((f"{run.num_preemptions:,}", "preemptions"))
    shown = "".join(f'<div class="card"><b>{value}</b><span>{escape(label)}</span></div>' for value, label in cards)
    return f'<div class="cards">{shown}</div>'


def _notices(run: Run) -> list[str]:
    notices = []
    if run.problems:
        items = "".join(f"<li>{escape(problem)}</li>" for problem in run.problems)
        more = f" (the first {len(run.problems)})" if run.num_problems > len(run.problems) else ""
        notices.append(
            f'<div class="panel bad"><h3>Warnings and errors: {run.num_problems:,}{more}</h3><ul>{items}</ul></div>'
        )
    if run.requests.num_lost:
        notices.append(f'<div class="panel bad">{run.requests.num_lost:,} requests were lost when a step failed.</div>')
    if run.requests.pending:
        notices.append(
            f'<div class="panel warn"><b>{len(run.requests.pending):,} requests had not finished</b> when the log '
            "ended: the program was stopped, is still running, or hangs.</div>"
        )
    if run.origin is None:
        notices.append('<div class="panel">This part of the log has no request and no step.</div>')
    elif not run.at_debug:
        notices.append(
            '<div class="panel warn"><b>This log is at INFO.</b> The charts below use its batch and statistics lines. '
            "<code>NANOVLLM_LOG_LEVEL=DEBUG</code> adds each step: its time, the slowest ones and why, and the use of "
            "the KV cache step by step.</div>"
        )
    if run.num_step_jumps > run.num_failures:
        notices.append(
            f'<div class="panel warn">The step numbers jump {run.num_step_jumps:,} times: lines are missing, or two '
            "engines of one process ran at the same time and are mixed here.</div>"
        )
    return notices


def _generations(run: Run) -> str:
    if not run.generations:
        return ""
    columns = (
        ("num_steps", "steps", number_text),
        ("total_output_tokens", "output tokens", number_text),
        ("prefill_time", "in steps with prefill", seconds_text),
        ("decode_time", "in other steps", seconds_text),
    )
    head = "".join(f'<th class="num">{label}</th>' for _, label, _ in columns)
    rows = []
    for generation in run.generations:
        cells = []
        for name, _, text in columns:
            value = number(generation, name)
            cells.append(f'<td class="num">{"" if value is None else text(value)}</td>')
        rows.append(f"<tr><td>{seconds_text(generation['at'])}</td>{''.join(cells)}</tr>")
    return (
        f'<div class="panel"><h3>Calls of generate</h3><div class="scroll"><table><tr><th>complete at</th>{head}</tr>'
        f"{''.join(rows)}</table></div></div>"
    )


def _startup(run: Run) -> str:
    startup = run.settings.get("engine.startup", {})
    seconds = startup.get("seconds")
    if not isinstance(seconds, dict):
        return ""
    parts = [(str(name), value) for name in seconds if (value := number(seconds, name)) is not None and value > 0]
    bar = share_bar("Where the start-up time went", parts)
    total = number(startup, "total_seconds") or sum(value for _, value in parts)
    return f'<div class="panel"><h3>Start-up: {seconds_text(total)}</h3>{bar}</div>'


_SETTINGS = {
    "engine.versions": "Versions",
    "engine.resolved": "Settings of the engine",
    "engine.config": "Arguments",
    "model.config": "Model",
    "model.weights": "Weights",
    "attention.selected": "Attention",
    "kv_cache.sizing": "KV cache: how its size was determined",
    "kv_cache.config": "KV cache",
    "kv_cache.allocated": "KV cache: allocated",
}


def _configuration(run: Run) -> str:
    groups = []
    for event, title in _SETTINGS.items():
        if event in run.settings:
            items = "".join(
                f"<div><span>{escape(name)}</span><b>{escape(_setting_text(value))}</b></div>"
                for name, value in run.settings[event].items()
            )
            groups.append(f'<h3 style="margin-top:10px">{title}</h3><div class="columns">{items}</div>')
    if not groups:
        return ""
    return f'<div class="panel"><details open><summary>Configuration</summary>{"".join(groups)}</details></div>'


def _setting_text(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, dict):
        return ", ".join(f"{name}: {_setting_text(inner)}" for name, inner in value.items())
    return str(value)[:300]
