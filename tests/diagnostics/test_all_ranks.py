"""Profiler, memory, leak check and timeline of an engine of two ranks, asked from rank 0."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanovllm import LLM, InvalidStateError, SamplingParams
from nanovllm.diagnostics.all_ranks import AllRanksDiagnostics, answer
from nanovllm.diagnostics.memory import MemoryReport
from nanovllm.distributed import worker_pool
from nanovllm.distributed.step_times import KINDS, StepTimes, pack_step_times, unpack_step_times
from nanovllm.engine.executor import StepTime
from tests.distributed.faulty_worker import run_leaking_worker
from tests.distributed.rank_processes import ONLY_LINUX, folder, start_script
from tests.processes import WATCHDOG
from tests.small_llm import GREEDY, generate, load, token_ids
from tests.tracing.test_timeline import read

__all__ = ["folder"]  # a fixture
pytestmark = ONLY_LINUX
PROMPTS = [[1, 2, 3], [4, 5]]
LONG = SamplingParams(max_tokens=90, ignore_eos=True)


@pytest.fixture(scope="module")
def llm(folder: Path) -> Iterator[LLM]:
    with load(folder, tensor_parallel_size=2) as llm:
        yield llm


# ---- memory


def test_the_memory_report_has_each_rank(llm: LLM, folder: Path) -> None:
    report = llm.memory_report()
    (other,) = report.others
    assert (report.rank, other.rank, other.device, other.others) == (0, 1, "cpu", ())
    with load(folder) as one:
        whole = one.memory_report()
    assert whole.others == ()
    for share in (report, other):
        assert 0.45 * whole.weights < share.weights < 0.6 * whole.weights
        assert share.kv_cache == whole.kv_cache // 2
        assert share.other > 50e6  # each is a process with Python and torch
        assert share.total == share.weights + share.other + share.free
    lines = str(report).splitlines()
    assert [line.split(":")[0] for line in lines if line.startswith("Memory")] == [
        "Memory of cpu, rank 0",
        "Memory of cpu, rank 1",
    ]
    assert len(lines) == 14


sizes = st.integers(0, 2**64 - 1)


@given(st.builds(MemoryReport, st.text(max_size=20), *[sizes] * 7, rank=st.integers(0, 2**64 - 1)))
def test_a_report_crosses_as_bytes(report: MemoryReport) -> None:
    assert MemoryReport.unpack(report.pack()) == report


def test_a_leak_of_another_rank_is_found(
    folder: Path, llm: LLM, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.ERROR, "nanovllm")  # pytest keeps every record
    assert llm.check_memory_leak(PROMPTS, GREEDY, num_runs=8).objects_per_run <= 5
    monkeypatch.setattr(worker_pool, "run_worker", run_leaking_worker)  # 11 objects a step
    with load(folder, tensor_parallel_size=2) as leaking:
        check = leaking.check_memory_leak(PROMPTS, GREEDY, num_runs=8)
        assert 60 <= check.objects_per_run <= 69
        assert not check.settles


# ---- profiler


def test_each_rank_writes_a_profile(llm: LLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # which the workers do not follow
    llm.start_profile("profile")
    with pytest.raises(InvalidStateError, match="A profile runs already"):
        llm.start_profile("other")
    generate(llm, PROMPTS)
    table = llm.stop_profile()
    parts = []
    for rank in (0, 1):
        trace = json.loads((tmp_path / "profile" / f"profile_rank{rank}.json").read_text())
        names = [str(event.get("name")) for event in trace["traceEvents"]]
        assert sum("aten::mm" in name or "linear" in name for name in names) > 50
        parts.append(f"Rank {rank}\n" + (tmp_path / "profile" / f"profile_rank{rank}.txt").read_text())
    assert table == "\n\n".join(parts)
    assert parts[0].count("Self CPU") == parts[1].count("Self CPU") > 0
    with pytest.raises(InvalidStateError, match="^No profile runs"):
        llm.stop_profile()


def test_a_profile_that_one_rank_can_not_write_is_none_of_any(llm: LLM, tmp_path: Path) -> None:
    (tmp_path / "bad" / "profile_rank1.txt").mkdir(parents=True)
    with pytest.raises(InvalidStateError, match="On rank 1: folder=.* a folder that can be written"):
        llm.start_profile(tmp_path / "bad")
    with pytest.raises(InvalidStateError, match="^No profile runs"):
        llm.stop_profile()
    llm.start_profile(tmp_path / "good")
    generate(llm, PROMPTS)
    llm.stop_profile()
    assert len(list((tmp_path / "good").glob("*.json"))) == 2


class FakeRank:
    """Diagnostics of a rank, as far as its profiler goes."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error, self.profiles = error, False

    def start_profile(self, folder: Path) -> None:
        if self.error is not None:
            raise self.error
        self.profiles = True

    def cancel_profile(self) -> None:
        self.profiles = False


@pytest.mark.parametrize("error", [None, OSError("no space left"), InvalidStateError("torch's profiler runs already")])
def test_a_profile_runs_on_all_ranks_or_on_none(error: Exception | None) -> None:
    own, ranks = FakeRank(), [FakeRank(), FakeRank(error), FakeRank()]
    diagnostics = AllRanksDiagnostics(own, lambda question: [answer(rank, question) for rank in ranks])  # type: ignore[arg-type]
    with nullcontext() if error is None else pytest.raises(InvalidStateError, match=f"On rank 2: {error}"):
        diagnostics.start_profile(Path("profile"))
    assert {rank.profiles for rank in (own, *ranks)} == {error is None}


def test_a_rank_that_can_not_finish_its_profile_is_told_and_the_engine_goes_on(llm: LLM, tmp_path: Path) -> None:
    expected = token_ids(generate(llm, PROMPTS))
    llm.start_profile(tmp_path / "gone")
    (tmp_path / "gone" / "profile_rank1.txt").unlink()
    (tmp_path / "gone" / "profile_rank1.txt").mkdir()
    with pytest.raises(InvalidStateError, match="On rank 1: .*Is a directory"):
        llm.stop_profile()
    assert token_ids(generate(llm, PROMPTS)) == expected
    llm.start_profile(tmp_path / "again")
    llm.stop_profile()


# ---- timeline


def check_timeline(trace: Path, num_steps: int) -> None:
    events = read(trace)
    names = {event["pid"]: event["args"]["name"] for event in events if event["name"] == "process_name"}
    assert [names[1], names[2], names[4]] == ["Engine", "Rank 0", "Rank 1"]
    steps = {event["args"]["step"]: event for event in events if event["ph"] == "X" and event["pid"] == 2}
    others = {event["args"]["step"]: event for event in events if event["ph"] == "X" and event["pid"] == 4}
    assert steps.keys() == others.keys() == set(range(1, num_steps + 1))
    assert len(steps) > 64  # more than are asked for at a time
    for number, step in steps.items():
        assert others[number]["name"] == step["name"]
        # Rank 0 sends a step at the beginning of its slice, and its tokens need the other rank's part of it.
        assert step["ts"] <= others[number]["ts"] <= step["ts"] + step["dur"]


def test_the_timeline_has_each_rank_s_steps(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NANOVLLM_TRACE_FILE", str(tmp_path / "trace.json"))
    with load(folder, tensor_parallel_size=2, pipeline_depth=2) as llm:
        generate(llm, [[1, 2, 3]] * 3, LONG)
        num_steps = llm.llm_engine.statistics.num_steps
    check_timeline(tmp_path / "trace.json", num_steps)


def test_the_timeline_of_a_script_that_just_ends(folder: Path, tmp_path: Path) -> None:
    script = f"""
from tests.small_llm import *
if __name__ == "__main__":
    llm = load({str(folder)!r}, tensor_parallel_size=2)
    generate(llm, [[1, 2, 3]] * 3, SamplingParams(max_tokens=90, ignore_eos=True))
"""
    process = start_script(script, tmp_path, NANOVLLM_TRACE_FILE=str(tmp_path / "trace.json"))
    _, errors = process.communicate(timeout=WATCHDOG)
    assert process.returncode == 0, errors
    check_timeline(tmp_path / "trace.json", 90)


moments = st.floats(allow_nan=False)


@given(st.lists(st.builds(StepTime, st.integers(0, 2**64 - 1), st.sampled_from(KINDS), *[moments] * 4)))
def test_step_times_cross_as_bytes(times: list[StepTime]) -> None:
    assert unpack_step_times(pack_step_times(times)) == times


def test_without_a_gpu_its_times_are_unknown() -> None:
    step = StepTime(1, "mixed", 2.0, 3.0)
    (read_back,) = unpack_step_times(pack_step_times([step]))
    assert math.isnan(read_back.gpu_began)
    assert math.isnan(read_back.gpu_ended)


@dataclass
class FakeEvent:
    """A CUDA event at `ms` of the device's clock."""

    ms: float
    has_passed: bool = True

    def query(self) -> bool:
        return self.has_passed

    def synchronize(self) -> None:
        self.has_passed = True

    def elapsed_time(self, end: FakeEvent) -> float:
        return end.ms - self.ms


@dataclass
class FakeStep:
    began: Any
    done: Any


def test_a_gpu_s_times_are_counted_from_event_to_event(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [50.0]
    monkeypatch.setattr("nanovllm.distributed.step_times.time.monotonic", lambda: now[0])
    times = StepTimes()
    steps = [FakeStep(FakeEvent(1000 + 10 * n), FakeEvent(1004 + 10 * n, n < 2)) for n in range(3)]
    for number, step in enumerate(steps):
        times.add(number, "decode", now[0] - 0.001, step)
        now[0] += 1
    first, second = times.take()
    assert (first.step, first.began, first.ended, first.gpu_began, first.gpu_ended) == (0, 49.999, 50.0, 50.0, 50.004)
    assert (second.gpu_began, second.gpu_ended) == pytest.approx((50.010, 50.014))
    assert times.take() == []  # the third is still running
    steps[2].done.has_passed = True
    (third,) = times.take()
    assert (third.gpu_began, third.gpu_ended) == pytest.approx((50.020, 50.024))
