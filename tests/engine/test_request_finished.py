"""Every request leaves one record of how it ended and where its time went, and the numbers add up."""

from __future__ import annotations

import asyncio
import gc
import logging
import random
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import pytest

from nanovllm import LLM, AsyncLLM, InvalidArgumentError, LLMEngine, SamplingParams
from nanovllm.engine.batch import StepResult
from tests.engine.simulated_executor import EOS, Handle, expected_output
from tests.engine.stepping_clock import Clock, make_timed_engine
from tests.engine.test_llm_engine import greedy, run
from tests.processes import WATCHDOG

PROMPT = "count from 3 to 9"
LOGGER = "nanovllm.engine.llm_engine"


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> Iterator[Callable[..., list[dict[str, Any]]]]:
    """Returns the fields of an event's records so far, with the record's level and `console`."""

    def fields(event: str = "request.finished") -> list[dict[str, Any]]:
        records = [record for record in caplog.records if record.event == event]  # type: ignore[attr-defined]
        assert all(record.name == LOGGER for record in records if event.startswith("request."))
        return [{**record.fields, "in_summary": record.in_summary} for record in records]  # type: ignore[attr-defined]

    gc.collect()  # engines of earlier tests, whose end is logged
    with caplog.at_level(logging.INFO, "nanovllm"):
        yield fields


def total(record: dict[str, Any]) -> float:
    return float(record["queue_s"] + record["prefill_s"] + record["decode_s"] + record["preempted_s"])


def test_the_record_of_a_request_that_waited(log: Callable[..., list[dict[str, Any]]]) -> None:
    clock = Clock()
    engine, _ = make_timed_engine(clock, max_num_seqs=1)
    engine.add_request("first", [1, 2, 3], greedy(4))
    engine.step()
    engine.add_request("second", [4], greedy(1))
    engine.add_request("third", [5], greedy(2))
    run(engine)
    first, second, third = log()
    assert first == {
        "request_id": "first",
        "seq_ids": [0],
        "cause": "length",
        "finish_reason": "length",
        "stop_reason": None,
        "e2e_s": 4,
        "queue_s": 0,
        "prefill_s": 1,
        "decode_s": 3,
        "preempted_s": 0,
        "ttft_s": 1,
        "itl_s": 1,
        "longest_stall_s": 1,
        "stall_cause": "decode",
        "stall_step": 2,
        "stall_reason": "step 2 decoded 1 sequences",
        "num_prompt_tokens": 3,
        "num_cached_tokens": 0,
        "num_output_tokens": 4,
        "num_preemptions": 0,
        "queued_behind": 0,
        "kv_cache_usage": 0,
        "arrival": 100,
        "finished": 104,
        "first_step": 1,
        "last_step": 4,
        "in_summary": False,
    }
    assert (second["queued_behind"], third["queued_behind"]) == (0, 1)
    assert second["kv_cache_usage"] == third["kv_cache_usage"] == 1 / 32
    assert (second["queue_s"], second["prefill_s"], second["decode_s"]) == (3, 1, 0)
    assert (second["first_step"], second["last_step"]) == (5, 5)
    assert (second["itl_s"], second["longest_stall_s"], second["stall_cause"]) == (None, None, None)


def test_eos_and_length(log: Callable[..., list[dict[str, Any]]]) -> None:
    engine, _ = make_timed_engine(Clock())
    prompt = next([seed, 1] for seed in range(40) if EOS in expected_output([seed, 1], 30, 64))
    engine.add_request("eos", prompt, greedy(30, ignore_eos=False))
    engine.add_request("length", prompt, greedy(2))
    stop = expected_output(prompt, 3, 64, ignore_eos=True)[2]
    engine.add_request("stop", prompt, SamplingParams(temperature=0, max_tokens=30, stop_token_ids=[stop]))
    run(engine)
    ends = {record["request_id"]: record for record in log()}
    assert {name: record["cause"] for name, record in ends.items()} == {
        "eos": "eos",
        "length": "length",
        "stop": "stop",
    }
    assert {name: record["finish_reason"] for name, record in ends.items()} == {
        **{"eos": "stop", "length": "length", "stop": "stop"}
    }
    assert (ends["stop"]["stop_reason"], ends["eos"]["stop_reason"]) == (stop, None)


def test_abort_and_leave(log: Callable[..., list[dict[str, Any]]]) -> None:
    engine, _ = make_timed_engine(Clock(), max_num_seqs=1)
    for name in ("runs", "leaves", "waits"):
        engine.add_request(name, [1], greedy(9))
    engine.step()
    engine.abort_request("runs")
    engine.abort_request("waits")
    engine.discard_requests(["leaves", "leaves", "unknown"])
    run(engine)
    runs, waits, leaves = sorted(log(), key=lambda end: ("runs", "waits", "leaves").index(end["request_id"]))
    assert [runs["cause"], waits["cause"], leaves["cause"]] == ["abort", "abort", "left"]
    assert {each["finish_reason"] for each in log()} == {"abort"}
    assert all(each["in_summary"] for each in log())
    assert (runs["num_output_tokens"], runs["first_step"], runs["last_step"]) == (1, 1, 1)
    assert (waits["num_output_tokens"], waits["first_step"], waits["last_step"]) == (0, None, None)
    assert (waits["queue_s"], waits["e2e_s"], waits["ttft_s"]) == (1, 1, None)


@pytest.mark.parametrize(
    ("error", "cause"), [(RuntimeError("a kernel failed"), "failed"), (KeyboardInterrupt(), "abort")]
)
def test_a_failed_step_ends_every_request(
    log: Callable[..., list[dict[str, Any]]], error: BaseException, cause: str
) -> None:
    engine, executor = make_timed_engine(Clock())
    for name in ("a", "b"):
        engine.add_request(name, [1, 2], greedy(9))
    engine.step()
    engine.step()
    original = executor.collect

    def fail(handle: Handle) -> StepResult:
        raise error

    executor.collect = fail  # type: ignore[method-assign]
    with pytest.raises(type(error)):
        engine.step()
    ends = log()
    assert [(each["request_id"], each["cause"], each["num_output_tokens"]) for each in ends] == [
        ("a", cause, 2),
        ("b", cause, 2),
    ]
    failed = log("request.failed")
    assert [each["request_id"] for each in failed] == (["a", "b"] if cause == "failed" else [])
    (stopped,) = log("engine.error" if cause == "failed" else "engine.interrupted")
    assert (stopped["step"], stopped["request_ids"], stopped["num_requests"]) == (3, ["a", "b"], 2)
    assert "in fail\n    raise error" in stopped["traceback"]
    executor.collect = original  # type: ignore[method-assign]
    engine.add_request("a", [1, 2], greedy(2))
    run(engine)
    again = log()[-1]
    assert (again["cause"], again["num_output_tokens"], again["queued_behind"]) == ("length", 2, 0)
    assert (again["first_step"], again["last_step"]) == (4, 5)  # no number is used twice


def test_exit_ends_what_is_unfinished(log: Callable[..., list[dict[str, Any]]]) -> None:
    engine, _ = make_timed_engine(Clock())
    engine.add_request("a", [1, 2], greedy(9))
    engine.step()
    engine.exit()
    engine.exit()
    (end,) = log()
    assert (end["cause"], end["num_output_tokens"]) == ("abort", 1)
    assert log("engine.statistics")[-1]["finished_by_cause"] == {"abort": 1}


def test_one_record_for_several_completions(log: Callable[..., list[dict[str, Any]]]) -> None:
    engine, _ = make_timed_engine(Clock())
    params = SamplingParams(temperature=1, seed=3, n=3, max_tokens=5, ignore_eos=True)
    engine.add_request("several", [1, 2, 3], params)
    engine.step()
    engine.abort_request("several/1")
    run(engine)
    (end,) = log()
    assert (end["request_id"], end["seq_ids"], end["cause"]) == ("several", [0, 1, 2], "length")
    assert end["num_output_tokens"] == sum(each["num_output_tokens"] for each in end["completions"])
    assert [(each["index"], each["cause"], each["num_output_tokens"]) for each in end["completions"]] == [
        (0, "length", 5),
        (1, "abort", 1),
        (2, "length", 5),
    ]
    assert total(end) == end["e2e_s"]


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("seed", range(4))
def test_the_times_add_up_whatever_happens(log: Callable[..., list[dict[str, Any]]], seed: int, depth: int) -> None:
    choose, clock = random.Random(seed), Clock()
    engine, _ = make_timed_engine(clock, num_blocks=9, max_num_batched_tokens=7, pipeline_depth=depth)
    added = 0
    outputs: dict[str, Any] = {}
    while added < 30 or engine.has_unfinished_requests():
        if added < 30 and choose.random() < 0.4:
            prompt = [choose.randrange(50) for _ in range(choose.randrange(1, 12))]
            n = choose.choice([1, 1, 1, 2])
            params = SamplingParams(max_tokens=choose.randrange(1, 20), n=n, seed=added)
            engine.add_request(f"r{added}", prompt, params)
            added += 1
        if choose.random() < 0.05:
            engine.abort_request(f"r{choose.randrange(added or 1)}")
        clock.now += choose.choice([0, 0, 0.25])
        outputs.update((output.request_id, output) for output in engine.step())
    ends = log()
    assert {end["request_id"] for end in ends} == outputs.keys()
    assert len(ends) == added
    assert sum(end["num_preemptions"] for end in ends) == engine.statistics.num_preemptions > 0
    for end in ends:
        metrics = outputs[end["request_id"]].metrics
        assert total(end) == pytest.approx(end["e2e_s"]) == pytest.approx(metrics.end_to_end)
        assert min(end["queue_s"], end["prefill_s"], end["decode_s"], end["preempted_s"]) >= 0
        assert end["num_output_tokens"] == metrics.num_output_tokens
        assert end["ttft_s"] == metrics.time_to_first_token
        assert end["itl_s"] == pytest.approx(metrics.inter_token_latency)


# ---- stalls


def gaps_of(engine: LLMEngine) -> dict[str, list[float]]:
    """Runs an engine to its end. Returns the seconds between the tokens of each request, as its caller sees them."""
    seen: dict[str, list[float]] = {}
    counts: dict[str, int] = {}
    while engine.has_unfinished_requests():
        outputs = engine.step()
        now = engine.scheduler.now
        lengths = {
            sequence.request_id: len(engine.new_tokens(sequence).token_ids) for sequence in engine._unfinished.running()
        }
        lengths |= {output.request_id: len(output["token_ids"]) for output in outputs}
        for name, length in lengths.items():
            if length > counts.get(name, 0):
                seen.setdefault(name, []).append(now)
                counts[name] = length
    return {name: [after - before for before, after in pairwise(times)] for name, times in seen.items()}


@pytest.mark.parametrize("depth", [1, 2])
def test_the_longest_stall_is_the_longest_gap(log: Callable[..., list[dict[str, Any]]], depth: int) -> None:
    engine, _ = make_timed_engine(Clock(), num_blocks=8, enable_prefix_caching=False, pipeline_depth=depth)
    for index in range(3):
        engine.add_request(f"{index}", [index] * 6, greedy(14))
    gaps = gaps_of(engine)
    ends = {end["request_id"]: end for end in log()}
    assert {name: end["longest_stall_s"] for name, end in ends.items()} == {
        name: max(each) for name, each in gaps.items()
    }
    preempted = [end for end in ends.values() if end["num_preemptions"]]
    assert preempted
    for end in preempted:
        assert end["stall_cause"] == "preempted"
        assert end["stall_reason"].startswith("preempted for ")
        assert "needed" in end["stall_reason"]
        assert end["longest_stall_s"] > end["preempted_s"] / end["num_preemptions"]


def test_a_stall_by_the_prompt_of_others(log: Callable[..., list[dict[str, Any]]]) -> None:
    clock = Clock()
    engine, executor = make_timed_engine(clock)
    engine.add_request("runs", [1, 2], greedy(8))
    engine.step()
    engine.step()
    engine.add_request("comes", [3] * 9, greedy(1))
    original = executor.collect

    def slow(handle: Handle) -> StepResult:
        clock.now += 5
        return original(handle)

    executor.collect = slow  # type: ignore[method-assign]
    engine.step()
    executor.collect = original  # type: ignore[method-assign]
    run(engine)
    runs = log()[-1]
    assert (runs["longest_stall_s"], runs["stall_cause"], runs["stall_step"]) == (6, "prefill", 3)
    assert runs["stall_reason"] == "step 3 computed 9 prompt tokens of comes"


def test_a_stall_by_a_caller_that_runs_no_step(log: Callable[..., list[dict[str, Any]]]) -> None:
    clock = Clock()
    engine, _ = make_timed_engine(clock)
    engine.add_request("a", [1, 2], greedy(8))
    engine.step()
    clock.now += 30
    run(engine)
    (a,) = log()
    assert (a["longest_stall_s"], a["stall_cause"]) == (31, "idle")
    assert a["stall_reason"] == "the caller ran no step for 30.000s"


@pytest.mark.parametrize("seconds", [4, 9])
def test_a_slow_step_is_a_warning_once_a_minute(
    log: Callable[..., list[dict[str, Any]]], monkeypatch: pytest.MonkeyPatch, seconds: int
) -> None:
    monkeypatch.setenv("NANOVLLM_LOG_SLOW_SECONDS", "8")
    clock = Clock()
    engine, executor = make_timed_engine(clock)
    original = executor.collect

    def slow(handle: Handle) -> StepResult:
        clock.now += seconds - 1
        return original(handle)

    executor.collect = slow  # type: ignore[method-assign]
    clock.now += 1000  # idle
    engine.add_request("a", [1, 2], greedy(30))
    engine.step()
    clock.now += 1000  # the caller runs no step
    engine.step()
    for _ in range(4):
        engine.step()
    warnings = log("engine.slow")
    assert [(each["what"], each["seconds"], each["step"]) for each in warnings] == (
        [("step", 9, 1), ("step", 9, 2)] if seconds == 9 else []
    )
    if warnings:
        assert warnings[0]["slow_reason"] == "step 1 computed 2 prompt tokens of a"
        assert [each["request_id"] for each in warnings] == [None, "a"]
        assert warnings[0]["threshold"] == 8


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"max_num_seqs": 1}, "behind 2 requests, the KV cache is 9% full: raise max_num_seqs from 1"),
        (
            {"num_blocks": 1, "block_size": 64, "max_model_len": 64},
            "behind 2 requests, the KV cache is 100% full: raise num_kvcache_blocks or "
            "gpu_memory_utilization, or lower max_num_seqs",
        ),
    ],
)
def test_a_long_wait_in_the_queue_is_a_warning_once_a_minute(
    log: Callable[..., list[dict[str, Any]]], monkeypatch: pytest.MonkeyPatch, settings: Any, reason: str
) -> None:
    monkeypatch.setenv("NANOVLLM_LOG_SLOW_SECONDS", "2")
    engine, _ = make_timed_engine(Clock(), **settings)
    for name in ("first", "of the same batch"):
        engine.add_request(name, [1, 2], greedy(14))
    engine.step()
    for name in ("late", "later", "aborted"):
        engine.add_request(name, [1, 2], greedy(14))
    engine.abort_request("aborted")
    run(engine)
    (warning,) = log("engine.slow")
    assert (warning["what"], warning["request_id"], warning["seconds"]) == ("queue", "late", 9)
    assert (warning["slow_reason"], warning["threshold"]) == (reason, 2)


# ---- LLM, stream and AsyncLLM


def test_llm_and_its_stream(log: Callable[..., list[dict[str, Any]]]) -> None:
    short = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)
    with LLM("tiny", device="cpu", max_model_len=128) as llm:
        prompts: Any = [PROMPT, [], PROMPT]
        llm.generate(prompts, short, use_tqdm=False)
        refused, *ends = log()
        assert (refused["cause"], refused["request_id"], refused["num_prompt_tokens"]) == (
            "refused",
            "generate-1",
            None,
        )
        assert "prompt must be at least one token long" in refused["error"]
        assert [(each["cause"], each["in_summary"]) for each in ends] == [("length", False)] * 2
        stream = llm.stream(PROMPT, short)
        next(stream)
        stream.close()
        assert (log()[-1]["cause"], log()[-1]["in_summary"]) == ("left", True)
        list(llm.stream(PROMPT, short))
        assert (log()[-1]["cause"], log()[-1]["in_summary"]) == ("length", True)
        with pytest.raises(InvalidArgumentError):
            llm.generate([[]], short, use_tqdm=False)
        assert log()[-1]["cause"] == "refused"
        text = llm.generate(PROMPT, short, use_tqdm=False)[0]["text"]
        llm.generate(PROMPT, SamplingParams(temperature=0, stop=[text[-1]], ignore_eos=True), use_tqdm=False)
        assert (log()[-1]["cause"], log()[-1]["stop_reason"]) == ("stop", text[-1])
    final = log("engine.statistics")[-1]
    assert final["final"]
    assert final["finished_by_cause"] == {"refused": 2, "length": 4, "left": 1, "stop": 1}


def test_async_llm(log: Callable[..., list[dict[str, Any]]]) -> None:
    endless = SamplingParams(temperature=0, max_tokens=4000, ignore_eos=True)

    async def use(engine: AsyncLLM) -> None:
        with pytest.raises(InvalidArgumentError):
            async for _ in engine.generate([], request_id="refused"):
                pass
        leaving = engine.generate(PROMPT, endless, "left")
        await anext(leaving)
        await leaving.aclose()
        async for _ in engine.generate(PROMPT, endless, "aborted"):
            await engine.abort("aborted")

    with AsyncLLM("tiny", device="cpu", max_model_len=4096, num_kvcache_blocks=512) as engine:
        asyncio.run(asyncio.wait_for(use(engine), WATCHDOG))
    assert {each["request_id"]: each["cause"] for each in log()} == {
        **{"refused": "refused", "left": "left", "aborted": "abort"}
    }
    assert all(each["in_summary"] for each in log())


def test_a_grammar_that_leads_nowhere_failed(log: Callable[..., list[dict[str, Any]]]) -> None:
    pytest.importorskip("xgrammar", reason="the extra nanovllm[structured] is not installed")
    with LLM("tiny", device="cpu", max_model_len=128) as llm:
        asked = {"grammar": 'root ::= "planet" x\nx ::= x "y"'}
        llm.generate(PROMPT, SamplingParams(structured_outputs=asked), use_tqdm=False)
    (end,) = log()
    assert (end["cause"], end["finish_reason"]) == ("failed", "abort")
    (failed,) = log("request.failed")
    assert (failed["request_id"], failed["cause"]) == ("generate-0", "failed")
    assert "planet" not in failed["error"] + end["error"]
