"""The same tokens with and without drafts, with a real model: every kind of sampling, eager and through graphs.

Drafts are random beginnings of the right continuation, some of their tokens wrong, so that all numbers of accepted
tokens occur beside prefill, preemption, shared prefixes and steps in flight.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanovllm import LLM, RequestOutput, SamplingParams, engine_factory
from nanovllm.engine.batch import ScheduledBatch
from nanovllm.sampling_params import StructuredOutputsParams
from tests.end_to_end.test_real_schedules import DETERMINISTIC, Request
from tests.engine.random_policy import RandomPolicy
from tests.models.qwen3_checkpoints import make_qwen3_checkpoint
from tests.properties import examples
from tests.runner.cpu_graphs import GraphLoader
from tests.runner.test_mixed_schedules import AROUND_SIZES, LENGTHS, answer, answers_as_they_arrive, check_same, prompts
from tests.speculation.guessing import guessing

MAX_DRAFT = 6
SPECULATIVE = {"speculative_config": {"method": "ngram", "num_speculative_tokens": MAX_DRAFT}}
ENGINES: dict[str, dict[str, Any]] = {
    "all fit": {"max_num_seqs": 8},
    "a small cache": {"max_num_seqs": 8, "num_kvcache_blocks": 18},
    "one at a time": {"max_num_seqs": 1},
}
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]

params = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.0, 0.8, 1.3]),
    seed=st.integers(0, 2**63 - 1),
    max_tokens=st.integers(1, 40),
    ignore_eos=st.booleans(),
    top_k=st.sampled_from([0, 0, 9]),
    top_p=st.sampled_from([1.0, 1.0, 0.8]),
    min_p=st.sampled_from([0.0, 0.0, 0.1]),
    logprobs=st.sampled_from([None, None, 0, 2]),
    prompt_logprobs=st.sampled_from([None, None, None, 1]),
    repetition_penalty=st.sampled_from([1.0, 1.0, 1.3]),
    presence_penalty=st.sampled_from([0.0, 0.0, 0.7]),
    frequency_penalty=st.sampled_from([0.0, 0.0, 0.4]),
    logit_bias=st.sampled_from([None, None, {40: 2.0, 41: -50.0}]),
    allowed_token_ids=st.sampled_from([None, None, None, list(range(3, 200))]),
    stop_token_ids=st.sampled_from([None, None, [60, 61, 62, 63]]),
    speculate=st.sampled_from([True, True, True, False]),
)
requests = st.lists(st.builds(Request, prompts, params, st.integers(0, 10)), min_size=2, max_size=8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_qwen3_checkpoint(tmp_path_factory.mktemp("qwen3"))


@pytest.fixture(scope="module", params=DEVICES)
def loader(request: pytest.FixtureRequest, folder: Path) -> GraphLoader:
    return GraphLoader(folder, request.param, "_mixed_graphs", **LENGTHS)


@pytest.fixture(scope="module")
def plain(loader: GraphLoader) -> Iterator[LLM]:
    with loader(use_graphs=False, max_num_seqs=16, enable_prefix_caching=False) as llm:
        yield llm


class Truth:
    """Knows what follows the beginnings of the expected outputs."""

    def __init__(self) -> None:
        self.texts: list[list[int]] = []

    def __call__(self, tokens: list[int], num_tokens: int) -> list[int]:
        end = len(tokens)
        found = [text for text in self.texts if len(text) > end and text[:end] == tokens]
        return found[0][end : end + num_tokens] if found else []


@pytest.mark.parametrize(("use_graphs", "depth"), [(True, 1), (False, 2)])
@pytest.mark.parametrize("name", ENGINES)
def test_drafts_change_no_token(
    loader: GraphLoader, plain: LLM, monkeypatch: pytest.MonkeyPatch, name: str, use_graphs: bool, depth: int
) -> None:
    truth = Truth()
    monkeypatch.setattr(engine_factory, "make_speculation", guessing(truth, seed=1, max_draft=MAX_DRAFT))
    loader.replays.clear()
    with loader(use_graphs, pipeline_depth=depth, **ENGINES[name], **SPECULATIVE) as llm:

        @settings(DETERMINISTIC, max_examples=examples(60))
        @given(seed=st.integers(0, 2**32), drawn=requests)
        def run(seed: int, drawn: list[Request]) -> None:
            engine = llm.llm_engine
            engine.scheduler.policy = RandomPolicy(engine.resolved, seed, AROUND_SIZES)
            outputs = plain.generate([r.prompt for r in drawn], [r.params for r in drawn], use_tqdm=False)
            expected = [answer(output) for output in outputs]
            truth.texts = [[*r.prompt, *tokens] for r, (tokens, _) in zip(drawn, expected, strict=True)]
            check_same(answers_as_they_arrive(llm, drawn), expected)

        run()
        statistics = llm.llm_engine.statistics
        assert 0 < statistics.num_accepted_tokens < statistics.num_draft_tokens
        assert (statistics.num_preemptions > 0) == (name == "a small cache")
    batches: list[ScheduledBatch] = [batch for batch, _, _ in loader.replays]
    if use_graphs and name != "one at a time":
        assert any(len(batch.section("drafts")) for batch in batches), "drafts beside prompt tokens"


@pytest.mark.parametrize("method", ["ngram", "suffix"])
@pytest.mark.parametrize("temperature", [0.0, 0.6])
def test_methods_change_no_token(method: str, temperature: float) -> None:
    """The tiny checkpoint counts and copies: some drafts are right."""
    asked = ["count from 3 to 30", "copy: one two three four one two three four one two", "a b c d a b c d a b"]
    params = [SamplingParams(temperature=temperature, seed=i, max_tokens=80, ignore_eos=True) for i in range(3)]
    config = {"method": method, "num_speculative_tokens": 5}
    if method == "ngram":
        config |= {"prompt_lookup_min": 2, "prompt_lookup_max": 3}
    answers = []
    for more in ({}, {"speculative_config": config}, {"speculative_config": config, "pipeline_depth": 2}):
        with LLM("tiny", device="cpu", **more) as llm:
            outputs = [*llm.generate(asked, params, use_tqdm=False), *llm.generate(asked, params, use_tqdm=False)]
            answers.append([output["token_ids"] for output in outputs])
            statistics = llm.llm_engine.statistics
            assert (statistics.num_accepted_tokens > 0) == bool(more)
            assert statistics.num_output_tokens >= 6 * 80
    assert answers[0] == answers[1] == answers[2]


ASKED = [
    "3, 4, 5, 6, 7, 8, 9, 3, 4, 5",
    "copy: one two three four one two three",
    "a b c d a b c d a b",
    "What is 27 + 58?",
]


@st.composite
def params_of_texts(draw: st.DrawFn) -> SamplingParams:
    """Draws parameters of requests that have a text: fields that need a tokenizer, grammars and several outputs."""
    max_tokens, temperature = draw(st.integers(1, 40)), draw(st.sampled_from([0.0, 0.6, 1.2]))
    detokenize = draw(st.sampled_from([True, True, False]))
    grammar = draw(st.sampled_from([None, None, None, {"regex": "[0-9, ]{5,30}"}, {"choice": ["a", "bb"]}]))
    return SamplingParams(
        temperature=temperature,
        n=1 if temperature == 0 else draw(st.integers(1, 3)),
        seed=draw(st.none() | st.integers(0, 2**40)),
        max_tokens=max_tokens,
        min_tokens=draw(st.integers(0, max_tokens)),
        ignore_eos=grammar is None and draw(st.booleans()),
        bad_words=draw(st.sampled_from([None, ["1"], ["2, 3", "4"], ["one two", "b"]])),
        stop=draw(st.sampled_from([None, [", 9"], ["three"], ["d a", "8"]])) if detokenize else None,
        include_stop_str_in_output=draw(st.booleans()),
        detokenize=detokenize,
        skip_special_tokens=draw(st.booleans()),
        repetition_penalty=draw(st.sampled_from([1.0, 1.0, 1.3])),
        logprobs=draw(st.sampled_from([None, 0, 2])),
        structured_outputs=None if grammar is None else StructuredOutputsParams(**grammar),
    )


def fields(output: RequestOutput) -> list[Any]:
    return [(each.token_ids, each.text, each.finish_reason, each.stop_reason) for each in output.outputs]


def logprobs(output: RequestOutput) -> list[float]:
    rows = [row for each in output.outputs for row in each.logprobs or []]
    return [row[token].logprob for row in rows for token in sorted(row)]


@pytest.mark.parametrize("config", [{"method": "ngram", "prompt_lookup_min": 1}, {"method": "suffix"}], ids=str)
def test_drafts_change_no_field_of_an_answer(config: dict[str, Any]) -> None:
    config = {"num_speculative_tokens": 5, **config}
    engine: dict[str, Any] = {"device": "cpu", "num_kvcache_blocks": 256, "max_num_seqs": 6}
    with LLM("tiny", **engine) as plain, LLM("tiny", **engine, speculative_config=config) as llm:

        @settings(DETERMINISTIC, max_examples=examples(10))
        @given(st.lists(st.tuples(st.sampled_from(ASKED), params_of_texts()), min_size=1, max_size=6))
        def check(drawn: list[tuple[str, SamplingParams]]) -> None:
            asked, drawn_params = zip(*drawn, strict=True)
            outputs = llm.generate(list(asked), list(drawn_params), use_tqdm=False)
            expected = plain.generate(list(asked), list(drawn_params), use_tqdm=False)
            for output, same in zip(outputs, expected, strict=True):
                assert output.error is same.error is None
                assert fields(output) == fields(same)
                assert logprobs(output) == pytest.approx(logprobs(same), abs=1e-4)

        check()
        assert llm.llm_engine.statistics.num_accepted_tokens > 0
