"""The comparison of two logs: their figures side by side, and the settings in which they differ."""

from __future__ import annotations

from dataclasses import dataclass

from nanovllm.report.answer import Answer
from nanovllm.report.answer_run import LATENCIES, run_facts
from nanovllm.report.log_file import Record, number
from nanovllm.report.summary import Summary
from nanovllm.report.verdict import verdict
from nanovllm.report.words import per_cent, time_text

_SAME = 0.02  # a change of less is said to be none


@dataclass(frozen=True)
class Pair:
    """A figure of two runs. kind: ms, s, share or count."""

    name: str
    first: float | None
    second: float | None
    kind: str

    def is_known(self) -> bool:
        """Returns whether a run has the figure."""
        return self.first is not None or self.second is not None

    @property
    def change(self) -> float | None:
        """The change as a share of the first; None if it is not known."""
        return self.second / self.first - 1 if self.first and self.second is not None else None

    def text(self, value: float | None) -> str:
        if value is None:
            return "not known"
        if self.kind == "share":
            return per_cent(value)
        if self.kind == "count":
            return f"{value:,.6g}"
        return time_text(value if self.kind == "s" else value / 1e3)


def compare(first: Summary, second: Summary) -> Answer:
    """Compares the last engine of each log."""
    one, two = (run_facts(summary.runs[-1], verdict(summary.runs[-1])) for summary in (first, second))
    figures = pairs(one, two)
    lines = [f"{first.path} → {second.path}"]
    for pair in filter(Pair.is_known, figures):
        lines.append(f"{pair.name}: {pair.text(pair.first)} → {pair.text(pair.second)}{_change_text(pair.change)}")
    settings = differing_settings(one, two)
    lines += [f"{name}: {a} → {b}" for name, (a, b) in settings.items()] or ["The settings are the same."]
    for path, facts in ((first.path, one), (second.path, two)):
        lines.append(f"Verdict on {path}: {facts['verdict']['sentence']}")
    facts = {
        "first": one,
        "second": two,
        "figures": {pair.name: {"first": pair.first, "second": pair.second, "change": pair.change} for pair in figures},
        "settings": {name: {"first": a, "second": b} for name, (a, b) in settings.items()},
    }
    return Answer(facts, lines)


def pairs(one: Record, two: Record) -> list[Pair]:
    """Returns the figures of two runs."""
    found: list[Pair] = []

    def add(name: str, kind: str, *path: str) -> None:
        values = []
        for facts in (one, two):
            inner = facts
            for part in path[:-1]:
                inner = inner.get(part) or {}
            values.append(number(inner, path[-1]))
        found.append(Pair(name, values[0], values[1], kind))

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
    return found


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


def _change_text(change: float | None) -> str:
    if change is None:
        return ""
    return " (same)" if abs(change) < _SAME else f" ({100 * change:+.0f} %)"
