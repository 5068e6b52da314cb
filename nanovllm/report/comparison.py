"""The comparison of two logs: their figures side by side, and the settings in which they differ."""

from __future__ import annotations

from nanovllm.report.answer import Answer
from nanovllm.report.answer_run import LATENCIES, run_facts
from nanovllm.report.log_file import Record, number
from nanovllm.report.summary import Summary
from nanovllm.report.words import per_cent, time_text

_SAME = 0.02  # a change of less is said to be none


def compare(first: Summary, second: Summary) -> Answer:
    """Compares the last engine of each log."""
    one, two = run_facts(first.runs[-1]), run_facts(second.runs[-1])
    figures = {}
    lines = [f"{first.path} → {second.path}"]
    for name, (a, b, kind) in figure_pairs(one, two).items():
        change = b / a - 1 if a and b is not None else None
        figures[name] = {"first": a, "second": b, "change": change}
        if a is not None or b is not None:
            lines.append(f"{name}: {value_text(a, kind)} → {value_text(b, kind)}{_change_text(change)}")
    settings = differing_settings(one, two)
    lines += [f"{name}: {a} → {b}" for name, (a, b) in settings.items()] or ["The settings are the same."]
    for path, facts in ((first.path, one), (second.path, two)):
        lines.append(f"Verdict on {path}: {facts['verdict']['sentence']}")
    facts = {
        "first": one,
        "second": two,
        "figures": figures,
        "settings": {name: {"first": a, "second": b} for name, (a, b) in settings.items()},
    }
    return Answer(facts, lines)


Pair = tuple[float | None, float | None, str]  # the figure of each run, and its kind: ms, share, count


def figure_pairs(one: Record, two: Record) -> dict[str, Pair]:
    """Returns the figures of two runs by their names."""
    pairs: dict[str, Pair] = {}

    def add(name: str, kind: str, *path: str) -> None:
        values = []
        for facts in (one, two):
            inner = facts
            for part in path[:-1]:
                inner = inner.get(part) or {}
            values.append(number(inner, path[-1]))
        pairs[name] = (values[0], values[1], kind)

    for name, title in LATENCIES.items():
        for quantile in ("p50", "p99", "max"):
            add(f"{title}, {quantile}", "ms", "latencies_ms", name, quantile)
    add("output tokens per second", "count", "tokens", "output_per_second")
    add("prompt tokens per second", "count", "tokens", "prompt_per_second")
    add("steps", "count", "steps", "num")
    add("time of the steps", "s", "steps", "wall_s")
    add("share of the host", "share", "steps", "host_share")
    add("preemptions", "count", "preemptions", "num")
    add("peak use of the KV cache", "share", "cache", "peak_usage")
    add("prefix hit rate", "share", "cache", "hit_rate")
    add("start-up", "s", "startup", "total_seconds")
    return pairs


def differing_settings(one: Record, two: Record) -> dict[str, tuple[object, object]]:
    """Returns the settings, versions and backends that differ."""
    found = {}
    for group in ("configuration", "versions", "variables", "backends"):
        a, b = one.get(group), two.get(group)
        a, b = a if isinstance(a, dict) else {}, b if isinstance(b, dict) else {}
        for name in dict.fromkeys([*a, *b]):
            if a.get(name) != b.get(name):
                found[name] = (a.get(name), b.get(name))
    return found


def value_text(value: float | None, kind: str) -> str:
    """Returns a figure as text, by its kind."""
    if value is None:
        return "not known"
    if kind == "share":
        return per_cent(value)
    return time_text(value if kind == "s" else value / 1e3) if kind in ("s", "ms") else f"{value:,.6g}"


def _change_text(change: float | None) -> str:
    if change is None:
        return ""
    return " (same)" if abs(change) < _SAME else f" ({100 * change:+.0f} %)"
