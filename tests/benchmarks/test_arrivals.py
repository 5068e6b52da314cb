"""Online traffic: a function of its seed, with the rates and lengths that were asked for."""

from __future__ import annotations

import random
import statistics
from dataclasses import replace

import pytest

from nanovllm.benchmarks.arrivals import Lengths, OnlineTraffic

TRAFFIC = OnlineTraffic(Lengths(220, 1.1, 2048), Lengths(190, 0.9, 1024), vocab_size=10_000, num_requests=50)


def test_a_seed_gives_the_same_traffic() -> None:
    requests = TRAFFIC.draw(10, seed=3)
    assert requests == TRAFFIC.draw(10.0, seed=3)
    assert [request.index for request in requests] == list(range(50))
    # Known values: other versions of Python must give them too.
    assert [request.output_len for request in requests[:5]] == [70, 69, 62, 77, 352]
    assert requests[0].prompt[:5] == [8587, 2330, 2324, 5347, 9455]
    assert requests[1].at == pytest.approx(0.21288620362180724)


def test_more_requests_begin_with_the_same() -> None:
    assert replace(TRAFFIC, num_requests=60).draw(10, seed=3)[:50] == TRAFFIC.draw(10, seed=3)


def test_no_run_finds_the_prompts_of_another_in_a_prefix_cache() -> None:
    runs = [TRAFFIC.draw(rate, seed) for rate in (10, 60) for seed in (0, 1)]
    runs += [TRAFFIC.warm_up(50, seed) for seed in (0, 1)]
    beginnings = [tuple(request.prompt[:8]) for run in runs for request in run if len(request.prompt) >= 8]
    assert len(set(beginnings)) == len(beginnings)


@pytest.mark.parametrize("burstiness", [0.5, 1.0, 4.0])
def test_gaps_have_the_rate_and_the_burstiness(burstiness: float) -> None:
    times = [request.at for request in replace(TRAFFIC, num_requests=4000, burstiness=burstiness).draw(20, seed=0)]
    gaps = [later - earlier for earlier, later in zip([0.0, *times], times, strict=False)]
    assert statistics.fmean(gaps) == pytest.approx(1 / 20, rel=0.1)
    assert statistics.stdev(gaps) == pytest.approx(1 / 20 / burstiness**0.5, rel=0.15)


def test_a_duration_ends_the_arrivals() -> None:
    requests = replace(TRAFFIC, num_requests=None, duration=30).draw(20, seed=0)
    assert 500 < len(requests) < 700
    assert 28 < requests[-1].at <= 30


def test_lengths_have_their_mean_and_their_limit() -> None:
    rng = random.Random(0)
    lengths = [Lengths(100, 0.5, 10_000).draw(rng) for _ in range(5000)]
    assert statistics.fmean(lengths) == pytest.approx(100, rel=0.05)
    clipped = [Lengths(100, 2.0, 150).draw(rng) for _ in range(2000)]
    assert (min(clipped), max(clipped)) == (1, 150)
    assert {Lengths(1000, 0, 2000).draw(rng) for _ in range(100)} == {1000}


def test_token_ids_are_below_the_vocabulary() -> None:
    requests = replace(TRAFFIC, vocab_size=7).draw(10, seed=0)
    assert {token for request in requests for token in request.prompt} == set(range(7))


def test_the_warm_up_is_no_longer_than_the_longest_request() -> None:
    short = replace(TRAFFIC, input_len=Lengths(8, 0, 8), output_len=Lengths(3, 0, 3))
    assert {(len(request.prompt), request.output_len) for request in short.warm_up(5, seed=0)} == {(8, 3)}
    assert {request.output_len for request in TRAFFIC.warm_up(5, seed=0)} == {40}
