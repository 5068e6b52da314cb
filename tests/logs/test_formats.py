"""JSON lines, the log file, colour: what is written where, and that nothing a field holds can stop it."""

from __future__ import annotations

import io
import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nanovllm.errors import InvalidArgumentError
from nanovllm.logs.formats import JsonFormatter, TextFormatter
from nanovllm.utils.logger import configure_logging, log_event, setup_logger

ROOT = Path(__file__).parents[2]
TEXT_LINE = re.compile(r"\[[\d\- :,]+\] \[nanovllm\.tests\] \[(?P<level>[A-Z]+)\] (?P<message>.*)")


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
    assert entry["message"] == "said 3 … two\nlines"
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
        (float("nan"), "nan"),
        (np.float64("inf"), "inf"),
        ({(1, 2): 3}, "{(1, 2): 3}"),
        ("\ud800 half a pair", "\ud800 half a pair"),
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
    assert entry["endless"] == "[[...]]"
    assert entry["unspeakable"] == "<Unspeakable that cannot be shown: RuntimeError>"
    assert "list" in entry["inside"]
    assert entry["deep"] == "{'nan': [nan]}"


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


def run_script(script: str, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = {name: value for name, value in os.environ.items() if not name.startswith("NANOVLLM_")}
    variables.update(environment, PYTHONPATH=str(ROOT))
    return subprocess.run([sys.executable, "-c", script], env=variables, capture_output=True, text=True, timeout=60)


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
    done = run_script(SAY + "os.kill(os.getpid(), signal.SIGKILL)", **environment)
    assert done.returncode == -signal.SIGKILL
    assert [entry["n"] for entry in json_lines(path.read_text())] == list(range(100))


@pytest.mark.parametrize(
    ("variable", "value", "allowed"),
    [("NANOVLLM_LOG_FORMAT", "xml", "text or json"), ("NANOVLLM_CONFIGURE_LOGGING", "no", "0 or 1")],
)
def test_a_wrong_value_is_refused_with_the_allowed_ones(variable: str, value: str, allowed: str) -> None:
    done = run_script(SAY, **{variable: value})
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
