"""Spans of requests, as a collector receives them."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from nanovllm import LLM, AsyncLLM, InvalidArgumentError, SamplingParams
from nanovllm.tracing import otlp
from nanovllm.utils.versions import installed_version
from tests.engine.test_llm_engine import greedy, make_engine, run
from tests.server.running_server import running_server

pytest.importorskip("opentelemetry.sdk", reason="OpenTelemetry is not installed")

from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from tests.processes import WATCHDOG, run_python

METRICS = "/v1/metrics"


@pytest.fixture(autouse=True, scope="module")
def _quiet_exporter() -> None:
    """Its thread may try once more after a test has ended its collector: no other test is to meet its warning."""
    logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)


class Collector(ThreadingHTTPServer):
    """Keeps what is posted. `answers`: cleared, it takes requests and never answers."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Receiver)
        self.requests: list[tuple[str, dict[str, str], Any]] = []
        self.answers = threading.Event()
        self.answers.set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    @property
    def spans(self) -> dict[str, Span]:
        """By request id."""
        found = {}
        for path, _, message in self.requests:
            for resource in message.resource_spans if path != METRICS else ():
                for scope in resource.scope_spans:
                    found.update({attributes_of(span)["gen_ai.response.id"]: span for span in scope.spans})
        return found

    @property
    def metrics(self) -> dict[str, Any]:
        """By name, the data points of the last export."""
        found = {}
        for path, _, message in self.requests:
            for resource in message.resource_metrics if path == METRICS else ():
                for scope in resource.scope_metrics:
                    found.update({metric.name: metric.histogram.data_points for metric in scope.metrics})
        return found


class Receiver(BaseHTTPRequestHandler):
    server: Collector

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.answers.wait(60)
        kind = ExportMetricsServiceRequest if self.path == METRICS else ExportTraceServiceRequest
        self.server.requests.append((self.path, dict(self.headers), kind.FromString(body)))
        self.send_response(200)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


def value_of(value: Any) -> Any:
    kind = value.WhichOneof("value")
    return [value_of(item) for item in value.array_value.values] if kind == "array_value" else getattr(value, kind)


def attributes_of(of: Any) -> dict[str, Any]:
    return {item.key: value_of(item.value) for item in of.attributes}


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    for name in [name for name in os.environ if name.startswith("OTEL_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with Collector() as server:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", server.url)
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield server
        server.answers.set()
        server.shutdown()
        thread.join()


def test_a_request_is_a_span(collector: Collector) -> None:
    before = time.time()
    engine, _ = make_engine(max_num_seqs=1)
    engine.add_request(
        "a", [1, 2, 3], SamplingParams(temperature=0.5, max_tokens=4, top_p=0.9, ignore_eos=True, seed=7)
    )
    engine.add_request("b", [4], greedy(1))
    outputs = run(engine)
    engine.exit()
    assert {path for path, _, _ in collector.requests} == {"/v1/traces", METRICS}
    (scope,) = {
        (scope.schema_url, scope.scope.name, scope.scope.version)
        for path, _, message in collector.requests
        for resource in (message.resource_metrics if path == METRICS else message.resource_spans)
        for scope in (resource.scope_metrics if path == METRICS else resource.scope_spans)
    }
    assert scope == (otlp.SCHEMA_URL, "nanovllm", installed_version("nanovllm") or "")
    assert collector.spans.keys() == {"a", "b"}
    span, metrics = collector.spans["a"], outputs["a"].metrics
    assert span.name == "text_completion simulated"
    assert span.kind == Span.SPAN_KIND_INTERNAL
    assert span.status.code == Status.STATUS_CODE_UNSET
    assert attributes_of(span) == {
        "gen_ai.operation.name": "text_completion",
        "gen_ai.provider.name": "nanovllm",
        "gen_ai.request.model": "simulated",
        "gen_ai.response.model": "simulated",
        "gen_ai.response.id": "a",
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.top_p": 0.9,
        "gen_ai.request.max_tokens": 4,
        "gen_ai.request.seed": 7,
        "gen_ai.usage.input_tokens": 3,
        "gen_ai.usage.cache_read.input_tokens": 0,
        "gen_ai.usage.output_tokens": 4,
        "gen_ai.response.finish_reasons": ["length"],
        "nanovllm.cause": "length",
        "nanovllm.preemptions": 0,
        "nanovllm.queue_time": metrics.first_scheduled - metrics.arrival,
        "nanovllm.time_to_first_token": metrics.time_to_first_token,
        "nanovllm.inter_token_latency": metrics.inter_token_latency,
        "nanovllm.end_to_end": metrics.end_to_end,
    }
    start, end = span.start_time_unix_nano / 1e9, span.end_time_unix_nano / 1e9
    assert before - 0.01 <= start <= end <= time.time() + 0.01  # the time of day
    assert end - start == pytest.approx(metrics.end_to_end, abs=1e-5)
    (event,) = span.events
    assert event.name == "nanovllm.first_token"
    assert event.time_unix_nano / 1e9 - start == pytest.approx(metrics.time_to_first_token, abs=1e-5)
    other = attributes_of(collector.spans["b"])
    assert "gen_ai.request.seed" not in other
    assert "nanovllm.inter_token_latency" not in other  # of one token


def test_a_span_tells_of_preemptions_and_cached_tokens(collector: Collector) -> None:
    engine, _ = make_engine(num_blocks=8)
    for index in range(3):
        engine.add_request(f"{index}", [5, 5, 5, 5, index], greedy(14))
    outputs = run(engine)
    engine.exit()
    assert engine.statistics.num_preemptions
    for request_id, span in collector.spans.items():
        attributes, metrics = attributes_of(span), outputs[request_id].metrics
        assert attributes["nanovllm.preemptions"] == metrics.num_preemptions
        assert [event.name for event in span.events].count("nanovllm.preempted") == metrics.num_preemptions
        assert attributes["gen_ai.usage.cache_read.input_tokens"] == metrics.num_cached_tokens
    assert any(output.num_cached_tokens for output in outputs.values())


def test_requests_that_do_not_end_well(collector: Collector) -> None:
    engine, executor = make_engine(max_num_seqs=1)
    for request_id in ("aborted", "discarded", "lost"):
        engine.add_request(request_id, [1, 2], greedy(9))
    engine.step()
    engine.abort_request("aborted")
    engine.discard_requests(["discarded"])
    engine.step()
    executor.failures["collect"] = RuntimeError("the device failed")
    with pytest.raises(RuntimeError):
        engine.step()
    engine.exit()
    found = {request_id: attributes_of(span) for request_id, span in collector.spans.items()}
    assert {name: values["gen_ai.response.finish_reasons"] for name, values in found.items()} == {
        "aborted": ["abort"],
        "discarded": ["abort"],
        "lost": ["error"],
    }
    assert found["aborted"]["gen_ai.usage.output_tokens"] == 1
    assert "nanovllm.time_to_first_token" not in found["discarded"]
    assert found["lost"]["error.type"] == "RuntimeError"
    lost = collector.spans["lost"]
    assert lost.status.code == Status.STATUS_CODE_ERROR
    assert "the device failed" in lost.status.message
    assert lost.end_time_unix_nano > lost.start_time_unix_nano


def test_the_caller_s_span_is_the_parent(collector: Collector) -> None:
    from opentelemetry.sdk.trace import TracerProvider

    engine, _ = make_engine()
    with TracerProvider().get_tracer("application").start_as_current_span("mine") as mine:
        engine.add_request("a", [1], greedy(2))
        run(engine)
    engine.exit()
    assert collector.spans["a"].trace_id == mine.get_span_context().trace_id.to_bytes(16, "big")
    assert collector.spans["a"].parent_span_id == mine.get_span_context().span_id.to_bytes(8, "big")


def test_the_span_is_that_of_the_caller_who_added_the_request(collector: Collector) -> None:
    from opentelemetry.sdk.trace import TracerProvider

    tracer = TracerProvider().get_tracer("application")
    engine, _ = make_engine()
    with tracer.start_as_current_span("adds") as adds:
        engine.add_request("a", [1], greedy(2))
    with tracer.start_as_current_span("steps"):
        run(engine)
    engine.exit()
    assert collector.spans["a"].parent_span_id == adds.get_span_context().span_id.to_bytes(8, "big")


@pytest.mark.parametrize("in_process", [False, True])
def test_the_span_of_a_coroutine_is_that_of_its_task(
    collector: Collector, caplog: pytest.LogCaptureFixture, in_process: bool
) -> None:
    from opentelemetry.sdk.trace import TracerProvider

    tracer = TracerProvider().get_tracer("application")
    parents: dict[str, int] = {}

    async def one(engine: AsyncLLM, name: str) -> None:
        with tracer.start_as_current_span(name) as span:
            parents[name] = span.get_span_context().span_id
            prompt = [] if name == "refused" else [1, 2, 3]
            params = SamplingParams(max_tokens=3, ignore_eos=True)
            with suppress(InvalidArgumentError):
                async for _ in engine.generate(prompt, params, name):
                    await asyncio.sleep(0)

    async def all_of(engine: AsyncLLM) -> None:
        await asyncio.gather(*(one(engine, name) for name in ("a", "b", "refused")))

    settings: dict[str, Any] = {"device": "cpu", "max_model_len": 64, "engine_process": in_process}
    with caplog.at_level(logging.INFO, "nanovllm"), AsyncLLM("tiny", **settings) as engine:
        asyncio.run(asyncio.wait_for(all_of(engine), WATCHDOG))
    spans = collector.spans
    assert {name: int.from_bytes(span.parent_span_id, "big") for name, span in spans.items()} == parents
    assert spans["refused"].status.code == Status.STATUS_CODE_ERROR
    assert attributes_of(spans["refused"])["error.type"] == "InvalidArgumentError"
    records = [record for record in caplog.records if record.event == "request.finished"]  # type: ignore[attr-defined]
    assert {record.fields["request_id"]: int(record.fields["span_id"], 16) for record in records} == parents  # type: ignore[attr-defined]
    traces = {record.fields["request_id"]: record.fields["trace_id"] for record in records}  # type: ignore[attr-defined]
    assert traces == {name: span.trace_id.hex() for name, span in spans.items()}


def test_a_request_with_several_completions_is_one_span(collector: Collector) -> None:
    engine, _ = make_engine()
    engine.add_request("several", [1, 2], SamplingParams(n=3, seed=1, max_tokens=2, ignore_eos=True))
    run(engine)
    engine.exit()
    (span,) = collector.spans.values()
    attributes = attributes_of(span)
    assert attributes["gen_ai.response.id"] == "several"
    assert attributes["gen_ai.request.choice.count"] == 3
    assert attributes["gen_ai.response.finish_reasons"] == ["length"] * 3
    assert attributes["gen_ai.usage.output_tokens"] == 6


def test_stop_strings_are_attributes(collector: Collector) -> None:
    with LLM("tiny", device="cpu", max_model_len=64) as llm:
        llm.generate("count", SamplingParams(max_tokens=2, stop=["three", "four"]), use_tqdm=False)
    (span,) = collector.spans.values()
    assert attributes_of(span)["gen_ai.request.stop_sequences"] == ["three", "four"]


def test_the_metrics_of_requests(collector: Collector) -> None:
    engine, executor = make_engine()
    for name in ("a", "b"):
        engine.add_request(name, [1, 2, 3], greedy(4))
    outputs = run(engine)
    engine.add_request("lost", [1], greedy(4))
    executor.failures["collect"] = RuntimeError("the device failed")
    with pytest.raises(RuntimeError):
        engine.step()
    engine.exit()
    metrics = collector.metrics
    assert metrics.keys() == {
        "gen_ai.server.request.duration",
        "gen_ai.server.time_to_first_token",
        "gen_ai.server.time_per_output_token",
    }
    fine, failed = sorted(metrics["gen_ai.server.request.duration"], key=lambda point: len(point.attributes))
    assert (fine.count, failed.count) == (2, 1)
    assert attributes_of(failed)["error.type"] == "RuntimeError"
    assert attributes_of(fine) == {
        "gen_ai.operation.name": "text_completion",
        "gen_ai.provider.name": "nanovllm",
        "gen_ai.request.model": "simulated",
        "gen_ai.response.model": "simulated",
    }
    assert fine.sum == pytest.approx(sum(output.metrics.end_to_end for output in outputs.values()))
    (first,) = metrics["gen_ai.server.time_to_first_token"]
    assert first.count == 2
    assert list(first.explicit_bounds)[:3] == [0.001, 0.005, 0.01]


@pytest.mark.parametrize("name", ["nanovllm", "shop"])
def test_the_standard_variables_hold(collector: Collector, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    if name != "nanovllm":
        monkeypatch.setenv("OTEL_SERVICE_NAME", name)
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment=test")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "x-key=secret")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", f"{collector.url}/elsewhere")
    monkeypatch.delenv("OTEL_EXPORTER_OTLP_ENDPOINT")
    engine, _ = make_engine()
    engine.add_request("a", [1], greedy(2))
    run(engine)
    engine.exit()
    ((path, headers, message),) = collector.requests  # metrics have an endpoint of their own
    assert path == "/elsewhere"
    assert headers["x-key"] == "secret"
    resource = attributes_of(message.resource_spans[0].resource)
    assert (resource["service.name"], resource["deployment"]) == (name, "test")


@pytest.mark.parametrize("way", ["silent", "absent"])
def test_a_collector_that_does_not_answer_holds_nobody_up(
    collector: Collector, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    if way == "absent":
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(otlp, "CLOSE_SECONDS", 0.3)
    monkeypatch.setenv("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "1")  # posts at once
    monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "2")  # and is full soon
    collector.answers.clear()
    engine, _ = make_engine()
    started = time.monotonic()
    for index in range(20):
        engine.add_request(f"{index}", [1], greedy(2))
        assert run(engine).keys() == {f"{index}"}
    # A post waits for ten seconds for its answer: twenty of them were not waited for, and the end waits for none.
    assert time.monotonic() - started < 60
    started = time.monotonic()
    engine.exit()
    assert time.monotonic() - started < 10


SCRIPT = """
import sys
from tests.engine.test_llm_engine import greedy, make_engine, run
engine, _ = make_engine()
engine.add_request("a", [1], greedy(2))
run(engine)
"""


def test_a_python_that_ends_without_exit_sends_its_spans(collector: Collector) -> None:
    result = run_python("-c", SCRIPT, NANOVLLM_LOG_LEVEL="WARNING", OTEL_EXPORTER_OTLP_ENDPOINT=collector.url)
    assert (result.returncode, result.stderr) == (0, "")
    assert collector.spans.keys() == {"a"}


def test_nothing_is_imported_where_nobody_asked() -> None:
    check = "assert not any(name.startswith('opentelemetry') for name in sys.modules)"
    result = run_python("-c", f"{SCRIPT}\n{check}", NANOVLLM_LOG_LEVEL="WARNING")
    assert (result.returncode, result.stderr) == (0, "")


def test_without_the_extra_a_line_says_what_to_install(
    collector: Collector, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("opentelemetry", "opentelemetry.sdk.metrics"):
        monkeypatch.setitem(sys.modules, name, None)
    with caplog.at_level(logging.INFO, "nanovllm"):
        engine, _ = make_engine()
    engine.add_request("a", [1], greedy(2))
    assert run(engine).keys() == {"a"}
    engine.exit()
    assert f"No spans go to {collector.url}: pip install opentelemetry-sdk " in caplog.text
    assert f"No metrics go to {collector.url}: pip install opentelemetry-sdk " in caplog.text
    assert not collector.requests


@pytest.mark.parametrize("in_process", [False, True], ids=["thread", "process"])
def test_the_trace_of_an_http_client_is_continued_by_the_engine(collector: Collector, in_process: bool) -> None:
    trace, parent = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
    with (
        AsyncLLM("tiny", device="cpu", num_kvcache_blocks=64, engine_process=in_process) as engine,
        running_server(engine) as server,
    ):
        headers = {"traceparent": f"00-{trace}-{parent}-01", "tracestate": "vendor=1"}
        continued, own = (
            server.client.post("/v1/completions", json={"prompt": "27 + 58 =", "max_tokens": 2}, headers=each).json()
            for each in (headers, {})
        )
    child, root = collector.spans[continued["id"]], collector.spans[own["id"]]
    assert (child.trace_id.hex(), child.parent_span_id.hex(), child.trace_state) == (trace, parent, "vendor=1")
    assert (root.trace_id.hex() != trace, root.parent_span_id) == (True, b"")
