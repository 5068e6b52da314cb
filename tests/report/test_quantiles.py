"""What a long log is kept in: quantiles to half a percent, bins that never grow, a fair sample."""

from __future__ import annotations

import random

import pytest

from nanovllm.report.quantiles import QuantileSketch, Sample, Timeline


@pytest.mark.parametrize("draw", [lambda rng: rng.uniform(1, 100), lambda rng: rng.lognormvariate(3, 2)])
@pytest.mark.parametrize("share", [0.01, 0.5, 0.9, 0.99, 1.0])
def test_quantiles_are_within_half_a_percent(draw, share):
    rng = random.Random(1)
    values = [draw(rng) for _ in range(5000)]
    sketch = QuantileSketch()
    for value in values:
        sketch.add(value)
    exact = sorted(values)[max(0, round(share * len(values)) - 1)]
    assert sketch.quantile(share) == pytest.approx(exact, rel=0.006)
    assert sketch.mean == pytest.approx(sum(values) / len(values))
    assert (sketch.least, sketch.most) == (min(values), max(values))


def test_a_single_value_is_every_quantile():
    sketch = QuantileSketch()
    sketch.add(12.5)
    assert [sketch.quantile(share) for share in (0.0, 0.5, 1.0)] == [12.5] * 3


def test_an_empty_sketch_and_zeros():
    sketch = QuantileSketch()
    assert sketch.quantile(0.5) == 0
    assert sketch.histogram(5) == []
    sketch.add(0.0, weight=3)
    assert sketch.quantile(0.5) == 0
    assert sum(count for _, _, count in sketch.histogram(5)) == 3


def test_weights_count_as_often_as_they_say():
    sketch = QuantileSketch()
    sketch.add(1.0, weight=98)
    sketch.add(100.0, weight=2)
    sketch.add(5.0, weight=0)
    assert sketch.count == 100
    assert sketch.quantile(0.98) == pytest.approx(1.0, rel=0.006)
    assert sketch.quantile(0.99) == pytest.approx(100.0, rel=0.006)


def test_a_histogram_holds_every_value_in_its_bar():
    sketch = QuantileSketch()
    for value in range(1, 1001):
        sketch.add(value)
    bars = sketch.histogram(20)
    assert sum(count for _, _, count in bars) == 1000
    assert bars[0][0] <= 1
    assert bars[-1][1] >= 1000
    for start, stop, count in bars:
        exact = sum(start < value <= stop for value in range(1, 1001))
        assert abs(count - exact) <= 2 + 0.02 * stop  # at an edge, a bucket may fall to the neighbour


def test_a_sketch_stays_small():
    sketch = QuantileSketch()
    rng = random.Random(2)
    for _ in range(20_000):
        sketch.add(10 ** rng.uniform(-30, 30))
    assert len(sketch._buckets) < 4000


def test_bins_join_and_keep_their_sums():
    timeline = Timeline(limit=8, width=1.0)
    for second in range(100):
        timeline.add(second + 0.5, "tokens", 3)
    assert timeline.width == 16
    assert timeline.num_bins == 7
    assert timeline.sums("tokens") == [48.0] * 6 + [12.0]
    assert timeline.means("tokens") == [3.0] * 7
    assert timeline.peaks("tokens") == [3] * 7


def test_spread_divides_by_the_time_in_each_bin():
    timeline = Timeline(limit=8, width=1.0)
    timeline.spread(0.5, 2.5, "tokens", 100)
    assert timeline.sums("tokens") == pytest.approx([25, 50, 25])
    timeline.spread(1.0, 1.0, "tokens", 7)
    assert sum(timeline.sums("tokens")) == pytest.approx(107)


def test_rates_are_sums_by_the_time_that_was():
    timeline = Timeline(limit=8, width=1.0)
    timeline.spread(0.0, 3.75, "tokens", 375)
    assert timeline.rates("tokens") == pytest.approx([100] * 4)


def test_gaps_are_none_or_hold_the_last_mean():
    timeline = Timeline(limit=8, width=1.0)
    timeline.add(0, "running", 4)
    timeline.add(2.5, "running", 6)
    assert timeline.means("running") == [4, None, 6]
    assert timeline.means("running", hold=True) == [4, 4, 6]


def test_time_before_the_origin_counts_as_the_origin():
    timeline = Timeline(limit=8, width=1.0)
    timeline.add(-5, "a", 1)
    timeline.spread(-2, 1, "b", 10)
    assert timeline.sums("a")[0] == 1
    assert sum(timeline.sums("b")) == pytest.approx(10)


def test_a_sample_is_of_fixed_size_and_fair():
    sums = 0.0
    for offset in range(50):
        sample = Sample[int](100)
        for item in range(2000):
            sample.offer((item + offset * 37) % 2000)
        assert len(sample.items) == len(set(sample.items)) == 100
        assert sample.num_offered == 2000
        sums += sum(sample.items) / 100
    assert sums / 50 == pytest.approx(1000, abs=60)  # the mean of all is 999.5


def test_a_small_number_is_kept_whole():
    sample = Sample[int](100)
    for item in range(60):
        sample.offer(item)
    assert sample.items == list(range(60))
