"""n > 1: several completions of one prompt, each as it would be alone, of a prompt that is computed once."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nanovllm import (
    LLM,
    AsyncLLM,
    CompletionOutput,
    InvalidArgumentError,
    RequestOutput,
    SamplingParams,
    StepFailedError,
)
from nanovllm.requests.parallel_sampling import ParallelSampling
from tests.engine.simulated_executor import expected_output
from tests.engine.test_schedules import check_integrity, engines, make_engine
from tests.models.qwen3_checkpoints import make_qwen3_checkpoint
from tests.properties import examples
from tests.small_llm import assert_empty, generate, load

PROMPT = [(7 * position) % 300 + 5 for position in range(37)]
SEEDED = SamplingParams(n=4, seed=11, max_tokens=9, ignore_eos=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_qwen3_checkpoint(tmp_path_factory.mktemp("qwen3"))


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"max_num_batched_tokens": 10, "pipeline_depth": 2, "max_num_seqs": 3},
        {"kvcache_block_size": 4, "num_kvcache_blocks": 26},  # preemption
        {"enable_prefix_caching": False},
    ],
)
def test_each_is_what_its_seed_gives_alone(folder: Path, arguments: dict[str, Any]) -> None:
    params = replace(SEEDED, max_tokens=30)
    with load(folder, dtype="float32", max_model_len=96) as llm:
        alone = [generate(llm, [PROMPT], replace(params, n=1, seed=11 + index))[0] for index in range(4)]
    with load(folder, dtype="float32", max_model_len=96, **arguments) as llm:
        output, other = generate(llm, [PROMPT, PROMPT[:3]], [params, replace(params, n=1)])
        assert [completion.index for completion in output.outputs] == [0, 1, 2, 3]
        assert [completion.token_ids for completion in output.outputs] == [each["token_ids"] for each in alone]
        assert len({tuple(completion.token_ids) for completion in output.outputs}) == 4
        assert output["token_ids"] == output.outputs[0].token_ids
        assert output.prompt_token_ids == PROMPT
        assert len(other.outputs) == 1
        assert output.metrics is not None
        assert output.metrics.num_output_tokens == 120
        assert output.request_id == "generate-0"
        preemptions = [one.num_preemptions for one in output.metrics.completions]
        assert sum(preemptions) == output.metrics.num_preemptions
        assert (len(set(preemptions)) > 1) is ("num_kvcache_blocks" in arguments)  # of some, not of the first
        assert preemptions[0] == 0
        assert_empty(llm)


def test_without_a_seed_they_differ_and_the_engine_repeats_them(folder: Path) -> None:
    runs = []
    for _ in range(2):
        with load(folder, dtype="float32", max_model_len=96, seed=5) as llm:
            runs.append([each.token_ids for each in generate(llm, [PROMPT], replace(SEEDED, seed=None))[0].outputs])
    assert runs[0] == runs[1]
    assert len(set(map(tuple, runs[0]))) == 4


def test_the_prompt_is_computed_once_and_its_blocks_are_shared(folder: Path) -> None:
    with load(folder, dtype="float32", max_model_len=96, kvcache_block_size=4) as llm:
        engine = llm.llm_engine
        engine.add_request("a", PROMPT, SEEDED)
        engine.step()
        assert engine.statistics.num_prompt_tokens == 37 + 3 * 1  # each computes what is in no full block
        # Nine full blocks in common, and the four's own last ones; depth 2 has asked for no more yet.
        assert engine.scheduler.block_manager.num_used_blocks == 9 + 4
        tables = [sequence.block_table.blocks for sequence in engine.scheduler.rows.running()]
        assert len(tables) == 4
        assert all(table[:9] == tables[0][:9] for table in tables)
        engine.abort_request("a")
        outputs = []
        while engine.has_unfinished_requests():
            outputs += engine.step()
        (output,) = outputs
        assert [each.finish_reason for each in output.outputs] == ["abort"] * 4
        assert_empty(llm)


def test_logprobs_of_each_and_of_the_prompt_once(folder: Path) -> None:
    with load(folder, dtype="float32", max_model_len=96) as llm:
        output = generate(llm, [PROMPT], replace(SEEDED, logprobs=1, prompt_logprobs=0))[0]
        assert output.prompt_logprobs is not None
        assert len(output.prompt_logprobs) == 37
        assert all(each.logprobs is not None and len(each.logprobs) == 9 for each in output.outputs)


def test_stop_rules_end_each_by_itself(folder: Path) -> None:
    with load(folder, dtype="float32", max_model_len=96) as llm:
        free = generate(llm, [PROMPT], SEEDED)[0]
        stop = free.outputs[2].token_ids[4]
        output = generate(llm, [PROMPT], replace(SEEDED, stop_token_ids=[stop]))[0]
        for each, whole in zip(output.outputs, free.outputs, strict=True):
            ends = whole.token_ids.index(stop) + 1 if stop in whole.token_ids else 9
            assert each.token_ids == whole.token_ids[:ends]
        assert output.outputs[2].stop_reason == stop


def test_ids_are_taken_as_long_as_it_runs(folder: Path) -> None:
    with load(folder, dtype="float32", max_model_len=96) as llm:
        engine = llm.llm_engine
        engine.add_request("a/1", PROMPT, replace(SEEDED, n=1))
        with pytest.raises(InvalidArgumentError, match="request_id='a/1'"):
            engine.add_request("a", PROMPT, SEEDED)
        engine.discard_requests(["a/1"])
        engine.add_request("a", PROMPT, SEEDED)
        for name in ("a", "a/0", "a/3"):
            with pytest.raises(InvalidArgumentError, match=f"request_id='{name}'"):
                engine.add_request(name, PROMPT)
        engine.discard_requests(["a"])
        while engine.has_unfinished_requests():
            assert engine.step() == []
        assert_empty(llm)
        engine.add_request("a", PROMPT, SEEDED)
        engine.discard_requests(["a"])


def test_what_is_refused(folder: Path) -> None:
    with pytest.raises(InvalidArgumentError, match=r"seed=.* at most 2\*\*63 - n"):
        SamplingParams(n=2, seed=2**63 - 1)
    with pytest.raises(InvalidArgumentError, match="n=2 .* 1 with temperature 0.*all the same"):
        SamplingParams(n=2, temperature=0)


def streamed(outputs: list[RequestOutput]) -> list[CompletionOutput]:
    """The deltas of one request, joined by completion."""
    parts: dict[int, list[CompletionOutput]] = {}
    for output in outputs:
        assert [each.index for each in output.outputs] == sorted({each.index for each in output.outputs})
        for each in output.outputs:
            parts.setdefault(each.index, []).append(each)
    assert outputs[-1].finished
    assert sorted(parts) == [each.index for each in outputs[-1].outputs]
    return [
        replace(
            parts[index][-1],
            text="".join(part.text for part in parts[index]),
            token_ids=[token for part in parts[index] for token in part.token_ids],
            logprobs=[row for part in parts[index] for row in part.logprobs or []] or None,
        )
        for index in sorted(parts)
    ]


def assert_same(found: list[CompletionOutput], expected: list[CompletionOutput]) -> None:
    """To rounding, where log-probabilities come from other batches."""
    for one, other in zip(found, expected, strict=True):
        assert replace(one, logprobs=None, cumulative_logprob=None) == replace(
            other, logprobs=None, cumulative_logprob=None
        )
        assert one.cumulative_logprob == pytest.approx(other.cumulative_logprob, abs=1e-3)
        for scores, others in zip(one.logprobs or [], other.logprobs or [], strict=True):
            assert next(iter(scores)) == next(iter(others))
            assert scores.keys() == others.keys()


@pytest.mark.parametrize("arguments", [{}, {"pipeline_depth": 2, "max_num_batched_tokens": 20, "max_num_seqs": 3}])
def test_streams_are_what_generate_gives(arguments: dict[str, Any]) -> None:
    text_params = SamplingParams(n=4, seed=3, temperature=1.5, max_tokens=24, logprobs=1, stop=["e", "a "])
    kinds = [text_params, replace(text_params, ignore_eos=True, stop=None), replace(text_params, n=1)]
    prompt = "introduce yourself"
    with LLM("tiny", device="cpu", num_kvcache_blocks=64, **{"max_num_seqs": 8, **arguments}) as llm:
        free = generate(llm, prompt, kinds[1])[0].outputs
        kinds.insert(1, replace(kinds[1], stop_token_ids=[free[1].token_ids[5], free[2].token_ids[9]]))
        expected = [output.outputs for output in generate(llm, [prompt] * 4, kinds)]
        assert len({len(each.token_ids) for each in expected[0]}) > 1  # they end at different times
        parts: dict[str, list[RequestOutput]] = {}
        for output in llm.stream([prompt] * 4, kinds):
            parts.setdefault(output.request_id, []).append(output)
        found = [streamed(parts[name]) for name in sorted(parts)]
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other)
        assert all(len(part.outputs) == 1 for part in parts[max(parts)])
        for _ in llm.stream(prompt, kinds[2]):
            break  # the iterator goes with the loop
        assert_empty(llm)


@pytest.mark.parametrize("delta", [False, True])
def test_streams_for_coroutines(delta: bool) -> None:
    params = SamplingParams(n=3, seed=3, temperature=1.2, max_tokens=20, logprobs=0, ignore_eos=True)
    prompt = "introduce yourself"
    with LLM("tiny", device="cpu", num_kvcache_blocks=64) as llm:
        expected = generate(llm, prompt, params)[0].outputs

    async def ask(engine: AsyncLLM) -> list[RequestOutput]:
        return [output async for output in engine.generate(prompt, params, delta=delta)]

    async def run() -> None:
        async with AsyncLLM("tiny", device="cpu", num_kvcache_blocks=64) as engine:
            for outputs in await asyncio.gather(*(ask(engine) for _ in range(3))):
                assert len(outputs) > 2
                if delta:
                    assert_same(streamed(outputs), expected)
                    continue
                assert_same(outputs[-1].outputs, expected)
                for output in outputs[:-1]:
                    for part, whole in zip(output.outputs, expected, strict=True):
                        assert (part.index, part.finish_reason) == (whole.index, None)
                        assert whole.text.startswith(part.text)
                        assert whole.token_ids[: len(part.token_ids)] == part.token_ids
            stream = engine.generate(prompt, replace(params, max_tokens=500), "mine")
            await anext(stream)
            await engine.abort("mine")
            last = [output async for output in stream][-1]
            assert [each.finish_reason for each in last.outputs] == ["abort"] * 3
            assert (engine.metrics.num_running, engine.metrics.num_waiting) == (0, 0)

    asyncio.run(run())


def test_a_lost_step_loses_the_stream(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("the device failed")

    with load(folder) as llm:
        mine, other = llm.stream([PROMPT], SEEDED), llm.stream([[3]], SEEDED)
        next(mine), next(other)
        with monkeypatch.context() as patch:
            patch.setattr(llm.llm_engine.executor, "submit", fail)
            with pytest.raises(RuntimeError, match="the device failed"):
                list(mine)
        with pytest.raises(StepFailedError, match="and with it this request"):
            list(other)
        assert_empty(llm)
        assert len(generate(llm, [PROMPT], SEEDED)[0].outputs) == 4


def test_metrics_are_of_all_completions(folder: Path) -> None:
    with load(folder, dtype="float32", max_model_len=96, max_num_seqs=2) as llm:
        generate(llm, [PROMPT[:20]])
        metrics = generate(llm, [PROMPT], SEEDED)[0].metrics
        assert metrics is not None
        each = metrics.completions
        assert len(each) == 4
        assert all(one.num_output_tokens == 9 and not one.completions for one in each)
        assert metrics.arrival == min(one.arrival for one in each)
        assert metrics.first_token == min(one.first_token or 0.0 for one in each)
        assert metrics.finished == max(one.finished for one in each)
        assert metrics.num_cached_tokens == each[0].num_cached_tokens == 16  # what others left, not each other's
        gaps = [one.inter_token_latency for one in each]
        assert metrics.inter_token_latency == pytest.approx(sum(gap or 0.0 for gap in gaps) / 4)


def test_a_prompt_is_read_once_and_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with LLM("tiny", device="cpu", num_kvcache_blocks=64) as llm:
        engine = llm.llm_engine
        tokenizer: Any = llm.get_tokenizer()
        texts: list[str] = []
        encode = type(tokenizer).encode

        def note(self: Any, text: str, **rest: Any) -> Any:
            texts.append(text)
            return encode(self, text, **rest)

        monkeypatch.setattr(type(tokenizer), "encode", note)
        engine.add_request("a", "introduce yourself", SamplingParams(n=5))
        assert texts == ["introduce yourself"]
        engine.add_request("b", [1, 2, 3])
        assert engine.num_waiting_tokens == len(encode(tokenizer, "introduce yourself")) + 3
        assert [sequence.prompt for sequence in engine.sequences("a")] == ["introduce yourself"] * 5
        engine.discard_requests(["a", "b"])


@dataclass
class Wanted:
    prompt: list[int]
    params: SamplingParams
    arrives_at_step: int
    aborted_at_step: int | None


wanted = st.builds(
    Wanted,
    st.builds(lambda common, own: [1, 2, 3] * common + own, st.integers(0, 4), st.lists(st.integers(1, 3), min_size=1)),
    st.builds(SamplingParams, n=st.integers(1, 5), max_tokens=st.integers(1, 20), ignore_eos=st.booleans()),
    st.integers(0, 15),
    st.none() | st.integers(0, 40),
)


@settings(max_examples=examples(200), deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(engines, st.lists(wanted, min_size=1, max_size=6), st.integers(0, 12))
def test_under_any_schedule(engine_values: dict[str, Any], requests: list[Wanted], spare_blocks: int) -> None:
    """Blocks are counted after every step, in a memory that fails where a block is not what it should be."""
    largest = max(len(r.prompt) + (r.params.max_tokens or 0) for r in requests)
    num_blocks = -(-largest // engine_values["block_size"]) + spare_blocks
    max_model_len = min(64, num_blocks * engine_values["block_size"])
    requests = [request for request in requests if len(request.prompt) < max_model_len]
    engine = make_engine(**engine_values, num_blocks=num_blocks, max_model_len=max_model_len)
    outputs: dict[str, RequestOutput] = {}
    step = 0
    while any(r.arrives_at_step >= step for r in requests) or engine.has_unfinished_requests():
        for index, request in enumerate(requests):
            if request.arrives_at_step == step:
                engine.add_request(str(index), request.prompt, request.params)
            if request.aborted_at_step == step:
                engine.abort_request(str(index))
        for output in engine.step():
            assert output.request_id not in outputs
            outputs[output.request_id] = output
        check_integrity(engine)
        step += 1
        assert step < 5000, "the engine makes no progress"
    for index, request in enumerate(requests):
        output, params = outputs[str(index)], request.params
        assert [each.index for each in output.outputs] == list(range(params.n))
        expected = expected_output(request.prompt, params.max_tokens or 0, max_model_len, ignore_eos=params.ignore_eos)
        for each in output.outputs:
            aborted = each.finish_reason == "abort"
            assert each.token_ids == (expected[: len(each.token_ids)] if aborted else expected)
            assert not aborted or request.aborted_at_step is not None
        assert output.metrics is not None
        assert output.metrics.num_output_tokens == sum(len(each.token_ids) for each in output.outputs)
    assert engine.scheduler.block_manager.num_free_blocks == num_blocks
    assert engine.scheduler.rows.is_empty
    assert not engine._unfinished.requests()


def test_one_of_them_aborted_leaves_the_others_and_any_error_is_told(folder: Path) -> None:
    with load(folder, dtype="float32", max_model_len=96) as llm:
        engine = llm.llm_engine
        whole = generate(llm, [PROMPT], SEEDED)[0].outputs
        engine.add_request("a", PROMPT, SEEDED)
        for _ in range(4):
            engine.step()
        engine.abort_request("a/2")
        outputs = []
        while engine.has_unfinished_requests():
            outputs += engine.step()
        assert [each.finish_reason for each in outputs[0].outputs] == ["length", "length", "abort", "length"]
        assert outputs[0].outputs[2].token_ids == whole[2].token_ids[: len(outputs[0].outputs[2].token_ids)]
        assert [each for each in outputs[0].outputs if each.index != 2] == [each for each in whole if each.index != 2]
        assert_empty(llm)
        parallel = ParallelSampling("b", SEEDED)
        failed = InvalidArgumentError("structured_outputs", "x", "something else")
        parts = [replace(outputs[0], request_id=name, outputs=whole[:1]) for name in parallel.ids]
        parts[2] = replace(parts[2], error=failed)
        *before, joined = [parallel.add(part) for part in parts]
        assert before == [None] * 3
        assert joined is not None
        assert joined.error is failed
