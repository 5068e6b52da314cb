"""Preemptions: who was preempted, when, for whom, and how many blocks would have been enough."""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass

from nanovllm.report.log_file import Record, count, number
from nanovllm.report.words import plural

KEPT = 500  # preemptions listed on a page
_MOST_WAITING = 20_000


@dataclass(frozen=True)
class Preemption:
    """A `sequence.preempted` event. `at` is on the log's monotonic clock."""

    at: float
    step: int
    seq_id: int
    request_id: str
    for_seq_id: int | None  # None: it lacked a block itself
    for_request_id: str | None
    needed: int
    free_before: int
    num_tokens: int  # to compute again
    num_blocks: int  # that it gave back

    @classmethod
    def of(cls, record: Record) -> Preemption:
        for_seq, for_request = number(record, "for_seq_id"), record.get("for_request_id")
        return cls(
            at=record["mono"],
            step=count(record, "step"),
            seq_id=count(record, "seq_id"),
            request_id=str(record.get("request_id", "")),
            for_seq_id=None if for_seq is None else int(for_seq),
            for_request_id=None if for_request is None else str(for_request),
            needed=count(record, "needed"),
            free_before=count(record, "free_before"),
            num_tokens=count(record, "num_tokens"),
            num_blocks=count(record, "freed") + count(record, "coming"),
        )

    @property
    def shortage(self) -> str:
        return f"needed {plural(self.needed, 'block')}, {self.free_before} free"

    @property
    def beneficiary(self) -> str:
        return "itself" if self.for_seq_id is None else f"seq {self.for_seq_id}"

    def facts(self) -> Record:
        return dict(vars(self))


class Preemptions:
    """The preemptions of a run, and the need of the sequences that had begun: in use, short, and given back before."""

    def __init__(self) -> None:
        self.num = 0
        self.first: list[Preemption] = []
        self.peak_need = 0
        self.peak_step: int | None = None
        self.waiting: dict[int, int] = {}  # blocks of each sequence that is preempted now

    def add(self, preemption: Preemption, num_blocks: int) -> None:
        self.num += 1
        if len(self.first) < KEPT:
            self.first.append(preemption)
        if num_blocks:
            need = num_blocks - preemption.free_before + preemption.needed + sum(self.waiting.values())
            if need > self.peak_need:
                self.peak_need, self.peak_step = need, preemption.step
        if len(self.waiting) < _MOST_WAITING:
            self.waiting[preemption.seq_id] = preemption.num_blocks

    def resumed(self, seq_id: int) -> None:
        self.waiting.pop(seq_id, None)


class LongestSequences:
    """The lengths of the longest sequences of a run, prompt and output: what they take of the cache together."""

    def __init__(self) -> None:
        self.limit = 1024
        self._lengths: list[int] = []  # a heap

    def add(self, length: int) -> None:
        if len(self._lengths) < self.limit:
            heapq.heappush(self._lengths, length)
        else:
            heapq.heappushpop(self._lengths, length)

    def blocks(self, block_size: int) -> list[int]:
        """Returns the number of blocks of each, the longest first."""
        return [math.ceil(length / block_size) for length in sorted(self._lengths, reverse=True)]
