"""What charts are made of: round ticks, readable units, phases of a request."""

from __future__ import annotations

import itertools
import re
import xml.etree.ElementTree as ET

import pytest

from nanovllm.report.charts import (
    Bins,
    Frame,
    Series,
    TimeAxis,
    decades,
    duration_text,
    histogram,
    number_text,
    share_bar,
    tick_text,
    ticks,
    time_chart,
)
from nanovllm.report.gantt import spans
from nanovllm.report.requests import RequestLife


@pytest.mark.parametrize("most", [1e-6, 0.3, 1, 7, 99, 100, 101, 12_345, 9e9])
def test_ticks_are_round_and_reach_the_most(most):
    marks = ticks(most)
    assert marks[0] == 0
    assert marks[-1] >= most * 0.999
    assert marks[-2] < most
    assert 3 <= len(marks) <= 8
    assert float(f"{marks[1]:e}".split("e")[0]) in (1.0, 2.0, 5.0)


def test_ticks_of_nothing():
    assert ticks(0) == [0.0, 1.0]


def test_decades_hold_the_values():
    assert decades([3, 250]) == [1, 10, 100, 1000]
    assert decades([10, 10]) == [10, 100]
    assert decades([]) == [1, 10]


@pytest.mark.parametrize(
    ("ms", "text"),
    [(0, "0 ms"), (0.25, "250 µs"), (1.234, "1.23 ms"), (99.96, "100 ms"), (999, "999 ms"), (1500, "1.5 s"),
     (100_000, "100 s"), (180_000, "3.0 min"), (7.2e6, "2.0 h")],
)  # fmt: skip
def test_durations_read_well(ms, text):
    assert duration_text(ms) == text


def test_numbers_read_well():
    assert [number_text(value) for value in (1234, 12.34, 0.123, 5)] == ["1,234", "12.3", "0.12", "5"]
    assert [tick_text(value) for value in (0, 0.5, 5000, 20_000, 3e6, 2e9)] == ["0", "0.5", "5000", "20k", "3M", "2G"]


@pytest.mark.parametrize(("end", "unit"), [(1.5, "ms"), (60, "s"), (400, "min"), (20_000, "h")])
def test_the_time_axis_takes_a_unit_that_suits(end, unit):
    marks = TimeAxis(end).ticks()
    assert marks[-1][1].endswith(f" {unit}")
    assert all(0 <= seconds <= end for seconds, _ in marks)
    assert len(marks) >= 4


def test_a_logarithmic_axis_has_equal_decades():
    frame = Frame("label", 500, 200, 1.0, 1000.0, log_from=1.0)
    heights = [frame.y(value) for value in (1, 10, 100, 1000)]
    steps = [low - high for low, high in itertools.pairwise(heights)]
    assert steps == pytest.approx([steps[0]] * 3)
    assert frame.y(0.001) == frame.y(1) == frame.bottom


def test_a_line_has_its_values_at_their_places():
    chart = time_chart("label", "tokens/s", [Series("out", [0.0, 50.0, None, 100.0], 1)], Bins(1.0, 4.0))
    drawing = ET.fromstring(chart[chart.index("<svg") : chart.rindex("</svg>") + 6])
    lines = [line.attrib["points"].split() for line in drawing.iter("polyline")]
    assert [len(points) for points in lines] == [4, 2], "a gap where nothing is known"
    frame = Frame("label", 560, 230, 4.0, 100.0)
    x, y = map(float, lines[1][0].split(","))
    assert (x, y) == pytest.approx((frame.x(3.0), frame.y(100.0)), abs=0.1)
    told = [title.text for title in drawing.iter("title")]
    assert told == ["0 s – 1 s\nout: 0 tokens/s", "1 s – 2 s\nout: 50 tokens/s", "3 s – 4 s\nout: 100 tokens/s"]


def test_stacked_bars_stand_on_one_another():
    series = [Series("a", [10.0], 2), Series("b", [30.0], 1)]
    chart = time_chart("label", "tokens", series, Bins(1.0, 1.0), stacked=True)
    drawing = ET.fromstring(chart[chart.index("<svg") : chart.rindex("</svg>") + 6])
    below, above = [rect for rect in drawing.iter("rect") if "fill" in rect.attrib["class"]]
    assert float(above.attrib["y"]) + float(above.attrib["height"]) == pytest.approx(float(below.attrib["y"]), abs=0.1)
    assert float(above.attrib["height"]) == pytest.approx(3 * float(below.attrib["height"]), rel=0.01)


def test_a_histogram_marks_its_quantiles():
    drawing = ET.fromstring(histogram("label", [(1.0, 10.0, 5), (10.0, 100.0, 5)], [("p50", 10.0)])).find("svg")
    assert drawing is not None
    (mark,) = [line for line in drawing.iter("line") if line.attrib["class"] == "quantile"]
    frame = Frame("label", 360, 210, 2.0, 5.0)
    assert float(mark.attrib["x1"]) == pytest.approx(frame.x(1.0), abs=0.1), "the middle of two decades"
    assert histogram("label", [], []) == ""


def test_a_share_bar_is_as_wide_as_its_parts():
    widths = [
        float(width)
        for width in re.findall(r'class="fill[^>]*? width="([\d.]+)"', share_bar("label", [("a", 3), ("b", 1)]))
    ]
    assert widths == pytest.approx([869, 289])
    assert share_bar("label", []) == ""


def life(**changes) -> RequestLife:
    values = {"first_scheduled": 2.0, "first_token": 3.0, "finished": 5.0, **changes}
    return RequestLife("r", 1.0, 10, **values)


@pytest.mark.parametrize(
    ("request_", "expected"),
    [
        (life(), [("queued", 1, 2), ("prefill", 2, 3), ("decode", 3, 5)]),
        (life(finished=None), [("queued", 1, 2), ("prefill", 2, 3), ("decode", 3, 9)]),
        (life(first_token=None), [("queued", 1, 2), ("prefill", 2, 5)]),
        (life(first_scheduled=None, first_token=None, finished=None), [("queued", 1, 9)]),
        (life(preempted=[(3.5, 4.0)]), [("queued", 1, 2), ("prefill", 2, 3), ("decode", 3, 5), ("preempted", 3.5, 4)]),
        (life(preempted=[(4.0, None)]), [("queued", 1, 2), ("prefill", 2, 3), ("decode", 3, 5), ("preempted", 4, 5)]),
    ],
)
def test_phases_of_a_request(request_, expected):
    assert spans(request_, 9.0) == expected
