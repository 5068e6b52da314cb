"""RequestMeters: sends the metrics `gen_ai.server.*` of the GenAI semantic conventions to an OpenTelemetry collector.

Enabled when OTEL_EXPORTER_OTLP_ENDPOINT or OTEL_EXPORTER_OTLP_METRICS_ENDPOINT is set and the extra `otel` is
installed; the SDK reads the other OTEL_* variables, such as OTEL_METRIC_EXPORT_INTERVAL. A thread of the SDK sends the
metrics, once a minute and when the engine ends.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from nanovllm.engine.observer import EngineObserver
from nanovllm.engine.request_end import RequestEnd
from nanovllm.engine.sequence import Sequence
from nanovllm.logs import events
from nanovllm.tracing.otlp import SCHEMA_URL, SCOPE, Closer, make_resource
from nanovllm.utils import env
from nanovllm.utils.logger import setup_logger
from nanovllm.utils.versions import installed_version

logger = setup_logger(__name__)

# Upper bounds in seconds, as the conventions give them.
_BOUNDS: Mapping[str, list[float]] = {
    "gen_ai.server.request.duration": [0.01 * 2**power for power in range(14)],
    "gen_ai.server.time_to_first_token": [ms / 1000 for ms in (1, 5, 10, 20, 40, 60, 80, 100, 250, 500, 750)]
    + [1.0, 2.5, 5.0, 7.5, 10.0],
    "gen_ai.server.time_per_output_token": [0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5],
}


def open_request_metrics(model: str) -> RequestMeters | None:
    """Returns the observer if the environment asks for metrics and the extra is installed, else None.

    A log line says when the extra is missing.
    """
    endpoint = env.otlp_metrics_endpoint() or env.otlp_endpoint()
    if endpoint is None:
        return None
    try:
        meters = RequestMeters(model)
    except ImportError as error:
        events.meters_missing.log(logger, endpoint=endpoint, error=str(error))
        return None
    events.meters_started.log(logger, endpoint=endpoint)
    return meters


class RequestMeters(EngineObserver):
    """Records each request that ends. Raises ImportError without the extra."""

    def __init__(self, model: str) -> None:
        # Imported here, so that engines without metrics do not pay for it.
        from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
        from opentelemetry.sdk.metrics import MeterProvider
        from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader

        self._attributes = {
            "gen_ai.operation.name": "text_completion",
            "gen_ai.provider.name": "nanovllm",
            "gen_ai.request.model": model,
            "gen_ai.response.model": model,
        }
        # A separate provider, since the global one belongs to the application. It is closed when the engine ends.
        provider = MeterProvider(
            [PeriodicExportingMetricReader(OTLPMetricExporter())], make_resource(), shutdown_on_exit=False
        )
        meter = provider.get_meter(SCOPE, installed_version(SCOPE), schema_url=SCHEMA_URL)
        self._histograms = {
            name: meter.create_histogram(name, unit="s", explicit_bucket_boundaries_advisory=bounds)
            for name, bounds in _BOUNDS.items()
        }
        self._closer = Closer(provider.shutdown)

    def request_finished(self, end: RequestEnd) -> None:
        attributes = self._attributes | ({"error.type": type(end.error).__qualname__} if end.is_error else {})
        values = {
            "gen_ai.server.request.duration": end.end_to_end,
            "gen_ai.server.time_to_first_token": end.to_first_token,
            "gen_ai.server.time_per_output_token": end.inter_token_latency,
        }
        for name, value in values.items():
            if value is not None:
                self._histograms[name].record(value, attributes)

    def engine_exiting(self, unfinished: Iterable[Sequence]) -> None:
        """Sends the metrics, for a few seconds at most."""
        self._closer.close()
