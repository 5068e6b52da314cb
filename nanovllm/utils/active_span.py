"""The OpenTelemetry span that is current where a request is added, for the log and as the parent of its span."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import Any

__all__ = ["ActiveSpan", "active_span", "span_fields"]


@dataclass(frozen=True)
class ActiveSpan:
    """A span: its ids, in hexadecimal, and OpenTelemetry's context of the code that it is current in."""

    trace_id: str
    span_id: str
    context: Any = field(default=None, compare=False, repr=False)


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


def span_fields(span: ActiveSpan | None) -> dict[str, Any]:
    """Returns the fields of a log record that concerns a request with `span`."""
    return {} if span is None else {"trace_id": span.trace_id, "span_id": span.span_id}
