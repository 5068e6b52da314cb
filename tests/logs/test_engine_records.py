"""Which engine a record is about, what the first and the last record of an engine say, and what the console shows."""

from __future__ import annotations

import gc
import json
import logging
import os
import re
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from nanovllm import NanoVLLMError, SamplingParams
from nanovllm.logs.events import SCHEMA
from nanovllm.logs.formats import JsonFormatter
from nanovllm.utils.logger import configure_logging, log_event, setup_logger
from tests.engine.test_llm_engine import make_engine
from tests.logs.test_events import heard, load
from tests.processes import ROOT, WATCHDOG, environment

FOUR = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)


@pytest.fixture(autouse=True)
def at_debug(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("NANOVLLM_LOG_LEVEL", "DEBUG")
    yield
    monkeypatch.undo()
    configure_logging()


def test_two_engines_of_a_process_are_told_apart() -> None:
    with heard() as records:
        engines = [make_engine()[0] for _ in range(2)]
        for step in range(4):
            for number, engine in enumerate(engines):
                if step == 0:
                    engine.add_request(f"of engine {number}", [5, 6, 7], FOUR)
                engine.step()
        for engine in engines:
            engine.exit()
    numbers = [engine.engine_id for engine in engines]
    assert numbers[1] == numbers[0] + 1
    for event in ("engine.init", "request.added", "batch.prefill", "batch.decode", "step.done", "blocks.allocated"):
        found = [record.engine_id for record in records if record.event == event]
        assert found
        assert set(found) == set(numbers), event
    for record in records:
        if "request_id" in record.fields:
            assert record.fields["request_id"] == f"of engine {numbers.index(record.engine_id)}"
    with heard() as records:
        log_event(setup_logger("tests"), logging.INFO, "x", "of no engine")
    assert records[0].engine_id is None
    assert "engine_id" not in json.loads(JsonFormatter().format(records[0]))


def test_generations_of_an_engine_have_its_number() -> None:
    gc.collect()  # so that no engine of another test ends, and says so, meanwhile
    with heard() as records, load() as llm:
        thread = threading.Thread(target=lambda: llm.generate([[5, 6, 7]], FOUR, use_tqdm=False))
        thread.start()
        thread.join()
    number = llm.llm_engine.engine_id
    assert {record.engine_id for record in records} == {number}
    envelope = json.loads(JsonFormatter().format(records[-1]))
    assert envelope["engine_id"] == number
    assert list(envelope)[:9] == ["ts", "mono", "level", "logger", "event", "message", "pid", "rank", "engine_id"]


def test_the_first_record_names_what_the_engine_runs_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NANOVLLM_OVERLAP", "0")
    with heard() as records:
        make_engine()[0].exit()
    first, last, statistics = records[0], *records[-2:]
    assert first.event == "engine.versions"
    assert first.fields["schema"] == SCHEMA
    assert first.fields["variables"].items() >= {"NANOVLLM_LOG_LEVEL": "DEBUG", "NANOVLLM_OVERLAP": "0"}.items()
    assert set(first.fields["versions"]) == {"nanovllm", "python", "torch", "cuda", "triton"}
    import torch

    assert first.fields["versions"]["torch"] == torch.__version__
    assert first.fields["versions"]["cuda"] == torch.version.cuda
    assert (last.event, last.getMessage()) == ("engine.exit", "Engine ended: clean, 0 unfinished requests")
    assert (statistics.event, statistics.fields["final"]) == ("engine.statistics", True)


def test_an_engine_that_failed_ends_with_its_error() -> None:
    with heard() as records:
        engine, executor = make_engine()
        engine.add_request("one", [5, 6, 7], FOUR)
        executor.synchronize = executor.collect = _fail  # type: ignore[method-assign]
        with pytest.raises(RuntimeError, match="the device is lost"):
            engine.step()
        engine.exit()
    (last,) = [record for record in records if record.event == "engine.exit"]
    assert last.fields["outcome"] == "error"
    assert "the device is lost" in last.fields["error"]
    assert last.engine_id == engine.engine_id
    with heard() as records:
        log_event(setup_logger("tests"), logging.INFO, "x", "of no engine")
    assert records[0].engine_id is None


def _fail(*_: object) -> Any:
    raise RuntimeError("the device is lost")


def test_a_failed_start_is_an_event_of_its_engine() -> None:
    with heard() as records, pytest.raises(NanoVLLMError):
        load(attention_backend="flash_attn")
    (failed,) = [record for record in records if record.event == "engine.start_failed"]
    assert failed.levelname == "ERROR"
    assert failed.engine_id == records[0].engine_id
    assert "flash_attn" in failed.fields["error"]
    with heard() as records:
        log_event(setup_logger("tests"), logging.INFO, "x", "of no engine")
    assert records[0].engine_id is None


LINE = re.compile(r"\[[^]]+\] \[[\w.]+\] \[\w+\] (.*)")


def console(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], level: str, **variables: str
) -> tuple[list[str], str]:
    """The sentences on the console of a program that starts an engine and generates; and all that is there."""
    monkeypatch.setattr(logging.root, "handlers", [])
    for name, value in {**variables, "NANOVLLM_LOG_LEVEL": level}.items():
        monkeypatch.setenv(name, value)
    params = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
    with load() as llm:
        llm.generate([[number + 1] * 20 for number in range(5)], params)
    text = capsys.readouterr().err
    return LINE.findall(text), text


def decode_steps(text: str) -> list[str]:
    return re.findall(r"DECODE batch \(step (\d+)\)", text)


def test_the_default_console_is_a_summary_and_the_file_has_all(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "run.jsonl"
    variables = {"NANOVLLM_LOG_FILE": str(path), "NANOVLLM_LOG_FILE_FORMAT": "json"}
    sentences, text = console(monkeypatch, capsys, "", **variables)
    assert [re.split(r"[:\d(=-]", sentence)[0].strip() for sentence in sentences] == [
        "",
        "Initializing LLMEngine",
        "Versions",
        "Model",
        "Configuration",
        "Model config",
        "Allocating KV cache",
        "Allocating",
        "Start",
        "",
        "Starting generation for",
        "Total prompt tokens",
        "Scheduled PREFILL batch",
        "Scheduled DECODE batch",
        "Scheduled DECODE batch",
        "Generation complete",
        "After generation",
    ]
    assert decode_steps(text) == ["1", "50"]
    assert "Generating: 100%" in text
    entries = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    assert entries[0]["event"] == "engine.versions"
    assert [entry["decode_step"] for entry in entries if entry["event"] == "batch.decode"] == [1, *range(10, 60, 10)]
    assert {"model.loading", "kv_cache.memory", "engine.resolved", "engine.exit"} <= {e["event"] for e in entries}


def test_info_that_was_asked_for_is_all_of_info(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sentences, text = console(monkeypatch, capsys, "INFO")
    assert decode_steps(text) == ["1", "10", "20", "30", "40", "50"]
    for sentence in ("Initializing ModelRunner (rank 0)", "[Rank 0] Loading model: ", "KV cache configuration: "):
        assert any(shown.startswith(sentence) for shown in sentences)


def test_streams_that_take_nothing_end_no_generation(tmp_path: Path) -> None:
    """Standard error is a pipe that nobody reads, and then closed, as standard output is."""
    script = """
import sys
from nanovllm import LLM, SamplingParams
with LLM("tiny", device="cpu", max_model_len=256, num_kvcache_blocks=64) as llm:
    llm.generate("Hello", SamplingParams(max_tokens=3))
    sys.stdout.close()
    sys.stderr.close()
    llm.generate("Hello", SamplingParams(max_tokens=3))
open(sys.argv[1], "w").close()
"""
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-c", script, str(tmp_path / "done")]
    subprocess.run(command, cwd=ROOT, env=environment(), stderr=write, timeout=WATCHDOG, check=False)
    os.close(write)
    assert (tmp_path / "done").exists()


def test_attention_and_blocks_name_their_step() -> None:
    with heard() as records, load(num_kvcache_blocks=8, kvcache_block_size=16) as llm:
        llm.generate([[5, 6, 7]], FOUR, use_tqdm=False)
    current, steps = None, []
    for record in records:
        if record.event.startswith("runner.prepare_"):
            current = record.fields["step"]
        elif record.event.startswith("attention.") and record.event != "attention.selected":
            assert record.fields.get("step", "no step") == ("no step" if current is None else current)
            steps.append(current)
    assert {step for step in steps if step is not None} == {1, 2, 3, 4}
    blocks = {record.event: record.fields for record in records if record.event.startswith("blocks.")}
    assert [(fields["request_id"], fields["step"]) for fields in blocks.values()] == [
        ("generate-0", 1),
        ("generate-0", 1),
        ("generate-0", 4),
    ]
