"""What requests and the engine report of their times and counts, on a clock that only steps move."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable

import numpy as np
import pytest

from nanovllm import InvalidArgumentError, LLMEngine, RequestMetrics, RequestOutput, SamplingParams
from nanovllm.engine.metrics import DistributionCounter, EngineMetrics
from nanovllm.metrics import Distribution, MetricsSnapshot
from tests.engine.stepping_clock import Clock, make_timed_engine
from tests.engine.test_llm_engine import greedy, run


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def engine_of(clock: Clock) -> Callable[..., LLMEngine]:
    def make(**config: object) -> LLMEngine:
        return make_timed_engine(clock, **config)[0]

    return make


def metrics_of(outputs: dict[str, RequestOutput], request_id: str) -> RequestMetrics:
    return outputs[request_id].metrics


def test_the_times_of_a_request(engine_of: Callable[..., LLMEngine], clock: Clock) -> None:
    engine = engine_of(max_num_seqs=1)
    engine.add_request("first", [1, 2, 3], greedy(4))
    clock.now += 10
    engine.add_request("second", [4], greedy(1))
    outputs = run(engine)
    assert metrics_of(outputs, "first") == RequestMetrics(
        arrival=100,
        queued=100,
        first_scheduled=110,
        first_token=111,
        last_token=114,
        finished=114,
        num_output_tokens=4,
        num_cached_tokens=0,
        num_preemptions=0,
    )
    first, second = metrics_of(outputs, "first"), metrics_of(outputs, "second")
    assert (first.queue_time, first.time_to_first_token, first.inter_token_latency, first.end_to_end) == (10, 11, 1, 14)
    assert (second.arrival, second.first_scheduled, second.first_token, second.finished) == (110, 114, 115, 115)
    assert second.inter_token_latency is None  # one token has no next


def test_a_request_that_never_ran_has_no_times_of_it(engine_of: Callable[..., LLMEngine], clock: Clock) -> None:
    engine = engine_of(max_num_seqs=1)
    engine.add_request("runs", [1], greedy(5))
    engine.add_request("waits", [2], greedy(5))
    engine.step()
    clock.now += 0.5
    engine.abort_request("waits")
    engine.abort_request("runs")
    outputs = run(engine)
    waits, runs = metrics_of(outputs, "waits"), metrics_of(outputs, "runs")
    assert (waits.first_scheduled, waits.first_token, waits.last_token, waits.finished) == (None, None, None, 101.5)
    assert (waits.queue_time, waits.time_to_first_token, waits.inter_token_latency) == (None, None, None)
    assert (runs.first_token, runs.last_token, runs.finished, runs.num_output_tokens) == (101, 101, 101.5, 1)


def test_a_preempted_request_keeps_its_first_times(engine_of: Callable[..., LLMEngine]) -> None:
    engine = engine_of(num_blocks=8, enable_prefix_caching=False)
    for index in range(3):
        engine.add_request(f"{index}", [index] * 6, greedy(14))
    outputs = run(engine)
    preempted = [output.metrics for output in outputs.values() if output.metrics.num_preemptions]
    assert preempted
    for metrics in preempted:
        assert metrics.first_scheduled is not None
        assert metrics.first_token is not None
        assert metrics.last_token == metrics.finished
        assert metrics.first_scheduled < 102  # the first time, not the last
        assert metrics.first_token < metrics.first_scheduled + 3
        assert metrics.num_output_tokens == 14
    assert sum(metrics.num_preemptions for metrics in preempted) == engine.statistics.num_preemptions


def test_totals_and_histograms(engine_of: Callable[..., LLMEngine]) -> None:
    engine = engine_of()
    prompt = list(range(9))
    for request_id in ("cold", "warm"):
        engine.add_request(request_id, prompt, greedy(3))
        run(engine)
    totals, metrics = engine.statistics, engine.metrics
    assert (totals.num_prefix_queries, totals.num_prefix_hits) == (18, 8)  # two blocks of four
    assert metrics.num_finished == {"stop": 0, "length": 2, "abort": 0, "error": 0}
    snapshot = metrics.snapshot(engine.scheduler.load)
    assert {name: (each.count, each.sum) for name, each in snapshot.distributions.items()} == {
        "time_to_first_token_seconds": (2, 2),
        "inter_token_latency_seconds": (4, 4),
        "request_time_per_output_token_seconds": (2, 2),
        "e2e_request_latency_seconds": (2, 6),
        "request_queue_time_seconds": (2, 0),
        "request_prefill_time_seconds": (2, 2),
        "request_decode_time_seconds": (2, 4),
        "request_inference_time_seconds": (2, 6),
        "request_prompt_tokens": (2, 18),
        "request_generation_tokens": (2, 6),
        "iteration_tokens_total": (6, 9 + 1 + 4),
    }
    assert (snapshot.prompt_tokens, snapshot.generation_tokens, snapshot.prefix_cache_hits) == (10, 6, 8)
    assert (snapshot.num_blocks, snapshot.block_size, snapshot.kv_cache_usage) == (32, 4, 0)


@pytest.mark.parametrize("depth", [1, 2])
def test_the_gaps_between_tokens_are_those_that_callers_see(engine_of: Callable[..., LLMEngine], depth: int) -> None:
    engine = engine_of(num_blocks=8, enable_prefix_caching=False, pipeline_depth=depth)
    for index in range(3):
        engine.add_request(f"{index}", [index] * 6, greedy(14))
    outputs = run(engine)
    assert engine.statistics.num_preemptions
    gaps = engine.metrics.distributions["inter_token_latency_seconds"]
    assert gaps.count == 3 * 13
    spans = [output.metrics.last_token - output.metrics.first_token for output in outputs.values()]
    assert gaps.sum == sum(spans)
    assert engine.metrics.num_generated == 3 * 14


def test_the_label_of_each_end(engine_of: Callable[..., LLMEngine]) -> None:
    engine = engine_of()
    for name in ("length", "abort", "left"):
        engine.add_request(name, [1, 2], greedy(3))
    engine.refuse_request("refused", InvalidArgumentError("prompt", [], "at least one token long"))
    engine.step()
    engine.abort_request("abort")
    engine.discard_requests(["left"])
    run(engine)
    assert engine.metrics.num_finished == {"stop": 0, "length": 1, "abort": 2, "error": 1}


def test_a_request_counts_once_whatever_its_completions(engine_of: Callable[..., LLMEngine]) -> None:
    engine = engine_of()
    engine.add_request("several", [1, 2, 3], SamplingParams(n=3, seed=0, max_tokens=4, ignore_eos=True))
    run(engine)
    distributions = engine.metrics.snapshot(engine.scheduler.load).distributions
    assert {name: each.count for name, each in distributions.items() if "inter_token" not in name} == {
        name: 4 if name == "iteration_tokens_total" else 1 for name in distributions if "inter_token" not in name
    }
    assert distributions["request_generation_tokens"].sum == 12


def test_a_distribution_counts_up_to_and_with_its_bounds() -> None:
    one, all_at_once = DistributionCounter([1.0, 2.0]), DistributionCounter([1.0, 2.0])
    values = [0.5, 1.0, 1.5, 2.0, 99.0]
    for value in values:
        one.observe(value)
    one.observe(None)
    all_at_once.observe_all(np.array(values))
    all_at_once.observe_all(np.array([]))
    for counter in (one, all_at_once):
        assert counter.snapshot() == Distribution((1.0, 2.0), (2, 2, 1), 104.0)
        assert counter.count == 5


def test_engines_share_no_counts() -> None:
    assert EngineMetrics().totals is not EngineMetrics().totals
    name = "request_prompt_tokens"
    assert EngineMetrics().distributions[name] is not EngineMetrics().distributions[name]


def test_snapshots_add_up_and_cross_a_process_border(engine_of: Callable[..., LLMEngine]) -> None:
    snapshots = []
    for num_requests in (1, 2):
        engine = engine_of(max_num_seqs=1)
        for index in range(num_requests):
            engine.add_request(f"{index}", [1, 2, 3], greedy(6))
        engine.step()
        engine.step()
        snapshots.append(engine.metrics.snapshot(engine.scheduler.load))
    first, second = (MetricsSnapshot.from_numbers(json.loads(json.dumps(each.to_numbers()))) for each in snapshots)
    assert [first, second] == snapshots
    both = first + second
    assert (both.num_running, both.num_waiting, both.generation_tokens, both.num_blocks) == (2, 1, 4, 64)
    assert both.kv_cache_usage == first.kv_cache_usage == 1 / 32
    assert both.distributions["iteration_tokens_total"].count == 4
    assert sum([first, second], MetricsSnapshot()) == both


def test_the_list_has_vllm_s_names_and_types(engine_of: Callable[..., LLMEngine]) -> None:
    from nanovllm.v1.metrics.reader import Counter, Gauge, Histogram, Metric, Vector

    engine = engine_of()
    engine.add_request("a", [1, 2, 3], greedy(3))
    run(engine)
    metrics = engine.metrics.snapshot(engine.scheduler.load).metrics(model_name="tiny")
    assert all(isinstance(metric, Metric) and metric.labels["model_name"] == "tiny" for metric in metrics)
    assert issubclass(Vector, Metric)
    names = {metric.name.removeprefix("vllm:") for metric in metrics if isinstance(metric, Gauge)}
    assert names == {"num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "cache_config_info"}
    counters = {
        (metric.name, metric.labels.get("finished_reason")): metric.value
        for metric in metrics
        if isinstance(metric, Counter)
    }
    assert counters["vllm:prompt_tokens", None] == counters["vllm:generation_tokens", None] == 3
    assert (counters["vllm:request_success", "length"], counters["vllm:request_success", "error"]) == (1, 0)
    (end_to_end,) = (metric for metric in metrics if metric.name == "vllm:e2e_request_latency_seconds")
    assert isinstance(end_to_end, Histogram)
    assert (end_to_end.count, end_to_end.sum) == (1, 3)
    assert (end_to_end.buckets["2.5"], end_to_end.buckets["5.0"], end_to_end.buckets["+Inf"]) == (0, 1, 1)


# ---- lines


def lines(caplog: pytest.LogCaptureFixture, event: str) -> list[dict[str, object]]:
    return [record.fields for record in caplog.records if record.event == event]  # type: ignore[attr-defined]


def test_the_statistics_line_comes_while_there_is_work(
    engine_of: Callable[..., LLMEngine], clock: Clock, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("NANOVLLM_LOG_STATS_INTERVAL", "4")
    engine = engine_of(max_num_seqs=2)
    with caplog.at_level(logging.INFO, "nanovllm"):
        for request_id in "abc":
            engine.add_request(request_id, [1, 2, 3], SamplingParams(temperature=0, max_tokens=10, ignore_eos=True))
        for _ in range(8):
            engine.step()
        first, second = lines(caplog, "engine.statistics")
        run(engine)
        caplog.clear()
        clock.now += 1000  # idle
        engine.add_request("d", [9], greedy(3))
        run(engine)
        assert lines(caplog, "engine.statistics") == []
    assert first == {
        "prompt_tokens_per_second": 6 / 4,
        "generation_tokens_per_second": 8 / 4,
        "num_running": 2,
        "num_waiting": 1,
        "kv_cache_usage": 4 / 32,
        "prefix_cache_hit_rate": 0.0,
        "preemptions": 0,
        "final": False,
        "seconds": 4,
        "num_steps": 4,
        "num_prompt_tokens": 6,
        "num_output_tokens": 8,
        "num_prefix_queries": 6,
        "num_prefix_hits": 0,
        "num_blocks": 32,
        "wall_s": 4,
        "device_s": None,
        "peak_kv_cache_usage": 4 / 32,
        "peak_kv_cache_at": 103,
        "peak_waiting": 3,
        "peak_waiting_at": 100,
        "slowest_step": 1,
        "slowest_step_kind": "prefill",
        "slowest_step_ms": 1000,
        "slowest_step_gpu_ms": None,
        "slowest_step_prompt_tokens": 6,
        "slowest_step_decode_seqs": 0,
        "slowest_step_request_ids": ["a", "b"],
        "finished_by_cause": {},
        "num_failed": 0,
        "num_refused": 0,
        "prefill_steps_by_budget": {"max_num_batched_tokens": 1},
    }
    assert (second["prompt_tokens_per_second"], second["generation_tokens_per_second"]) == (0, 2)


def test_the_last_statistics_cover_the_run(
    engine_of: Callable[..., LLMEngine], clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "nanovllm"):
        engine = engine_of(max_num_seqs=1)
        for request_id in "ab":
            engine.add_request(request_id, [1, 2, 3, 4, 5], greedy(3))
        run(engine)
        clock.now += 50  # idle
        engine.add_request("c", [1, 2, 3, 4, 5], greedy(3))
        engine.step()
        engine.exit()
        engine.exit()
    (final,) = lines(caplog, "engine.statistics")
    assert caplog.records[-1].event == "engine.statistics"  # type: ignore[attr-defined]
    assert final["final"]
    assert (final["num_steps"], final["num_output_tokens"], final["wall_s"], final["seconds"]) == (7, 7, 7, 57)
    assert (final["num_prefix_queries"], final["num_prefix_hits"]) == (15, 8)
    assert (final["peak_waiting"], final["peak_kv_cache_usage"]) == (2, 2 / 32)
    assert final["generation_tokens_per_second"] == 1
    assert final["finished_by_cause"] == {"length": 2, "abort": 1}


def test_the_peak_counts_blocks_of_requests_that_end_with_their_first_step(
    engine_of: Callable[..., LLMEngine], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "nanovllm"):
        engine = engine_of()
        engine.add_request("a", [1, 2, 3, 4, 5], greedy(1))
        run(engine)
        engine.exit()
    (final,) = lines(caplog, "engine.statistics")
    assert (final["peak_kv_cache_usage"], final["kv_cache_usage"]) == (2 / 32, 0)


def test_the_lines_of_requests_and_steps(engine_of: Callable[..., LLMEngine], caplog: pytest.LogCaptureFixture) -> None:
    engine = engine_of()
    with caplog.at_level(logging.DEBUG, "nanovllm"):
        engine.add_request("a", [1, 2, 3, 4, 5], greedy(2))
        engine.step()
        engine.add_request("b", [1, 2], greedy(1))
        run(engine)
    assert lines(caplog, "request.added")[0] == {
        "request_id": "a",
        "seq_id": 0,
        "num_prompt_tokens": 5,
        "max_tokens": 2,
    }
    prefill, mixed = lines(caplog, "step.done")
    assert prefill == {
        "step": 1,
        "kind": "prefill",
        "num_prefill_tokens": 5,
        "num_prefill_seqs": 1,
        "num_decode_seqs": 0,
        "num_output_tokens": 1,
        "preempted": 0,
        "num_running": 1,
        "num_waiting": 0,
        "used_blocks": 2,
        "num_blocks": 32,
        "wall_ms": 1000.0,
        "gpu_ms": None,
    }
    assert (mixed["kind"], mixed["num_decode_seqs"], mixed["num_prefill_tokens"]) == ("mixed", 1, 2)
    finished = lines(caplog, "sequence.finished")
    assert {line["request_id"] for line in finished} == {"a", "b"}
    (a,) = (line for line in finished if line["request_id"] == "a")
    assert (a["arrival"], a["first_token"], a["finished"]) == (100, 101, 102)
    assert (a["queue_ms"], a["ttft_ms"], a["itl_ms"], a["e2e_ms"]) == (0, 1000, 1000, 2000)
