"""The timeline, as Perfetto would read it."""

from __future__ import annotations

import json
import signal
import time
from collections import defaultdict
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from nanovllm.engine.batch import StepResult
from tests.engine.simulated_executor import Handle
from tests.engine.test_llm_engine import greedy, make_engine, run
from tests.processes import WATCHDOG, start_python, until

Event = dict[str, Any]

ENDLESS = """
from nanovllm import LLM, SamplingParams
with LLM("tiny", device="cpu", max_model_len=4096, num_kvcache_blocks=512) as llm:
    print("ready", flush=True)
    params = SamplingParams(temperature=0, max_tokens=4000, ignore_eos=True)
    llm.generate(["count from 3 to 9"] * 8, params, use_tqdm=False)
"""


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NANOVLLM_TRACE_FILE", str(tmp_path / "trace.json"))
    return tmp_path / "trace.json"


def read(path: Path) -> list[Event]:
    """The events, checked: every slice has an end and lies beside or within others; tracks are named."""
    return checked(json.loads(path.read_text("utf-8")))


def read_whole_events(path: Path) -> list[Event]:
    """The events, as Perfetto reads a file that lacks its end: up to the last whole one. An event is one line."""
    lines = path.read_text("utf-8").splitlines()
    assert lines[0] == "["
    return [json.loads(line[:-1]) for line in lines[1:] if line.endswith("},")]


def checked(events: list[Event]) -> list[Event]:
    named = {(event["pid"], event["tid"]) for event in events if event["name"] == "thread_name"}
    slices = defaultdict(list)
    counters = defaultdict(list)
    for event in events:
        assert event["ph"] in "MXCisf"
        if event["ph"] == "X":
            slices[event["pid"], event["tid"]].append(event)
        elif event["ph"] == "C":
            counters[event["name"]].append(event["ts"])
    assert set(slices) <= named
    for track in slices.values():
        open_ends: list[float] = []
        for event in sorted(track, key=lambda event: (event["ts"], -event["dur"])):
            end = round(event["ts"] + event["dur"], 3)
            while open_ends and open_ends[-1] <= event["ts"]:
                open_ends.pop()
            assert not open_ends or end <= open_ends[-1], "slices overlap"
            open_ends.append(end)
    for times in counters.values():
        assert times == sorted(times)
    for event in events:
        if event["ph"] in "sf":  # an arrow binds to the slice that its track has at that moment
            assert any(
                each["ts"] <= event["ts"] <= each["ts"] + each["dur"] for each in slices[event["pid"], event["tid"]]
            )
    return events


def named(events: list[Event], start: str) -> list[Event]:
    return [event for event in events if event["ph"] == "X" and event["name"].startswith(start)]


@pytest.mark.parametrize("depth", [1, 2])
def test_steps_requests_and_counters(path: Path, depth: int) -> None:
    now = [100.0]
    engine, executor = make_engine(clock=lambda: now[0], pipeline_depth=depth, max_num_seqs=2, num_blocks=8)
    original = executor.collect

    def collect(handle: Handle) -> StepResult:
        now[0] += 1
        return StepResult(original(handle).token_ids, gpu_ms=750.0)

    executor.collect = collect  # type: ignore[method-assign]
    for request_id in "abc":
        engine.add_request(request_id, [ord(request_id) % 50] * 6, greedy(12))
    run(engine)
    num_steps, num_preemptions = engine.statistics.num_steps, engine.statistics.num_preemptions
    engine.exit()
    events = read(path)
    steps = [event for event in events if event["ph"] == "X" and event["pid"] == 2]
    assert sum(event["tid"] < 100 for event in steps) == sum(event["tid"] == 100 for event in steps) == num_steps
    assert {event["dur"] for event in steps if event["tid"] == 100} == {750_000.0}
    assert len(named(events, "wait")) == len(named(events, "update")) == len(named(events, "launch")) == num_steps
    assert len(named(events, "preempted")) == num_preemptions > 0
    instants = [event for event in events if event["ph"] == "i" and event["name"] == "preempted"]
    assert len(instants) == num_preemptions
    for event in [*named(events, "preempted"), *instants]:
        assert event["args"]["needed"] > event["args"]["free"]
        assert event["args"]["for_request_id"] in ("a", "b")
    assert {name for event in steps for name in event["args"]["requests"]} == {"a", "b", "c"}
    starts, ends = ([event for event in events if event["ph"] == kind] for kind in "sf")
    assert len(starts) == len(ends) == 3 + num_preemptions  # one for each admission
    assert {event["pid"] for event in starts} == {3}
    assert {event["pid"] for event in ends} == {2}
    (a,) = named(events, "a (length)")
    parts = [event for event in events if event["ph"] == "X" and event["pid"] == 3 and event["tid"] == a["tid"]]
    assert [event["name"] for event in parts[:4]] == ["a (length)", "queued", "prefill", "decode"]
    assert (a["ts"], parts[2]["dur"]) == (100e6, 1e6)
    assert a["args"]["num_output_tokens"] == 12
    last = [event for event in events if event["name"] == "KV cache blocks"][-1]
    assert last["args"] == {"used": 0, "free": 8}


def test_the_start_and_the_time_of_day_are_there(path: Path) -> None:
    before = time.time()
    engine, _ = make_engine()
    engine.exit()
    events = read(path)
    (whole,) = named(events, "start-up")
    (part,) = named(events, "tokenizer")
    assert whole["ts"] <= part["ts"] <= part["ts"] + part["dur"] <= whole["ts"] + whole["dur"]
    (anchor,) = (event for event in events if event["name"].startswith("wall clock "))
    assert before <= datetime.fromisoformat(anchor["args"]["utc"]).timestamp() <= time.time()
    assert anchor["ts"] == pytest.approx(anchor["args"]["monotonic"] * 1e6, abs=1)


def test_an_abort_is_a_moment_of_its_request(path: Path) -> None:
    engine, _ = make_engine()
    for name in ("aborted", "left"):
        engine.add_request(name, [1, 2, 3], greedy(9))
    engine.step()
    engine.abort_request("aborted")
    engine.discard_requests(["left"])
    run(engine)
    engine.exit()
    moments = [event for event in read(path) if event["ph"] == "i" and event["pid"] == 3]
    names = {(event["name"], event["args"]["request_id"]) for event in moments}
    assert names == {("abort", "aborted"), ("left", "left")}
    assert len(moments) == 2


def test_requests_lie_one_after_another_where_they_can(path: Path) -> None:
    engine, _ = make_engine()
    for request_id in "abc":
        engine.add_request(request_id, [1, 2, 3], greedy(2))
        run(engine)
    engine.exit()
    assert {event["tid"] for event in read(path) if event["pid"] == 3} == {1}


def test_what_a_failed_step_lost_and_what_never_ended_is_there(path: Path) -> None:
    engine, executor = make_engine()
    original = executor.collect

    def fail(handle: Handle) -> StepResult:
        raise KeyboardInterrupt

    engine.add_request("lost", [1, 2], greedy(5))
    executor.collect = fail  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    assert named(read(path), "lost (lost)")  # written at once
    executor.collect = original  # type: ignore[method-assign]
    engine.add_request("running", [1, 2], greedy(5))
    engine.step()
    engine.add_request("waiting", [1, 2], greedy(5))
    engine.exit()
    events = read(path)
    assert named(events, "running (unfinished)")
    assert named(events, "waiting (unfinished)")


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGKILL])
def test_the_file_can_be_read_after_ctrl_c_and_kill(path: Path, sent: signal.Signals) -> None:
    process = start_python("-c", ENDLESS, NANOVLLM_TRACE_FILE=str(path), NANOVLLM_LOG_LEVEL="WARNING")
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    assert until(lambda: len(read_whole_events(path)) >= 1000)  # it may be half written just now
    process.send_signal(sent)
    process.wait(WATCHDOG)
    events = read(path) if sent == signal.SIGINT else checked(read_whole_events(path))
    assert len(named(events, "decode")) > 100
    if sent == signal.SIGINT:
        assert len(named(events, "generate-")) == 8
