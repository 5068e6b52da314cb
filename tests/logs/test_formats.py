"""JSON lines, the log file, colour: what is written where, and that nothing a field holds can stop it."""

from __future__ import annotations

import errno
import io
import json
import logging
import os
import re
import signal
import sys
import time
import weakref
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from nanovllm.errors import InvalidArgumentError
from nanovllm.logs import events, formats, lost_lines
from nanovllm.logs.formats import JsonFormatter, TerminalFormatter, TextFormatter
from nanovllm.logs.handlers import LogFileHandler
from nanovllm.logs.records import Event, ItemList
from nanovllm.utils.logger import configure_logging, log_event, setup_logger
from tests.logs.test_events import Recorder
from tests.processes import run_python

TEXT_LINE = re.compile(r"\[[\d\- :,]+[+-]\d{4}\] \[nanovllm\.tests\] \[(?P<level>[A-Z]+)\] (?P<message>.*)")


@pytest.fixture(autouse=True)
def clean_logging(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No variable is set before, and none after."""
    for name in [name for name in os.environ if name.startswith("NANOVLLM_") or name == "NO_COLOR"]:
        monkeypatch.delenv(name)
    configure_logging(rank=0)
    yield
    monkeypatch.undo()
    configure_logging(rank=0)


def leave_root_bare(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take pytest's handlers off the root logger, as in a program of its own (pytest adds them after fixtures)."""
    monkeypatch.setattr(logging.root, "handlers", [])


def log(message: str = "said {n}", level: int = logging.INFO, **fields: Any) -> None:
    log_event(setup_logger("tests"), level, "tests.said", message, **{"n": 1, **fields})


def json_lines(text: str) -> list[dict[str, Any]]:
    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def formatted(**fields: Any) -> dict[str, Any]:
    """What a JSON line says of these fields."""
    record = logging.LogRecord("nanovllm.tests", logging.INFO, "", 0, "sentence", (), None)
    record.event, record.fields, record.mono = "tests.said", fields, 1.5
    (entry,) = json_lines(JsonFormatter().format(record))
    return entry


# JSON


def test_a_json_line_has_the_envelope_and_the_fields(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    leave_root_bare(monkeypatch)
    monkeypatch.setenv("NANOVLLM_LOG_FORMAT", "json")
    before, mono_before = datetime.now(timezone.utc), time.monotonic()
    log("said {n} … {text}", n=3, text="two\nlines", ratio=0.25, shape=[2, 5], missing=None, yes=True)
    mono_after, after = time.monotonic(), datetime.now(timezone.utc)
    (entry,) = json_lines(capsys.readouterr().err)
    assert list(entry)[:8] == ["ts", "mono", "level", "logger", "event", "message", "pid", "rank"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", entry["ts"])
    assert before <= datetime.strptime(entry["ts"], "%Y-%m-%dT%H:%M:%S.%f%z") <= after
    assert mono_before <= entry["mono"] <= mono_after
    assert (entry["level"], entry["logger"], entry["event"]) == ("INFO", "nanovllm.tests", "tests.said")
    assert entry["message"] == "said 3 … two\\nlines"
    assert (entry["pid"], entry["rank"]) == (os.getpid(), 0)
    fields = {"n": 3, "text": "two\nlines", "ratio": 0.25, "shape": [2, 5], "missing": None, "yes": True}
    assert {name: entry[name] for name in list(entry)[8:]} == fields


def test_a_plain_record_and_a_traceback_are_json_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    leave_root_bare(monkeypatch)
    monkeypatch.setenv("NANOVLLM_LOG_FORMAT", "json")
    try:
        raise KeyError("here")
    except KeyError:
        setup_logger("tests").exception("it %s", "failed")
    logging.getLogger("nanovllm.never_set_up").warning("a stranger")
    failed, stranger = json_lines(capsys.readouterr().err)
    assert (failed["message"], failed["event"], failed["level"]) == ("it failed", "", "ERROR")
    assert failed["exception"].endswith("KeyError: 'here'")
    assert (stranger["message"], stranger["event"]) == ("a stranger", "")
    assert isinstance(stranger["mono"], float)


@pytest.mark.parametrize(
    ("value", "written"),
    [
        (np.int64(3), 3),
        (np.float32(0.5), 0.5),
        (np.bool_(True), True),
        (np.float64(0.25), 0.25),
        (torch.tensor(7), 7),
        (torch.tensor(0.5, dtype=torch.bfloat16), 0.5),
        (np.zeros((2, 5), np.int32), {"shape": [2, 5], "dtype": "int32"}),
        (torch.zeros(3), {"shape": [3], "dtype": "torch.float32"}),
        ([np.int64(1), {"a": np.int64(2)}], [1, {"a": 2}]),
        ({1: "one"}, {"1": "one"}),
        (frozenset({4}), [4]),
        (Path("a/b"), "a/b"),
        (torch.float16, "torch.float16"),
        (float("nan"), None),
        (np.float64("inf"), None),
        (torch.tensor(float("-inf")), None),
        ([1.5, float("nan")], [1.5, None]),
        ({(1, 2): 3}, {"(1, 2)": 3}),
        ("\ud800 half a pair", "\\ud800 half a pair"),
        ({"\udc00": "😀"}, {"\\udc00": "😀"}),
        (b"bytes", "b'bytes'"),
        (10**400, 10**400),
    ],
    ids=str,
)
def test_numbers_stay_numbers_and_the_rest_has_a_form(value: object, written: object) -> None:
    entry = formatted(value=value, other=1)
    assert entry["value"] == written
    assert type(entry["value"]) is type(written)
    assert entry["other"] == 1


def test_no_field_stops_a_line() -> None:
    class Unspeakable:
        def __str__(self) -> str:
            raise RuntimeError("no")

        __repr__ = __str__

    endless: list[object] = []
    endless.append(endless)
    entry = formatted(endless=endless, unspeakable=Unspeakable(), inside=[Unspeakable()], deep={"nan": [float("nan")]})
    assert "[...]" in str(entry["endless"])
    assert entry["unspeakable"] == "<Unspeakable that cannot be shown: RuntimeError>"
    assert entry["inside"] == [entry["unspeakable"]]
    assert entry["deep"] == {"nan": [None]}
    assert "int that cannot be shown" in formatted(huge=10**5000)["huge"]


def test_a_tensor_on_a_gpu_is_not_read() -> None:
    """Reading a scalar would wait for the device."""

    class OnGpu:
        shape = ()
        dtype = "torch.int64"
        device = torch.device("cuda")

        def item(self) -> int:
            raise AssertionError("the device was asked")

    assert formatted(value=OnGpu())["value"] == {"shape": [], "dtype": "torch.int64"}


def test_fields_do_not_hide_the_envelope() -> None:
    entry = formatted(pid="mine", ts="never", rank=3)
    assert entry["pid"] == os.getpid()
    assert entry["ts"] != "never"
    assert entry["rank"] == 3


# The file


def test_the_file_gets_all_and_the_console_as_before(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    leave_root_bare(monkeypatch)
    monkeypatch.setenv("NANOVLLM_LOG_FILE", str(tmp_path / "run.log"))
    log("one …")
    log("not taken", level=logging.DEBUG)
    written = (tmp_path / "run.log").read_text("utf-8")
    assert written == capsys.readouterr().err
    assert [TEXT_LINE.fullmatch(line)["message"] for line in written.splitlines()] == ["one …"]  # type: ignore[index]


@pytest.mark.parametrize(("file_format", "times"), [("json", 1), ("text", 2)])
def test_a_line_is_made_once_for_each_format(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, file_format: str, times: int
) -> None:
    leave_root_bare(monkeypatch)
    monkeypatch.setenv("NANOVLLM_LOG_FILE", str(tmp_path / "run.log"))
    monkeypatch.setenv("NANOVLLM_LOG_FORMAT", "json")
    monkeypatch.setenv("NANOVLLM_LOG_FILE_FORMAT", file_format)
    configure_logging()
    made = []
    for formatter in (JsonFormatter, TextFormatter):
        line = formatter.line
        monkeypatch.setattr(formatter, "line", lambda self, record, line=line: made.append(1) or line(self, record))
    log("one")
    log("two")
    assert len(made) == 2 * times
    assert len((tmp_path / "run.log").read_text("utf-8").splitlines()) == 2


def test_a_formatter_keeps_no_record() -> None:
    formatter = JsonFormatter()
    record = logging.LogRecord("nanovllm.tests", logging.INFO, "", 0, "said", (), None)
    assert formatter.format(record) is formatter.format(record)
    alive = weakref.ref(record)
    del record
    assert alive() is None


def test_times_are_right_across_seconds() -> None:
    text, as_json = TextFormatter(), JsonFormatter()
    for created, milliseconds, utc in (
        (1_800_000_000.25, "250", "2027-01-15T08:00:00.250000Z"),
        (1_800_000_000.9996, "999", "2027-01-15T08:00:00.999600Z"),
        (1_800_000_000.9999997, "999", "2027-01-15T08:00:01.000000Z"),
        (1_800_000_001.5, "500", "2027-01-15T08:00:01.500000Z"),
        (1_800_000_000.5, "500", "2027-01-15T08:00:00.500000Z"),
    ):
        record = logging.LogRecord("nanovllm.tests", logging.INFO, "", 0, "said", (), None)
        record.created = created
        local = time.localtime(created)
        assert text.format(record).startswith(time.strftime(f"[%Y-%m-%d %H:%M:%S,{milliseconds}%z]", local))
        assert json.loads(as_json.format(record))["ts"] == utc


def test_the_user_s_format_decides_and_the_file_is_ours(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    leave_root_bare(monkeypatch)
    monkeypatch.setenv("NANOVLLM_LOG_FILE", str(tmp_path / "run.jsonl"))
    monkeypatch.setenv("NANOVLLM_LOG_FORMAT", "json")
    stream = io.StringIO()
    log("before")
    logging.basicConfig(format="USER %(message)s", stream=stream)
    log("after")
    configure_logging()
    log("again")
    assert stream.getvalue() == "USER after\nUSER again\n"
    messages = [entry["message"] for entry in json_lines((tmp_path / "run.jsonl").read_text("utf-8"))]
    assert messages == ["before", "after", "again"]


def test_the_file_has_a_format_of_its_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    leave_root_bare(monkeypatch)
    monkeypatch.setenv("NANOVLLM_LOG_FILE", str(tmp_path / "run.jsonl"))
    monkeypatch.setenv("NANOVLLM_LOG_FILE_FORMAT", "json")
    log("one")
    assert [entry["message"] for entry in json_lines((tmp_path / "run.jsonl").read_text("utf-8"))] == ["one"]
    assert TEXT_LINE.fullmatch(capsys.readouterr().err.strip())


def test_a_renamed_or_removed_file_is_followed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "run.log"
    monkeypatch.setenv("NANOVLLM_LOG_FILE", str(path))
    log("first")
    path.rename(tmp_path / "run.log.1")
    log("second")
    path.unlink()
    log("third")
    assert "first" in (tmp_path / "run.log.1").read_text("utf-8")
    assert "second" not in (tmp_path / "run.log.1").read_text("utf-8")
    assert path.read_text("utf-8").endswith("third\n")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_one_warning_a_minute(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    leave_root_bare(monkeypatch)
    monkeypatch.setenv("NANOVLLM_LOG_FILE", "/dev/full")
    now = [1000.0]
    monkeypatch.setattr(lost_lines, "time", SimpleNamespace(monotonic=lambda: now[0]))
    for _ in range(100):
        log()
    now[0] += 61
    log()
    lines = capsys.readouterr().err.splitlines()
    warnings = [line.rpartition("] ")[2] for line in lines if "WARNING" in line]
    assert warnings == [
        f"/dev/full cannot be written (No space left on device): {count} lines are lost" for count in (1, 101)
    ]
    assert len(lines) == 103


def test_a_disk_with_room_again_begins_a_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    handler = LogFileHandler(tmp_path / "run.log")
    write = os.write

    def fill(file: int, data: bytes) -> int:
        if len(data) > 3:
            return write(file, data[:3])
        raise OSError(errno.ENOSPC, "No space left on device")

    def handle(message: str) -> None:
        handler.handle(logging.LogRecord("nanovllm.tests", logging.INFO, "", 0, message, (), None))

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", fill)
        handle("abcdefgh")
    handle("whole")
    handler.close()
    assert (tmp_path / "run.log").read_text("utf-8") == "abcdef\nwhole\n"


def test_other_ranks_have_files_of_their_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("NANOVLLM_LOG_FILE", str(tmp_path / "run.jsonl"))
    monkeypatch.setenv("NANOVLLM_LOG_FORMAT", "json")
    log("zero")
    configure_logging(rank=1)
    log("one")
    configure_logging()
    log("one again")
    zero, one = (json_lines((tmp_path / name).read_text("utf-8")) for name in ("run.jsonl", "run.jsonl.rank1"))
    assert [(entry["message"], entry["rank"]) for entry in zero] == [("zero", 0)]
    assert [(entry["message"], entry["rank"]) for entry in one] == [("one", 1), ("one again", 1)]


def test_the_file_follows_the_variable_and_is_appended_to(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, message in (("a", "first"), ("b", "second"), ("a", "third")):
        monkeypatch.setenv("NANOVLLM_LOG_FILE", str(tmp_path / name))
        log(message)
    monkeypatch.delenv("NANOVLLM_LOG_FILE")
    log("nowhere")
    assert [line.rpartition("] ")[2] for line in (tmp_path / "a").read_text().splitlines()] == ["first", "third"]
    assert [line.rpartition("] ")[2] for line in (tmp_path / "b").read_text().splitlines()] == ["second"]
    assert len(logging.getLogger("nanovllm").handlers) == 1


def test_a_file_that_can_not_be_written_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("NANOVLLM_LOG_FILE", str(tmp_path / "none" / "run.log"))
    with pytest.raises(InvalidArgumentError, match="NANOVLLM_LOG_FILE=.*No such file or directory"):
        setup_logger("tests")


def test_configure_logging_0_writes_no_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("NANOVLLM_LOG_FILE", str(tmp_path / "run.log"))
    log("once")
    monkeypatch.setenv("NANOVLLM_CONFIGURE_LOGGING", "0")
    log("never", level=logging.WARNING)
    assert len((tmp_path / "run.log").read_text().splitlines()) == 1
    assert logging.getLogger("nanovllm").handlers == []


SAY = """
import logging, os, signal
from nanovllm.utils.logger import log_event, setup_logger
logger = setup_logger("tests")
for n in range(100):
    log_event(logger, logging.INFO, "tests.said", "said {n}", n=n)
"""


def test_a_killed_program_s_file_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    environment = {"NANOVLLM_LOG_FILE": str(path), "NANOVLLM_LOG_FORMAT": "json"}
    done = run_python("-c", SAY + "os.kill(os.getpid(), signal.SIGKILL)", **environment)
    assert done.returncode == -signal.SIGKILL
    assert [entry["n"] for entry in json_lines(path.read_text())] == list(range(100))


@pytest.mark.parametrize(
    ("variable", "value", "allowed"),
    [("NANOVLLM_LOG_FORMAT", "xml", "text or json"), ("NANOVLLM_CONFIGURE_LOGGING", "no", "0 or 1")],
)
def test_a_wrong_value_is_refused_with_the_allowed_ones(variable: str, value: str, allowed: str) -> None:
    done = run_python("-c", SAY, **{variable: value})
    assert done.returncode == 1
    assert f"{variable}='{value}' is not allowed: it must be {allowed}." in done.stderr.splitlines()[-1]


# Colour


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("stream", "environment", "coloured"),
    [
        (Terminal(), {}, True),
        (Terminal(), {"NO_COLOR": "1"}, False),
        (Terminal(), {"NO_COLOR": ""}, True),  # as no-color.org has it
        (Terminal(), {"NANOVLLM_LOG_FORMAT": "json"}, False),
        (io.StringIO(), {}, False),
    ],
)
def test_levels_have_colour_on_a_terminal_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, stream: io.StringIO, environment: dict[str, str], coloured: bool
) -> None:
    leave_root_bare(monkeypatch)
    for name, value in {**environment, "NANOVLLM_LOG_FILE": str(tmp_path / "run.log")}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "stderr", stream)
    log("said", level=logging.WARNING)
    assert ("[\33[33mWARNING\33[0m] said" in stream.getvalue()) is coloured
    assert ("\33" in stream.getvalue()) is coloured
    assert "\33" not in (tmp_path / "run.log").read_text()


def test_every_level_has_a_colour_and_any_number_a_line() -> None:
    formatter = TextFormatter(colour=True)
    colours = set()
    for level in (logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR, logging.CRITICAL, 7):
        line = formatter.format(logging.LogRecord("nanovllm.tests", level, "", 0, "said", (), None))
        found = re.search(r"\[\x1b\[([\d;]+)m[^\x1b]+\x1b\[0m\] said", line)
        assert found is not None
        colours.add(found[1])
    assert len(colours) == 6


# Width


def on_a_terminal(event: Event, **fields: Any) -> str:
    """The lines of an event on a terminal, without colour."""
    recorder = Recorder()
    logger = setup_logger(event.loggers.split()[0])
    logger.addHandler(recorder)
    try:
        event.log(logger, **fields)
    finally:
        logger.removeHandler(recorder)
    return re.sub("\33\\[[\\d;]*m", "", TerminalFormatter(colour=True).format(recorder.records[0]))


def test_a_list_is_cut_on_a_terminal_and_whole_elsewhere() -> None:
    seqs = ItemList(f"seq_{number}(len=100,cached=0)" for number in range(16))
    line = on_a_terminal(events.batch_prefill, step=1, size=16, batched_tokens=1600, seqs=seqs)
    assert len(line) <= 120
    assert line.endswith("] Scheduled PREFILL batch: size=16, …")  # no number is cut


def test_other_sentences_are_wrapped_on_a_terminal() -> None:
    fields = {"num_steps": 95, "total_output_tokens": 18900, "prefill_time": 0.0625, "decode_time": 1.5}
    first, second = on_a_terminal(events.generation_complete, **fields).splitlines()
    assert max(len(first), len(second)) <= 120
    sentence = first.partition("[INFO] ")[2] + " " + second.strip()
    assert sentence == events.generation_complete.sentence.format(**fields)


def test_a_table_keeps_its_lines_on_a_terminal() -> None:
    table = "a    b\n" * 30
    lines = on_a_terminal(events.profile_written, trace="t", table_file="f", table=table, rank=0)
    assert lines.endswith(table)


@pytest.mark.parametrize("columns", [60, 100, 200])
def test_a_rule_is_as_wide_as_the_terminal(monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    monkeypatch.setattr(formats, "_columns", lambda: columns)
    record = logging.LogRecord("nanovllm.engine.llm_engine", logging.INFO, "", 0, "=" * 80, (), None)
    record.event = "rule"
    line = TerminalFormatter(colour=True).format(record)
    assert line.endswith("] =" if columns == 60 else "===")
    visible = len(re.sub("\33\\[[\\d;]*m", "", line))
    assert visible == columns or columns == 60
