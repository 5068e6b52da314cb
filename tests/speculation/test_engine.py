"""Speculative decoding through the public API: streams, several ranks, stop rules, metrics and the log."""

from __future__ import annotations

import asyncio
import collections
import logging
from collections.abc import AsyncIterator
from typing import Any

import pytest

from nanovllm import LLM, AsyncLLM, RequestOutput, RequestOutputKind, SamplingParams
from nanovllm.engine.batch import IntArray
from nanovllm.engine.row_table import RowTable
from nanovllm.metrics import Counter
from nanovllm.speculation.drafter import Drafter
from nanovllm.speculation.proposers import NgramProposer
from tests.distributed.rank_processes import ONLY_LINUX

SUFFIX = {"method": "suffix", "num_speculative_tokens": 6}
PROMPTS = ["a b c d e f a b c d e f a b c", "count from 3 to 30", "one two three one two three one two"]
# Copies of the same token or phrase come from the tiny checkpoint whatever it is asked.
PARAMS = [SamplingParams(temperature=0.3, seed=i, max_tokens=60, ignore_eos=True, logprobs=1) for i in range(3)]


def load(**settings: Any) -> LLM:
    return LLM("tiny", **{"device": "cpu", "max_model_len": 256, "num_kvcache_blocks": 128, **settings})


def tokens_of(outputs: list[RequestOutput]) -> list[list[int]]:
    return [completion.token_ids for output in outputs for completion in output.outputs]


@pytest.fixture(scope="module")
def plain() -> list[list[int]]:
    with load() as llm:
        return tokens_of(llm.generate(PROMPTS, PARAMS, use_tqdm=False))


@ONLY_LINUX
def test_two_ranks(plain: list[list[int]]) -> None:
    with load(speculative_config=SUFFIX, tensor_parallel_size=2, pipeline_depth=2) as llm:
        assert tokens_of(llm.generate(PROMPTS, PARAMS, use_tqdm=False)) == plain
        assert llm.llm_engine.statistics.num_accepted_tokens > 0


@pytest.mark.parametrize("engine_process", [False, True])
def test_streams_have_every_token_once(plain: list[list[int]], engine_process: bool) -> None:
    params = [params.clone() for params in PARAMS]
    for each in params:
        each.output_kind = RequestOutputKind.DELTA

    async def read(stream: AsyncIterator[RequestOutput]) -> tuple[list[int], int, list[int]]:
        token_ids, num_logprobs, sizes = [], 0, []
        async for output in stream:
            completion = output.outputs[0]
            token_ids += completion.token_ids
            num_logprobs += len(completion.logprobs or [])
            sizes.append(len(completion.token_ids))
        return token_ids, num_logprobs, sizes

    async def read_all() -> list[tuple[list[int], int, list[int]]]:
        with AsyncLLM(
            "tiny", device="cpu", max_model_len=256, speculative_config=SUFFIX, engine_process=engine_process
        ) as engine:
            streams = [
                engine.generate(prompt, own, str(index))
                for index, (prompt, own) in enumerate(zip(PROMPTS, params, strict=True))
            ]
            return await asyncio.gather(*map(read, streams))

    found = asyncio.run(read_all())
    assert [token_ids for token_ids, _, _ in found] == plain
    assert all(num_logprobs == len(token_ids) for token_ids, num_logprobs, _ in found)
    assert max(max(sizes) for _, _, sizes in found) > 1


def test_stop_rules_see_every_token(plain: list[list[int]]) -> None:
    """A rule that applies within a draft ends the output there, and what was accepted after it is dropped."""
    with load(speculative_config=SUFFIX) as llm:
        text = llm.generate(PROMPTS[0], PARAMS[0], use_tqdm=False)[0].outputs[0].text
        for end in range(8, 40, 3):
            stop = plain[0][end]
            params = PARAMS[0].clone()
            params.stop_token_ids = [stop]
            completion = llm.generate(PROMPTS[0], params, use_tqdm=False)[0].outputs[0]
            assert completion.token_ids == plain[0][: plain[0].index(stop) + 1]
            assert len(completion.logprobs or []) == len(completion.token_ids)
            params = PARAMS[0].clone()
            params.stop = word = text[end % (len(text) - 4) :][:4]
            completion = llm.generate(PROMPTS[0], params, use_tqdm=False)[0].outputs[0]
            assert completion.text == text[: text.index(word)]
            params = PARAMS[0].clone()
            params.max_tokens = end
            assert tokens_of(llm.generate(PROMPTS[0], params, use_tqdm=False)) == [plain[0][:end]]
        assert llm.llm_engine.statistics.num_accepted_tokens > 0


def test_several_completions() -> None:
    params = SamplingParams(temperature=0.9, seed=1, max_tokens=50, ignore_eos=True, n=3)
    answers = []
    for settings in ({}, {"speculative_config": SUFFIX}):
        with load(**settings) as llm:
            answers.append(tokens_of(llm.generate(PROMPTS, params, use_tqdm=False)))
    assert answers[0] == answers[1]


def test_a_grammar_runs_without_and_the_log_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("xgrammar", reason="xgrammar is not installed")
    grammar = SamplingParams(temperature=0, max_tokens=30, structured_outputs={"regex": "[a-c ]{20}"})
    refused = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True, speculate=False)
    answers = []
    caplog.set_level(logging.INFO, logger="nanovllm")
    for settings in ({}, {"speculative_config": SUFFIX}):
        with load(**settings) as llm:
            caplog.clear()
            answers.append(tokens_of(llm.generate(PROMPTS, [grammar, PARAMS[1], refused], use_tqdm=False)))
            off = [record.fields for record in caplog.records if record.event == "speculation.off"]
            finished = [record.fields for record in caplog.records if record.event == "request.finished"]
    assert answers[0] == answers[1]
    assert sorted(fields["why"] for fields in off) == ["speculate=False", "structured_outputs"]
    assert sum("num_draft_tokens" in fields for fields in finished) == 1


def test_metrics() -> None:
    with load(speculative_config=SUFFIX) as llm:
        outputs = llm.generate(PROMPTS, PARAMS, use_tqdm=False)
        values = {
            (metric.name, metric.labels.get("position")): metric.value
            for metric in llm.get_metrics()
            if isinstance(metric, Counter)
        }
        statistics = llm.llm_engine.statistics
    prefix = "vllm:spec_decode_num_"
    assert values[f"{prefix}drafts", None] == statistics.num_drafts > 0
    assert values[f"{prefix}draft_tokens", None] == statistics.num_draft_tokens
    assert values[f"{prefix}accepted_tokens", None] == statistics.num_accepted_tokens > 0
    by_position = [values[f"{prefix}accepted_tokens_per_pos", str(position)] for position in range(6)]
    assert sum(by_position) == statistics.num_accepted_tokens
    assert by_position == sorted(by_position, reverse=True)
    assert values["vllm:generation_tokens", None] == sum(map(len, tokens_of(outputs)))
    with load() as llm:
        assert not [metric for metric in llm.get_metrics() if "spec_decode" in metric.name]


def test_rows_without_drafts_are_looked_at_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """So many rows, each with a new token after every step, would otherwise hold up the steps."""
    looks: list[list[NgramProposer]] = []

    def watch(self: Drafter, rows: RowTable) -> None:
        looks.append([])
        watch_all(self, rows)

    def propose(self: NgramProposer, tokens: IntArray, limit: int) -> list[int]:
        looks[-1].append(self)
        return []

    watch_all = Drafter.watch
    monkeypatch.setattr(Drafter, "watch", watch)
    monkeypatch.setattr(NgramProposer, "propose", propose)
    config = {"method": "ngram", "num_speculative_tokens": 4}
    with load(speculative_config=config, max_num_seqs=40, num_kvcache_blocks=400) as llm:
        params = SamplingParams(max_tokens=20, ignore_eos=True)
        llm.generate([[1, token] for token in range(40)], params, use_tqdm=False)
    assert max(map(len, looks)) == 16
    counts = collections.Counter(id(proposer) for each in looks for proposer in each)
    assert len(counts) == 40
    assert min(counts.values()) >= 5


def test_a_reset_cache_has_no_outputs_to_draft_from() -> None:
    with load(speculative_config=SUFFIX) as llm:

        def num_drafted() -> int:
            before = llm.llm_engine.statistics.num_draft_tokens
            llm.generate("count from 3 to 30", PARAMS[1], use_tqdm=False)
            return llm.llm_engine.statistics.num_draft_tokens - before

        alone = num_drafted()
        assert num_drafted() > alone, "the second run drafts from the first one's output"
        llm.reset_prefix_cache()
        assert num_drafted() == alone
