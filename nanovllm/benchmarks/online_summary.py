"""Figures of online runs: percentiles and goodput of one run, medians over runs, and both as text.

Latencies are those of requests that were completed. The time between tokens (ITL) is taken for each token: a delta of
k tokens that comes t after the previous one counts as k gaps of t/k. The longest gap is the longest t of a request.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from nanovllm.benchmarks.online import Bounds, OnlineRun

MAX_LATENESS_MS = 5.0  # p99 above which the load generator is part of what was measured
QUANTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99}
LATENCIES = {"ttft": "TTFT", "itl": "ITL", "latency": "end to end", "longest_gap": "longest gap"}
RATIOS = {
    "ttft_p50_ms": "TTFT p50",
    "ttft_p99_ms": "TTFT p99",
    "itl_p50_ms": "ITL p50",
    "itl_p99_ms": "ITL p99",
    "output_tokens_per_second": "output tokens/s",
}
_SHOWN_ERRORS = 3

Figures = dict[str, float | None]  # by name; None: no request was completed


@dataclass(frozen=True)
class RunSummary:
    """The figures of one run of one engine. Names of `figures` end in their unit."""

    engine: str
    rate: float  # requests/s
    seed: int
    num_requests: int  # that ended
    num_failed: int
    num_unfinished: int  # of an interrupted run
    errors: dict[str, int]  # of failed requests, how many each
    figures: Figures


def summarize_run(engine: str, rate: float, seed: int, run: OnlineRun, bounds: Bounds) -> RunSummary:
    """Returns the figures of one run."""
    records = run.records
    completed = [record for record in records if record.error is None]
    seconds = run.seconds or None
    num_tokens = sum(record.num_output_tokens for record in completed)
    figures: Figures = {
        "seconds": run.seconds,
        "output_tokens_per_second": num_tokens / seconds if seconds else None,
        "requests_per_second": len(completed) / seconds if seconds else None,
        "goodput_requests_per_second": sum(map(bounds.met_by, completed)) / seconds if seconds else None,
        "mean_prompt_tokens": _mean([record.prompt_len for record in completed]),
        "mean_output_tokens": _mean([record.num_output_tokens for record in completed]),
        **_quantiles("ttft", [record.ttft for record in completed if record.ttft is not None]),
        **_quantiles("itl", [gap for record in completed for gap in record.gaps]),
        **_quantiles("latency", [record.latency for record in completed]),
        **_quantiles("longest_gap", [record.longest_gap for record in completed]),
        **_quantiles("lateness", [record.lateness for record in records]),
    }
    return RunSummary(
        engine=engine,
        rate=rate,
        seed=seed,
        num_requests=len(records),
        num_failed=len(records) - len(completed),
        num_unfinished=len(run.requests) - len(records),
        errors=dict(Counter(record.error for record in records if record.error is not None)),
        figures=figures,
    )


def _mean(counts: Sequence[int]) -> float | None:
    return statistics.fmean(counts) if counts else None


def _quantiles(name: str, seconds: Sequence[float]) -> Figures:
    """Returns the percentiles of `seconds` and their maximum, in milliseconds."""
    found = [*np.quantile(seconds, [*QUANTILES.values(), 1.0])] if seconds else [None] * (len(QUANTILES) + 1)
    names = [f"{name}_{quantile}_ms" for quantile in (*QUANTILES, "max")]
    return {each: None if value is None else float(value) * 1e3 for each, value in zip(names, found, strict=True)}


def rows_of(summary: RunSummary, run: OnlineRun) -> list[dict[str, Any]]:
    """Returns a row for each request of a run, in the order in which they ended."""
    label = {"engine": summary.engine, "rate": summary.rate, "seed": summary.seed}
    return [
        {
            **label,
            **{name: value for name, value in vars(record).items() if name != "gaps"},
            "mean_itl": record.mean_itl,
        }
        for record in run.records
    ]


def result_of(runs: Sequence[RunSummary]) -> dict[str, Any]:
    """Returns the report's entry for the runs of one engine at one rate: medians over them, with least and most."""
    figures = {}
    for name in runs[0].figures:
        values = [value for run in runs if (value := run.figures[name]) is not None]
        figures[name] = statistics.median(values) if values else None
        figures[f"{name}_least"] = min(values, default=None)
        figures[f"{name}_most"] = max(values, default=None)
    errors: Counter[str] = Counter()
    for run in runs:
        errors.update(run.errors)
    return {
        "engine": runs[0].engine,
        "rate": runs[0].rate,
        "num_requests": sum(run.num_requests for run in runs),
        "num_failed": sum(run.num_failed for run in runs),
        "num_unfinished": sum(run.num_unfinished for run in runs),
        "errors": dict(errors.most_common()),
        **figures,
        "runs": [asdict(run) for run in runs],
    }


def described(result: Mapping[str, Any], bounds: Bounds) -> str:
    """Returns the table of one entry."""
    num_runs = len(result["runs"])
    over = f"median of {num_runs} runs, least to most" if num_runs > 1 else "one run"
    head = (
        f"\n{result['engine']}, {result['rate']:g} requests/s: {result['num_requests']:,} requests, "
        f"{result['num_failed']:,} failed"
    )
    if result["num_unfinished"]:
        head += f", {result['num_unfinished']:,} unfinished"
    if result["mean_prompt_tokens"] is None:
        return "\n".join([head, *_error_lines(result)])
    lines = [
        f"{head}; {result['mean_prompt_tokens']:.0f} tokens in and {result['mean_output_tokens']:.0f} out on average",
        f"  {f'ms ({over})':<42}" + "".join(f"{quantile:<26}" for quantile in QUANTILES).rstrip(),
    ]
    for name, label in LATENCIES.items():
        cells = [_spread(result, f"{name}_{quantile}_ms", num_runs) for quantile in QUANTILES]
        lines.append(f"  {label:<42}" + "".join(f"{cell:<26}" for cell in cells).rstrip())
    lines += [
        f"  output tokens/s: {_spread(result, 'output_tokens_per_second', num_runs)}",
        f"  requests/s: {_spread(result, 'requests_per_second', num_runs)}; goodput "
        f"{_spread(result, 'goodput_requests_per_second', num_runs)} with TTFT ≤ {bounds.ttft_ms:g} ms and a mean ITL "
        f"≤ {bounds.itl_ms:g} ms",
        f"  the load generator was late by {_spread(result, 'lateness_p99_ms', num_runs)} ms at p99",
    ]
    if (result["lateness_p99_ms_most"] or 0) > MAX_LATENESS_MS:
        lines.append(
            f"  Warning: more than {MAX_LATENESS_MS:g} ms late, so these figures are those of the load generator too."
        )
    return "\n".join([*lines, *_error_lines(result)])


def _spread(result: Mapping[str, Any], name: str, num_runs: int) -> str:
    """Returns a figure as text, with least and most if there are several runs."""
    if result[name] is None:
        return "–"
    median, least, most = (_number(result[f"{name}{suffix}"]) for suffix in ("", "_least", "_most"))
    return median if num_runs == 1 else f"{median} ({least}–{most})"


def _number(value: float) -> str:
    """Returns three digits or more: 1.23, 12.3, 1,234."""
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:,.0f}"


def _error_lines(result: Mapping[str, Any]) -> list[str]:
    errors = list(result["errors"].items())
    lines = [f"  {count:,} × {text}" for text, count in errors[:_SHOWN_ERRORS]]
    rest = sum(count for _, count in errors[_SHOWN_ERRORS:])
    return [*lines, f"  {rest:,} × other errors"] if rest else lines


def ratios_of(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> Figures:
    """Returns our medians over theirs; None where one is missing."""
    return {name: ours[name] / theirs[name] if ours[name] is not None and theirs[name] else None for name in RATIOS}


def described_ratios(found: Mapping[str, float | None], rate: float, engines: str) -> str:
    """Returns the ratios as one line. engines: such as "nanovllm / vLLM"."""
    parts = [f"{RATIOS[name]} {'–' if value is None else f'{value:.2f}'}" for name, value in found.items()]
    return f"\n{engines} at {rate:g} requests/s: {', '.join(parts)}"
