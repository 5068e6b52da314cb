"""RequestTracks: draws each request in a timeline, with arrows to the steps that admitted it."""

from __future__ import annotations

from itertools import zip_longest
from typing import Any

from nanovllm.engine.observer import Preemption
from nanovllm.engine.sequence import Sequence
from nanovllm.tracing.trace_file import TraceFile

_ENDS_BEFORE_TIME = ("abort", "left", "failed", "lost")  # drawn as instants too


class RequestTracks:
    """The tracks of process `process`: one below another where requests overlap in time."""

    def __init__(self, file: TraceFile, process: int) -> None:
        self._file, self._process = file, process
        self._lanes: list[float] = []  # for each track, when it is free again
        self._steps: dict[int, list[tuple[int, int, float]]] = {}  # by seq_id: process, thread and start of its steps
        self._preemptions: dict[int, list[Preemption]] = {}  # by seq_id
        self._num_arrows = 0

    def admitted(self, seq_id: int, process: int, thread: int, now: float) -> None:
        """Remembers a step that admits a sequence. process, thread: the step's track."""
        self._steps.setdefault(seq_id, []).append((process, thread, now))

    def preempted(self, seq_id: int, preemption: Preemption) -> None:
        self._preemptions.setdefault(seq_id, []).append(preemption)

    def draw(self, sequence: Sequence, ended: str, now: float) -> None:
        """Draws a request from its arrival to its end, or to `now`, on the first track that is free at its arrival."""
        start, end = sequence.arrival, sequence.finished or now
        lane = next((lane for lane, free in enumerate(self._lanes) if free <= start), len(self._lanes))
        if lane == len(self._lanes):
            self._lanes.append(0.0)
            self._file.name_track(self._process, 1 + lane, "Requests", f"requests {lane + 1}")
        self._lanes[lane] = end
        track = self._process, 1 + lane
        self._file.slice(
            *track,
            f"{sequence.request_id} ({ended})",
            start,
            end,
            seq_id=sequence.seq_id,
            num_prompt_tokens=sequence.num_prompt_tokens,
            num_cached_tokens=sequence.num_cached_tokens,
            num_output_tokens=len(sequence.output_token_ids),
            num_preemptions=len(sequence.preempted_at),
        )
        scheduled, first_token = sequence.first_scheduled, sequence.first_token
        self._file.slice(*track, "queued", start, end if scheduled is None else scheduled)
        if scheduled is not None:
            self._file.slice(*track, "prefill", scheduled, end if first_token is None else first_token)
        if first_token is not None:
            self._file.slice(*track, "decode", first_token, end)
        preemptions = self._preemptions.pop(sequence.seq_id, [])
        times = zip_longest(sequence.preempted_at, sequence.resumed_at, fillvalue=end)
        for (preempted, resumed), preemption in zip(times, preemptions, strict=False):
            self._file.slice(*track, "preempted", preempted, resumed, **preemption_details(sequence, preemption))
        for process, thread, at in self._steps.pop(sequence.seq_id, []):
            self._num_arrows += 1
            self._file.arrow(self._num_arrows, "request to step", track, (process, thread), at)
        if ended in _ENDS_BEFORE_TIME:
            self._file.instant(*track, ended, end, request_id=sequence.request_id)


def preemption_details(sequence: Sequence, preemption: Preemption) -> dict[str, Any]:
    """Returns for whom a sequence was preempted, and the blocks that were needed and free."""
    shortage = preemption.shortage
    for_whom = None if shortage.oldest is sequence else shortage.oldest.request_id
    return {"for_request_id": for_whom, "needed": shortage.needed, "free": shortage.free, "step": shortage.step}
