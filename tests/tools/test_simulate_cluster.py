"""The simulation of many replicas: nothing is lost, the same arguments give the same figures, and numpy agrees."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tools.batched_replicas import simulate_batched
from tools.cluster_routing import POLICIES, make_routing
from tools.cluster_traffic import Traffic
from tools.simulate_cluster import BLOCK_SIZE, CAPACITY, Run, runs_of, simulate, simulate_exact
from tools.simulate_load import Device

TRAFFIC = Traffic(num_replicas=3, rate=12, seconds=2, seed=1)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("is_exact", [True, False])
def test_every_request_ends_once_and_its_replica_is_told(policy: str, is_exact: bool) -> None:
    requests = TRAFFIC.draw()
    routing = make_routing(policy, 3, CAPACITY)
    ended: list[int] = []

    class Recording:
        def choose(self, hashes: list[int]) -> int:
            return routing.choose(hashes)

        def ended(self, replica: int) -> None:
            ended.append(replica)
            routing.ended(replica)

    if is_exact:
        served = simulate_exact(requests, Recording(), 3, Device())  # type: ignore[arg-type]
    else:
        served = simulate_batched(requests, Recording(), 3, CAPACITY, BLOCK_SIZE, Device())  # type: ignore[arg-type]
    assert np.bincount(ended, minlength=3).tolist() == np.bincount(served.replicas, minlength=3).tolist()
    assert len(ended) == len(requests) == 72
    assert (served.ttft > 0).all()
    assert (served.finished >= requests.arrivals + served.ttft).all()


@pytest.mark.parametrize("policy", POLICIES)
def test_the_batched_model_is_close_to_the_engine(policy: str) -> None:
    run = Run(num_replicas=4, policy=policy, rate=15, seconds=2, is_exact=True, seed=0)
    exact, batched = simulate(run), simulate(replace(run, is_exact=False))
    assert batched.ttft_p50 == pytest.approx(exact.ttft_p50, rel=0.2)
    assert batched.tokens_per_second == pytest.approx(exact.tokens_per_second, rel=0.05)
    assert batched.cached == pytest.approx(exact.cached, abs=0.1)


def test_the_router_finds_more_in_the_caches_than_chance_and_the_figures_are_repeatable() -> None:
    runs = [Run(16, policy, 15, 6, is_exact=False, seed=0) for policy in POLICIES]
    random, shortest, prefix = map(simulate, runs)
    assert prefix.cached > random.cached + 0.1
    assert prefix.ttft_p99 < min(random.ttft_p99, shortest.ttft_p99)
    assert prefix.largest_share < 1.5
    again = simulate(runs[2])
    assert replace(again, choice_us=None) == replace(prefix, choice_us=None)


def test_sizes_above_the_largest_exact_one_are_batched() -> None:
    runs = runs_of([1, 64, 1000], [15.0], 6.0, 0)
    assert [(run.name, run.is_exact) for run in runs[:: len(POLICIES)]] == [
        ("1", True),
        ("64", True),
        ("64, batched", False),
        ("1000", False),
    ]
