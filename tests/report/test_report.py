"""The page against logs of known figures, broken logs, logs at INFO, logs of several engines, and large ones."""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import re
import tracemalloc
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path

import pytest

from nanovllm.errors import InvalidArgumentError
from nanovllm.report.__main__ import main
from nanovllm.report.log_file import LogFile
from nanovllm.report.page import render
from nanovllm.report.run import Run
from nanovllm.report.style import CSS
from nanovllm.report.summary import MOST_RUNS, summarise
from tests.processes import run_python
from tests.report.synthetic_log import BOOT, Line, finished, line, simulated, startup, write
from tests.report.test_answers import slow_log

SVG = re.compile(r'<div class="drawing">(<svg .*?</svg>)</div>', re.DOTALL)


def page_of(path: Path) -> str:
    return render(summarise(path))


def only_run(path: Path) -> Run:
    (run,) = summarise(path).runs
    return run


def step(at: float, number: int, *, kind: str = "decode", wall_ms: float = 10.0, **fields: object) -> Line:
    values = {
        "num_prefill_tokens": 0, "num_prefill_seqs": 0, "num_decode_seqs": 2, "num_output_tokens": 2, "preempted": 0,
        "num_running": 2, "num_waiting": 0, "used_blocks": 5, "num_blocks": 10, "gpu_ms": None,
    }  # fmt: skip
    return line(at, "step.done", step=number, kind=kind, wall_ms=wall_ms, **{**values, **fields})


def known_log() -> list[Line]:
    """Two requests that arrive at 10 s: a prefill of 300 tokens until 11 s, then ten decode steps of 100 ms each."""
    lines = startup()
    for seq_id in (0, 1):
        who = {"request_id": f"generate-{seq_id}", "seq_id": seq_id}
        lines.append(line(10.0, "request.added", num_prompt_tokens=150, max_tokens=11, **who))
    lines.append(line(10.0, "batch.prefill", "INFO", step=1, size=2, batched_tokens=300, seqs=[]))
    prefill = {"num_prefill_tokens": 300, "num_prefill_seqs": 2, "num_decode_seqs": 0}
    lines.append(step(11.0, 1, kind="prefill", wall_ms=1000.0, used_blocks=20, num_blocks=40, **prefill))
    for number in range(2, 12):
        lines.append(line(11.0 + 0.1 * (number - 2), "batch.decode", step=number, decode_step=number - 1, size=2))
        if number == 7:
            lines.append(line(11.5, "graph.captured", size=2, elapsed_ms=31.0))
        wall = 95.0 if number != 7 else 100.0
        lines.append(step(11.0 + 0.1 * (number - 1), number, wall_ms=wall, used_blocks=30, num_blocks=40))
    for seq_id, cached in ((0, 0), (1, 75)):
        request = {
            "request_id": f"generate-{seq_id}", "seq_id": seq_id, "prompt": 150, "cached": cached, "out": 11,
            "arrival": 10.0, "scheduled": 10.25, "token": 11.0, "preemptions": 0,
        }  # fmt: skip
        lines.append(finished(request, 12.0))
    return lines


@pytest.fixture
def known(tmp_path: Path) -> Path:
    return write(tmp_path / "run.jsonl", known_log())


# ---- figures


def test_totals_and_duration(known):
    run = only_run(known)
    assert run.duration == pytest.approx(2.0)
    assert (run.num_steps, run.num_prefill_steps) == (11, 1)
    assert (run.num_prefill_tokens, run.num_output_tokens) == (300, 22)
    assert (run.requests.num_added, run.requests.num_finished, run.requests.num_aborted) == (2, 2, 0)
    assert (run.peak_blocks, run.num_blocks) == (30, 40)


def test_throughput_over_time(known):
    """300 tokens in the first second and none after; two tokens in the first second, twenty in the second one."""
    timeline = only_run(known).timeline
    rates = timeline.rates("prompt")
    half = len(rates) // 2
    assert rates[: half - 1] == pytest.approx([300] * (half - 1))
    assert rates[half + 1 :] == pytest.approx([0] * (len(rates) - half - 1))
    assert sum(timeline.sums("output")) == pytest.approx(22)
    assert timeline.rates("output")[half + 3] == pytest.approx(20, rel=0.1)  # 95 of each 100 ms


def test_latencies(known):
    requests = only_run(known).requests
    expected = {"queue_ms": 250.0, "ttft_ms": 1000.0, "itl_ms": 100.0, "e2e_ms": 2000.0}
    for name, ms in expected.items():
        assert requests.latencies[name].count == 2
        assert requests.latencies[name].quantile(0.5) == pytest.approx(ms, rel=0.006)
    assert only_run(known).token_gaps.quantile(0.5) == pytest.approx(100.0, rel=0.006)


def test_the_page_shows_the_figures(known):
    page = page_of(known)
    for figure in (
        "<b>2 s</b>",
        "<b>22</b>",
        "<b>300</b>",
        "<b>1 s</b>",
        "<b>100 ms</b>",
        "<b>25.0 %</b>",
        "<b>75.0 %</b>",
    ):
        assert figure in page
    assert "requests finished of 2" in page
    assert "Start-up: 6.17 s" in page
    assert "largest steps 2.6 s" in page
    assert "gpu_memory_utilization" in page
    assert "/models/qwen3-0.6b" in page


def test_the_slowest_step_says_what_was_in_it_and_why(known):
    steps = only_run(known).slow_steps.slowest_first()
    assert [slow.step for slow in steps[:2]] == [1, 7]
    assert steps[0].contents() == "prefill of 300 tokens in 2 prompts"
    assert steps[1].contents() == "decode of 2 sequences"
    assert steps[1].events == ("a CUDA graph for batch size 2 was captured in 31 ms",)
    assert "a CUDA graph for batch size 2 was captured in 31 ms" in page_of(known)


def test_prefill_beside_decode_and_preemption_are_reasons(tmp_path):
    lines = known_log()
    at = 12.0
    lines.append(line(at, "sequence.preempted", "INFO", seq_id=3, request_id="r3", num_tokens=900))
    lines.append(line(at, "batch.decode", "INFO", step=12, decode_step=11, size=2))
    lines.append(step(12.5, 12, kind="mixed", wall_ms=500.0, num_prefill_tokens=2048, num_prefill_seqs=1, preempted=1))
    run = only_run(write(tmp_path / "run.jsonl", lines))
    slow = next(slow for slow in run.slow_steps.slowest_first() if slow.step == 12)
    assert slow.contents() == "prefill of 2,048 tokens in 1 prompt beside decode of 2 sequences"
    reasons = slow.reasons(10.0, 300.0)
    assert reasons[0] == "50.0× the median mixed step"
    assert "seq_3 was preempted (900 tokens to compute again)" in reasons
    assert any("2 decodes waited for the prefill of 2,048 tokens" in reason for reason in reasons)
    assert run.num_preemptions == 1


def test_events_of_a_step_in_flight_are_told_for_those_that_wait_beside_it(tmp_path):
    """With two steps in flight, a capture for step 2 holds up the collection of step 1 as well."""
    lines = [
        line(1.0, "batch.decode", step=1, decode_step=1, size=1),
        line(1.1, "batch.decode", step=2, decode_step=2, size=2),
        line(1.4, "graph.captured", size=2, elapsed_ms=300),
        step(1.5, 1, wall_ms=500.0),
        step(1.6, 2, wall_ms=500.0),
    ]
    steps = only_run(write(tmp_path / "run.jsonl", lines)).slow_steps.slowest_first()
    events = {slow.step: slow.events for slow in steps}
    assert events[2] == ("a CUDA graph for batch size 2 was captured in 300 ms",)
    assert events[1] == ("a CUDA graph for batch size 2 was captured in 300 ms, for the step after it",)


def test_an_unexplained_step_says_so_and_gpu_time_is_compared(tmp_path):
    lines = [step(1.0 + number / 100, number, wall_ms=10.0) for number in range(2, 30)]
    lines.append(step(2.0, 30, wall_ms=300.0, gpu_ms=5.0))
    lines.append(step(2.5, 31, wall_ms=400.0))
    by_step = {s.step: s for s in only_run(write(tmp_path / "run.jsonl", lines)).slow_steps.slowest_first()}
    assert any("the GPU worked for 5.0 ms of it" in reason for reason in by_step[30].reasons(10.0, 0.0))
    assert any("no event explains it" in reason for reason in by_step[31].reasons(10.0, 0.0))


def test_a_capture_while_the_engine_starts_is_no_reason(tmp_path):
    lines = [*startup(), line(6.3, "graph.captured", size=512, elapsed_ms=900), step(7.0, 1)]
    (slow,) = only_run(write(tmp_path / "run.jsonl", lines)).slow_steps.slowest_first()
    assert slow.events == ()


def test_a_request_that_never_ends_is_shown(tmp_path):
    lines = known_log()
    lines.append(line(11.9, "request.added", request_id="hangs-9", seq_id=9, num_prompt_tokens=77, max_tokens=1))
    page = page_of(write(tmp_path / "run.jsonl", lines))
    assert "<b>1 requests had not finished</b>" in page
    assert "hangs-9: 77 prompt tokens; not finished when the log ends" in page


def test_preempted_time_is_drawn_until_the_blocks_come_back(tmp_path):
    lines = known_log()
    lines.insert(-2, line(11.2, "sequence.preempted", "INFO", seq_id=1, request_id="generate-1", num_tokens=160))
    lines.insert(-2, line(11.7, "blocks.allocated", seq_id=1, new=10, cache_hits=0))
    page = page_of(write(tmp_path / "run.jsonl", lines))
    assert "preempted: 500 ms" in page
    assert "preempted 1 ×" in page


def test_aborted_requests_are_no_latencies(tmp_path):
    request = {
        "request_id": "r", "seq_id": 0, "prompt": 10, "cached": 0, "out": 2, "arrival": 1.0, "scheduled": 1.0,
        "token": 1.5, "preemptions": 0, "cause": "abort",
    }  # fmt: skip
    run = only_run(write(tmp_path / "run.jsonl", [finished(request, 2.0)]))
    assert (run.requests.num_finished, run.requests.num_aborted) == (0, 1)
    assert run.requests.latencies["e2e_ms"].count == 0


def test_a_failed_step_loses_the_unfinished(tmp_path):
    lines = known_log()
    who = {"request_id": "lost", "seq_id": 5}
    lines.append(line(12.1, "request.added", num_prompt_tokens=7, max_tokens=1, **who))
    lines.append(line(12.2, "engine.error", "ERROR", "A step failed (RuntimeError('boom'))", what="failed"))
    page = page_of(write(tmp_path / "run.jsonl", lines))
    assert "1 requests were lost" in page
    assert "ERROR: A step failed (RuntimeError(&#x27;boom&#x27;))" in page


# ---- INFO


def test_a_log_at_info_gives_what_it_can_and_says_what_debug_adds(tmp_path):
    lines = [record for record in simulated(60) if record["level"] == "INFO"]
    path = write(tmp_path / "run.jsonl", lines)
    page, run = page_of(path), only_run(path)
    assert "This log is at INFO." in page
    assert "NANOVLLM_LOG_LEVEL=DEBUG" in page
    for title in ("Throughput", "Batch composition", "KV cache", "Requests running and waiting", "Calls of generate"):
        assert f"<h3>{title}</h3>" in page
    assert "The slowest steps" not in page
    assert run.line_prompt_tokens == sum(r["batched_tokens"] for r in lines if r["event"] == "batch.prefill")


def test_decode_tokens_are_counted_from_the_lines_that_info_has(tmp_path):
    """Every change of size has a line, so that the steps between two lines are all of the first one's size."""
    sizes = [4] * 25 + [3] * 7 + [5] * 9
    lines = []
    for number, size in enumerate(sizes, start=1):
        shown = number == 1 or number % 10 == 0 or size != sizes[number - 2]
        if shown:
            lines.append(line(number * 0.01, "batch.decode", "INFO", step=number, decode_step=number, size=size))
    run = only_run(write(tmp_path / "run.jsonl", lines))
    last = max(record["decode_step"] for record in lines)
    assert run.line_decode_tokens == sum(sizes[: last - 1])


def test_a_prefill_at_info_lasts_until_the_next_step_s_line(tmp_path):
    lines = [
        line(1.0, "batch.prefill", "INFO", step=1, size=1, batched_tokens=100),
        line(2.0, "batch.prefill", "INFO", step=2, size=1, batched_tokens=300),
        line(2.0, "batch.decode", "INFO", step=2, decode_step=1, size=1),  # the same step
        line(3.0, "batch.decode", "INFO", step=3, decode_step=2, size=2),
        line(4.0, "batch.prefill", "INFO", step=4, size=1, batched_tokens=50),
        line(5.0, "generation.memory", "INFO"),
    ]
    timeline = only_run(write(tmp_path / "run.jsonl", lines)).timeline
    rates = timeline.rates("line_prompt")
    for at, rate in ((0.5, 100), (1.5, 300), (2.5, 0), (3.5, 50)):
        assert rates[int(at / timeline.width)] == pytest.approx(rate)
    assert sum(timeline.sums("line_prompt")) == pytest.approx(450)


# ---- several engines


def test_engines_one_after_another_in_one_process(tmp_path):
    lines = known_log() + startup(model="/models/second", at=20.0)
    lines.append({**step(30.0, 1), "used_blocks": 1})
    summary = summarise(write(tmp_path / "run.jsonl", lines))
    assert [run.num_steps for run in summary.runs] == [11, 1]
    assert summary.runs[0].duration == pytest.approx(2.0)
    page = render(summary)
    assert "The log holds 2 engines" in page
    assert 'href="#run2"' in page
    assert 'id="run2"' in page
    assert "/models/second" in page


def test_processes_that_write_into_one_file(tmp_path):
    one, two = known_log(), [{**record, "pid": 99} for record in known_log()]
    mixed = [record for pair in zip(one, two, strict=True) for record in pair]
    summary = summarise(write(tmp_path / "run.jsonl", mixed))
    assert [run.num_steps for run in summary.runs] == [11, 11]


def test_very_many_engines_are_cut_and_counted(tmp_path):
    lines = [record for pid in range(MOST_RUNS + 5) for record in startup(pid=pid)]
    summary = summarise(write(tmp_path / "run.jsonl", lines))
    assert len(summary.runs) == MOST_RUNS
    assert summary.num_left_out == 5
    assert "5 more engines are left out" in render(summary)


def test_mixed_engines_of_one_process_are_said(tmp_path):
    lines = [step(1 + number / 10, number // 2 + 1 + 50 * (number % 2)) for number in range(20)]
    assert "two engines of one process" in page_of(write(tmp_path / "run.jsonl", lines))


def test_other_ranks_are_counted(tmp_path):
    lines = [*known_log(), {**step(12.0, 12), "rank": 1}]
    summary = summarise(write(tmp_path / "run.jsonl", lines))
    assert summary.runs[0].num_steps == 11
    assert "1 lines of other ranks are not used for the steps" in render(summary)


def test_the_log_of_another_rank_is_refused(tmp_path):
    path = write(tmp_path / "run.jsonl.rank1", [{**record, "rank": 1} for record in known_log()])
    with pytest.raises(InvalidArgumentError, match="the log of rank 0.*without .rankN"):
        summarise(path)


# ---- broken logs, and what is no log


def test_broken_lines_are_counted_and_said(tmp_path):
    good = [json.dumps(record) for record in known_log()]
    bad = [
        "{not json",
        '"a string"',
        "[1, 2]",
        '{"event": 3}',
        '{"event": "x"}',
        "[" * 100_000,
        '{"event": "x", "mono": NaN}',
    ]
    path = tmp_path / "run.jsonl"
    text = "\n".join([good[0], *bad, *good[1:]]) + '\n\n{"event": "step.done", "mono": 12'
    path.write_bytes(text.encode() + b"\xff\xfe\n")
    summary = summarise(path)
    assert summary.counts.broken == len(bad) + 1
    assert summary.runs[0].num_steps == 11
    page = render(summary)
    assert f"<b>{len(bad) + 1} of {len(good) + len(bad) + 2} lines could not be read</b>" in page
    assert "line 2: {not json" in page


def test_lines_that_no_figure_needs_are_counted_and_the_last_one_says_when_the_log_ends(tmp_path):
    layers = [line(8.0 + number, "attention.forward", step=1) for number in range(3)]
    log = write(tmp_path / "run.jsonl", [*startup(), line(7.0, "request.added", request_id="a", seq_id=0), *layers])
    assert sum(record["event"] == "attention.forward" for record in LogFile(log).records()) == 1
    summary = summarise(log)
    assert (summary.counts.lines, summary.counts.records, summary.counts.broken) == (len(startup()) + 4,) * 2 + (0,)
    assert summary.runs[0].duration == pytest.approx(3.0)
    warning = line(11.0, "attention.forward", "WARNING", step=1)
    assert summarise(write(log, [*startup(), warning, layers[0]])).runs[0].num_problems == 1


def test_a_line_of_megabytes_is_one_broken_line(tmp_path):
    path = write(tmp_path / "run.jsonl", known_log())
    with path.open("a") as file:
        file.write("x" * 3_000_000 + "\n" + json.dumps(step(12.1, 12)) + "\n")
    summary = summarise(path)
    assert summary.counts.broken == 1
    assert summary.runs[0].num_steps == 12
    assert summary.counts.bytes == path.stat().st_size


@pytest.mark.parametrize("value", [None, "text", [], {}, True, -5, 1e308])
def test_fields_of_unexpected_kinds_harm_nothing(tmp_path, value):
    lines = known_log()
    damaged = []
    for record in lines:
        for field in record.keys() - {"event", "mono"}:
            damaged.append({**record, field: value})
    page = page_of(write(tmp_path / "run.jsonl", lines + damaged))
    assert "</html>" in page


def test_nothing_of_the_log_becomes_markup(tmp_path):
    evil = '<script>alert("1")</script><img src=x onerror=alert(2)>'
    lines = known_log() + startup(model=evil, at=13.0)
    lines.append(line(14, "request.added", request_id=evil, seq_id=7, num_prompt_tokens=1, max_tokens=1))
    lines.append(line(14, evil, "WARNING", evil))
    lines.append(line(14.5, "step.done", kind=evil, step=1, wall_ms=3))
    path = tmp_path / "run.jsonl"
    write(path, [*lines])
    with path.open("a") as file:
        file.write(evil + "\n")
    page = page_of(path)
    assert page.count("<script") == 1  # the page's own
    assert "<img" not in page
    assert "&lt;script&gt;" in page


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (None, "it must be a file that exists"),
        ("", "it must be a file that is not empty"),
        (
            "[2026-11-21 08:00:00] [nanovllm.llm] [INFO] Starting\n" * 3,
            "it must be a file of JSON records; 'line 1: [2026",
        ),
        ("\n" * 30, "it must be a file that is not empty"),
        ("text\n" * 2000, "it must be a file of JSON records"),
    ],
)
def test_what_is_no_log_is_an_error_that_says_what_to_do(tmp_path, capsys, content, problem):
    path = tmp_path / "run.jsonl"
    if content is not None:
        path.write_text(content)
    assert main([str(path), "-o", str(tmp_path / "report.html")]) == 2
    error = capsys.readouterr().err
    assert problem in error
    assert "NANOVLLM_LOG_FORMAT=json" in error
    assert "NANOVLLM_LOG_FILE=run.jsonl" in error
    assert not (tmp_path / "report.html").exists()


def test_a_folder_and_a_page_that_can_not_be_written(tmp_path, known, capsys):
    assert main([str(tmp_path), "-o", str(tmp_path / "x.html")]) == 2
    assert "a file, not a folder" in capsys.readouterr().err
    assert main([str(known), "-o", str(tmp_path / "no" / "such" / "x.html")]) == 2
    assert "a file that can be written" in capsys.readouterr().err
    before = known.read_bytes()
    assert main([str(known), "-o", str(known)]) == 2
    assert "another file than the log" in capsys.readouterr().err
    assert known.read_bytes() == before


def test_a_long_log_in_text_is_refused_early(tmp_path):
    path = tmp_path / "run.jsonl"
    path.write_text("text\n" * 100_000)
    log = LogFile(path)
    with pytest.raises(InvalidArgumentError):
        list(log.records())
    assert log.counts.lines == 1000


def test_the_command(tmp_path, known):
    done = run_python("-X", "importtime", "-m", "nanovllm.report", str(known), "-o", str(tmp_path / "page.html"))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "page.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    assert "1 engine(s)" in done.stdout
    imported = {row.rpartition("|")[2].strip() for row in done.stderr.splitlines()}
    assert not imported & {"torch", "numpy", "transformers", "nanovllm.engine"}


# ---- the markup


class Balance(HTMLParser):
    """Collects tags that are not closed in order, and every attribute."""

    VOID = frozenset({"meta", "br", "hr", "link", "img", "input"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str | None]] = []
        self.problems: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.attributes += [(tag, name, value) for name, value in attrs]

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.problems.append(f"</{tag}> at {self.getpos()}")


@pytest.fixture(scope="module")
def large_page(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("report") / "run.jsonl"
    return page_of(write(path, simulated(150, num_blocks=200)))


def test_the_markup_is_well_formed(large_page):
    parser = Balance()
    parser.feed(large_page)
    parser.close()
    assert parser.problems == []
    assert parser.open == []
    drawings = SVG.findall(large_page)
    assert len(drawings) >= 12
    for drawing in drawings:
        ET.fromstring(drawing)


def test_the_page_needs_no_network_and_runs_its_own_script_only(large_page):
    parser = Balance()
    parser.feed(large_page)
    for tag, name, value in parser.attributes:
        assert name not in ("src", "srcset", "data", "action", "xlink:href"), (tag, name)
        assert not name.startswith("on"), (tag, name)
        assert name != "href" or (value or "").startswith("#")
    (script,) = re.findall(r"<script>(.*?)</script>", large_page, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in large_page
    for text in ("<link", "<iframe", "@import", "url(", "http:", "https:"):
        assert text not in large_page
    assert "default-src 'none'" in large_page


def test_light_and_dark(large_page):
    assert "prefers-color-scheme: dark" in large_page
    named = set(re.findall(r"var\((--\w+)\)", large_page))
    light, dark = large_page.split("@media (prefers-color-scheme: dark)")[:2]
    for name in named:
        assert f"{name}:" in light
        assert f"{name}:" in dark


def test_every_drawing_is_inside_its_frame_and_has_numbers_only(large_page):
    for drawing in map(ET.fromstring, SVG.findall(large_page)):
        _, _, width, height = map(float, drawing.attrib["viewBox"].split())
        for rect in drawing.iter("rect"):
            x, y, w, h = (float(rect.attrib[name]) for name in ("x", "y", "width", "height"))
            assert -1 <= x <= x + w <= width + 1
            assert -1 <= y <= y + h <= height + 1
        for shape in (*drawing.iter("polyline"), *drawing.iter("polygon")):
            for point in shape.attrib["points"].split():
                x, y = map(float, point.split(","))
                assert -1 <= x <= width + 1
                assert -1 <= y <= height + 1


def test_axes_have_units(large_page):
    units = {text.text for drawing in map(ET.fromstring, SVG.findall(large_page)) for text in drawing.iter("text")}
    assert {
        "tokens/s",
        "tokens in a step",
        "per cent",
        "requests",
        "ms, logarithmic",
        "time since the first request",
    } <= units


# ---- size


def peak_of(path: Path) -> int:
    tracemalloc.start()
    try:
        page_of(path)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_memory_does_not_grow_with_the_log(tmp_path):
    """Past what is drawn (600 requests), four times the log takes no more memory. 500 MB: docs/debugging.md."""
    small = write(tmp_path / "small.jsonl", simulated(620, max_output=20))
    large = write(tmp_path / "large.jsonl", simulated(2480, max_output=20))
    assert large.stat().st_size > 3.5 * small.stat().st_size
    first, second = peak_of(small), peak_of(large)
    assert second < 1.2 * first
    assert second < large.stat().st_size / 2


def test_the_monotonic_clock_may_begin_anywhere(tmp_path):
    shifted = [{**r, "mono": r["mono"] - BOOT - 10} for r in known_log() if r["event"] == "step.done"]
    assert only_run(write(tmp_path / "run.jsonl", shifted)).duration == pytest.approx(1.0)


# ---- the page answers first


def test_the_verdict_comes_first_and_names_the_setting(tmp_path):
    page = page_of(write(tmp_path / "run.jsonl", slow_log()))
    assert "<h3>The KV cache was too small: 2 preemptions" in page
    assert "Raise num_kvcache_blocks from 40 to 43 or more" in page
    assert page.index("too small") < page.index("<svg")


def test_requests_and_preemptions_are_tables_with_ids_to_link_to(tmp_path):
    refused = {**slow_log()[-1], "request_id": "no", "cause": "refused", "error": "prompt is empty", "seq_ids": []}
    page = page_of(write(tmp_path / "run.jsonl", [*slow_log(), refused]))
    assert re.search(r'<tr id="run1-request-0"><td data-label="request"><code>slow</code>', page)
    assert "prompt is empty" in page
    assert "requests ended by cause: refused" in page
    assert page.count('<tr id="run1-preemption-') == 2
    assert "3 needed, 0 free" in page
    assert page.count('<input type="search"') == 2


def test_a_wait_in_preemption_is_a_gap_between_tokens(tmp_path):
    """The steps go on meanwhile, so that their times do not show it."""
    lines = known_log()
    lines[-1] |= {"longest_stall_s": 20.65, "stall_cause": "preempted"}
    run = only_run(write(tmp_path / "run.jsonl", lines))
    assert run.token_gaps.most == pytest.approx(20650)
    assert run.requests.latencies["stall_ms"].most == pytest.approx(20650)


def test_the_peak_of_the_cache_is_drawn(tmp_path):
    lines = known_log()
    lines.append(step(12.01, 12, used_blocks=39, num_blocks=40))
    run = only_run(write(tmp_path / "run.jsonl", lines))
    assert max(value for value in run.timeline.peaks("kv_use") if value is not None) == pytest.approx(39 / 40)
    assert "97.5 %" in render(summarise(tmp_path / "run.jsonl"))


def test_no_hit_rate_is_drawn_where_nothing_was_looked_up(tmp_path):
    idle = {"num_prefix_queries": 0, "prefix_cache_hit_rate": 0.0, "kv_cache_usage": 0.5}
    lines = [line(1.0, "batch.decode", "INFO", step=1, decode_step=1, size=1)]
    lines += [line(2.0 + number, "engine.statistics", "INFO", **idle) for number in range(3)]
    assert "stat_hit_rate" not in only_run(write(tmp_path / "run.jsonl", lines)).timeline


def y_marks(drawing: str) -> list[str | None]:
    texts = ET.fromstring(drawing).iter("text")
    return [text.text for text in texts if text.attrib.get("text-anchor") == "end"]


def test_two_runs_side_by_side(tmp_path, known):
    other = write(tmp_path / "other.jsonl", slow_log())
    assert main([str(known), "--compare", str(other), "-o", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text()
    assert "<h3>Two runs</h3>" in page
    assert "<code>num_blocks</code>" in page
    charts = page.partition("<h2>Charts of both runs</h2>")[2].partition("</section>")[0]
    titles = re.findall(r"<h3>(.*?)</h3>", charts)
    assert titles[::2] == titles[1::2]
    assert titles
    drawings = SVG.findall(charts)
    for one, two in zip(drawings[::2], drawings[1::2], strict=True):
        assert y_marks(one) == y_marks(two)


def test_unexplained_steps_are_said_once(tmp_path):
    lines = [step(1.0 + number / 100, number, wall_ms=10.0) for number in range(2, 30)]
    assert page_of(write(tmp_path / "run.jsonl", lines)).count("no event explains it") == 1


def test_text_and_marks_contrast_with_their_ground():
    """4.5:1 for text and colours of the legend, as WCAG asks of text."""
    for theme in CSS.split("@media (prefers-color-scheme: dark)"):
        card, page = luminance(theme, "card"), luminance(theme, "page")
        for names, grounds in (
            (("ink", "soft"), (card, page)),
            (("c1", "c2", "c3", "c4", "c5", "c6"), (card, luminance(theme, "onfill"))),
        ):
            for name, ground in itertools.product(names, grounds):
                bright, dim = sorted((luminance(theme, name), ground), reverse=True)
                assert (bright + 0.05) / (dim + 0.05) >= 4.5, name


def luminance(theme: str, name: str) -> float:
    found = re.search(rf"--{name}: #(\w\w)(\w\w)(\w\w)", theme)
    assert found is not None
    linear = [
        value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4
        for value in (int(part, 16) / 255 for part in found.groups())
    ]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
