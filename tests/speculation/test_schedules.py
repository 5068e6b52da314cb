"""Drafts change no token under any schedule, lose no block, and leave no wrong key where attention reads."""

from __future__ import annotations

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nanovllm import LLMEngine, SamplingParams
from nanovllm.config import EngineConfig
from nanovllm.engine.observer import EngineObserver, VerifiedDrafts
from tests.engine import simulated_executor
from tests.engine.simulated_executor import SimulatedExecutor, expected_output, make_config
from tests.engine.test_schedules import Request, cache_sizes, check_answers, engines, requests, run
from tests.properties import examples
from tests.speculation.guessing import guessing


def truth(tokens: list[int], num_tokens: int) -> list[int]:
    return expected_output(tokens, num_tokens, max_model_len=10_000, ignore_eos=True)


class CountDrafts(EngineObserver):
    def __init__(self) -> None:
        self.verified: list[VerifiedDrafts] = []

    def drafts_verified(self, drafts: VerifiedDrafts) -> None:
        self.verified.append(drafts)


def make_engine(seed: int, max_draft: int, observer: EngineObserver, **changes: object) -> LLMEngine:
    executor = SimulatedExecutor(make_config(**changes))
    speculative = {"method": "ngram", "num_speculative_tokens": max_draft}
    return LLMEngine(
        EngineConfig("simulated", skip_tokenizer_init=True, speculative_config=speculative),
        lambda config, stopwatch: executor,
        [observer],
        make_speculation=guessing(truth, seed, max_draft),
    )


@settings(max_examples=examples(400), deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    engines,
    st.lists(requests, min_size=1, max_size=12),
    st.integers(0, 20),
    st.none() | st.integers(0, 2**32),
    st.integers(0, 2**32),
    st.integers(1, 9),
)
def test_answers_do_not_depend_on_drafts(
    engine_values: dict[str, int],
    wanted: list[Request],
    spare_blocks: int,
    policy_seed: int | None,
    seed: int,
    max_draft: int,
) -> None:
    counts = CountDrafts()
    sizes = cache_sizes(engine_values["block_size"], wanted, spare_blocks)
    engine = make_engine(seed, max_draft, counts, **engine_values, **sizes)
    check_answers(engine, wanted, policy_seed)
    for drafts in counts.verified:
        counted = zip(drafts.num_drafted, drafts.num_accepted, drafts.gained, strict=True)
        for drafted, accepted, (_, gained) in counted:
            assert 1 <= drafted <= max_draft
            assert 0 <= gained <= accepted <= drafted


def test_right_drafts_save_steps() -> None:
    prompt, steps = [1, 2, 3], []
    for max_draft in (1, 7):
        counts = CountDrafts()
        engine = make_engine(3, max_draft, counts, num_blocks=32, max_num_batched_tokens=40)
        wanted = [Request(prompt, SamplingParams(max_tokens=50, ignore_eos=True), 0)]
        run(engine, wanted)
        assert wanted[0].output == expected_output(prompt, 50, 64, ignore_eos=True)
        steps.append(engine.statistics.num_steps)
        assert any(drafts.num_accepted != drafts.num_drafted for drafts in counts.verified), "some are wrong"
        assert sum(gained for drafts in counts.verified for _, gained in drafts.gained) == 50 - steps[-1]
    assert steps[1] < steps[0] < 50
    assert simulated_executor.EOS in wanted[0].output
