"""Requests: the times of each request, read from its events. A sample of requests is kept for the chart."""

from __future__ import annotations

from dataclasses import dataclass, field

from nanovllm.report.log_file import Record, count, number
from nanovllm.report.quantiles import QuantileSketch, Sample

DRAWN = 600  # requests in the chart; more rows cannot be told apart
_MOST_PENDING = 20_000
_MOST_PREEMPTIONS = 32  # of one request in the chart


@dataclass
class RequestLife:
    """The times of a request, in seconds of the log's monotonic clock; None: not reached, or not known."""

    request_id: str
    arrival: float
    num_prompt_tokens: int = 0
    first_scheduled: float | None = None
    first_token: float | None = None
    finished: float | None = None
    reason: str = ""
    num_cached_tokens: int = 0
    output_len: int = 0
    preemptions: int = 0
    preempted: list[tuple[float, float | None]] = field(default_factory=list)  # from, until computed again


class Requests:
    """The requests of a run. `sample` has finished ones; `pending` has those that have not ended so far in the log."""

    def __init__(self) -> None:
        self.sample: Sample[RequestLife] = Sample(DRAWN)
        self.pending: dict[int, RequestLife] = {}
        self.num_added = self.num_finished = self.num_aborted = self.num_lost = 0
        self.num_prompt_tokens = self.num_cached_tokens = self.num_output_tokens = 0
        self.latencies = {name: QuantileSketch() for name in ("queue_ms", "ttft_ms", "itl_ms", "e2e_ms")}

    def added(self, record: Record) -> None:
        self.num_added += 1
        if len(self.pending) < _MOST_PENDING:
            life = RequestLife(str(record.get("request_id")), record["mono"], count(record, "num_prompt_tokens"))
            self.pending[count(record, "seq_id")] = life

    def allocated(self, record: Record) -> None:
        """Notes that a request got blocks: it is scheduled, for the first time or again after a preemption."""
        life = self.pending.get(count(record, "seq_id"))
        if life is None:
            return
        if life.first_scheduled is None:
            life.first_scheduled = record["mono"]
        if life.preempted and life.preempted[-1][1] is None:
            life.preempted[-1] = (life.preempted[-1][0], record["mono"])

    def preempted(self, record: Record) -> None:
        life = self.pending.get(count(record, "seq_id"))
        if life is not None:
            life.preemptions += 1
            if len(life.preempted) < _MOST_PREEMPTIONS:
                life.preempted.append((record["mono"], None))

    def finished(self, record: Record) -> RequestLife:
        life = self.pending.pop(count(record, "seq_id"), None)
        if life is None:
            life = RequestLife(str(record.get("request_id")), number(record, "arrival") or record["mono"])
        arrival, finished = number(record, "arrival"), number(record, "finished")
        life.arrival = life.arrival if arrival is None else arrival
        life.first_scheduled = number(record, "first_scheduled") or life.first_scheduled
        life.first_token = number(record, "first_token")
        life.finished = record["mono"] if finished is None else finished
        life.reason = str(record.get("reason", ""))
        life.num_prompt_tokens = count(record, "num_prompt_tokens") or life.num_prompt_tokens
        life.num_cached_tokens = count(record, "num_cached_tokens")
        life.output_len = count(record, "output_len")
        life.preemptions = max(life.preemptions, count(record, "preemptions"))
        self.num_prompt_tokens += life.num_prompt_tokens
        self.num_cached_tokens += life.num_cached_tokens
        self.num_output_tokens += life.output_len
        self.sample.offer(life)
        if life.reason == "abort":  # the time of an abort says nothing about speed
            self.num_aborted += 1
            return life
        self.num_finished += 1
        for name, sketch in self.latencies.items():
            value = number(record, name)
            if value is not None:
                sketch.add(value)
        return life

    def lost(self) -> None:
        """Counts all unfinished requests as lost: a step failed, which logs no event for each."""
        self.num_lost += len(self.pending)
        self.pending.clear()

    def drawn(self) -> list[RequestLife]:
        """Returns at most `DRAWN` requests in order of arrival, preferring unfinished ones, since they show a hang."""
        unfinished = list(self.pending.values())[: DRAWN // 2]
        finished = self.sample.items[: DRAWN - len(unfinished)]
        return sorted(unfinished + finished, key=lambda life: life.arrival)
