"""Any SamplingParams that is accepted runs beside other requests, and changes none of their tokens."""

from __future__ import annotations

from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nanovllm import InvalidArgumentError, RequestOutput, SamplingParams
from tests.engine.simulated_executor import VOCAB_SIZE, expected_output
from tests.engine.test_llm_engine import greedy, is_empty, make_engine, tokens
from tests.engine.test_schedules import engines
from tests.properties import examples

# Every integer is drawn from what is common, from the limits of machine integers, and beyond.
integers = st.one_of(
    st.integers(-2, 80),
    st.builds(
        lambda power, offset: 2**power + offset, st.sampled_from([7, 15, 16, 31, 32, 62, 63, 64]), st.integers(-2, 2)
    ),
    st.integers(),
)
floats = st.floats(allow_nan=True) | st.sampled_from([0.0, 1e-6, 1.0, 2.0, -2.0, 1e6])
token_lists = st.none() | st.lists(st.integers(0, VOCAB_SIZE - 1) | integers, max_size=4)
fields: dict[str, st.SearchStrategy[Any]] = {
    "temperature": floats,
    "max_tokens": st.none() | integers,
    "ignore_eos": st.booleans(),
    "seed": st.none() | integers,
    "top_k": integers,
    "top_p": floats,
    "min_p": floats,
    "stop_token_ids": token_lists,
    "presence_penalty": floats,
    "frequency_penalty": floats,
    "repetition_penalty": floats,
    "logit_bias": st.none() | st.dictionaries(integers, floats, max_size=3),
    "min_tokens": integers,
    "allowed_token_ids": token_lists,
    "n": st.integers(1, 5) | integers,
}


@st.composite
def accepted_params(draw: st.DrawFn) -> SamplingParams:
    """Keeps the fields that are accepted together with those drawn before."""
    accepted: dict[str, Any] = {}
    for name in draw(st.lists(st.sampled_from(sorted(fields)), unique=True, max_size=6)):
        wanted = {**accepted, name: draw(fields[name])}
        try:
            SamplingParams(**wanted)
        except InvalidArgumentError:
            continue
        accepted = wanted
    return SamplingParams(**accepted)


@settings(max_examples=examples(400), deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    engines, st.lists(accepted_params(), min_size=1, max_size=4), st.lists(st.integers(0, 49), min_size=1, max_size=20)
)
def test_others_keep_their_tokens(
    engine_values: dict[str, Any], drawn: list[SamplingParams], prompt: list[int]
) -> None:
    engine, _ = make_engine(**engine_values, num_blocks=-(-64 // engine_values["block_size"]) + 8)
    engine.add_request("before", [1, 2, 3], greedy(20))
    queued: list[str] = []
    num_completions = 2
    outputs: dict[str, RequestOutput] = {}
    for index, params in enumerate(drawn):
        if params.n > 64:  # accepted, and tested elsewhere: each is a request of its own
            continue
        try:
            queued.append(engine.add_request(str(index), prompt, params))
        except InvalidArgumentError:  # not allowed on this model
            continue
        num_completions += params.n
        outputs.update((output.request_id, output) for output in engine.step())
    engine.add_request("after", [3, 2, 1], greedy(20))
    for _ in range(200 * num_completions):  # one may run after another, each for up to 64 steps
        if not engine.has_unfinished_requests():
            break
        outputs.update((output.request_id, output) for output in engine.step())
    assert outputs.keys() == {"before", "after", *queued}
    assert tokens(outputs["before"]) == expected_output([1, 2, 3], 20, 64, ignore_eos=True)
    assert tokens(outputs["after"]) == expected_output([3, 2, 1], 20, 64, ignore_eos=True)
    assert is_empty(engine)
