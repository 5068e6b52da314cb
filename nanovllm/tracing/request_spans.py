"""RequestSpans: sends an OpenTelemetry span for each request, with the attributes of the GenAI semantic conventions.

Enabled when OTEL_EXPORTER_OTLP_ENDPOINT or OTEL_EXPORTER_OTLP_TRACES_ENDPOINT is set and OpenTelemetry's SDK is
installed; the SDK reads the other OTEL_* variables. When a request has ended, the engine puts its span into a queue,
which drops it if it is full. A thread of the SDK sends the spans to the collector in batches. Attribute names are those
of https://github.com/open-telemetry/semantic-conventions-genai; others begin with `nanovllm.`.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from nanovllm.engine.observer import EngineObserver, EngineStart
from nanovllm.engine.request_end import RequestEnd, error_text
from nanovllm.engine.sequence import Sequence
from nanovllm.logs import events
from nanovllm.tracing.otlp import SCHEMA_URL, SCOPE, Closer, make_resource
from nanovllm.utils import env
from nanovllm.utils.caller import ActiveSpan
from nanovllm.utils.logger import setup_logger
from nanovllm.utils.versions import installed_version

logger = setup_logger(__name__)


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


@dataclass
class _Request:
    """An unfinished request."""

    context: Any  # of the caller that added it: its span is the parent
    sequences: list[Sequence] = field(default_factory=list)


class RequestSpans(EngineObserver):
    """Sends a span for each request that ends. Raises ImportError without the extra."""

    def __init__(self, model: str) -> None:
        # Imported here, so that engines without spans do not pay the tenth of a second that it takes.
        from opentelemetry import trace
        from opentelemetry.context import Context
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        self._api, self._no_context, self._model = trace, Context(), model
        self._clock = time.monotonic
        self._requests: dict[str, _Request] = {}
        # A separate provider, since the global one belongs to the application. It is closed when the engine ends.
        provider = TracerProvider(resource=make_resource(), shutdown_on_exit=False)
        provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        self._tracer = provider.get_tracer(SCOPE, installed_version(SCOPE), schema_url=SCHEMA_URL)
        self._closer = Closer(provider.shutdown)

    def engine_started(self, start: EngineStart) -> None:
        self._clock = start.clock

    def request_added(self, sequence: Sequence) -> None:
        name = sequence.whole_request_id
        if name not in self._requests:
            self._requests[name] = _Request(self._context(sequence.caller.span))
        self._requests[name].sequences.append(sequence)

    def request_finished(self, end: RequestEnd) -> None:
        request = self._requests.pop(end.request_id, None)
        self._record(end, _Request(self._context(end.caller.span)) if request is None else request)

    def _context(self, span: ActiveSpan | None) -> Any:
        return self._no_context if span is None else span.context

    def engine_exiting(self, unfinished: Iterable[Sequence]) -> None:
        """Sends the remaining spans, for a few seconds at most."""
        self._closer.close()

    def _record(self, end: RequestEnd, request: _Request) -> None:
        to_wall = time.time() - self._clock()
        span = self._tracer.start_span(
            f"text_completion {self._model}",
            context=request.context,
            kind=self._api.SpanKind.INTERNAL,  # the convention for a model in the same process
            attributes={
                name: value for name, value in self._attributes(end, request.sequences).items() if value is not None
            },
            start_time=_nanoseconds(end.arrival + to_wall),
        )
        if end.to_first_token is not None:
            moment = end.arrival + end.to_first_token
            span.add_event("nanovllm.first_token", timestamp=_nanoseconds(moment + to_wall))
        for sequence in request.sequences:
            for moment in sequence.preempted_at:
                span.add_event("nanovllm.preempted", timestamp=_nanoseconds(moment + to_wall))
        if end.is_error:
            span.set_status(self._api.StatusCode.ERROR, error_text(end.error))
        finished = end.arrival if end.last is None else end.last.finished
        span.end(_nanoseconds(finished + to_wall))

    def _attributes(self, end: RequestEnd, sequences: list[Sequence]) -> dict[str, Any]:
        """Returns the attributes of a request; None for those that do not apply."""
        attributes: dict[str, Any] = {
            "gen_ai.operation.name": "text_completion",
            "gen_ai.provider.name": "nanovllm",
            "gen_ai.request.model": self._model,
            "gen_ai.response.model": self._model,
            "gen_ai.response.id": end.request_id,
            "gen_ai.response.finish_reasons": [
                "error" if each.cause == "failed" else each.finish_reason for each in end.completions
            ]
            or ["error"],
            "error.type": type(end.error).__qualname__ if end.is_error else None,
            "nanovllm.cause": end.cause,
        }
        if not sequences:
            return attributes
        params, choices = sequences[0].params, len(sequences)
        attributes |= {
            "gen_ai.request.temperature": float(params.temperature),
            "gen_ai.request.top_p": float(params.top_p),
            "gen_ai.request.max_tokens": None if params.max_tokens is None else int(params.max_tokens),
            "gen_ai.request.seed": None if params.seed is None else int(params.seed),
            "gen_ai.request.stop_sequences": list(params.stop) if params.stop else None,
            "gen_ai.request.choice.count": choices if choices > 1 else None,
            "gen_ai.usage.input_tokens": end.num_prompt_tokens,
            "gen_ai.usage.cache_read.input_tokens": end.num_cached_tokens,
            "gen_ai.usage.output_tokens": end.num_output_tokens,
            "nanovllm.preemptions": sum(each.num_preemptions for each in end.completions),
        }
        if end.last is not None:
            has_run = end.last.first_step is not None
            attributes |= {
                "nanovllm.queue_time": end.last.times.queue if has_run else None,  # seconds, like all times
                "nanovllm.time_to_first_token": end.to_first_token,
                "nanovllm.inter_token_latency": end.inter_token_latency,
                "nanovllm.end_to_end": end.end_to_end,
            }
        return attributes


def _nanoseconds(seconds: float) -> int:
    return int(seconds * 1e9)
