"""Steps with chunks through graphs give the tokens of eager steps, whatever their make-up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nanovllm import LLM, SamplingParams
from nanovllm.engine.batch import Chunk, ScheduledBatch
from nanovllm.runner.mixed_graphs import StepShape, token_sizes
from tests.end_to_end.test_real_schedules import Request, answers_as_they_arrive
from tests.models.qwen3_checkpoints import make_qwen3_checkpoint
from tests.runner.cpu_graphs import GraphLoader

MAX_TOKENS = 150


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_qwen3_checkpoint(tmp_path_factory.mktemp("qwen3"))


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def load(request: pytest.FixtureRequest, folder: Path) -> GraphLoader:
    return GraphLoader(folder, request.param, "_mixed_graphs", max_num_batched_tokens=MAX_TOKENS, kvcache_block_size=16)


def prompt(seed: int, length: int) -> list[int]:
    return [(7 * seed + 3 * position) % 300 + 10 for position in range(length)]


def requests(lengths: list[int], **fields: Any) -> list[Request]:
    """Requests that arrive one after another, so that their prompts run beside the decoding of earlier ones."""
    return [
        Request(
            prompt(seed, length),
            SamplingParams(temperature=seed % 2, seed=seed, max_tokens=4 + 3 * (seed % 5), ignore_eos=True, **fields),
            seed // 2,
        )
        for seed, length in enumerate(lengths)
    ]


@pytest.mark.parametrize("max_tokens", [1, 24, 64, 65, 512, 1000, 8192])
def test_sizes_are_close_together(max_tokens: int) -> None:
    sizes = token_sizes(max_tokens)
    assert sizes == sorted(set(sizes))
    assert sizes[-1] == max_tokens
    for small, large in zip([0, *sizes], sizes, strict=False):
        assert large - small <= max(64, small / 4)


# Around the padded sizes 64, 128 and 150, one-token chunks, and more chunks than the smallest shape has room for.
LENGTHS = [1, 63, 64, 65, 1, 90, 2, 88, 31, 33, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 40]


@pytest.mark.parametrize(
    "arguments",
    [
        {"max_num_seqs": 16},
        {"max_num_seqs": 5, "max_num_batched_tokens": 24},
        {"max_num_seqs": 9, "num_kvcache_blocks": 8},
        {"max_num_seqs": 40, "max_prefill_tokens_beside_decode": 7},
        {"max_num_seqs": 12, "enable_prefix_caching": False},
    ],
)
def test_the_tokens_are_those_of_eager_steps(load: GraphLoader, arguments: dict[str, Any]) -> None:
    arrivals = requests(LENGTHS)
    with load(use_graphs=False, max_num_seqs=32) as llm:
        expected = answers_as_they_arrive(llm, arrivals)
    with load(use_graphs=True, **arguments) as llm:
        for _ in range(2):  # the second time with prefix hits
            assert answers_as_they_arrive(llm, arrivals) == expected
        if "num_kvcache_blocks" in arguments:
            assert llm.llm_engine.statistics.num_preemptions > 0
    kinds = {batch.kind for batch, _, _ in load.replays}
    assert kinds == {"prefill", "mixed"}
    if arguments.keys() & {"max_num_batched_tokens", "max_prefill_tokens_beside_decode"}:
        assert any(batch.num_final_chunks < len(batch.chunks) for batch, _, _ in load.replays)  # a prompt in parts
    for batch, _, shape in load.replays:
        assert batch.num_tokens <= shape.num_tokens
        assert len(batch.sampled_rows) <= shape.num_rows
        assert len(batch.chunks) <= shape.num_chunks


def test_sampling_of_any_kind_beside_a_prompt(load: GraphLoader) -> None:
    fields = {"top_k": 9, "repetition_penalty": 1.3, "logprobs": 2, "logit_bias": {40: 2.0}}
    arrivals = [*requests([20, 70]), *requests([30, 5, 64, 3], **fields)]
    with load(use_graphs=False, max_num_seqs=8) as llm:
        expected = answers_as_they_arrive(llm, arrivals)
    with load(use_graphs=True, max_num_seqs=8) as llm:
        assert answers_as_they_arrive(llm, arrivals) == expected
    assert load.replays


def test_prompt_logprobs_run_without_a_graph(load: GraphLoader) -> None:
    params = SamplingParams(temperature=0, max_tokens=3, prompt_logprobs=1)
    answers = []
    for use_graphs in (False, True):
        with load(use_graphs, max_num_seqs=4) as llm:
            output = llm.generate([prompt(1, 30)], params, use_tqdm=False)[0]
            assert output.prompt_logprobs is not None
            answers.append((output.outputs[0].token_ids, [row and list(row) for row in output.prompt_logprobs]))
    assert answers[0] == answers[1]
    assert not load.replays


def test_a_step_that_is_too_large_has_no_shape(load: GraphLoader) -> None:
    with load(use_graphs=True, max_num_seqs=16) as llm:
        graphs = llm.llm_engine.executor._runner._mixed_graphs  # type: ignore[attr-defined]

        def shape(num_decode: int, *lengths: int) -> StepShape | None:
            chunks = [Chunk(row, 0, length) for row, length in enumerate(lengths)]
            batch = ScheduledBatch.build(1, decode_rows=np.arange(num_decode), chunks=chunks)
            found: StepShape | None = graphs.shape_of(batch)
            return found

        assert shape(10, 141) is None
        assert shape(10, 140) == StepShape(MAX_TOKENS, 16, 8)
        assert shape(0, 5) == StepShape(64, 8, 8)
        assert shape(3, *[1] * 9) is None  # room for 9 chunks comes with 288 tokens


def num_captured(llm: LLM) -> int:
    runner: Any = llm.llm_engine.executor._runner  # type: ignore[attr-defined]
    return len(runner._graphs._captured) + runner._mixed_graphs.num_captured


def test_graphs_captured_while_idle_serve_later_steps(load: GraphLoader) -> None:
    arrivals = requests(LENGTHS[:8], top_k=5)
    with load(use_graphs=False, max_num_seqs=8) as llm:
        expected = answers_as_they_arrive(llm, arrivals)
    with load(use_graphs=True, max_num_seqs=8) as llm:
        before = num_captured(llm)
        assert llm.llm_engine.capture_ahead()
        assert num_captured(llm) == before + 1
        while llm.llm_engine.capture_ahead():
            pass
        assert not llm.llm_engine.capture_ahead()
        everything = num_captured(llm)
        assert answers_as_they_arrive(llm, arrivals) == expected
        assert num_captured(llm) == everything  # no step had to capture one


def test_capturing_ahead_stops_when_little_memory_is_left(load: GraphLoader, monkeypatch: pytest.MonkeyPatch) -> None:
    with load(use_graphs=True, max_num_seqs=8) as llm:
        monkeypatch.setattr("nanovllm.runner.mixed_graphs.free_memory", lambda device: 1 << 29)
        assert llm.llm_engine.capture_ahead()
        assert not llm.llm_engine.capture_ahead()
        [output] = llm.generate([prompt(0, 9)], SamplingParams(max_tokens=3, ignore_eos=True), use_tqdm=False)
        assert len(output["token_ids"]) == 3
