"""What a running engine says at DEBUG, against the registry: no event, field or type that it lacks, none unheard."""

from __future__ import annotations

import logging
import sys
import tempfile
import types
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args, get_origin

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from nanovllm import LLM, NanoVLLMError, RequestTooLargeError, SamplingParams
from nanovllm.async_engine.log_records import report_dropped
from nanovllm.engine import prefix_groups, scheduler
from nanovllm.logs import configuration
from nanovllm.logs.events import EVENTS
from nanovllm.logs.fields import FIELDS, fields_of
from nanovllm.logs.lost_lines import LostLines
from nanovllm.logs.records import Event
from nanovllm.requests.default_params import read_default_params
from nanovllm.tracing.trace_file import TraceFile
from nanovllm.utils.logger import configure_logging, log_gpu_memory, log_tensor_shapes, setup_logger
from tests.engine.test_llm_engine import make_engine
from tests.models.qwen3_checkpoints import make_qwen3_checkpoint
from tests.runner.cpu_graphs import use_cpu_graphs

GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
PROMPT = "list all prime numbers within 100, then count from 3 to 9, then reverse the word planet"


class Recorder(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


@contextmanager
def heard() -> Iterator[list[logging.LogRecord]]:
    recorder = Recorder()
    logging.getLogger("nanovllm").addHandler(recorder)
    try:
        yield recorder.records
    finally:
        logging.getLogger("nanovllm").removeHandler(recorder)


def load(**settings: Any) -> LLM:
    return LLM("tiny", **{"device": "cpu", "max_model_len": 256, "num_kvcache_blocks": 64, **settings})


def generate(llm: LLM, *prompts: str, max_tokens: int = 6) -> None:
    params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
    llm.generate(list(prompts), params, use_tqdm=False)


# The ways through the engine


def prefix_hits_and_mixed_steps(_: pytest.MonkeyPatch) -> None:
    with load(kvcache_block_size=16, max_num_batched_tokens=32, max_num_seqs=4) as llm:
        generate(llm, PROMPT)
        generate(llm, PROMPT, "count from 3 to 9")


def preemption(_: pytest.MonkeyPatch) -> None:
    with load(max_model_len=96, num_kvcache_blocks=6, kvcache_block_size=16) as llm:
        generate(llm, "introduce yourself", "count from 3 to 9", max_tokens=70)


def abort(_: pytest.MonkeyPatch) -> None:
    with load() as llm:
        engine = llm.llm_engine
        for request_id in ("runs", "waits"):
            engine.add_request(request_id, PROMPT, GREEDY)
        engine.step()
        engine.add_request("late", PROMPT, GREEDY)
        for request_id in ("runs", "waits", "late"):
            engine.abort_request(request_id)
        while engine.has_unfinished_requests():
            engine.step()


def errors(monkeypatch: pytest.MonkeyPatch) -> None:
    with load() as llm:
        with pytest.raises(RequestTooLargeError):
            generate(llm, "many words " * 200)
        generate(llm, "many words " * 200, "count from 3 to 9")
        for error in (RuntimeError("a kernel failed"), KeyboardInterrupt()):

            def fail(_: object, error: BaseException = error) -> None:
                raise error

            with monkeypatch.context() as patch:
                patch.setattr(llm.llm_engine.executor, "collect", fail)
                with pytest.raises(type(error)):
                    generate(llm, "count from 3 to 9")


def ignored_tools(_: pytest.MonkeyPatch) -> None:
    tools = [{"type": "function", "function": {"name": "add"}}]
    with load() as llm:
        llm.chat([{"role": "user", "content": "a"}], GREEDY, False, chat_template="count from 3 to 9", tools=tools)


def a_cache_that_lowers_the_length(_: pytest.MonkeyPatch) -> None:
    for settings in ({}, {"max_model_len": 1024}):
        LLM("tiny", device="cpu", num_kvcache_blocks=8, kvcache_block_size=16, **settings).exit()


def shared_prefixes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefix_groups, "_MIN_SHARERS", 2)
    monkeypatch.setattr(prefix_groups, "_MIN_TOKENS_SAVED", 1)
    monkeypatch.setattr(scheduler, "MIN_SHARED_PREFIX", 16)
    with load(kvcache_block_size=16) as llm:
        generate(llm, PROMPT)
        generate(llm, PROMPT, PROMPT, PROMPT)


def cuda_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    with load(max_num_seqs=4) as llm:
        use_cpu_graphs(llm)
        generate(llm, "count from 3 to 9")
        llm.generate("count from 3 to 9", SamplingParams(max_tokens=1, prompt_logprobs=0), use_tqdm=False)


def drafts(_: pytest.MonkeyPatch) -> None:
    with load(speculative_config={"method": "suffix"}) as llm:
        generate(llm, "a b c d e a b c d e a b c")
        refused = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True, speculate=False)
        llm.generate("count from 3 to 9", refused, use_tqdm=False)


def texts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NANOVLLM_LOG_PROMPTS", "1")
    with load() as llm:
        generate(llm, "count from 3 to 9")
        llm.generate([[1, 2, 3]], GREEDY, use_tqdm=False)


def a_grammar_that_leads_nowhere(_: pytest.MonkeyPatch) -> None:
    pytest.importorskip("xgrammar", reason="xgrammar is not installed")
    with load() as llm:
        asked = {"grammar": 'root ::= "planet" x\nx ::= x "y"'}
        llm.generate(PROMPT, SamplingParams(structured_outputs=asked), use_tqdm=False)


def a_damaged_folder(_: pytest.MonkeyPatch) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = make_qwen3_checkpoint(Path(name))
        (folder / "generation_config.json").write_text("no JSON")
        weights = load_file(folder / "model.safetensors")
        weights["model.norm.weight"].fill_(torch.nan)
        save_file(weights, folder / "model.safetensors")
        with LLM(name, device="cpu", skip_tokenizer_init=True) as llm:
            llm.generate([[5], [6]], GREEDY, use_tqdm=False)


def a_start_that_fails(_: pytest.MonkeyPatch) -> None:
    with pytest.raises(NanoVLLMError):
        load(attention_backend="flash_attn")


def an_unknown_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(configuration._STATE, "unknown_variables", set())
    monkeypatch.setenv("NANOVLLM_LOGGING_LEVEL", "DEBUG")
    configure_logging()


def files_that_are_full(_: pytest.MonkeyPatch) -> None:
    with tempfile.TemporaryDirectory() as folder:
        lost = LostLines(Path(folder, "run.log"))
        lost.add(OSError(28, "No space left on device"))
        lost.warn()
        trace = TraceFile(Path(folder, "trace.json"), max_mb=0)
        trace.counter(1, "requests", 0.0, running=1)
        trace.close()


def a_log_that_another_process_did_not_read(_: pytest.MonkeyPatch) -> None:
    report_dropped(5)


def a_function_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    with tempfile.TemporaryDirectory() as folder:
        monkeypatch.setenv("NANOVLLM_TRACE_FUNCTION", f"{folder}/calls.txt")
        make_engine()[0].exit()


def a_wrong_level(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setenv("NANOVLLM_LOG_LEVEL", "DEBUG,scheduler=LOUD")
        configure_logging()
    configure_logging()


def a_profile(_: pytest.MonkeyPatch) -> None:
    with load() as llm, tempfile.TemporaryDirectory() as folder:
        llm.start_profile(folder)
        generate(llm, "count from 3 to 9")
        llm.stop_profile()


def spans(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    make_engine()[0].exit()
    for name in ("opentelemetry", "opentelemetry.sdk.metrics"):  # as if it were not installed
        monkeypatch.setitem(sys.modules, name, None)
    make_engine()[0].exit()


def quantized_weights(_: pytest.MonkeyPatch) -> None:
    with load(quantization="int8"):
        pass


def arguments_of_vllm(_: pytest.MonkeyPatch) -> None:
    SamplingParams(skip_clone=True)  # type: ignore[call-arg]  # it has no effect


def a_recommendation_that_is_not_allowed(_: pytest.MonkeyPatch) -> None:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "generation_config.json").write_text('{"top_p": 2}')
        read_default_params(Path(folder))


def lines_of_one_s_own(_: pytest.MonkeyPatch) -> None:
    logger = setup_logger("tests")
    log_gpu_memory(logger, "Before", "cpu")
    log_tensor_shapes(logger, {"input_ids": np.zeros(3)}, "Mine")


WAYS: list[Callable[[pytest.MonkeyPatch], None]] = [
    ignored_tools,
    prefix_hits_and_mixed_steps,
    preemption,
    abort,
    errors,
    a_cache_that_lowers_the_length,
    shared_prefixes,
    cuda_graphs,
    drafts,
    texts,
    a_grammar_that_leads_nowhere,
    a_damaged_folder,
    a_start_that_fails,
    an_unknown_variable,
    files_that_are_full,
    a_log_that_another_process_did_not_read,
    a_function_trace,
    a_wrong_level,
    a_profile,
    spans,
    quantized_weights,
    arguments_of_vllm,
    a_recommendation_that_is_not_allowed,
    lines_of_one_s_own,
]


# The comparison


def fits(value: object, annotation: Any) -> bool:
    """Whether `value` is of the type as it stands: numbers are plain, and a bool is no number."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is types.UnionType:
        return any(fits(value, alternative) for alternative in arguments)
    if origin is list:
        return isinstance(value, list) and all(fits(item, arguments[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(
            fits(key, arguments[0]) and fits(item, arguments[1]) for key, item in value.items()
        )
    return annotation is object or type(value) in ({float, int} if annotation is float else {annotation})


@pytest.mark.parametrize(
    ("value", "annotation", "expected"),
    [
        (1, int, True),
        (True, int, False),
        (np.int64(1), int, False),
        (np.float64(1), float, False),
        (1, float, True),
        (None, float | None, True),
        (None, float, False),
        ([1, 2], list[int], True),
        ([1, "2"], list[int], False),
        ({"a": 1.0}, float | dict[str, float], True),
        ({"a": "b"}, float | dict[str, float], False),
    ],
)
def test_fits(value: object, annotation: Any, expected: bool) -> None:
    assert fits(value, annotation) is expected


def wrong_with(record: logging.LogRecord) -> str:
    event: Event | None = EVENTS.get(record.event)
    if event is None:
        return f"the registry has no event {record.event!r}"
    levels = (event.levels,) if isinstance(event.levels, int) else event.levels
    if record.levelno not in levels:
        return f"{event.name} is not said at {record.levelname}"
    if event.loggers and record.name.removeprefix("nanovllm.") not in event.loggers.split():
        return f"{event.name} is not said by {record.name}"
    if event.others:
        return ""
    declared = fields_of(event)
    missing = {name for name, (_, always) in declared.items() if always} - record.fields.keys()
    if missing or record.fields.keys() - declared.keys():
        return f"{event.name} has the fields {sorted(record.fields)}"
    odd = {name: value for name, value in record.fields.items() if not fits(value, FIELDS[name].type)}
    return f"{event.name} has values of other types: {odd}" if odd else ""


@pytest.fixture(scope="module")
def records() -> list[logging.LogRecord]:
    with pytest.MonkeyPatch.context() as patch, heard() as found:
        patch.setenv("NANOVLLM_LOG_LEVEL", "DEBUG")
        patch.setenv("NANOVLLM_LOG_STATS_INTERVAL", "0.001")
        patch.setattr(logging.root, "handlers", [])
        for way in WAYS:
            with pytest.MonkeyPatch.context() as way_patch:
                way(way_patch)
    configure_logging()
    return found


def test_every_record_is_as_declared(records: list[logging.LogRecord]) -> None:
    assert len(records) > 500
    wrong = Counter(filter(None, map(wrong_with, records)))
    assert not wrong, "\n".join(wrong)


def test_every_event_is_heard(records: list[logging.LogRecord]) -> None:
    unheard = EVENTS.keys() - {record.event for record in records}
    on_gpus = {"kv_cache.sizing", "graph.mixed_ready", "graph.mixed_off"}
    in_server = {event.name for event in EVENTS.values() if event.loggers.startswith("server.")}
    of_replicas = {event.name for event in EVENTS.values() if event.loggers.startswith("data_parallel.")}
    rare = {"communication", "worker.lost", "engine_process.lost", "engine.slow", "grammar.output", "actor.ended"}
    rare |= {"api_process.dropped"}
    assert unheard == rare | on_gpus | in_server | of_replicas
    assert all(EVENTS[name].unseen for name in unheard)


def test_a_prompt_s_text_is_said_only_where_it_was_asked_for(records: list[logging.LogRecord]) -> None:
    said = "\n".join(record.getMessage() + str(record.fields) for record in records)
    assert "prime" not in said
    assert "planet" not in said
    (prompt,) = {record.fields["prompt"] for record in records if "prompt" in record.fields} - {None}
    assert prompt == "count from 3 to 9"
    assert "count from" not in "".join(record.getMessage() for record in records)


@pytest.mark.gpu
def test_a_gpu_is_spoken_of_as_declared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NANOVLLM_LOG_LEVEL", "DEBUG")
    with heard() as found, LLM("tiny", device="cuda", max_model_len=256, max_num_seqs=4) as llm:
        generate(llm, "count from 3 to 9", "introduce yourself")
    monkeypatch.undo()
    configure_logging()
    wrong = Counter(filter(None, map(wrong_with, found)))
    assert not wrong, "\n".join(wrong)
    assert {"kv_cache.sizing", "graph.captured"} <= {record.event for record in found}
    decode = [record for record in found if record.event == "section.end" and "DECODE" in record.fields["section"]]
    assert decode
    assert decode[-1].fields["gpu_ms"] > 0


@pytest.mark.parametrize(
    ("event", "level", "logger", "fields", "complaint"),
    [
        ("block.freed", "DEBUG", "engine.block_manager", {}, "no event 'block.freed'"),
        ("engine.init", "DEBUG", "engine.llm_engine", {}, "not said at DEBUG"),
        ("engine.init", "INFO", "llm", {}, "not said by nanovllm.llm"),
        ("engine.model", "INFO", "engine.llm_engine", {}, "has the fields []"),
        ("engine.model", "INFO", "engine.llm_engine", {"model": "x", "more": 1}, "has the fields ['model', 'more']"),
        ("runner.init", "INFO", "engine.model_runner", {"rank": np.int64(0)}, "other types"),
        ("runner.init", "INFO", "engine.model_runner", {"rank": 0}, ""),
    ],
)
def test_what_is_wrong_is_found(event: str, level: str, logger: str, fields: dict[str, Any], complaint: str) -> None:
    number = logging.getLevelName(level)
    record = logging.LogRecord(f"nanovllm.{logger}", number, "", 0, "", (), None)
    record.event, record.fields = event, fields
    assert complaint in wrong_with(record)
    assert bool(wrong_with(record)) is bool(complaint)


ABOUT_A_STEP = ("batch.", "blocks.", "runner.", "section.", "sequence.", "step.")


def test_records_name_their_request_and_their_step(records: list[logging.LogRecord]) -> None:
    for record in records:
        if "seq_id" in record.fields:
            assert record.fields["request_id"], record.event
        if record.event.startswith(ABOUT_A_STEP) and record.event != "runner.init":
            assert "step" in record.fields, record.event
