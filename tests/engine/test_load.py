"""Under more load than fits: first come first served, and no collapse. On a simulated device, so times are exact."""

from __future__ import annotations

import numpy as np
import pytest

from nanovllm import LLMEngine
from tools.simulate_load import Device, Load, Outcome, simulate

LOAD = Load(num_requests=400)
NUM_BLOCKS = 600  # for some 30 requests; 256 may run
LOADS = (0.5, 1.0, 2.0, 4.0)
TARGET_MS = 20.0


def without_watermark(engine: LLMEngine) -> None:
    engine.scheduler.policy.watermark = 0


@pytest.fixture(scope="module")
def saturation() -> float:
    return simulate(LOAD, float("inf"), Device(), num_blocks=NUM_BLOCKS).requests_per_second


@pytest.fixture(scope="module", params=[None, "auto", TARGET_MS], ids=["no target", "adapts", "target"])
def outcomes(request: pytest.FixtureRequest, saturation: float) -> dict[float, Outcome]:
    config = {"num_blocks": NUM_BLOCKS, "inter_token_latency_target_ms": request.param}
    return {load: simulate(LOAD, load * saturation, Device(), **config) for load in LOADS}


def test_first_tokens_come_in_the_order_of_arrival(outcomes: dict[float, Outcome]) -> None:
    for outcome in outcomes.values():
        assert outcome.first_tokens == list(range(LOAD.num_requests))


def test_more_load_than_fits_costs_no_throughput(outcomes: dict[float, Outcome]) -> None:
    peak = max(outcome.goodput for outcome in outcomes.values())
    for load in (2.0, 4.0):
        assert outcomes[load].goodput >= 0.9 * peak


def test_the_queue_grows_and_the_time_between_tokens_does_not(outcomes: dict[float, Outcome]) -> None:
    ttft = [float(np.median(outcomes[load].ttft)) for load in LOADS]
    assert ttft == sorted(ttft)
    assert ttft[-1] > 20 * ttft[0]
    at_saturation = np.quantile(outcomes[1.0].itl, [0.5, 0.99])
    for load in (2.0, 4.0):
        assert (np.quantile(outcomes[load].itl, [0.5, 0.99]) <= 1.25 * at_saturation).all()


def test_hardly_anything_is_computed_twice(
    request: pytest.FixtureRequest, outcomes: dict[float, Outcome], saturation: float
) -> None:
    most = 0.06 if "adapts" in request.node.name else 0.05  # with other seeds 0.06 without a target, too
    for outcome in outcomes.values():
        assert outcome.num_recomputed <= most * outcome.num_prompt_tokens
    without = simulate(LOAD, 2 * saturation, Device(), without_watermark, num_blocks=NUM_BLOCKS)
    assert without.num_recomputed > 5 * outcomes[2.0].num_recomputed


def test_steps_keep_to_the_target(saturation: float) -> None:
    outcome = simulate(LOAD, 2 * saturation, Device(), num_blocks=NUM_BLOCKS, inter_token_latency_target_ms=TARGET_MS)
    assert np.quantile(outcome.itl, 0.99) <= 1.02e-3 * TARGET_MS


def test_a_run_gives_the_same_again() -> None:
    load = Load(num_requests=60)
    first, second = (
        simulate(load, 50.0, Device(), num_blocks=300, inter_token_latency_target_ms=TARGET_MS) for _ in range(2)
    )
    assert first.first_tokens == second.first_tokens
    assert first.itl.tolist() == second.itl.tolist()
