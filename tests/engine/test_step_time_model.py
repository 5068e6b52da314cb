"""What a step takes is learned from measured steps, and odd ones hardly count."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanovllm.engine.step_time_model import StepSize, StepTimeModel

MOST = 16_384
CONSTANT, PER_CONTEXT, PER_PROMPT_TOKEN, PER_PAIR = 6e-3, 49e-9, 27e-6, 1.2e-9
EXPECTED = 802  # prompt tokens in 30 ms beside a context of 40,000


def size_of(context: int, num_prompt_tokens: int, start: int = 0) -> StepSize:
    return StepSize(context, num_prompt_tokens, num_prompt_tokens * (start + num_prompt_tokens / 2))


def seconds(context: int, num_prompt_tokens: int, start: int = 0) -> float:
    size = size_of(context, num_prompt_tokens, start)
    return CONSTANT + PER_CONTEXT * context + PER_PROMPT_TOKEN * num_prompt_tokens + PER_PAIR * size.num_pairs


def observe(model: StepTimeModel, num_steps: int, factor: float = 1.0, noise: float = 0.0) -> None:
    """Steps with growing context, every third with a prompt."""
    rng = np.random.default_rng(0)
    for step in range(num_steps):
        context, prompt = 20_000 + 500 * (step % 100), int(rng.integers(1, 1500)) if step % 3 == 0 else 0
        model.observe(size_of(context, prompt), factor * seconds(context, prompt) * float(rng.normal(1.0, noise)))


def test_nothing_measured_is_nothing_promised() -> None:
    model = StepTimeModel()
    assert model.num_prompt_tokens(1000, 0, 1.0, MOST) == 0
    model.observe(size_of(1000, 0), 0.006)
    assert model.num_prompt_tokens(1000, 0, 1.0, MOST) == 0


def test_the_parts_of_a_steps_time_are_told_apart() -> None:
    model = StepTimeModel()
    observe(model, 300)
    for context, prompt in [(20_000, 0), (60_000, 0), (20_000, 1500), (60_000, 300)]:
        assert model.seconds(size_of(context, prompt)) == pytest.approx(seconds(context, prompt), rel=0.001)
    assert seconds(40_000, model.num_prompt_tokens(40_000, 0, 0.03, MOST)) == pytest.approx(0.03, rel=0.001)


def test_times_that_vary_are_averaged() -> None:
    model = StepTimeModel()
    observe(model, 300, noise=0.1)
    assert seconds(60_000, model.num_prompt_tokens(60_000, 0, 0.03, MOST)) == pytest.approx(0.03, rel=0.1)


def test_a_step_that_the_host_saw_late_hardly_counts() -> None:
    """The next one then seems to have taken no time at all."""
    model = StepTimeModel()
    observe(model, 300)
    model.observe(size_of(60_000, 0), 0.05)
    model.observe(size_of(60_000, 100), 1e-5)
    assert seconds(60_000, model.num_prompt_tokens(60_000, 0, 0.03, MOST)) == pytest.approx(0.03, rel=0.1)


def test_chunks_of_a_long_prompt_become_smaller_towards_its_end() -> None:
    """Their attention to what is before them takes more and more time: here as much as all else, and more."""
    model, start = StepTimeModel(), 0
    observe(model, 60)
    while start < 40_000:
        num_tokens = model.num_prompt_tokens(20_000, start, 0.03, MOST)
        assert seconds(20_000, num_tokens, start) == pytest.approx(0.03, rel=0.02)
        model.observe(size_of(20_000, num_tokens, start), seconds(20_000, num_tokens, start))
        start += num_tokens


@pytest.mark.parametrize("scale", [0.01, 1.0, 100.0])
def test_slow_and_fast_devices_are_learned_alike(scale: float) -> None:
    model = StepTimeModel()
    observe(model, 300, factor=scale)
    assert model.num_prompt_tokens(40_000, 0, 0.03 * scale, MOST) == pytest.approx(EXPECTED, rel=0.05)


def test_a_step_that_captures_a_graph_hardly_counts() -> None:
    model = StepTimeModel()
    observe(model, 300)
    before = model.num_prompt_tokens(40_000, 0, 0.03, MOST)
    model.observe(size_of(40_000, 100), 5.0)
    model.observe(size_of(40_000, 0), 1.0)
    assert model.num_prompt_tokens(40_000, 0, 0.03, MOST) == pytest.approx(before, rel=0.05)


def test_a_slow_first_step_is_forgotten_by_the_next_ones() -> None:
    model = StepTimeModel()
    model.observe(size_of(0, 220), 4.5)
    observe(model, 12)
    assert model.num_prompt_tokens(40_000, 0, 0.03, MOST) == pytest.approx(EXPECTED, rel=0.2)


@pytest.mark.parametrize("factor", [0.5, 3.0])
def test_a_lasting_change_is_followed(factor: float) -> None:
    model = StepTimeModel()
    observe(model, 300)
    observe(model, 400, factor=factor)
    assert model.seconds(size_of(40_000, 500)) == pytest.approx(factor * seconds(40_000, 500), rel=0.15)


def test_what_prompts_cost_is_known_after_a_long_time_without_any() -> None:
    model = StepTimeModel()
    observe(model, 300)
    for _ in range(10_000):
        model.observe(size_of(40_000, 0), seconds(40_000, 0))
    assert model.num_prompt_tokens(40_000, 0, 0.03, MOST) == pytest.approx(EXPECTED, rel=0.05)


def test_what_long_prompts_cost_is_known_after_some_short_ones() -> None:
    model = StepTimeModel()
    observe(model, 300)
    for context in range(20_000, 70_000, 500):
        model.observe(size_of(context, 10), seconds(context, 10))
    assert model.num_prompt_tokens(40_000, 0, 0.03, MOST) == pytest.approx(EXPECTED, rel=0.05)


@given(
    st.lists(st.tuples(st.integers(0, 2**31), st.integers(0, MOST), st.floats(0.0, 1e6, allow_nan=False)), max_size=30),
    st.integers(0, 2**31),
    st.integers(0, 2**20),
    st.floats(1e-6, 1e5),
    st.integers(0, MOST),
)
def test_whatever_was_measured_the_answer_is_within_bounds_and_the_same_again(
    steps: list[tuple[int, int, float]], context: int, start: int, target: float, most: int
) -> None:
    models = StepTimeModel(), StepTimeModel()
    for step in steps:
        for model in models:
            model.observe(size_of(*step[:2]), step[2])
    first, second = (model.num_prompt_tokens(context, start, target, most) for model in models)
    assert 0 <= first == second <= most
