"""RequestSpans: sends an OpenTelemetry span for each request, with the attributes of the GenAI semantic conventions.

Enabled when OTEL_EXPORTER_OTLP_ENDPOINT or OTEL_EXPORTER_OTLP_TRACES_ENDPOINT is set and OpenTelemetry's SDK is
installed; the SDK reads the other OTEL_* variables. When a request has ended, the engine puts its span into a queue,
which drops it if it is full. A thread of the SDK sends the spans to the collector in batches. Attribute names are those
of https://github.com/open-telemetry/semantic-conventions-genai; others begin with `nanovllm.`.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable
from typing import Any

from nanovllm.engine.observer import EngineObserver, EngineStart
from nanovllm.engine.sequence import Sequence
from nanovllm.logs import events
from nanovllm.utils import env
from nanovllm.utils.logger import setup_logger

logger = setup_logger(__name__)

_CLOSE_SECONDS = 5.0  # how long the engine's end waits for a collector that does not answer


def open_request_spans(model: str) -> RequestSpans | None:
    """Returns the observer if the environment asks for spans and the extra is installed, else None.

    A log line says when the extra is missing.
    """
    endpoint = env.otlp_traces_endpoint() or env.otlp_endpoint()
    if endpoint is None:
        return None
    try:
        spans = RequestSpans(model)
    except ImportError as error:
        events.spans_missing.log(logger, endpoint=endpoint, error=str(error))
        return None
    events.spans_started.log(logger, endpoint=endpoint)
    return spans


class RequestSpans(EngineObserver):
    """Sends a span for each request that ends. Raises ImportError without the extra."""

    def __init__(self, model: str) -> None:
        # Imported here, so that engines without spans do not pay the tenth of a second that it takes.
        from opentelemetry import trace
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import SERVICE_NAME, OTELResourceDetector, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        self._api, self._model = trace, model
        self._clock = time.monotonic
        # OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES override the service name.
        resource = Resource.create().merge(Resource({SERVICE_NAME: "nanovllm"})).merge(OTELResourceDetector().detect())
        # A separate provider, since the global one belongs to the application. It is closed when the engine ends.
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        self._tracer = self._provider.get_tracer("nanovllm")
        self._ending = threading.Event()
        # Started now, since Python starts no threads while it shuts down.
        self._closer = threading.Thread(target=self._shut_down, name="nanovllm-spans", daemon=True)
        self._closer.start()

    def engine_started(self, start: EngineStart) -> None:
        self._clock = start.clock

    def sequence_finished(self, sequence: Sequence) -> None:
        self._record(sequence)

    def engine_failed(self, error: BaseException, lost: Iterable[Sequence], goes_on: bool) -> None:
        for sequence in lost:
            self._record(sequence, error)

    def engine_exiting(self, unfinished: Iterable[Sequence]) -> None:
        """Sends the remaining spans, for a few seconds at most."""
        self._ending.set()
        self._closer.join(_CLOSE_SECONDS)

    def _record(self, sequence: Sequence, error: BaseException | None = None) -> None:
        """Sends the span of a request that has ended. error: what ended it, if it failed.

        Its parent is the caller's current span.
        """
        now = self._clock()
        to_wall = time.time() - now
        span = self._tracer.start_span(
            f"text_completion {self._model}",
            kind=self._api.SpanKind.INTERNAL,  # the convention for a model in the same process
            attributes=self._attributes(sequence, error),
            start_time=_nanoseconds(sequence.arrival + to_wall),
        )
        if sequence.first_token is not None:
            span.add_event("nanovllm.first_token", timestamp=_nanoseconds(sequence.first_token + to_wall))
        for moment in sequence.preempted_at:
            span.add_event("nanovllm.preempted", timestamp=_nanoseconds(moment + to_wall))
        if error is not None:
            span.set_status(self._api.StatusCode.ERROR, repr(error))
        end = now if sequence.finished is None else sequence.finished
        span.end(_nanoseconds(end + to_wall))

    def _shut_down(self) -> None:
        self._ending.wait()
        self._provider.shutdown()  # sends what is queued, and may wait for the collector

    def _attributes(self, sequence: Sequence, error: BaseException | None) -> dict[str, Any]:
        params = sequence.params
        attributes: dict[str, Any] = {
            "gen_ai.operation.name": "text_completion",
            "gen_ai.provider.name": "nanovllm",
            "gen_ai.request.model": self._model,
            "gen_ai.response.model": self._model,
            "gen_ai.response.id": sequence.request_id,
            "gen_ai.request.temperature": float(params.temperature),
            "gen_ai.request.max_tokens": None if params.max_tokens is None else int(params.max_tokens),
            "gen_ai.request.seed": None if params.seed is None else int(params.seed),
            "gen_ai.usage.input_tokens": sequence.num_prompt_tokens,
            "gen_ai.usage.cache_read.input_tokens": sequence.num_cached_tokens or 0,
            "gen_ai.response.finish_reasons": [sequence.finish_reason or "error"],
            "error.type": None if error is None else type(error).__qualname__,
            "nanovllm.preemptions": len(sequence.preempted_at),
        }
        if sequence.finished is not None:
            metrics = sequence.metrics()
            attributes |= {
                "gen_ai.usage.output_tokens": metrics.num_output_tokens,
                "nanovllm.queue_time": metrics.queue_time,  # seconds, like all times
                "nanovllm.time_to_first_token": metrics.time_to_first_token,
                "nanovllm.inter_token_latency": metrics.inter_token_latency,
                "nanovllm.end_to_end": metrics.end_to_end,
            }
        return {name: value for name, value in attributes.items() if value is not None}


def _nanoseconds(seconds: float) -> int:
    return int(seconds * 1e9)
