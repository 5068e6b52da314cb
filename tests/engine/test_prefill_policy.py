"""How many prompt tokens a step computes, whose they are, and when a waiting sequence is admitted."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanovllm.engine.prefill_policy import MIN_PREFILL_TOKENS
from nanovllm.engine.sequence import Sequence, SequenceStatus
from tests.engine.scheduler_driver import Driver
from tests.properties import examples

ROOMY = {"max_num_batched_tokens": 4096, "max_model_len": 20_000, "num_blocks": 20_000, "max_num_seqs": 8}
SHORT, LONG = 20, 16_000


def prefill(driver: Driver, *, gpu_ms: float | None = None) -> int:
    """Runs a step and returns how many prompt tokens it computed."""
    batch = driver.launch()
    assert batch is not None
    driver.collect(gpu_ms=gpu_ms)
    return batch.num_prefill_tokens


def steps_until_first_token(driver: Driver, sequence: Sequence) -> int:
    for num_steps in range(1, 2000):
        driver.step()
        if sequence.first_token is not None:
            return num_steps
    raise AssertionError("it never gets a token")


# ---- the budget, and the setting that decides it


@pytest.mark.parametrize(
    ("config", "decodes", "expected"),
    [
        ({}, True, (4095, "max_num_batched_tokens")),
        ({"max_prefill_tokens_beside_decode": 300}, True, (300, "max_prefill_tokens_beside_decode")),
        ({"max_prefill_tokens_beside_decode": 300}, False, (4096, "max_num_batched_tokens")),
        ({"max_prefill_tokens_beside_decode": 9000}, True, (4095, "max_num_batched_tokens")),
        ({"inter_token_latency_target_ms": 20.0}, True, (MIN_PREFILL_TOKENS, "inter_token_latency_target_ms")),
        ({"inter_token_latency_target_ms": 20.0}, False, (4096, "max_num_batched_tokens")),
        (
            {"inter_token_latency_target_ms": 20.0, "max_prefill_tokens_beside_decode": 7},
            True,
            (7, "max_prefill_tokens_beside_decode"),
        ),
    ],
)
def test_the_budget_names_the_setting_that_decides_it(
    caplog: pytest.LogCaptureFixture, config: dict[str, object], decodes: bool, expected: tuple[int, str]
) -> None:
    """Before any step was measured the target allows the least."""
    caplog.set_level(logging.INFO, logger="nanovllm.engine.scheduler")
    driver = Driver(**{**ROOMY, **config})
    if decodes:
        driver.add(3)
        driver.launch()
    driver.add(LONG)
    caplog.clear()
    batch = driver.launch()
    assert batch is not None
    record = next(record for record in caplog.records if record.event == "batch.prefill")
    assert (record.fields["budget"], record.fields["budget_reason"]) == expected
    assert batch.num_prefill_tokens == expected[0]


def test_a_target_becomes_tokens_by_what_steps_took() -> None:
    """A step of 5 ms, and 10 µs for each prompt token, in a target of 20 ms: 1500 tokens."""
    driver = Driver(**ROOMY, inter_token_latency_target_ms=20.0)
    driver.add(3, max_tokens=1000)
    for _ in range(3):
        driver.launch()
        driver.collect(gpu_ms=5.0)
    driver.add(LONG)
    lengths = []
    for _ in range(10):
        batch = driver.launch()
        assert batch is not None
        lengths.append(batch.num_prefill_tokens)
        driver.collect(gpu_ms=5.0 + 0.01 * lengths[-1])
    assert lengths[:5] == [MIN_PREFILL_TOKENS, 128, 256, 512, 1024]  # no step goes far beyond what was measured
    assert lengths[5:] == pytest.approx([1500] * 5, rel=0.01)


def test_without_device_times_the_time_between_collected_steps_counts() -> None:
    now = 0.0
    driver = Driver(clock=lambda: now, **ROOMY, inter_token_latency_target_ms=20.0)
    driver.add(3, max_tokens=1000)
    driver.launch()
    driver.add(LONG)
    lengths = []
    for _ in range(14):  # two steps in flight
        batch = driver.launch()
        assert batch is not None
        lengths.append(batch.num_prefill_tokens)
        now += (5.0 + 0.01 * driver.in_flight[0].num_prefill_tokens) / 1e3
        driver.collect()
    assert lengths[-1] == pytest.approx(1500, rel=0.01)


def test_a_target_that_no_step_meets_still_lets_prompts_go_on() -> None:
    driver = Driver(**ROOMY, inter_token_latency_target_ms=1.0)
    driver.add(3, max_tokens=1000)
    driver.launch()
    driver.collect(gpu_ms=5.0)
    driver.add(LONG)
    assert [prefill(driver, gpu_ms=7.0) for _ in range(5)] == [MIN_PREFILL_TOKENS] * 5


def lengths_beside_decoding(decode_ms: float, waited: float = 0.0) -> int:
    """Returns the most tokens of a long prompt that a step computes, with the target "auto".

    A step takes `decode_ms`, and 10 µs for each prompt token. waited: seconds for which the prompt is there.
    """
    now = 0.0
    driver = Driver(clock=lambda: now, **ROOMY, inter_token_latency_target_ms="auto")
    driver.add(3, max_tokens=1000)
    for _ in range(3):
        driver.launch()
        driver.collect(gpu_ms=decode_ms)
    driver.add(LONG)
    now += waited
    lengths = []
    for _ in range(9):
        batch = driver.launch()
        assert batch is not None
        lengths.append(batch.num_prefill_tokens)
        driver.collect(gpu_ms=decode_ms + 0.01 * lengths[-1])
    return max(lengths)


def test_auto_a_step_takes_a_multiple_of_the_time_of_decoding() -> None:
    assert lengths_beside_decoding(10.0) == pytest.approx(1200, rel=0.01)  # 22 ms
    assert lengths_beside_decoding(8.0) == pytest.approx(960, rel=0.01)  # 17.6 ms


def test_auto_short_steps_may_take_12_ms() -> None:
    assert lengths_beside_decoding(2.0) == pytest.approx(1000, rel=0.01)
    assert lengths_beside_decoding(4.0) == pytest.approx(800, rel=0.01)


def test_auto_prompts_that_have_waited_get_longer_steps() -> None:
    assert lengths_beside_decoding(8.0, waited=0.1) == pytest.approx(960, rel=0.01)
    assert lengths_beside_decoding(8.0, waited=0.28) == pytest.approx(2000, rel=0.01)  # 28 ms
    assert lengths_beside_decoding(4.0, waited=100.0) == pytest.approx(3200, rel=0.01)  # three times 12 ms


# ---- whose the tokens are


@pytest.mark.parametrize("budget", [64, 256, 1024])
@pytest.mark.parametrize("num_long", [1, 2])
def test_a_long_prompt_does_not_keep_short_ones_waiting(budget: int, num_long: int) -> None:
    driver = Driver(**ROOMY, max_prefill_tokens_beside_decode=budget)
    driver.add(3, max_tokens=10_000)
    driver.step()
    long = [driver.add(LONG) for _ in range(num_long)]
    driver.step()
    for _ in range(5):  # one after another
        assert steps_until_first_token(driver, driver.add(SHORT)) <= 4
    assert all(sequence.first_token is None for sequence in long)


def test_short_prompts_take_a_quarter_at_most_and_go_in_order() -> None:
    driver = Driver(**{**ROOMY, "max_num_seqs": 600}, max_prefill_tokens_beside_decode=256)
    driver.add(3, max_tokens=10_000)
    driver.step()
    long = driver.add(LONG)
    short = [driver.add(50, max_tokens=1) for _ in range(400)]
    num_steps = steps_until_first_token(driver, long)
    assert num_steps <= LONG / (0.75 * 256) + 2
    firsts = [sequence.first_token for sequence in short]
    started = [first for first in firsts if first is not None]
    assert len(started) > 60
    assert started == sorted(started)
    assert firsts[: len(started)] == started


def test_a_prompt_of_few_steps_is_not_overtaken() -> None:
    driver = Driver(**ROOMY, max_prefill_tokens_beside_decode=64)
    driver.add(3, max_tokens=1000)
    driver.step()
    first = driver.add(5 * 64)
    driver.step()
    driver.add(SHORT)
    assert steps_until_first_token(driver, first) == 4
    assert driver.scheduler.waiting


def test_a_prompt_that_does_not_fit_into_a_step_overtakes_nobody() -> None:
    driver = Driver(**ROOMY, max_prefill_tokens_beside_decode=64)
    driver.add(3, max_tokens=1000)
    driver.step()
    driver.add(LONG)
    second = driver.add(65)
    for _ in range(50):
        driver.step()
    assert second.status is SequenceStatus.WAITING


@pytest.mark.parametrize("depth", [1, 2])
def test_a_first_token_comes_with_the_first_step_that_was_planned_after_the_arrival(depth: int) -> None:
    """Steps in flight end first. Nothing else stands before it, however full or empty the batch is."""
    driver = Driver(**ROOMY, pipeline_depth=depth)
    driver.add(3, max_tokens=1000)
    for _ in range(depth):
        driver.launch()
    for _ in range(3):
        driver.collect()
        sequence = driver.add(SHORT)
        batch = driver.launch()
        assert batch is not None
        assert sequence.row in batch.sampled_rows
        for _ in range(depth - 1):
            driver.collect()
            assert sequence.first_token is None
            driver.launch()
        driver.collect()
        assert sequence.first_token is not None
        driver.launch()


# ---- the watermark


def waiting_and_running(**config: object) -> tuple[Driver, Sequence, Sequence]:
    """100 blocks of 4 tokens: one sequence of 50 runs, and one of 46 waits."""
    driver = Driver(
        **{"num_blocks": 100, "block_size": 4, "max_model_len": 400, "max_num_batched_tokens": 400, **config}
    )
    running = driver.add(50 * 4 - 1, max_tokens=20)
    driver.step()
    return driver, running, driver.add(46 * 4)


def test_admission_leaves_blocks_for_the_growth_of_running_sequences() -> None:
    driver, running, waiting = waiting_and_running()
    driver.step()
    assert waiting.status is SequenceStatus.WAITING  # four would be left, not five
    while running.status is not SequenceStatus.FINISHED:
        driver.step()
    driver.step()
    assert waiting.status is SequenceStatus.DECODING
    assert driver.metrics.totals.num_preemptions == 0


def test_a_sequence_that_takes_the_whole_cache_is_admitted_once_nothing_else_runs() -> None:
    driver = Driver(num_blocks=100, block_size=4, max_model_len=400, max_num_batched_tokens=400)
    small = driver.add(8, max_tokens=3)
    driver.step()
    whole = driver.add(399, max_tokens=1)
    while small.status is not SequenceStatus.FINISHED:
        assert whole.status is SequenceStatus.WAITING
        driver.step()
    driver.step()
    assert whole.status is SequenceStatus.FINISHED


@settings(max_examples=examples(100), deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 90), st.integers(1, 60)), min_size=2, max_size=12),
    st.integers(1, 3),
    st.integers(8, 40),
)
def test_every_request_ends_whatever_the_others_need(
    wanted: list[tuple[int, int]], depth: int, num_batched_tokens: int
) -> None:
    driver = Driver(num_blocks=40, block_size=4, max_model_len=150, max_num_batched_tokens=num_batched_tokens)
    sequences = [driver.add(*request) for request in wanted]
    for _ in launches(driver, depth):
        assert len(driver.in_flight) <= depth
    assert [len(sequence.output_token_ids) for sequence in sequences] == [num_tokens for _, num_tokens in wanted]
    assert driver.num_free_blocks == 40


def launches(driver: Driver, depth: int) -> Iterator[None]:
    """Keeps `depth` steps in flight until nothing is left."""
    for _ in range(5000):
        if not driver.scheduler.has_unfinished and not driver.in_flight:
            return
        while len(driver.in_flight) < depth and driver.launch() is not None:
            yield
        driver.collect()
    raise AssertionError("it never ends")
