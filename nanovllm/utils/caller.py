"""Caller: who added a request, for the log and as the parent of its span."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import Any

__all__ = ["ActiveSpan", "Caller", "active_span"]


@dataclass(frozen=True)
class ActiveSpan:
    """A span: its ids, in hexadecimal, and OpenTelemetry's context of the code that it is current in."""

    trace_id: str
    span_id: str
    context: Any = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class Caller:
    """Who added a request. client_request_id: the client's own name of it."""

    span: ActiveSpan | None = None  # OpenTelemetry's
    client_request_id: str | None = None

    @property
    def fields(self) -> dict[str, Any]:
        """The fields of a log record that concerns the request."""
        fields = {} if self.client_request_id is None else {"client_request_id": self.client_request_id}
        return fields if self.span is None else {**fields, "trace_id": self.span.trace_id, "span_id": self.span.span_id}


def active_span() -> ActiveSpan | None:
    """Returns the caller's span; None without one. Imports nothing: without the API there is no span."""
    trace: Any = sys.modules.get("opentelemetry.trace")
    if trace is None:
        return None
    ids = trace.get_current_span().get_span_context()
    if not ids.is_valid:
        return None
    context = sys.modules["opentelemetry.context"].get_current()
    return ActiveSpan(f"{ids.trace_id:032x}", f"{ids.span_id:016x}", context)
