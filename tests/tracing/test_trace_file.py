from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest

from nanovllm import InvalidArgumentError
from nanovllm.tracing import trace_file
from nanovllm.tracing.trace_file import TraceFile


def events(path: Path) -> list[dict[str, object]]:
    found: list[dict[str, object]] = json.loads(path.read_text("utf-8"))
    return found


def test_the_file_is_whole_after_every_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trace_file, "_FLUSH_EVENTS", 3)
    path = tmp_path / "trace.json"
    trace = TraceFile(path)
    assert events(path) == []
    for count in range(1, 10):
        trace.slice(1, 1, "schedule", count, count + 0.5, step=count)
        assert len(events(path)) == count // 3 * 3
    trace.counter(1, "requests", 9.0, running=2, waiting=0)
    trace.close()
    trace.close()
    found = events(path)
    assert len(found) == 10
    assert found[0] == {
        **{"ph": "X", "name": "schedule", "pid": 1, "tid": 1, "ts": 1e6, "dur": 5e5},
        "args": {"step": 1},
    }
    assert found[-1]["args"] == {"running": 2, "waiting": 0}
    trace.slice(1, 1, "late", 1, 2)
    trace.flush()
    assert len(events(path)) == 10


def test_a_second_engine_does_not_overwrite_the_first_ones_trace(tmp_path: Path) -> None:
    traces = [TraceFile(tmp_path / "trace.json") for _ in range(3)]
    assert [trace.path.name for trace in traces] == ["trace.json", "trace.2.json", "trace.3.json"]


def test_a_file_that_can_not_be_written_is_an_error_with_its_name(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgumentError, match="NANOVLLM_TRACE_FILE=.*No such file.*nowhere"):
        TraceFile(tmp_path / "nowhere" / "trace.json")


def test_times_that_meet_still_meet_in_microseconds(tmp_path: Path) -> None:
    trace = TraceFile(tmp_path / "trace.json")
    start, middle, end = 27782.139017375, 27782.151842043, 27782.229742170
    for first, last in ((start, end), (start, middle), (middle, end)):
        trace.slice(1, 1, "x", first, last)
    trace.close()
    whole, left, right = events(trace.path)
    assert round(left["ts"] + left["dur"], 3) == right["ts"]  # type: ignore[operator]
    assert round(right["ts"] + right["dur"], 3) == round(whole["ts"] + whole["dur"], 3)  # type: ignore[operator]


def test_names_that_strict_readers_refuse_are_escaped(tmp_path: Path) -> None:
    trace = TraceFile(tmp_path / "trace.json")
    trace.slice(1, 1, "\ud800", 1, 2, request_id="a\n\udc00")
    trace.counter(1, "x", 1.0, value=float("nan"))
    trace.close()
    first, second = events(trace.path)
    assert (first["name"], first["args"]) == ("\\ud800", {"request_id": "a\n\\udc00"})
    assert second["args"] == {"value": None}


def test_a_file_of_the_largest_size_is_whole_and_says_so_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(trace_file, "_FLUSH_EVENTS", 100)
    trace = TraceFile(tmp_path / "trace.json", max_mb=1)
    for count in range(20_000):
        trace.slice(1, 1, "schedule", count, count + 0.5, step=count)
    trace.close()
    assert 900_000 < trace.path.stat().st_size <= 1_000_003
    assert events(trace.path)
    assert [record.getMessage() for record in caplog.records if record.event == "trace.full"] == [
        f"{trace.path} has reached 1 MB: later events are not in it. Raise NANOVLLM_TRACE_MAX_MB for more."
    ]


def test_a_full_disk_loses_events_and_leaves_a_whole_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    trace = TraceFile(tmp_path / "trace.json")
    trace.slice(1, 1, "kept", 1, 2)
    trace.flush()
    file, room = trace._file, [10]

    class Full:
        closed = False

        def write(self, text: bytes) -> int:
            taken = min(len(text), room[0])
            room[0] -= taken
            if not taken:
                raise OSError(errno.ENOSPC, "No space left on device")
            return file.write(text[:taken])

        def __getattr__(self, name: str) -> object:
            return getattr(file, name)

    monkeypatch.setattr(trace, "_file", Full())
    for _ in range(2):
        trace.slice(1, 1, "lost", 1, 2)
        trace.flush()
        room[0] = 3  # enough for the closing bracket
        trace.flush()
    monkeypatch.setattr(trace, "_file", file)
    trace.slice(1, 1, "kept again", 1, 2)
    trace.close()
    assert [event["name"] for event in events(trace.path)] == ["kept", "kept again"]
    (warning,) = [record for record in caplog.records if record.event == "log.lost"]
    assert warning.getMessage() == f"{trace.path} cannot be written (No space left on device): 1 lines are lost"
