"""What spans and metrics share: the resource, the scope, and the end of a provider that may have to wait."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

SCOPE = "nanovllm"
SCHEMA_URL = "https://opentelemetry.io/schemas/1.40.0"  # has every `gen_ai.*` name that is used here

CLOSE_SECONDS = 5.0  # how long the engine's end waits for a collector that does not answer


def make_resource() -> Any:
    """Returns the resource. OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES override the service name."""
    from opentelemetry.sdk.resources import SERVICE_NAME, OTELResourceDetector, Resource

    return Resource.create().merge(Resource({SERVICE_NAME: "nanovllm"})).merge(OTELResourceDetector().detect())


class Closer:
    """Runs `shut_down` when asked, for a few seconds at most.

    Its thread is started early, since Python starts no threads while it shuts down.
    """

    def __init__(self, shut_down: Callable[[], object]) -> None:
        self._shut_down = shut_down  # sends what is queued, and may wait for the collector
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run, name="nanovllm-otlp", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._ending.set()
        self._thread.join(CLOSE_SECONDS)

    def _run(self) -> None:
        self._ending.wait()
        self._shut_down()
