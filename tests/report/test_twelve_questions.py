"""Twelve questions to the INFO log of a real run; an observer of the engine says whether the answers are right."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from nanovllm import SamplingParams
from nanovllm.config import EngineConfig
from nanovllm.engine.batch import ScheduledBatch
from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.engine.observer import CollectedStep, EngineObserver, EngineStart, Preemption, SampledStep
from nanovllm.engine.request_end import RequestEnd
from nanovllm.engine.sequence import Sequence
from nanovllm.engine_factory import default_observers, make_executor
from nanovllm.errors import NanoVLLMError
from nanovllm.report.__main__ import main
from nanovllm.sampling_params import StructuredOutputsParams
from tests.processes import ROOT

Preempted = tuple[int, str, str, int, int]  # step, request, for which request, needed, free


@dataclass
class Watcher(EngineObserver):
    """Keeps the engine's own state at the moments that the questions are about."""

    ends: dict[str, RequestEnd] = field(default_factory=dict)
    preemptions: list[Preempted] = field(default_factory=list)
    peak: float = 0.0
    peak_at: float = 0.0
    slowest: tuple[float, int, set[str]] = (0.0, 0, set())
    wall: float = 0.0
    _last: float = 0.0

    def engine_started(self, start: EngineStart) -> None:
        self.start = start

    def request_finished(self, end: RequestEnd) -> None:
        self.ends[end.request_id] = end

    def sequence_preempted(self, sequence: Sequence, preemption: Preemption) -> None:
        why = preemption.shortage
        self.preemptions.append((why.step, sequence.request_id, why.oldest.request_id, why.needed, why.free))

    def step_submitted(self, batch: ScheduledBatch, now: float, num_in_flight: int) -> None:
        if not num_in_flight:
            self._last = now

    def tokens_sampled(self, step: SampledStep) -> None:
        seconds, self._last = step.now - self._last, step.now
        if seconds > self.slowest[0]:
            rows = [*step.batch.chunks["row"].tolist(), *step.batch.decode_rows.tolist()]
            self.slowest = seconds, step.batch.step, {step.rows.sequence(row).request_id for row in rows}

    def step_collected(self, step: CollectedStep) -> None:
        usage = step.load.used_blocks / step.load.num_blocks
        if usage > self.peak:
            self.peak, self.peak_at = usage, step.collected


@dataclass(frozen=True)
class Case:
    log: Path
    seen: Watcher
    engine: LLMEngine


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    """Ten requests on a cache of twelve blocks, one more that is aborted, one refused, one with a grammar."""
    log = tmp_path_factory.mktemp("questions") / "run.jsonl"
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("LEVEL", "INFO"), ("FILE", str(log)), ("FILE_FORMAT", "json")):
            patch.setenv(f"NANOVLLM_LOG_{name}", value)
        config = EngineConfig(
            str(ROOT / "nanovllm/assets/tiny-qwen3"),
            device="cpu",
            max_num_seqs=6,
            num_kvcache_blocks=12,
            max_model_len=128,
        )
        seen = Watcher()
        engine = LLMEngine(config, make_executor, [*default_observers(config), seen])
        params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
        for number in range(10):
            engine.add_request(f"r-{number}", list(range(10, 20 + 3 * number)), params)
        engine.add_request("gone", [1, 2, 3], params)
        grammar = StructuredOutputsParams(regex="[ab]{5}")
        engine.add_request("grammar", [5, 6], SamplingParams(max_tokens=20, structured_outputs=grammar))
        with pytest.raises(NanoVLLMError):
            engine.add_request("refused", [], params)
        while engine.has_unfinished_requests():
            engine.step()
            if len(seen.preemptions) == 1:
                engine.abort_request("gone")
        engine.exit()
        yield Case(log, seen, engine)


@pytest.fixture
def ask(case: Case, capsys: pytest.CaptureFixture[str]) -> Any:
    def ask(*question: object) -> tuple[Any, str]:
        arguments = [str(case.log), *map(str, question)]
        assert main([*arguments, "--json"]) == 0
        facts = json.loads(capsys.readouterr().out)
        assert main(arguments) == 0
        return facts, capsys.readouterr().out

    return ask


@pytest.fixture
def engine_facts(ask: Any) -> Any:
    return ask("--summary")[0]["engines"][0]


def shown_at(case: Case, mono: float) -> datetime:
    """A moment of the engine's clock as the time of day that the log gives it."""
    record = json.loads(case.log.open().readline())
    start = datetime.fromisoformat(record["ts"].replace("Z", "+00:00")) - timedelta(seconds=record["mono"])
    return start + timedelta(seconds=mono)


def assert_moment(text: str, expected: datetime) -> None:
    told = datetime.combine(expected.date(), datetime.strptime(text, "%H:%M:%S.%f").time(), expected.tzinfo)
    assert abs((told - expected).total_seconds()) < 0.01


def test_why_was_it_slow(case, ask):
    for request_id, end in case.seen.ends.items():
        facts, words = ask("--request", request_id)
        assert facts["cause"] == end.cause
        if end.last is None:
            assert words.startswith("Refused at once")
            continue
        for name, seconds in asdict(end.last.times).items():
            if f"{name}_s" in facts:
                assert facts[f"{name}_s"] == pytest.approx(seconds, abs=1e-6)
        parts = sum(facts[f"{name}_s"] for name in ("queue", "prefill", "decode", "preempted"))
        assert parts == pytest.approx(end.last.finished - end.arrival, abs=1e-6)
    slowest, _ = ask("--slowest", 1)
    assert slowest[0]["e2e_s"] == pytest.approx(
        max(end.last.finished - end.arrival for end in case.seen.ends.values() if end.last is not None)
    )


def test_when_was_it_first_scheduled(case, ask):
    for number in range(10):
        end = case.seen.ends[f"r-{number}"]
        facts, words = ask("--request", f"r-{number}")
        (completion,) = end.completions
        assert facts["first_step"] == completion.first_step
        assert_moment(facts["first_scheduled_at"], shown_at(case, end.arrival + completion.times.queue))
        assert f"in step {completion.first_step}" in words


def test_who_was_preempted_by_whom_when_and_for_want_of_what(case, ask):
    assert len(case.seen.preemptions) >= 3
    told = []
    for request_id in case.seen.ends:
        facts, words = ask("--request", request_id)
        for one in facts.get("preemptions", []):
            told.append((one["step"], one["request_id"], one["for_request_id"], one["needed"], one["free_before"]))
            assert f"in step {one['step']} for seq {one['for_seq_id']}" in words
    assert sorted(told) == sorted(case.seen.preemptions)


def test_how_full_was_the_cache_and_when(case, engine_facts):
    assert engine_facts["cache"]["peak_usage"] == pytest.approx(case.seen.peak)
    assert_moment(engine_facts["cache"]["peak_at"], shown_at(case, case.seen.peak_at))
    assert engine_facts["cache"]["num_blocks"] == 12


def test_what_was_the_hit_rate(case, engine_facts):
    totals = case.seen.start.statistics
    assert totals.num_prefix_hits > 0
    assert engine_facts["cache"]["hit_rate"] == pytest.approx(totals.num_prefix_hits / totals.num_prefix_queries)


def test_which_step_was_the_slowest_and_whose(case, ask, engine_facts):
    seconds, step, requests = case.seen.slowest
    slowest = engine_facts["slowest_step"]
    assert slowest["step"] == step
    assert slowest["ms"] == pytest.approx(seconds * 1e3)
    assert set(slowest["request_ids"]) == requests
    facts, words = ask("--step", step)
    assert "It was the slowest of the run" in words
    assert set(facts["requests"]) <= requests


def test_device_against_host(case, ask, engine_facts):
    totals = case.seen.start.statistics
    assert engine_facts["steps"]["wall_s"] == pytest.approx(totals.prefill_seconds + totals.decode_seconds)
    assert engine_facts["steps"]["device_s"] is None
    assert "the device's time was not measured" in ask("--summary")[1]


def test_communication(ask, engine_facts):
    assert engine_facts["communication"] == {"0": {}}
    assert "Communication: none, there is one rank." in ask("--summary")[1]


def test_memory(ask, engine_facts):
    memory = engine_facts["memory"]["0"]
    assert set(memory) >= {"model.loaded", "kv_cache.memory"}
    assert 0 < memory["model.loaded"]["resident_bytes"] <= memory["kv_cache.memory"]["peak_bytes"]
    assert "Memory of rank 0: after the weights resident" in ask("--summary")[1]


def test_how_long_did_the_start_take(case, engine_facts):
    assert engine_facts["startup"]["seconds"] == pytest.approx(case.seen.start.stopwatch.seconds)


def test_which_backend_and_why(case, engine_facts):
    resolved, told = case.engine.resolved, engine_facts["backends"]
    assert (told["prefill"], told["decode"]) == (resolved.prefill_backend, resolved.decode_backend)
    assert "no CUDA device" in told["decode_reason"]


def test_with_which_configuration(case, engine_facts):
    resolved, told = case.engine.resolved, engine_facts["configuration"]
    for name in ("num_blocks", "block_size", "max_num_seqs", "max_model_len", "dtype", "enable_prefix_caching"):
        assert told[name] == getattr(resolved, name)
    assert told["tensor_parallel_size"] == 1
