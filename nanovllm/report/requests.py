"""Requests: how each request spent its time, from `request.finished`; at DEBUG also those that have not ended."""

from __future__ import annotations

import heapq
import re
from collections import Counter, deque
from dataclasses import dataclass, field
from itertools import count as counter

from nanovllm.report.log_file import Record, count, number
from nanovllm.report.preemptions import LongestSequences, Preemption
from nanovllm.report.quantiles import QuantileSketch, Sample
from nanovllm.report.watch import BY_FIELD, Watch

DRAWN = 600  # requests in the chart; more rows cannot be told apart
LISTED = 100  # failed or refused requests in the table
_MOST_PENDING = 20_000
_MOST_PREEMPTIONS = 32  # of one sequence
_MOST_IDS = 20_000  # the last ids, of which the nearest are named when an id is not found
_COMPLETION = re.compile(r"/\d+$")
PARTS = ("queue_s", "prefill_s", "preempted_s", "decode_s")


@dataclass
class RequestLife:
    """The times of a request, in seconds of the log's monotonic clock; None: not reached, or not known."""

    request_id: str
    arrival: float
    num_prompt_tokens: int = 0
    first_scheduled: float | None = None
    first_token: float | None = None
    finished: float | None = None
    cause: str = ""
    num_cached_tokens: int = 0
    output_len: int = 0
    preempted: list[tuple[float, float | None]] = field(default_factory=list)  # from, until computed again
    preemptions: list[Preemption] = field(default_factory=list)
    num_preemptions: int = 0
    end: Record = field(default_factory=dict)  # the fields of `request.finished`

    def seconds(self, name: str) -> float:
        """Returns a field of its end that is a time; 0 if it has none."""
        return number(self.end, name) or 0.0


class Slowest:
    """The requests with the largest value of one field."""

    def __init__(self, name: str, limit: int) -> None:
        self._name, self._limit = name, limit
        self._heap: list[tuple[float, int, RequestLife]] = []
        self._order = counter()

    def offer(self, life: RequestLife) -> None:
        value = number(life.end, self._name)
        if value is None:
            return
        if len(self._heap) < self._limit:
            heapq.heappush(self._heap, (value, -next(self._order), life))
        elif self._heap and value > self._heap[0][0]:
            heapq.heapreplace(self._heap, (value, -next(self._order), life))

    def first(self) -> list[RequestLife]:
        return [life for _, _, life in sorted(self._heap, key=lambda entry: entry[:2], reverse=True)]


class Requests:
    """The requests of a run. `sample` has finished ones; `pending` has the sequences that have not ended so far."""

    def __init__(self, watch: Watch) -> None:
        self._watch = watch
        self.sample: Sample[RequestLife] = Sample(DRAWN)
        self.pending: dict[int, RequestLife] = {}
        self.num_added = self.num_lost = 0
        self.causes: Counter[str] = Counter()
        self.num_prompt_tokens = self.num_cached_tokens = self.num_output_tokens = 0
        self.latencies = {name: QuantileSketch() for name in ("queue_ms", "ttft_ms", "itl_ms", "e2e_ms", "stall_ms")}
        self.parts = dict.fromkeys(PARTS, 0.0)  # sums over all requests
        self.slowest = {by: Slowest(name, watch.num_slowest if by == watch.by else 10) for by, name in BY_FIELD.items()}
        self.unsuccessful: list[RequestLife] = []  # failed and refused
        self.lengths = LongestSequences()
        self.wanted: RequestLife | None = None  # the last one with the id of the question
        self.num_wanted = 0
        self.last_ids: deque[str] = deque(maxlen=_MOST_IDS if watch.request_id is not None else 0)

    @property
    def num_finished(self) -> int:
        """Requests whose times say something about speed."""
        return self.causes["eos"] + self.causes["stop"] + self.causes["length"]

    @property
    def num_aborted(self) -> int:
        return self.causes["abort"] + self.causes["left"]

    def added(self, record: Record) -> None:
        self.num_added += 1
        if len(self.pending) < _MOST_PENDING:
            life = RequestLife(str(record.get("request_id")), record["mono"], count(record, "num_prompt_tokens"))
            self.pending[count(record, "seq_id")] = life
            self._seen(life)

    def scheduled(self, seq_id: int, at: float) -> None:
        """Notes that a sequence got blocks: it is scheduled, for the first time or again after a preemption."""
        life = self.pending.get(seq_id)
        if life is None:
            return
        if life.first_scheduled is None:
            life.first_scheduled = at
        if life.preempted and life.preempted[-1][1] is None:
            life.preempted[-1] = (life.preempted[-1][0], at)

    def preempted(self, preemption: Preemption) -> None:
        life = self.pending.get(preemption.seq_id)
        if life is None:  # at INFO, a request is unknown until something happens to it
            if len(self.pending) >= _MOST_PENDING:
                return
            life = self.pending[preemption.seq_id] = RequestLife(preemption.request_id, preemption.at)
            self._seen(life)
        life.num_preemptions += 1
        if len(life.preempted) < _MOST_PREEMPTIONS:
            life.preempted.append((preemption.at, None))
            life.preemptions.append(preemption)

    def finished(self, record: Record) -> RequestLife:
        life = RequestLife(str(record.get("request_id")), number(record, "arrival") or record["mono"])
        seq_ids = record.get("seq_ids")
        for seq_id in seq_ids if isinstance(seq_ids, list) else []:
            sequence = self.pending.pop(seq_id, None) if isinstance(seq_id, int) else None
            if sequence is not None:
                life.preempted += sequence.preempted
                life.preemptions += sequence.preemptions
        queue, ttft = number(record, "queue_s") or 0.0, number(record, "ttft_s")
        life.finished = number(record, "finished") or record["mono"]
        if number(record, "first_step") is not None:
            life.first_scheduled = life.arrival + queue
        life.first_token = None if ttft is None else life.arrival + ttft
        life.cause = str(record.get("cause", ""))
        life.num_prompt_tokens = count(record, "num_prompt_tokens")
        life.num_cached_tokens = count(record, "num_cached_tokens")
        life.output_len = count(record, "num_output_tokens")
        life.num_preemptions = max(count(record, "num_preemptions"), len(life.preemptions))
        life.end = record
        self._count(life, record)
        return life

    def _count(self, life: RequestLife, record: Record) -> None:
        self.causes[life.cause] += 1
        self.num_prompt_tokens += life.num_prompt_tokens
        self.num_cached_tokens += life.num_cached_tokens
        self.num_output_tokens += life.output_len
        completions = record.get("completions")
        for completion in completions if isinstance(completions, list) else [record]:
            if isinstance(completion, dict):
                self.lengths.add(life.num_prompt_tokens + count(completion, "num_output_tokens"))
        self.sample.offer(life)
        self._seen(life)
        if life.cause in ("failed", "refused") and len(self.unsuccessful) < LISTED:
            self.unsuccessful.append(life)
        for part in PARTS:
            self.parts[part] += number(record, part) or 0.0
        for slowest in self.slowest.values():
            slowest.offer(life)
        if life.cause not in ("eos", "stop", "length"):  # the time of an abort says nothing about speed
            return
        for name, sketch in self.latencies.items():
            seconds = number(record, "longest_stall_s" if name == "stall_ms" else name.replace("_ms", "_s"))
            if seconds is not None:
                sketch.add(seconds * 1e3)

    def _seen(self, life: RequestLife) -> None:
        if self._watch.request_id is None:
            return
        if not self.last_ids or self.last_ids[-1] != life.request_id:
            self.last_ids.append(life.request_id)
        wanted = self._watch.request_id
        of_completions = "completions" in life.end and _COMPLETION.sub("", wanted) == life.request_id
        if wanted in (life.request_id, life.end.get("client_request_id")) or of_completions:
            self.num_wanted += bool(life.end)
            self.wanted = life

    def lost(self) -> None:
        """Counts all unfinished requests as lost: a step failed."""
        self.num_lost += len(self.pending)
        self.pending.clear()

    def drawn(self) -> list[RequestLife]:
        """Returns at most `DRAWN` requests in order of arrival, preferring unfinished ones, since they show a hang."""
        unfinished = list(self.pending.values())[: DRAWN // 2]
        finished = self.sample.items[: DRAWN - len(unfinished)]
        return sorted(unfinished + finished, key=lambda life: life.arrival)
