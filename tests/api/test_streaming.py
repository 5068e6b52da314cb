"""LLM.stream: joined, its outputs are what generate gives; and whatever ends it early leaves nothing behind."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nanovllm import (
    LLM,
    CompletionOutput,
    EngineDeadError,
    InvalidArgumentError,
    RequestOutput,
    RequestTooLargeError,
    SamplingParams,
    StepFailedError,
)
from nanovllm.requests.output_builder import NewTokens
from nanovllm.sampling_params import RequestOutputKind
from nanovllm.streaming import OutputStream
from tests.end_to_end.test_everything_together import assert_close
from tests.models.qwen3_checkpoints import make_qwen3_checkpoint
from tests.properties import examples
from tests.small_llm import GREEDY, assert_empty, generate, load

PROMPTS: list[Any] = ["introduce yourself", "count from 3 to 9", [5, 6, 7], {"prompt": "What is 27 + 58?"}]
HOT: dict[str, Any] = {"temperature": 2.0, "ignore_eos": True}  # stray bytes and half characters
TIGHT: dict[str, Any] = {"num_kvcache_blocks": 14, "kvcache_block_size": 16, "max_model_len": 128}


@pytest.fixture(scope="module")
def tiny() -> Iterator[LLM]:
    with LLM("tiny", device="cpu", max_num_seqs=8) as llm:
        yield llm


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_qwen3_checkpoint(tmp_path_factory.mktemp("qwen3"))


def join(parts: list[RequestOutput]) -> CompletionOutput:
    """A request's outputs as one; checks what each of them must be."""
    *before, last = parts
    assert last.finished
    for part in before:
        assert (part.finished, part.outputs[0].finish_reason, part.metrics) == (False, None, None)
        assert part["token_ids"]
        assert (part.prompt, part.prompt_token_ids) == (last.prompt, last.prompt_token_ids)
        assert part.num_cached_tokens == last.num_cached_tokens
    completions = [part.outputs[0] for part in parts]
    has_logprobs = last.outputs[0].logprobs is not None
    sums = [completion.cumulative_logprob or 0.0 for completion in completions]
    assert sums == sorted(sums, reverse=True)
    return CompletionOutput(
        index=0,
        text="".join(completion.text for completion in completions),
        token_ids=[token_id for completion in completions for token_id in completion.token_ids],
        finish_reason=completions[-1].finish_reason,
        logprobs=[row for completion in completions for row in completion.logprobs or []] if has_logprobs else None,
        cumulative_logprob=completions[-1].cumulative_logprob,
        stop_reason=completions[-1].stop_reason,
    )


def by_request(outputs: Iterator[RequestOutput]) -> list[list[RequestOutput]]:
    parts: dict[str, list[RequestOutput]] = {}
    for output in outputs:
        parts.setdefault(output.request_id, []).append(output)
    return [parts[request_id] for request_id in sorted(parts, key=lambda name: int(name.rpartition("-")[2]))]


def many_kinds(llm: LLM) -> list[SamplingParams]:
    text = generate(llm, PROMPTS[0], SamplingParams(temperature=0, max_tokens=40))[0]["text"]
    stop = text[6:20]
    eos = llm.llm_engine.resolved.eos_token_ids[0]
    return [
        SamplingParams(temperature=0, max_tokens=40),
        SamplingParams(temperature=0, max_tokens=40, stop=stop),
        SamplingParams(temperature=0, max_tokens=40, stop=[stop, "no such text"], include_stop_str_in_output=True),
        SamplingParams(temperature=0, max_tokens=40, stop=[text[3] + "?", text[8:10] + "!"]),  # begins, and goes on
        SamplingParams(temperature=0, max_tokens=40, stop_token_ids=[eos], include_stop_str_in_output=True),
        SamplingParams(temperature=0, max_tokens=20, logprobs=2),
        SamplingParams(temperature=0, max_tokens=20, detokenize=False),
        SamplingParams(temperature=0, max_tokens=60, ignore_eos=True, skip_special_tokens=False),
        *[SamplingParams(seed=seed, max_tokens=40, stop=["\ufffd\ufffd", "a "], **HOT) for seed in range(6)],
        *[SamplingParams(seed=seed, max_tokens=40, **HOT) for seed in range(6)],
        SamplingParams(temperature=0, max_tokens=1),
        SamplingParams(temperature=0, max_tokens=40, min_tokens=12, stop=[stop, text[2:4], "no such text"]),
        SamplingParams(temperature=0, max_tokens=20, prompt_logprobs=1, presence_penalty=1.0),
        SamplingParams(seed=1, max_tokens=40, structured_outputs={"regex": "(é|[a-f]{2}){1,4}-[0-9]{1,5}"}),
    ]


@pytest.mark.parametrize(
    "settings", [{}, {"pipeline_depth": 2}, {**TIGHT, "pipeline_depth": 2, "max_num_batched_tokens": 17}]
)
def test_joined_they_are_what_generate_gives(tiny: LLM, settings: dict[str, Any]) -> None:
    kinds = many_kinds(tiny)
    prompts = [prompt for prompt in PROMPTS for _ in kinds]
    params = kinds * len(PROMPTS)
    with LLM("tiny", device="cpu", **{"max_num_seqs": 8, **settings}) as llm:
        expected = generate(llm, prompts, params)
        llm.reset_prefix_cache()
        before = llm.llm_engine.statistics.num_preemptions
        streamed = by_request(llm.stream(prompts, params))
        assert (llm.llm_engine.statistics.num_preemptions > before) == ("num_kvcache_blocks" in settings)
        assert_empty(llm)
    assert len(streamed) == len(expected)
    for parts, whole in zip(streamed, expected, strict=True):
        joined, completion = join(parts), whole.outputs[0]
        without = {"logprobs": None, "cumulative_logprob": None}
        assert replace(joined, **without) == replace(completion, **without)
        assert_close(joined.logprobs, completion.logprobs)  # rows that wait for a grammar change the batches
        assert joined.cumulative_logprob == pytest.approx(completion.cumulative_logprob, abs=1e-2)
        assert parts[-1].metrics is not None
        assert parts[-1].prompt == whole.prompt
        # With a step in flight at a time every token comes alone; the last with the end.
        if "pipeline_depth" not in settings:
            assert [len(part["token_ids"]) for part in parts] == [1] * len(completion.token_ids)


@settings(max_examples=examples(60), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_text_that_was_shown_never_changes(tiny: LLM, data: st.DataObject) -> None:
    """Random tokens in random portions, with stop strings that begin in the text and do not come."""
    engine = tiny.llm_engine
    tokenizer: Any = tiny.get_tokenizer()
    token_ids = data.draw(st.lists(st.integers(0, len(tokenizer) - 1), min_size=1, max_size=25))
    text = tokenizer.decode(token_ids, skip_special_tokens=True)
    starts = data.draw(st.lists(st.integers(0, max(0, len(text) - 1)), max_size=3))
    stop = [string for start in starts if (string := text[start : start + 3] + "\x00") not in text]  # a token is \x00
    engine.add_request("r", [1], SamplingParams(stop=stop or None))
    try:
        stream = OutputStream(tokenizer, "r", engine.sequences("r"), RequestOutputKind.DELTA)
        whole = OutputStream(tokenizer, "r", engine.sequences("r"), RequestOutputKind.CUMULATIVE)
        shown, at = "", 0
        while at < len(token_ids):
            size = data.draw(st.integers(1, 6))
            shown += stream.grow({0: NewTokens(token_ids[at : at + size], None)})["text"]
            assert whole.grow({0: NewTokens(token_ids[at : at + size], None)})["text"] == shown
            at += size
            assert text.startswith(shown)
            known = stream._completions[0]._text
            for string in stop:  # wherever it may still come, nothing of it was shown
                assert not any(string.startswith(known[start:]) for start in range(len(shown)))
        longest = max([3, *(len(string) - 1 for string in stop)])
        assert len(text) - len(shown) <= 3 + longest
    finally:
        engine.discard_requests(["r"])


def test_outputs_come_while_the_requests_run(tiny: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    before = tiny.llm_engine.statistics.num_steps
    stream = tiny.stream(["introduce yourself", "count from 3 to 9"], params)
    assert tiny.llm_engine.statistics.num_steps == before, "nothing runs before the first output is asked for"
    assert not tiny.llm_engine.has_unfinished_requests()
    first, second = next(stream), next(stream)
    assert tiny.llm_engine.statistics.num_steps == before + 1
    assert first.request_id != second.request_id
    assert (first.prompt, second.prompt) == ("introduce yourself", "count from 3 to 9")
    assert len(list(stream)) == 14
    assert_empty(tiny)
    assert list(tiny.stream([])) == []


@pytest.mark.parametrize("depth", [1, 2])
def test_leaving_the_loop_frees_all_at_once(folder: Path, depth: int) -> None:
    params = SamplingParams(temperature=0, max_tokens=50, ignore_eos=True)
    with load(folder, pipeline_depth=depth, max_num_seqs=3) as llm:
        for leave_after in (1, 2, 7):
            stream = llm.stream([[1], [2], [3], [4]], params)
            for _ in range(leave_after):
                next(stream)
            assert llm.llm_engine.scheduler.block_manager.num_used_blocks > 0
            stream.close()
            assert_empty(llm)
        for _ in llm.stream([1], params):
            break  # the iterator goes with the loop
        assert_empty(llm)


def test_other_calls_within_the_loop(folder: Path) -> None:
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    prompts = [[5], [6], [7], [8]]
    with load(folder, pipeline_depth=2) as llm:
        expected = [output.outputs[0] for output in generate(llm, prompts, params)]
        outer, inner = llm.stream(prompts[:2], params), llm.stream(prompts[2], params)
        outputs: list[RequestOutput] = [next(outer), next(inner)]
        (within,) = generate(llm, prompts[3], params)  # runs the others to their end
        outputs += [*outer, *inner]
        found = [join(parts) for parts in by_request(iter(outputs))]
        assert found == expected[:3]
        assert within.outputs[0] == expected[3]
        llm.llm_engine.add_request("mine", prompts[3], params)
        list(llm.stream(prompts[0], SamplingParams(max_tokens=30, ignore_eos=True)))
        (mine,) = llm.llm_engine.step()
        assert mine.outputs[0] == expected[3]
        assert_empty(llm)


def test_a_stream_that_is_closed_leaves_nothing_that_ended_within_another_call(folder: Path) -> None:
    params = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)
    with load(folder) as llm:
        stream = llm.stream([[5], [6]], params)
        next(stream)
        generate(llm, [7], params)  # runs the stream's to their end
        stream.close()
        assert_empty(llm)
        assert [output.request_id for output in llm.llm_engine.step()] == []


def test_a_bad_request_fails_alone(tiny: LLM) -> None:
    prompts: list[Any] = ["introduce yourself", "", "count from 3 to 9"]
    parts = by_request(tiny.stream(prompts, GREEDY))
    expected = generate(tiny, prompts, GREEDY)
    assert [join(part) for part in parts] == [output.outputs[0] for output in expected]
    assert len(parts[1]) == 1
    assert isinstance(parts[1][0].error, InvalidArgumentError)
    with pytest.raises(RequestTooLargeError):
        next(tiny.stream([[1] * 100_000], GREEDY))
    assert_empty(tiny)


def test_a_step_that_fails(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("the device failed")

    with load(folder) as llm:
        expected = generate(llm, [[1], [2]], GREEDY)
        mine, other = llm.stream([1], GREEDY), llm.stream([2], GREEDY)
        next(mine), next(other)
        with monkeypatch.context() as patch:
            patch.setattr(llm.llm_engine.executor, "submit", fail)
            with pytest.raises(RuntimeError, match="the device failed"):
                list(mine)
        with pytest.raises(StepFailedError, match="and with it this request"):  # not for ever on the way
            list(other)
        assert_empty(llm)
        again = [join(parts) for parts in by_request(llm.stream([[1], [2]], GREEDY))]
        assert again == [output.outputs[0] for output in expected]
        late = llm.stream([1], GREEDY)
        next(late)
    with pytest.raises(EngineDeadError):
        list(late)
