"""The logging module: events, levels, who prints, shapes, memory, timed sections, decode frequency."""

from __future__ import annotations

import io
import logging
import logging.config
import re
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from nanovllm.logs import configuration, events
from nanovllm.logs.decode_rule import DecodeLogPolicy
from nanovllm.utils.logger import (
    configure_logging,
    first_items,
    flush_timed_sections,
    log_communication,
    log_event,
    log_gpu_memory,
    log_rule,
    log_tensor_shapes,
    setup_logger,
    timed_section,
)
from tests.processes import PATIENCE, run_python

LINE = re.compile(
    r"^\[\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}[+-]\d{4}\] \[(?P<name>[\w.]+)\] \[(?P<level>[A-Z]+)\] (?P<message>.*)$"
)


@pytest.fixture(autouse=True)
def clean_logging(monkeypatch):
    """Each test starts from the defaults, and leaves no level behind."""
    for variable in ("NANOVLLM_LOG_LEVEL", "NANOVLLM_CONFIGURE_LOGGING", "NANOVLLM_LOG_DECODE_INTERVAL"):
        monkeypatch.delenv(variable, raising=False)
    configure_logging()
    yield
    monkeypatch.undo()
    for name in list(logging.root.manager.loggerDict):
        if name == "nanovllm" or name.startswith("nanovllm."):
            logging.getLogger(name).setLevel(logging.NOTSET)
    configure_logging()


def debug_logger(name="nanovllm.test_logger"):
    return setup_logger(name, level="DEBUG")


def run_script(script, **environment):
    """Standard output and error of a fresh Python that runs `script`."""
    done = run_python("-c", script, **environment)
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


# ---- events


def test_a_record_carries_sentence_event_and_fields(caplog):
    log_event(debug_logger(), logging.INFO, "kv_cache.allocated", "Allocating {n} blocks, {gb:.2f}GB", n=512, gb=1.119)
    (record,) = caplog.records
    assert record.getMessage() == "Allocating 512 blocks, 1.12GB"
    assert record.event == "kv_cache.allocated"
    assert record.fields == {"n": 512, "gb": 1.119}
    assert (record.name, record.levelname) == ("nanovllm.test_logger", "INFO")


def test_field_values_are_never_read_as_templates(caplog):
    log_event(debug_logger(), logging.INFO, "x", "Model: {model}", model="100%s {0} {model}")
    log_gpu_memory(debug_logger(), "{prefix} %d", "cpu")
    assert caplog.messages[0] == "Model: 100%s {0} {model}"
    assert caplog.messages[1].startswith("{prefix} %d - ")


def test_nothing_is_formatted_for_a_record_that_no_one_takes():
    class Explosive:
        def __format__(self, spec):
            raise AssertionError("formatted although the level is off")

        @property
        def shape(self):
            raise AssertionError("shape read although the level is off")

    logger = setup_logger("nanovllm.test_logger", level="INFO")
    log_event(logger, logging.DEBUG, "x", "{value}", value=Explosive())
    log_tensor_shapes(logger, {"a": Explosive()})
    log_communication(logger, "all_reduce", [Explosive()], 0, 2)


def test_the_caller_is_the_one_who_logs(caplog):
    logger = debug_logger()
    calls = [
        lambda: log_event(logger, logging.INFO, "x", "message"),
        lambda: log_rule(logger),
        lambda: log_tensor_shapes(logger, {"a": 1}),
        lambda: log_communication(logger, "broadcast", 64, 0, 2),
        lambda: log_gpu_memory(logger, device="cpu"),
    ]
    for call in calls:
        call()
    with timed_section(logger, "section"):
        pass
    lines = {record.lineno for record in caplog.records}
    assert {record.filename for record in caplog.records} == {"test_logger.py"}
    assert len(lines) == len(calls) + 1  # one each, and one for the section's two records


def test_a_plain_record_has_the_attributes_too(caplog):
    debug_logger().info("plain %s", "words")
    (record,) = caplog.records
    assert (record.getMessage(), record.event, record.fields) == ("plain words", "", {})


def test_the_rule_is_80_characters(caplog):
    log_rule(debug_logger())
    log_rule(debug_logger(), "-")
    assert caplog.messages == ["=" * 80, "-" * 80]


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("a\nb", "a\\nb"),
        ("\33[2J", "\\x1b[2J"),
        ("\ud800", "\\ud800"),
        ("\u202eabc", "\\u202eabc"),
        ("日本 😀 …", "日本 😀 …"),
    ],
)
def test_a_value_breaks_no_line_and_moves_no_cursor(caplog, value, shown):
    log_event(debug_logger(), logging.INFO, "x", "Request {request_id} failed", request_id=value)
    events.request_failed.log(debug_logger(), request_id=value, others="the others go on", error="x", cause="refused")
    assert caplog.messages == [f"Request {shown} failed", f"Request {shown} is given up, the others go on: x"]
    assert [record.fields["request_id"] for record in caplog.records] == [value] * 2


def test_a_template_may_have_lines(caplog):
    log_event(debug_logger(), logging.INFO, "x", "Table:\n{table}", table="a\nb\33")
    assert caplog.messages == ["Table:\na\nb\\x1b"]


def test_a_long_list_is_cut_and_only_what_is_shown_is_rendered():
    rendered = []

    def render(number):
        rendered.append(number)
        return f"seq_{number}"

    shown = first_items(range(256), render)
    assert rendered == list(range(16))
    assert shown[:2] == ["seq_0", "seq_1"]
    assert f"{shown}".endswith("seq_15, … +240 more]")
    assert f"seqs={first_items(range(2), render)}" == "seqs=[seq_0, seq_1]"
    assert f"{first_items(range(16), render)}".endswith("seq_15]")
    assert f"{first_items([], render)}" == "[]"


# ---- levels


def test_info_is_the_default_and_names_are_put_below_nanovllm():
    logger = setup_logger("my_tool")
    assert logger is logging.getLogger("nanovllm.my_tool")
    assert setup_logger("nanovllm.engine.scheduler") is logging.getLogger("nanovllm.engine.scheduler")
    assert setup_logger("nanovllm") is logging.getLogger("nanovllm")
    assert setup_logger("nanovllmish").name == "nanovllm.nanovllmish"
    assert logger.getEffectiveLevel() == logging.INFO


def test_the_variable_decides_and_the_argument_wins(monkeypatch):
    monkeypatch.setenv("NANOVLLM_LOG_LEVEL", "debug")
    assert setup_logger("nanovllm.one").getEffectiveLevel() == logging.DEBUG
    assert setup_logger("nanovllm.two", level="ERROR").getEffectiveLevel() == logging.ERROR
    assert setup_logger("nanovllm.two", level=logging.WARNING).getEffectiveLevel() == logging.WARNING


def test_an_unknown_level_is_one_warning_that_names_the_valid_ones_then_info(monkeypatch, caplog):
    monkeypatch.setenv("NANOVLLM_LOG_LEVEL", "LOUD")
    loggers = [setup_logger("nanovllm.one"), setup_logger("nanovllm.two")]
    assert [logger.getEffectiveLevel() for logger in loggers] == [logging.INFO] * 2
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    for word in ("NANOVLLM_LOG_LEVEL", "'LOUD'", "DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"):
        assert word in record.getMessage()
    assert setup_logger("nanovllm.three", level="QUIET").getEffectiveLevel() == logging.INFO
    assert "'QUIET'" in caplog.records[-1].getMessage()


@pytest.mark.parametrize(
    ("text", "level"), [("WARN", logging.WARNING), ("fatal", logging.CRITICAL), ("Warn,scheduler=fatal", 30)]
)
def test_the_names_that_logging_takes_pass(monkeypatch, caplog, text, level):
    monkeypatch.setenv("NANOVLLM_LOG_LEVEL", text)
    assert setup_logger("nanovllm.one").getEffectiveLevel() == level
    assert caplog.records == []


def test_an_unknown_variable_is_one_warning_with_the_nearest_name(monkeypatch, caplog):
    monkeypatch.setattr(configuration._STATE, "unknown_variables", set())
    monkeypatch.setenv("NANOVLLM_LOGGING_LEVEL", "DEBUG")
    monkeypatch.setenv("NANOVLLM_ZQ", "1")
    configure_logging()
    setup_logger("nanovllm.one")
    assert [record.levelname for record in caplog.records] == ["WARNING"] * 2
    assert {record.fields["variable"]: record.getMessage() for record in caplog.records} == {
        name: f"{name} is set, but nanovllm reads no variable of this name.{hint}"
        for name, hint in (("NANOVLLM_LOGGING_LEVEL", " Did you mean NANOVLLM_LOG_LEVEL?"), ("NANOVLLM_ZQ", ""))
    }


def test_levels_per_part(monkeypatch):
    monkeypatch.setenv("NANOVLLM_LOG_LEVEL", "INFO, scheduler=DEBUG ,engine.block_manager=WARNING,layers=ERROR")
    levels = {
        "nanovllm.engine.scheduler": logging.DEBUG,  # by its last component
        "nanovllm.engine.block_manager": logging.WARNING,  # by its path
        "nanovllm.layers.attention": logging.ERROR,  # through its package
        "nanovllm.engine.llm_engine": logging.INFO,  # the default
    }
    assert {name: setup_logger(name).getEffectiveLevel() for name in levels} == levels


def test_a_path_beats_a_bare_name(monkeypatch):
    monkeypatch.setenv("NANOVLLM_LOG_LEVEL", "attention=DEBUG,nanovllm.layers.attention=ERROR")
    assert setup_logger("nanovllm.layers.attention").getEffectiveLevel() == logging.ERROR
    assert setup_logger("nanovllm.attention.torch_backend").getEffectiveLevel() == logging.DEBUG
    assert setup_logger("nanovllm.engine.scheduler").getEffectiveLevel() == logging.INFO


@pytest.mark.parametrize(
    ("text", "complaint", "scheduler_level"),
    [
        ("DEBUG,scheduler=LOUD", "unknown level 'LOUD', using INFO for 'scheduler'", logging.INFO),
        ("DEBUG,scheduler=", "unknown level '', using INFO for 'scheduler'", logging.INFO),
        ("DEBUG,=ERROR", "'=ERROR'", logging.DEBUG),
        ("DEBUG,ERROR", "'ERROR'", logging.DEBUG),
        (
            "DEBUG,schedular=ERROR",
            "no part of nanovllm is called 'schedular' (did you mean 'scheduler'?)",
            logging.DEBUG,
        ),
    ],
)
def test_a_malformed_specification_is_one_warning(monkeypatch, caplog, text, complaint, scheduler_level):
    scheduler = setup_logger("nanovllm.engine.scheduler")
    monkeypatch.setenv("NANOVLLM_LOG_LEVEL", text)
    configure_logging()
    configure_logging()
    (record,) = caplog.records
    assert complaint in record.getMessage()
    assert record.event == "logging.level"
    assert scheduler.getEffectiveLevel() == scheduler_level
    assert setup_logger("nanovllm.engine.llm_engine").getEffectiveLevel() == logging.DEBUG


def test_the_user_s_own_level_wins_before_and_after(monkeypatch):
    before = logging.getLogger("nanovllm.user.before")
    before.setLevel(logging.ERROR)
    monkeypatch.setenv("NANOVLLM_LOG_LEVEL", "INFO,before=DEBUG,after=DEBUG")
    assert setup_logger("nanovllm.user.before").level == logging.ERROR
    after = setup_logger("nanovllm.user.after")
    assert after.level == logging.DEBUG
    after.setLevel(logging.WARNING)
    logging.getLogger("nanovllm").setLevel(logging.CRITICAL)
    configure_logging()
    assert after.level == logging.WARNING
    assert setup_logger("nanovllm.user.other").getEffectiveLevel() == logging.CRITICAL


def test_a_changed_environment_is_honoured_by_configure_logging(monkeypatch):
    scheduler = setup_logger("nanovllm.engine.scheduler")
    monkeypatch.setenv("NANOVLLM_LOG_LEVEL", "WARNING,scheduler=DEBUG")
    configure_logging()
    assert scheduler.getEffectiveLevel() == logging.DEBUG
    monkeypatch.setenv("NANOVLLM_LOG_LEVEL", "WARNING")
    configure_logging()
    assert scheduler.getEffectiveLevel() == logging.WARNING
    monkeypatch.delenv("NANOVLLM_LOG_LEVEL")
    configure_logging()
    assert scheduler.getEffectiveLevel() == logging.INFO


# ---- who prints


def test_there_is_one_handler_however_often_it_is_set_up():
    for _ in range(3):
        setup_logger("nanovllm.engine.scheduler")
        configure_logging()
    assert logging.getLogger("nanovllm").handlers == [configuration._STATE.console]
    assert logging.getLogger("nanovllm.engine.scheduler").handlers == []
    assert logging.getLogger("nanovllm").propagate


LOG_TWO = """
log_event(logger, logging.INFO, "one", "first {n}", n=1)
log_event(logger, logging.DEBUG, "two", "second")
"""
IMPORT = """
import logging, sys
from nanovllm.utils.logger import setup_logger, log_event
logger = setup_logger("nanovllm.engine.scheduler")
"""


def test_alone_it_prints_the_text_format_to_standard_error_and_imports_no_torch():
    out, err = run_script(IMPORT + LOG_TWO + 'assert not {"torch", "numpy", "transformers"} & set(sys.modules)')
    (line,) = err.splitlines()
    match = LINE.match(line)
    assert match is not None
    assert match.groupdict() == {"name": "nanovllm.engine.scheduler", "level": "INFO", "message": "first 1"}
    assert out == ""


def test_warning_is_silence():
    assert run_script(IMPORT + LOG_TWO, NANOVLLM_LOG_LEVEL="WARNING") == ("", "")


@pytest.mark.parametrize("order", ["before the import", "after the import", "after the first line"])
def test_basic_config_decides_the_format_and_no_line_appears_twice(order):
    configure = 'import logging, sys; logging.basicConfig(format="USER %(message)s", stream=sys.stdout)\n'
    first = 'log_event(logger, logging.INFO, "zero", "zeroth")\n'
    out, err = run_script(
        {
            "before the import": configure + IMPORT + LOG_TWO,
            "after the import": IMPORT + configure + LOG_TWO,
            "after the first line": IMPORT + first + configure + LOG_TWO,
        }[order]
    )
    assert out == "USER first 1\n"
    if order == "after the first line":
        assert [LINE.match(line)["message"] for line in err.splitlines()] == ["zeroth"]
    else:
        assert err == ""


@pytest.mark.parametrize("order", ["before the import", "after the import"])
def test_basic_config_at_debug_gives_debug_lines(order):
    configure = (
        'import logging, sys; logging.basicConfig(level="DEBUG", format="USER %(message)s", stream=sys.stdout)\n'
    )
    parts = [configure, IMPORT] if order == "before the import" else [IMPORT, configure]
    start = "from nanovllm.utils.logger import configure_logging; configure_logging()\n"  # as each engine does
    assert run_script("".join([*parts, start, LOG_TWO])) == ("USER first 1\nUSER second\n", "")
    out, _ = run_script("".join([*parts, start, LOG_TWO]), NANOVLLM_LOG_LEVEL="INFO")
    assert out == "USER first 1\n"


def test_loggers_that_dict_config_disables_are_revived(monkeypatch, tmp_path):
    monkeypatch.setenv("NANOVLLM_LOG_FILE", str(tmp_path / "run.log"))
    logger = setup_logger("nanovllm.engine.scheduler")
    handlers = list(logging.getLogger("nanovllm").handlers)
    root = logging.root.handlers[:]
    try:
        logging.config.dictConfig({"version": 1, "loggers": {"nanovllm": {"level": "INFO", "handlers": []}}})
        logging.config.dictConfig({"version": 1, "root": {"level": "WARNING"}})
        assert logger.disabled
        configure_logging()
    finally:
        logging.root.handlers[:] = root
    assert logging.getLogger("nanovllm").handlers == handlers
    log_event(logger, logging.INFO, "x", "again")
    assert (tmp_path / "run.log").read_text("utf-8").endswith("again\n")


def test_configure_logging_0_leaves_logging_alone(monkeypatch):
    monkeypatch.setenv("NANOVLLM_CONFIGURE_LOGGING", "0")
    monkeypatch.setenv("NANOVLLM_LOG_LEVEL", "DEBUG,scheduler=DEBUG")
    logger = setup_logger("nanovllm.engine.scheduler")
    package = logging.getLogger("nanovllm")
    assert (package.handlers, package.level, logger.level) == ([], logging.NOTSET, logging.NOTSET)


class ListHandler(logging.Handler):
    def __init__(self):
        super().__init__()
        self.messages = []

    def emit(self, record):
        self.messages.append(record.getMessage())


def leave_root_bare(monkeypatch):
    """Take pytest's handlers off the root logger, as in a program of its own (pytest adds them after fixtures)."""
    monkeypatch.setattr(logging.root, "handlers", [])


def test_a_handler_of_the_user_s_takes_the_console_s_place_where_it_is_attached(monkeypatch, capsys):
    leave_root_bare(monkeypatch)
    scheduler, engine = setup_logger("nanovllm.engine.scheduler"), setup_logger("nanovllm.engine.llm_engine")
    own = ListHandler()
    scheduler.addHandler(own)
    try:
        log_event(scheduler, logging.INFO, "x", "from the scheduler")
        log_event(engine, logging.INFO, "x", "from the engine")
    finally:
        scheduler.removeHandler(own)
    assert own.messages == ["from the scheduler"]
    assert [LINE.match(line)["message"] for line in capsys.readouterr().err.splitlines()] == ["from the engine"]


def test_a_replaced_standard_error_is_followed(monkeypatch, capsys):
    leave_root_bare(monkeypatch)
    log_event(setup_logger("nanovllm.engine.scheduler"), logging.INFO, "x", "seen by capsys … +1")
    captured = capsys.readouterr()
    assert captured.err.endswith("seen by capsys … +1\n")
    assert captured.out == ""


def test_a_lost_standard_error_ends_nothing(monkeypatch):
    leave_root_bare(monkeypatch)
    closed = io.StringIO()
    closed.close()
    for stream in (None, SimpleNamespace(write=None, flush=None), closed):
        monkeypatch.setattr(sys, "stderr", stream)
        log_event(setup_logger("nanovllm.engine.scheduler"), logging.INFO, "x", "to nowhere")


def test_a_closed_stream_of_the_user_s_handler_ends_nothing(monkeypatch):
    closed = io.StringIO()
    monkeypatch.setattr(logging.root, "handlers", [logging.StreamHandler(closed)])
    monkeypatch.setattr(sys, "stderr", closed)  # where `logging` reports what a handler raised
    closed.close()
    log_event(setup_logger("nanovllm.engine.scheduler"), logging.INFO, "x", "to nowhere")


# ---- shapes, communication, memory


def test_tensor_shapes(caplog):
    logger = debug_logger()
    tensors = {"input_ids": np.zeros(156), "tables": np.zeros((2, 5)), "caches": [np.zeros(3), np.zeros(4)]}
    log_tensor_shapes(logger, {**tensors, "block_tables": None, "max_seqlen": 78}, "[Rank 0] PREFILL")
    log_tensor_shapes(logger, {"a": np.zeros(1)})
    assert caplog.messages == [
        "[Rank 0] PREFILL tensors: input_ids=[156], tables=[2, 5], caches=[[3], [4]], max_seqlen=78",
        "tensors: a=[1]",
    ]
    shapes = {"input_ids": [156], "tables": [2, 5], "caches": [[3], [4]], "max_seqlen": 78}
    assert caplog.records[0].fields == {"shapes": shapes}
    assert caplog.records[0].levelname == "DEBUG"
    assert {record.event for record in caplog.records} == {"tensors"}


def test_shapes_of_torch_tensors_are_plain_integers(caplog):
    import torch

    log_tensor_shapes(debug_logger(), {"q": torch.zeros(3, 2, 4)}, "x")
    assert caplog.messages == ["x tensors: q=[3, 2, 4]"]
    assert type(caplog.records[0].fields["shapes"]["q"]) is list


def test_communication(caplog):
    logger = debug_logger()
    log_communication(logger, "all_reduce", [[2, 1024]], 1, 2, elapsed_ms=0.1234)
    log_communication(logger, "broadcast", {"hidden": np.zeros((2, 8))}, 0, 2)
    log_communication(logger, "shm_send", 4096, 0, 2)
    assert caplog.messages == [
        "[Rank 1/2] all_reduce: shapes=[[2, 1024]], elapsed=0.12ms",
        "[Rank 0/2] broadcast: shapes={'hidden': [2, 8]}",
        "[Rank 0/2] shm_send: bytes=4096",
    ]
    expected = {"operation": "shm_send", "bytes": 4096, "rank": 0, "world_size": 2, "elapsed_ms": None}
    assert caplog.records[2].fields == expected
    assert {(record.event, record.levelname) for record in caplog.records} == {("communication", "DEBUG")}


def test_memory_on_a_cpu_is_the_process_s_and_says_so(caplog):
    log_gpu_memory(debug_logger(), device="cpu", event=events.model_loaded)
    (record,) = caplog.records
    pattern = r"After model loading - CPU Memory \[this process\]: (Resident=\d+\.\d\dGB, )?Peak=\d+\.\d\dGB"
    assert re.fullmatch(pattern, record.getMessage())
    assert (record.event, record.levelname) == ("model.loaded", "INFO")
    if sys.platform == "linux":
        assert 10**6 < record.fields["resident_bytes"] <= record.fields["peak_bytes"]
    log_gpu_memory(debug_logger(), device="cpu")
    assert caplog.messages[1].startswith("CPU Memory")


def fake_torch(monkeypatch, **cuda):
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=SimpleNamespace(**cuda)))


@pytest.mark.parametrize(("device", "index"), [(0, 0), (1, 1), ("cuda:1", 1), ("cuda", 3)])
def test_memory_on_a_gpu(monkeypatch, caplog, device, index):
    seen = []

    def answer(value):
        return lambda device_index: seen.append(device_index) or value

    fake_torch(
        monkeypatch,
        is_available=lambda: True,
        current_device=lambda: 3,
        mem_get_info=answer((100 * 10**9, 141 * 10**9)),
        memory_allocated=answer(1_850_000_000),
        memory_reserved=answer(2 * 10**9),
        max_memory_allocated=answer(3 * 10**9),
    )
    log_gpu_memory(debug_logger(), "After KV cache allocation", device)
    assert caplog.messages == [
        f"After KV cache allocation - GPU Memory [Device {index}]: Allocated=1.85GB, Reserved=2.00GB, Peak=3.00GB, "
        "Free=100.00GB/141.00GB"
    ]
    assert set(seen) == {index}
    assert caplog.records[0].fields["allocated_bytes"] == 1_850_000_000
    assert caplog.records[0].event == "memory"


def test_memory_never_raises(monkeypatch, caplog):
    def broken(*_):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    fake_torch(monkeypatch, is_available=lambda: True, mem_get_info=broken)
    log_gpu_memory(debug_logger(), "After generation", 0)
    assert caplog.messages[0].startswith("After generation - Memory not known: RuntimeError('CUDA error")
    log_gpu_memory(debug_logger(), "After generation", "cuda:one")
    assert "Memory not known: ValueError" in caplog.messages[1]


# ---- timed sections


def test_a_section_on_a_cpu(caplog):
    with timed_section(debug_logger(), "[Rank 0] Model forward PREFILL", device="cpu"):
        assert caplog.messages == ["[START] [Rank 0] Model forward PREFILL"]
    assert re.fullmatch(r"\[END\] \[Rank 0\] Model forward PREFILL - Elapsed: \d+\.\d\dms", caplog.messages[1])
    start, end = caplog.records
    assert (start.event, start.fields) == ("section.start", {"section": "[Rank 0] Model forward PREFILL"})
    assert end.event == "section.end"
    assert end.fields["wall_ms"] >= 0
    assert (end.fields["gpu_ms"], end.fields["failed"]) == (None, False)
    assert {start.levelname, end.levelname} == {"DEBUG"}


def test_a_section_ends_also_when_its_body_raises(caplog):
    with pytest.raises(KeyError), timed_section(debug_logger(), "body"):
        raise KeyError("x")
    assert caplog.records[1].fields["failed"] is True


def test_a_section_that_is_off_does_nothing(monkeypatch, caplog):
    fake_torch(monkeypatch)  # has nothing: any use of it would raise
    logger = setup_logger("nanovllm.test_logger", level="INFO")
    section = timed_section(logger, "one", device="cuda")
    assert section is timed_section(logger, "two", device="cuda")
    with section:
        pass
    assert caplog.records == []


class FakeCuda:
    """CUDA events on a clock that the test moves."""

    def __init__(self):
        self.passed = False  # whether the GPU has got past everything recorded so far
        self.capturing = False
        self.synchronisations = 0
        self.recorded = []
        cuda = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self, stream):
                assert stream == "stream of 0"
                cuda.recorded.append(self)

            def query(self):
                assert not cuda.capturing
                return cuda.passed

            def synchronize(self):
                cuda.synchronisations += 1
                cuda.passed = True

            def elapsed_time(self, end):
                assert cuda.passed
                return 12.34

        self.cuda = SimpleNamespace(
            Event=Event,
            is_initialized=lambda: True,
            is_current_stream_capturing=lambda: self.capturing,
            current_device=lambda: 0,
            current_stream=lambda index: f"stream of {index}",
        )


@pytest.fixture
def gpu(monkeypatch):
    fake = FakeCuda()
    monkeypatch.setitem(sys.modules, "torch", fake)
    yield fake
    flush_timed_sections()


@pytest.mark.parametrize("device", [None, 0, "cuda:0", "cuda"])
def test_on_a_gpu_elapsed_is_gpu_time_read_later_without_waiting(gpu, caplog, device):
    logger = debug_logger()
    with timed_section(logger, "first", device=device):
        pass
    with timed_section(logger, "second", device=device):
        pass
    assert caplog.messages == ["[START] first", "[START] second"]
    gpu.passed = True
    with timed_section(logger, "third", device=device):
        pass
    assert gpu.synchronisations == 0
    assert [re.sub(r"wall time [\d.]+ms", "wall time …", message) for message in caplog.messages[2:]] == [
        "[END] first - Elapsed: 12.34ms (GPU time; wall time …)",
        "[END] second - Elapsed: 12.34ms (GPU time; wall time …)",
        "[START] third",
    ]
    end = caplog.records[2]
    assert end.fields["gpu_ms"] == 12.34
    assert 0 <= end.fields["wall_ms"] < 1000
    assert end.filename == "test_logger.py"
    assert end.lineno == caplog.records[0].lineno


def test_flush_waits_and_logs_the_rest(gpu, caplog):
    with pytest.raises(KeyError), timed_section(debug_logger(), "only"):
        raise KeyError("x")
    assert len(caplog.records) == 1
    flush_timed_sections()
    assert gpu.synchronisations == 1
    assert caplog.records[1].fields["gpu_ms"] == 12.34
    assert caplog.records[1].fields["failed"] is True
    flush_timed_sections()
    assert len(caplog.records) == 2


def test_ends_are_logged_once_and_in_order_from_several_threads(gpu, caplog):
    """One thread is stopped while it asks the GPU; meanwhile another one leaves the pending sections to it."""
    logger = debug_logger()
    asks, goes_on = threading.Event(), threading.Event()
    for name in ("first", "second"):
        with timed_section(logger, name):
            pass
    query = gpu.cuda.Event.query

    def wait(event):
        asks.set()
        assert goes_on.wait(PATIENCE)
        return query(event)

    def time_a_section(name):
        with timed_section(logger, name):
            pass

    gpu.passed, gpu.cuda.Event.query = True, wait
    stopped = threading.Thread(target=time_a_section, args=("third",))
    stopped.start()
    assert asks.wait(PATIENCE)
    time_a_section("fourth")
    goes_on.set()
    stopped.join(PATIENCE)
    flush_timed_sections()
    ends = [message.split(" - ")[0] for message in caplog.messages if message.startswith("[END]")]
    assert ends == ["[END] first", "[END] second", "[END] fourth", "[END] third"]


def test_during_capture_no_event_is_recorded_or_asked(gpu, caplog):
    logger = debug_logger()
    with timed_section(logger, "before"):
        pass
    assert len(gpu.recorded) == 2
    gpu.capturing = gpu.passed = True
    with timed_section(logger, "captured"):
        pass
    assert len(gpu.recorded) == 2
    assert [message.split(" - ")[0] for message in caplog.messages] == [
        "[START] before",
        "[START] captured",
        "[END] captured",
    ]
    assert caplog.records[2].fields["gpu_ms"] is None
    gpu.capturing = False


def test_a_cpu_section_beside_a_gpu_is_wall_time(gpu, caplog):
    with timed_section(debug_logger(), "host work", device="cpu"):
        pass
    assert gpu.recorded == []
    assert caplog.records[1].fields["gpu_ms"] is None


def test_a_failing_gpu_hides_no_error(gpu, caplog, monkeypatch):
    def broken(*_):
        raise RuntimeError("CUDA error")

    def body():
        monkeypatch.setattr(gpu.cuda.Event, "record", broken)
        raise KeyError("the body's own error")

    with pytest.raises(KeyError), timed_section(debug_logger(), "body"):
        body()
    assert caplog.records[1].fields["gpu_ms"] is None


def test_what_is_pending_is_logged_when_python_exits():
    script = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
import logging
from test_logger import FakeCuda
sys.modules["torch"] = FakeCuda()
from nanovllm.utils.logger import setup_logger, timed_section
with timed_section(setup_logger("exit", level="DEBUG"), "last"):
    pass
"""
    _, err = run_script(script)
    assert "[END] last - Elapsed: 12.34ms (GPU time" in err.splitlines()[-1]


@pytest.mark.gpu
def test_gpu_time_covers_the_work_and_wall_time_only_its_launch(caplog):
    import torch

    matrix = torch.randn(8192, 8192, device="cuda")
    matrix @ matrix
    torch.cuda.synchronize()
    with timed_section(debug_logger(), "products"):
        for _ in range(20):
            matrix @ matrix
    flush_timed_sections()
    fields = caplog.records[-1].fields
    assert fields["gpu_ms"] > 2 * fields["wall_ms"]
    graph = torch.cuda.CUDAGraph()
    with timed_section(debug_logger(), "pending"):
        matrix @ matrix
    with torch.cuda.graph(graph), timed_section(debug_logger(), "captured"):
        matrix @ matrix
    assert caplog.records[-1].fields["gpu_ms"] is None
    graph.replay()
    flush_timed_sections()
    log_gpu_memory(debug_logger(), "After", matrix.device)
    assert re.search(r"After - GPU Memory \[Device 0\]: Allocated=\d+\.\d\dGB", caplog.messages[-1])
    assert caplog.records[-1].fields["allocated_bytes"] >= matrix.nbytes


# ---- decode frequency


def levels(policy, steps):
    return "".join("I" if policy.level_for(*step) == logging.INFO else "d" for step in steps)


def test_first_and_every_tenth_decode_step_are_info():
    assert levels(DecodeLogPolicy(), [(step, 2, 0) for step in range(1, 22)]) == "IddddddddIdddddddddId"


def test_the_interval_comes_from_the_variable_when_the_policy_is_made(monkeypatch):
    monkeypatch.setenv("NANOVLLM_LOG_DECODE_INTERVAL", "3")
    policy = DecodeLogPolicy()
    monkeypatch.setenv("NANOVLLM_LOG_DECODE_INTERVAL", "1")
    assert levels(policy, [(step, 2, 0) for step in range(1, 8)]) == "IdIddId"
    assert levels(DecodeLogPolicy(), [(step, 2, 0) for step in range(1, 4)]) == "III"


def test_a_changed_batch_size_and_a_preemption_are_info():
    steps = [(1, 4, 0), (2, 4, 0), (3, 3, 0), (4, 3, 0), (5, 3, 2), (6, 3, 0), (7, 4, 0), (8, 4, 0)]
    assert levels(DecodeLogPolicy(interval=100), steps) == "IdIdIdId"


def in_summary(policy, steps):
    return [step for step, num_preempted in steps if policy.in_summary(step, num_preempted)]


def test_the_summary_has_the_first_step_every_nth_and_preemptions(monkeypatch):
    monkeypatch.delenv("NANOVLLM_LOG_DECODE_INTERVAL", raising=False)
    steps = [(step, int(step == 7)) for step in range(1, 101)]
    assert in_summary(DecodeLogPolicy(), steps) == [1, 7, 50, 100]
    monkeypatch.setenv("NANOVLLM_LOG_DECODE_INTERVAL", "30")
    assert in_summary(DecodeLogPolicy(), steps) == [1, 7, 30, 60, 90]


def test_after_a_reset_the_first_step_is_first_again():
    policy = DecodeLogPolicy(interval=100)
    assert levels(policy, [(1, 4, 0), (2, 4, 0)]) == "Id"
    policy.reset()
    assert levels(policy, [(3, 4, 0), (4, 4, 0)]) == "Id"


def test_ranks_above_0_say_only_what_is_their_own():
    script = """
from nanovllm.logs import configuration, events
from nanovllm.utils.logger import configure_logging, setup_logger
configure_logging(rank=1)
logger = setup_logger("nanovllm.engine.model_runner")
events.model_loading.log(logger, rank=1, model="m")
events.model_weights.log(logger, rank=1, num_tensors=1, gigabytes=0.5, num_files=1, seconds=0.1)
logger.info("of a plugin")
logger.warning("trouble")
"""
    _, error = run_script(script, NANOVLLM_LOG_LEVEL="INFO")
    assert [LINE.match(line)["message"] for line in error.splitlines()] == [
        "[Rank 1] Loaded 1 tensors, 0.50GB from 1 files in 0.10s",
        "of a plugin",
        "trouble",
    ]
    _, error = run_script(script, NANOVLLM_LOG_LEVEL="DEBUG")
    assert "[Rank 1] Loading model: m" in error


def test_a_process_that_another_one_starts_does_not_repeat_the_warning(tmp_path):
    script = tmp_path / "program.py"
    script.write_text(
        "import multiprocessing\n"
        "from nanovllm.utils.logger import setup_logger\n"
        "setup_logger('mine').warning('imported')\n"
        "if __name__ == '__main__':\n"
        "    process = multiprocessing.get_context('spawn').Process(target=print)\n"
        "    process.start()\n"
        "    process.join()\n"
    )
    done = run_python(str(script), NANOVLLM_LOGGING_LEVEL="DEBUG")
    assert done.stderr.count("imported") == 2
    assert done.stderr.count("NANOVLLM_LOGGING_LEVEL is set") == 1
