"""Decode through graphs gives the tokens of decode without, at every batch size, from the first output on.

On a CPU a stand-in replays the captured step (`cpu_graphs.py`); on a GPU these are CUDA graphs.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nanovllm import LLM, SamplingParams
from nanovllm.engine.batch import StepNeeds
from nanovllm.runner.cuda_graph import graph_sizes
from tests.end_to_end.test_real_schedules import Request, answers_as_they_arrive
from tests.models.qwen3_checkpoints import make_qwen3_checkpoint
from tests.runner.cpu_graphs import GraphLoader

MAX_MODEL_LEN = 96


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_qwen3_checkpoint(tmp_path_factory.mktemp("qwen3"))


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def load(request: pytest.FixtureRequest, folder: Path) -> GraphLoader:
    return GraphLoader(folder, request.param, "_graphs")


def replayed(load: GraphLoader) -> list[int]:
    """The sizes of the batches that were replayed."""
    return [len(rows) for rows, _ in load.replays]


def greedy(num_tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)


def generate(llm: LLM, prompts: list[list[int]], params: Any) -> list[list[int]]:
    return [output["token_ids"] for output in llm.generate(prompts, params, use_tqdm=False)]


def prompts_of(lengths: list[int]) -> list[list[int]]:
    return [[(7 * seq + 3 * position) % 300 + 10 for position in range(n)] for seq, n in enumerate(lengths)]


def num_open_rows(llm: LLM) -> int:
    """Rows other than free ones, which show the null block alone and are one token long."""
    rows = llm.llm_engine.executor._runner.rows  # type: ignore[attr-defined]
    free = (rows.block_tables == rows.null_block).all(dim=1) & (rows.lengths == 1)
    assert bool(free[rows.null_row])
    return int((~free).sum())


@pytest.mark.parametrize("max_num_seqs", [1, 2, 3, 7, 8, 9, 13, 63, 64, 100, 129, 500, 512, 1000])
def test_every_batch_size_has_a_graph_that_is_not_much_larger(max_num_seqs: int) -> None:
    sizes = graph_sizes(max_num_seqs)
    assert sizes == sorted(set(sizes))
    assert sizes[0] == 1
    assert sizes[-1] == max_num_seqs
    for size in range(1, max_num_seqs + 1):
        padded = min(captured for captured in sizes if captured >= size)
        assert padded - size < max(8, size / 7)
    assert {1 << power for power in range(max_num_seqs.bit_length())} <= set(sizes)  # no tile has unused tokens


@pytest.mark.parametrize("max_num_seqs", [1, 3, 8, 13])
def test_every_size_decodes_as_without_graphs(load: GraphLoader, max_num_seqs: int) -> None:
    """Sequences end one after another: each size from the largest down to one runs, on the grid and off it."""
    prompts = prompts_of([1 + 5 * seq % 17 for seq in range(max_num_seqs)])
    params = [greedy(2 + 2 * seq) for seq in range(max_num_seqs)]
    with load(use_graphs=False, max_num_seqs=max_num_seqs) as llm:
        expected = generate(llm, prompts, params)
    with load(use_graphs=True, max_num_seqs=max_num_seqs) as llm:
        assert generate(llm, prompts, params) == expected
        captured = set(llm.llm_engine.executor._runner._graphs._captured)  # type: ignore[attr-defined]
    assert set(replayed(load)) == set(range(1, max_num_seqs + 1))
    assert len(replayed(load)) == 2 * max_num_seqs - 1  # every step but the prefill
    assert captured == {(size, StepNeeds()) for size in graph_sizes(max_num_seqs)}


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8, 11])
def test_the_first_outputs_of_a_fresh_engine_are_right(load: GraphLoader, size: int) -> None:
    """Its first decode step captures the graph that it runs, where that is not the largest."""
    prompts = prompts_of([4 + seq for seq in range(size)])
    with load(use_graphs=False, max_num_seqs=16) as llm:
        expected = generate(llm, prompts, greedy(3))
    with load(use_graphs=True, max_num_seqs=16) as llm:
        assert generate(llm, prompts, greedy(3)) == expected
    assert replayed(load) == [size, size]


def test_tables_are_fixed_in_width_and_cleared_on_reuse(load: GraphLoader) -> None:
    """The narrowest tables there can be, then the widest, and both, through the same graphs and rows."""
    wide, narrow = prompts_of([MAX_MODEL_LEN - 20] * 6), prompts_of([1, 2, 3, 4, 5])
    batches = [(narrow, 9), (wide, 20), (narrow, 9), (wide[:3] + narrow[:2], 20), (narrow[:1], 4)]
    tokens = []
    for use_graphs in (False, True):
        with load(use_graphs, max_num_seqs=6, enable_prefix_caching=False) as llm:
            tokens.append([])
            for prompts, num_tokens in batches:
                tokens[-1].append(generate(llm, prompts, greedy(num_tokens)))
                assert num_open_rows(llm) == len(prompts)  # the last step's rows close with the next step
    assert tokens[0] == tokens[1]
    assert tokens[0][0] == tokens[0][2]


def test_steps_of_the_same_rows_are_copied_to_the_device_once(load: GraphLoader) -> None:
    """Until another sequence joins or one ends. Blocks are so long that no step needs a new one."""
    with load(use_graphs=True, max_num_seqs=4, kvcache_block_size=128, pipeline_depth=1) as llm:
        engine = llm.llm_engine
        engine.add_request("long", [1, 2, 3], greedy(20))
        for _ in range(8):
            engine.step()
        engine.add_request("short", [4, 5], greedy(30))
        while engine.has_unfinished_requests():
            engine.step()
    places = [(rows.data_ptr(), len(rows)) for rows, _ in load.replays]
    assert [number for _, number in dict.fromkeys(places)] == [1, 2, 1, 1]  # one, both, one while a row closes, one


def test_padding_leaves_the_rows_of_ended_sequences_alone(load: GraphLoader) -> None:
    """Three of five go on, in the graph for four: the fourth place must not still be the fourth sequence's."""
    params = [greedy(num_tokens) for num_tokens in (9, 9, 9, 3, 3)]
    with load(use_graphs=True, max_num_seqs=5) as llm:
        for _ in range(2):  # a graph that was just captured has padding all over
            generate(llm, prompts_of([1, 2, 3, 4, 5]), params)
            assert num_open_rows(llm) == 3
    assert replayed(load) == ([5, 5] + [3] * 6) * 2


def test_batches_with_and_without_truncation_take_their_own_graphs(load: GraphLoader) -> None:
    """Rows that ask for it come and go beside one that does not: everybody's tokens are those of eager steps."""
    prompts = prompts_of([5, 9, 2])
    fields: list[dict[str, Any]] = [{}, {"top_k": 3}, {"top_p": 0.6, "min_p": 0.02}]
    params = [
        SamplingParams(seed=seq, max_tokens=4 + 6 * (2 - seq), ignore_eos=True, **own) for seq, own in enumerate(fields)
    ]
    with load(use_graphs=False, max_num_seqs=4) as llm:
        expected = generate(llm, prompts, params)
        assert expected[1:] != generate(
            llm, prompts[1:], [replace(p, top_k=0, top_p=1.0, min_p=0.0) for p in params[1:]]
        )
        assert expected[0] == generate(llm, prompts[:1], params[0])[0]
    with load(use_graphs=True, max_num_seqs=4) as llm:
        assert generate(llm, prompts, params) == expected
        graphs: Any = llm.llm_engine.executor._runner._graphs  # type: ignore[attr-defined]
        captured = {(size, needs.truncates) for size, needs in graphs._captured}
        assert {(4, True), (2, True), (1, False)} <= captured
        assert (2, False) not in captured


def test_shaped_rows_take_their_own_graphs_and_no_neighbour_notices(load: GraphLoader) -> None:
    prompts = prompts_of([5, 9, 2, 7])
    fields: list[dict[str, Any]] = [
        {},
        {"repetition_penalty": 1.5, "frequency_penalty": 0.5, "presence_penalty": 0.5, "top_k": 9, "logprobs": 2},
        {"logit_bias": {7: 3.0, 8: -100.0}, "min_tokens": 7, "stop_token_ids": [9], "temperature": 0.0},
        {"allowed_token_ids": list(range(20, 320, 3)), "presence_penalty": 2.0},
    ]
    params = [SamplingParams(**{"seed": seq, "max_tokens": 16 - 3 * seq, **own}) for seq, own in enumerate(fields)]
    with load(use_graphs=False, max_num_seqs=4) as llm:
        expected = generate(llm, prompts, params)
        assert expected[0] == generate(llm, prompts[:1], params[0])[0]
        plain = [SamplingParams(seed=seq, max_tokens=p.max_tokens) for seq, p in enumerate(params)]
        assert all(a != b for a, b in zip(expected[1:], generate(llm, prompts, plain)[1:], strict=True))
    with load(use_graphs=True, max_num_seqs=4, pipeline_depth=2 if load.device == "cuda" else 1) as llm:
        for _ in range(2):
            assert generate(llm, prompts, params) == expected
        graphs: Any = llm.llm_engine.executor._runner._graphs  # type: ignore[attr-defined]
        captured = {(size, needs.edits_logits) for size, needs in graphs._captured}
        assert {(4, True), (1, False)} <= captured
        assert (2, False) not in captured


def test_logprobs_of_graphs_are_those_without(load: GraphLoader) -> None:
    """Rows that ask for different numbers, for none, and for all, which runs without a graph."""
    prompts = prompts_of([3, 5, 8, 4])
    asked: list[int | None] = [2, None, 20, 0]
    params = [replace(greedy(4 + 2 * row), logprobs=number) for row, number in enumerate(asked)]

    def answers(llm: LLM, params: list[SamplingParams]) -> list[list[list[tuple[int, int, float]]] | None]:
        outputs = [
            output.outputs[0].logprobs for output in llm.generate(prompts[: len(params)], params, use_tqdm=False)
        ]
        return [
            output and [[(token, x.rank, round(x.logprob, 3)) for token, x in each.items()] for each in output]
            for output in outputs
        ]

    everything = [replace(greedy(3), logprobs=-1)]
    with load(use_graphs=False, max_num_seqs=4) as llm:
        expected, all_expected = answers(llm, params), answers(llm, everything)
    with load(use_graphs=True, max_num_seqs=4) as llm:
        assert answers(llm, params) == expected
        assert replayed(load).count(4) == 3  # every decode step that all four share
        before = len(load.replays)
        assert answers(llm, everything) == all_expected
        assert len(load.replays) == before
    assert expected[1] is None
    assert [len(each) for each in expected[0] or ()] == [2] * 4


def test_random_arrivals_and_preemption(load: GraphLoader) -> None:
    lengths = [3, 40, 1, 17, 29, 8, 33, 2, 21, 12, 5, 30]
    requests = [
        Request(
            prompt,
            SamplingParams(temperature=seq % 2, seed=seq, max_tokens=10 + 5 * (seq % 7), top_k=seq % 3 * 10),
            2 * seq,
        )
        for seq, prompt in enumerate(prompts_of(lengths))
    ]
    sizes = {"max_num_seqs": 6, "kvcache_block_size": 16, "num_kvcache_blocks": 8, "max_num_batched_tokens": 24}
    with load(use_graphs=False, max_num_seqs=32) as llm:
        expected = answers_as_they_arrive(llm, requests)
    with load(use_graphs=True, **sizes) as llm:
        assert answers_as_they_arrive(llm, requests) == expected
        assert llm.llm_engine.statistics.num_preemptions > 0
    assert set(replayed(load)) & {3, 5}, "no size between two captured ones was needed"
