"""Figures of online runs, on records whose figures are worked out by hand."""

from __future__ import annotations

import pytest

from nanovllm.benchmarks.online import Bounds, OnlineRun, RequestRecord
from nanovllm.benchmarks.online_summary import (
    RunSummary,
    described,
    described_ratios,
    ratios_of,
    result_of,
    rows_of,
    summarize_run,
)
from tests.benchmarks.test_online import request

BOUNDS = Bounds(ttft_ms=500, itl_ms=50)


def record(
    index: int, ttft: float | None = 0.1, itl: float = 0.01, error: str | None = None, lateness: float = 0.0
) -> RequestRecord:
    return RequestRecord(
        index=index,
        at=0.0,
        lateness=lateness,
        prompt_len=10 + index,
        output_len=5,
        num_output_tokens=5,
        ttft=ttft,
        latency=(ttft or 0) + 4 * itl,
        longest_gap=2 * itl,
        error=error,
        gaps=[itl] * 4,
    )


def summary_of(*records: RequestRecord, seconds: float = 10.0, seed: int = 0, num_requests: int = 0) -> RunSummary:
    requests = [request(index, 0, 5) for index in range(num_requests or len(records))]
    return summarize_run("engine", 10.0, seed, OnlineRun(requests, list(records), seconds), BOUNDS)


def test_percentiles() -> None:
    """TTFT of 1 … 101 ms and ITL of 0.1 … 10.1 ms, in any order: the percentile p is at 1 + p."""
    records = [record(index, ttft=1e-3 * (1 + index), itl=1e-4 * (1 + index)) for index in reversed(range(101))]
    figures = summary_of(*records).figures
    for name, p50, p90, p99, most in (
        ("ttft", 51, 91, 100, 101),
        ("itl", 5.1, 9.1, 10.0, 10.1),
        ("longest_gap", 10.2, 18.2, 20.0, 20.2),
        ("latency", 71.4, 127.4, 140.0, 141.4),
    ):
        found = [figures[f"{name}_{quantile}_ms"] for quantile in ("p50", "p90", "p99", "max")]
        assert found == pytest.approx([p50, p90, p99, most])
    assert figures["output_tokens_per_second"] == pytest.approx(50.5)
    assert figures["requests_per_second"] == pytest.approx(10.1)
    assert figures["mean_prompt_tokens"] == pytest.approx(60)


@pytest.mark.parametrize(
    ("ttft", "itl", "error", "is_good"),
    [
        (0.1, 0.01, None, True),
        (0.5, 0.05, None, True),
        (0.501, 0.01, None, False),
        (0.1, 0.0501, None, False),
        (0.1, 0.01, "gone", False),
        (None, 0.0, "refused", False),
    ],
)
def test_goodput_counts_completed_requests_within_both_bounds(
    ttft: float | None, itl: float, error: str | None, is_good: bool
) -> None:
    assert BOUNDS.met_by(record(0, ttft, itl, error)) == is_good
    figures = summary_of(record(0), record(1, ttft, itl, error), seconds=4.0).figures
    assert figures["goodput_requests_per_second"] == (2 if is_good else 1) / 4


def test_failed_requests_are_counted_and_give_no_latency() -> None:
    summary = summary_of(record(0), record(1, ttft=9.0, error="gone"), record(2, error="gone"), num_requests=5)
    assert (summary.num_requests, summary.num_failed, summary.num_unfinished) == (3, 2, 2)
    assert summary.errors == {"gone": 2}
    assert summary.figures["ttft_max_ms"] == pytest.approx(100)
    assert summary.figures["output_tokens_per_second"] == pytest.approx(0.5)


def test_medians_and_spread_over_runs() -> None:
    runs = [summary_of(record(0, ttft=ttft), seed=seed) for seed, ttft in enumerate((0.3, 0.1, 0.2))]
    result = result_of(runs)
    assert [result[f"ttft_p50_ms{suffix}"] for suffix in ("", "_least", "_most")] == pytest.approx([200, 100, 300])
    assert [run["seed"] for run in result["runs"]] == [0, 1, 2]
    text = described(result, BOUNDS)
    assert "engine, 10 requests/s: 3 requests, 0 failed; 10 tokens in and 5 out on average" in text
    assert "median of 3 runs, least to most" in text
    assert "200 (100–300)" in text
    assert "goodput 0.10 (0.10–0.10) with TTFT ≤ 500 ms and a mean ITL ≤ 50 ms" in text
    assert "Warning" not in text


def test_a_late_generator_is_said() -> None:
    late = described(result_of([summary_of(record(0, lateness=0.0051))]), BOUNDS)
    assert "the load generator was late by 5.10 ms at p99" in late
    assert "Warning: more than 5 ms late" in late
    punctual = described(result_of([summary_of(record(0, lateness=0.0049))]), BOUNDS)
    assert "Warning" not in punctual


def test_a_rate_at_which_all_fail_has_errors_and_no_figures() -> None:
    errors = ["one", "one", "two", "three", "four", "five"]
    result = result_of([summary_of(*(record(index, None, error=error) for index, error in enumerate(errors)))])
    assert result["ttft_p50_ms"] is None
    text = described(result, BOUNDS)
    assert "6 requests, 6 failed" in text
    assert "2 × one" in text
    assert "2 × other errors" in text
    assert "p50" not in text


def test_an_interrupted_run_says_how_many_are_unfinished() -> None:
    assert "1 requests, 0 failed, 3 unfinished;" in described(
        result_of([summary_of(record(0), num_requests=4)]), BOUNDS
    )


def test_ratios() -> None:
    ours = result_of([summary_of(record(0, ttft=0.1), seconds=5)])
    theirs = result_of([summary_of(record(0, ttft=0.2), seconds=10)])
    found = ratios_of(ours, theirs)
    assert found["ttft_p50_ms"] == pytest.approx(0.5)
    assert found["output_tokens_per_second"] == pytest.approx(2.0)
    failed = result_of([summary_of(record(0, None, error="gone"))])
    assert set(ratios_of(ours, failed).values()) == {None}
    assert "TTFT p50 0.50, TTFT p99 0.50" in described_ratios(found, 10, "nanovllm / vLLM")


def test_rows_have_everything_but_the_gaps() -> None:
    summary = summary_of(record(0, itl=0.02))
    run = OnlineRun([request(0, 0, 5)], [record(0, itl=0.02)], 1.0)
    (row,) = rows_of(summary, run)
    assert row["engine"] == "engine"
    assert row["mean_itl"] == pytest.approx(0.02)
    assert row["ttft"] == 0.1
    assert "gaps" not in row
