"""The OpenTelemetry span that is current where a request is added, for the log."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

__all__ = ["ActiveSpan", "active_span", "span_fields"]


@dataclass(frozen=True)
class ActiveSpan:
    """The ids of a span, in hexadecimal."""

    trace_id: str
    span_id: str


def active_span() -> ActiveSpan | None:
    """Returns the caller's span; None without one. Imports nothing: without the API there is no span."""
    trace: Any = sys.modules.get("opentelemetry.trace")
    if trace is None:
        return None
    context = trace.get_current_span().get_span_context()
    return ActiveSpan(f"{context.trace_id:032x}", f"{context.span_id:016x}") if context.is_valid else None


def span_fields(span: ActiveSpan | None) -> dict[str, Any]:
    """Returns the fields of a log record that concerns a request with `span`."""
    return {} if span is None else {"trace_id": span.trace_id, "span_id": span.span_id}
