"""Steps with chunks through graphs give the tokens of eager steps under random schedules.

The schedules have steps around the padded sizes, chunks of one token, steps without decode rows and steps that sample
nothing, with prefix hits, preemption, and every kind of sampling beside one another.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanovllm import LLM, RequestOutput, SamplingParams
from nanovllm.engine.batch import ScheduledBatch
from tests.end_to_end.test_real_schedules import DETERMINISTIC, Request
from tests.engine.random_policy import RandomPolicy
from tests.engine.test_schedules import check_integrity
from tests.models.qwen3_checkpoints import make_qwen3_checkpoint
from tests.properties import examples
from tests.runner.cpu_graphs import GraphLoader

MAX_TOKENS = 150
PADDED_SIZES = (64, 128, MAX_TOKENS)
AROUND_SIZES = tuple(size + more for size in PADDED_SIZES for more in (-1, 0, 1) if size + more <= MAX_TOKENS)
LENGTHS = {"max_model_len": 220, "max_num_batched_tokens": MAX_TOKENS, "kvcache_block_size": 16}
ENGINES: dict[str, dict[str, Any]] = {
    "all fit": {"max_num_seqs": 12},
    "a small cache": {"max_num_seqs": 12, "num_kvcache_blocks": 18},  # room for the largest request, and little more
    "no prefix cache": {"max_num_seqs": 5, "enable_prefix_caching": False},
}
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_qwen3_checkpoint(tmp_path_factory.mktemp("qwen3"))


@pytest.fixture(scope="module", params=DEVICES)
def loader(request: pytest.FixtureRequest, folder: Path) -> GraphLoader:
    return GraphLoader(folder, request.param, "_mixed_graphs", **LENGTHS)


@pytest.fixture(scope="module")
def eager(loader: GraphLoader) -> Iterator[LLM]:
    with loader(use_graphs=False, max_num_seqs=16, enable_prefix_caching=False) as llm:
        yield llm


# Some prompts begin alike; some are as long as a padded size, or one token longer or shorter. Tokens stay clear of the
# end-of-sequence ids 1 and 2.
prompts = st.builds(
    lambda common, own, first: [*range(10, 10 + common), *((first + 3 * i) % 300 + 10 for i in range(own))],
    st.sampled_from([0, 0, 16, 40]),
    st.sampled_from([1, 1, 2, 17, 63, 64, 65, 127, 128, 129]) | st.integers(1, 129),
    st.integers(0, 299),
)
plain = {
    "temperature": st.sampled_from([0.0, 0.0, 0.8]),
    "seed": st.integers(0, 2**63 - 1),
    "max_tokens": st.integers(1, 25),
    "ignore_eos": st.just(True),
}
special = {
    "top_k": st.sampled_from([0, 9]),
    "top_p": st.sampled_from([1.0, 0.8]),
    "logprobs": st.sampled_from([None, 0, 2]),
    "repetition_penalty": st.sampled_from([1.0, 1.3]),
    "presence_penalty": st.sampled_from([0.0, 0.7]),
    "logit_bias": st.sampled_from([None, {40: 2.0, 41: -50.0}]),
    "min_tokens": st.sampled_from([0, 1]),
}
params = st.builds(SamplingParams, **plain) | st.builds(SamplingParams, **plain, **special)
requests = st.lists(st.builds(Request, prompts, params, st.integers(0, 10)), min_size=3, max_size=10)


def answer(output: RequestOutput) -> tuple[list[int], list[float]]:
    """Returns the tokens of an output, and their log-probabilities if it has some."""
    completion = output.outputs[0]
    rows = zip(completion.token_ids, completion.logprobs or [], strict=bool(completion.logprobs))
    return completion.token_ids, [row[token_id].logprob for token_id, row in rows]


def answers_as_they_arrive(llm: LLM, requests: list[Request]) -> list[tuple[list[int], list[float]]]:
    engine, outputs, step = llm.llm_engine, {}, 0
    while len(outputs) < len(requests):
        for index, request in enumerate(requests):
            if request.arrives_at_step == step:
                engine.add_request(str(index), request.prompt, request.params)
        outputs.update((output.request_id, answer(output)) for output in engine.step())
        check_integrity(engine)
        step += 1
        assert step < 20_000, "the engine makes no progress"
    while engine.has_unfinished_requests():
        engine.step()
    return [outputs[str(index)] for index in range(len(requests))]


def check_same(found: list[tuple[list[int], list[float]]], expected: list[tuple[list[int], list[float]]]) -> None:
    assert [token_ids for token_ids, _ in found] == [token_ids for token_ids, _ in expected]
    for (_, logprobs), (_, expected_logprobs) in zip(found, expected, strict=True):
        assert logprobs == pytest.approx(expected_logprobs, abs=1e-3)


def kinds_of(batch: ScheduledBatch) -> set[str]:
    """Returns which of the cases that this file is about a step shows, and its number of tokens."""
    shown = {
        "chunk of one token": bool((batch.chunks["length"] == 1).any()),
        "no decode rows": not len(batch.decode_rows),
        "nothing sampled": not len(batch.sampled_rows),
        "several final chunks": batch.num_final_chunks > 1,
        "logit edits": batch.needs.edits_logits,
        "log-probabilities": batch.needs.num_logprobs is not None,
    }
    return {f"{batch.num_tokens} tokens"} | {kind for kind, applies in shown.items() if applies}


KINDS = {
    *("chunk of one token", "no decode rows", "nothing sampled", "several final chunks"),
    *("logit edits", "log-probabilities", "63 tokens", "64 tokens", "65 tokens"),
}


@pytest.mark.parametrize("name", ENGINES)
def test_graphs_give_the_tokens_of_eager_steps_under_any_schedule(loader: GraphLoader, eager: LLM, name: str) -> None:
    loader.replays.clear()
    with loader(use_graphs=True, **ENGINES[name]) as llm:

        @settings(DETERMINISTIC, max_examples=examples(80))
        @given(seed=st.integers(0, 2**32), drawn=requests)
        def run(seed: int, drawn: list[Request]) -> None:
            engine = llm.llm_engine
            engine.scheduler.policy = RandomPolicy(engine.resolved, seed, AROUND_SIZES)
            expected = eager.generate([r.prompt for r in drawn], [r.params for r in drawn], use_tqdm=False)
            check_same(answers_as_they_arrive(llm, drawn), [answer(output) for output in expected])

        run()
        statistics = llm.llm_engine.statistics
        assert (statistics.num_preemptions > 0) == (name == "a small cache")
        assert (statistics.num_prefix_hits > 0) == (name != "no prefix cache")
    assert set().union(*(kinds_of(batch) for batch, _, _ in loader.replays)) >= KINDS


@pytest.mark.parametrize("device", DEVICES)
def test_grammars_beside_chunks(device: str) -> None:
    """A row with a grammar sits out the steps in which its mask is not known yet, and takes part in others."""
    pytest.importorskip("xgrammar", reason="xgrammar is not installed")
    loader = GraphLoader(Path("tiny"), device, "_mixed_graphs", **LENGTHS, skip_tokenizer_init=False)
    asked = [
        {"regex": r"[a-f]{2,9}-\d{1,5}"},
        {"choice": ["yes", "no", "I can't say"]},
        None,
        {"json": {"type": "object"}},
    ]
    drawn = [
        Request(
            [(7 * index + 3 * i) % 300 + 10 for i in range(length)],
            SamplingParams(
                temperature=index % 2, seed=index, max_tokens=20, structured_outputs=asked[index % len(asked)]
            ),
            index // 2,
        )
        for index, length in enumerate([1, 63, 64, 65, 100, 127, 2, 30, 129, 1, 90, 5])
    ]
    with loader(use_graphs=False, max_num_seqs=16) as llm:
        outputs = llm.generate([r.prompt for r in drawn], [r.params for r in drawn], use_tqdm=False)
        expected = [answer(output) for output in outputs]
    with loader(use_graphs=True, max_num_seqs=8) as llm:
        for seed in range(4):
            llm.llm_engine.scheduler.policy = RandomPolicy(llm.llm_engine.resolved, seed, AROUND_SIZES)
            check_same(answers_as_they_arrive(llm, drawn), expected)
    assert any(batch.needs.edits_logits and len(batch.decode_rows) for batch, _, _ in loader.replays)
