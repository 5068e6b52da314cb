"""SlowSteps: the slowest steps, each with its contents and the events while it ran."""

from __future__ import annotations

import heapq
from collections import deque
from dataclasses import dataclass
from itertools import count as counter

from nanovllm.report.log_file import Record, count, number
from nanovllm.report.words import plural

UNEXPLAINED = "no event explains it: look at the host (garbage collection, other processes, debugger)"
_KEPT = 15
_MOST_IN_FLIGHT = 64  # steps that have not ended; an engine has a few
_MOST_EVENTS = 8  # kept for each step
_MOST_RECORDS = 512  # of the step that a question is about
_NUMBERED = ("batch.", "step.", "sequence.preempted", "request.finished")  # events with the number of a step


@dataclass(frozen=True)
class SlowStep:
    """One step, from its `step.done` event. `events` are sentences on other events while it was in flight."""

    step: int
    at: float  # seconds since the run's origin, when it was collected
    kind: str
    wall_ms: float
    gpu_ms: float | None
    num_prefill_tokens: int
    num_prefill_seqs: int
    num_decode_seqs: int
    events: tuple[str, ...]

    def contents(self) -> str:
        parts = []
        if self.num_prefill_tokens:
            parts.append(f"prefill of {self.num_prefill_tokens:,} tokens in {plural(self.num_prefill_seqs, 'prompt')}")
        if self.num_decode_seqs:
            parts.append(f"decode of {plural(self.num_decode_seqs, 'sequence')}")
        return " beside ".join(parts) or "nothing"

    def reasons(self, median_ms: float, typical_prefill: float) -> list[str]:
        """Returns reasons for its duration found in the log. `median_ms` is of steps of the same kind."""
        reasons = list(self.events)
        if self.num_prefill_tokens and self.num_decode_seqs:
            reasons.append(
                f"{plural(self.num_decode_seqs, 'decode')} waited for the prefill of {self.num_prefill_tokens:,} "
                "tokens (max_prefill_tokens_beside_decode bounds it)"
            )
        elif self.num_prefill_tokens > typical_prefill > 0:
            reasons.append(f"{self.num_prefill_tokens / typical_prefill:.1f}× the mean prefill of a step")
        if self.gpu_ms is not None and self.wall_ms > 2 * self.gpu_ms + 1:
            reasons.append(f"the GPU worked for {self.gpu_ms:.1f} ms of it: it waited for the host, or an earlier step")
        if self.step == 1:
            reasons.append("the first step: kernels load, caches are cold")
        if not reasons:
            reasons.append(UNEXPLAINED)
        if median_ms > 0:
            reasons.insert(0, f"{self.wall_ms / median_ms:.1f}× the median {self.kind} step")
        return reasons


class SlowSteps:
    """Keeps the slowest steps, each with the events between its scheduling and its end."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, SlowStep]] = []
        self._order = counter()
        self._in_flight: dict[int, list[str]] = {}
        self._coming: deque[str] = deque(maxlen=_MOST_EVENTS)  # events of the step that is being scheduled

    def scheduled(self, step: int) -> None:
        """Notes that a step was scheduled. A step may have a line for its prefill and one for its decode."""
        if step in self._in_flight:
            return
        if len(self._in_flight) >= _MOST_IN_FLIGHT:
            self._in_flight.pop(next(iter(self._in_flight)))
        self._in_flight[step] = list(self._coming)
        self._coming.clear()

    def planning_event(self, sentence: str) -> None:
        """Adds an event to the step that is scheduled next, such as a preemption that made room for it."""
        self._coming.append(sentence)

    def event(self, sentence: str) -> None:
        """Adds an event to the step scheduled last, and to the others in flight, which waited too."""
        newest = next(reversed(self._in_flight), None)
        for step, events in self._in_flight.items():
            if len(events) < _MOST_EVENTS:
                events.append(sentence if step == newest else f"{sentence}, for the step after it")
        if newest is None:
            self._coming.append(sentence)

    def done(self, record: Record, at: float) -> None:
        step, wall_ms = count(record, "step"), number(record, "wall_ms") or 0.0
        events = self._in_flight.pop(step, None)
        if events is None:  # its scheduling is not in the log
            events = list(self._coming)
            self._coming.clear()
        if len(self._heap) == _KEPT and wall_ms <= self._heap[0][0]:
            return
        preempted = count(record, "preempted")
        if preempted and not any("preempted" in event for event in events):
            events.append(f"{plural(preempted, 'sequence')} preempted")
        slow = SlowStep(
            step=step,
            at=at,
            kind=str(record.get("kind")),
            wall_ms=wall_ms,
            gpu_ms=number(record, "gpu_ms"),
            num_prefill_tokens=count(record, "num_prefill_tokens"),
            num_prefill_seqs=count(record, "num_prefill_seqs"),
            num_decode_seqs=count(record, "num_decode_seqs"),
            events=tuple(events),
        )
        entry = (wall_ms, next(self._order), slow)
        if len(self._heap) < _KEPT:
            heapq.heappush(self._heap, entry)
        else:
            heapq.heapreplace(self._heap, entry)

    def slowest_first(self) -> list[SlowStep]:
        return [slow for _, _, slow in sorted(self._heap, key=lambda entry: -entry[0])]


class StepStory:
    """What a log says of one step: its own records, and at INFO the batch line before it."""

    def __init__(self, step: int | None) -> None:
        self.step = step
        self.records: list[Record] = []
        self.ends: list[Record] = []  # `request.finished` that name it
        self.before: Record | None = None  # the last batch line of an earlier step
        self.last = 0  # the last step of the log
        self.requests: dict[int, str] = {}  # of its sequences, by seq_id

    @property
    def is_known(self) -> bool:
        return bool(self.records)

    def take(self, record: Record) -> None:
        event = record["event"]
        step = count(record, "step") or count(record, "last_step")
        if event.startswith(_NUMBERED):
            self.last = max(self.last, step)
        if self.step is None:
            return
        if event == "request.finished":
            self._ended(record)
        elif self.step in (step, count(record, "slowest_step")):
            self._keep(record)
        elif event in ("batch.prefill", "batch.decode") and step < self.step:
            self.before = record

    def _keep(self, record: Record) -> None:
        if len(self.records) < _MOST_RECORDS:
            self.records.append(record)

    def _ended(self, record: Record) -> None:
        names = ("first_step", "last_step", "stall_step")
        if any(count(record, name) == self.step for name in names) and len(self.ends) < _MOST_RECORDS:
            self.ends.append(record)
        first, last = count(record, "first_step"), count(record, "last_step")
        if self.step is not None and 0 < first <= self.step <= last and len(self.requests) < 2 * _MOST_RECORDS:
            seq_ids = record.get("seq_ids")
            for seq_id in seq_ids if isinstance(seq_ids, list) else []:
                if isinstance(seq_id, int):
                    self.requests[seq_id] = str(record.get("request_id"))
