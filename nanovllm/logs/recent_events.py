"""RecentEvents: the newest records of the log, kept in memory for a page that shows them."""

from __future__ import annotations

import logging
from collections import deque
from dataclasses import dataclass

from nanovllm.logs import events

__all__ = ["RecentEvent", "RecentEvents"]

_LIMIT = 100
# Their sentences have counts, times and ids. Those of other events may have paths, settings or texts of requests.
_SHOWN = frozenset(
    event.name
    for event in (
        events.request_finished,
        events.sequence_preempted,
        events.engine_slow,
        events.engine_statistics,
        events.batch_prefill,
        events.server_draining,
    )
)


@dataclass(frozen=True)
class RecentEvent:
    """One record. time: in seconds since 1970."""

    time: float
    level: str
    event: str
    message: str


class RecentEvents(logging.Handler):
    """Keeps the last 100 records of events that quote neither requests nor the machine."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self._events: deque[RecentEvent] = deque(maxlen=_LIMIT)

    def emit(self, record: logging.LogRecord) -> None:
        event = getattr(record, "event", "")
        if event in _SHOWN:
            self._events.append(RecentEvent(record.created, record.levelname, event, record.getMessage()))

    def latest(self) -> list[RecentEvent]:
        """Returns the events, the oldest first."""
        self.acquire()
        try:
            return list(self._events)
        finally:
            self.release()
