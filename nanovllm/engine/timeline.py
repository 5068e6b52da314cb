"""NANOVLLM_TRACE_FILE: what the engine does over time, for Perfetto.

Tracks: the loop (schedule, launch, wait, update), steps from launch to their tokens, each on the track of its place in
the pipeline; the GPU's time of each step; requests, each from arrival to end with queue, prefill and decode within.
Counters: blocks of the KV cache, running and waiting requests. docs/timeline.md shows how to read it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import zip_longest
from typing import TYPE_CHECKING

from nanovllm.engine.batch import ScheduledBatch
from nanovllm.engine.metrics import Load
from nanovllm.engine.sequence import Sequence
from nanovllm.utils import env
from nanovllm.utils.trace_file import TraceFile

if TYPE_CHECKING:
    from collections.abc import Iterator

_ENGINE, _RANK, _REQUESTS = 1, 2, 3  # the trace's processes
_LOOP = 1
_GPU = 100  # after the steps' tracks


class Timeline:
    """One engine's trace. Every method is cheap, and is called once a step or once a request."""

    def __init__(self, file: TraceFile, clock: Callable[[], float], pipeline_depth: int) -> None:
        self._file, self._clock, self._depth = file, clock, pipeline_depth
        self._gpu_end = 0.0
        self._lanes: list[float] = []  # of requests: when each is free again
        file.name_track(_ENGINE, _LOOP, "Engine", "loop")
        for place in range(pipeline_depth):
            file.name_track(_RANK, 1 + place, "Rank 0", f"steps ({place + 1} of {pipeline_depth} in flight)")

    @contextmanager
    def section(self, name: str) -> Iterator[None]:
        """What the loop does meanwhile."""
        start = self._clock()
        try:
            yield
        finally:
            self._file.slice(_ENGINE, _LOOP, name, start, self._clock())

    def step(
        self,
        batch: ScheduledBatch,
        kind: str,
        submitted: float,
        collected: float,
        gpu_ms: float | None,
        load: Load,
    ) -> None:
        """A step whose tokens have come. The GPU's time is drawn as if it had ended where the host saw the tokens."""
        details = {"step": batch.step, "num_prefill_tokens": batch.num_prefill_tokens}
        details["num_decode_seqs"] = len(batch.decode_rows)
        self._file.slice(_RANK, 1 + batch.step % self._depth, kind, submitted, collected, **details)
        if gpu_ms is not None:
            if not self._gpu_end:
                self._file.name_track(_RANK, _GPU, "Rank 0", "GPU")
            start = max(self._gpu_end, collected - gpu_ms / 1e3)
            self._file.slice(_RANK, _GPU, kind, start, collected, **details, gpu_ms=gpu_ms)
            self._gpu_end = collected
        used, total = load.used_blocks, load.num_blocks
        self._file.counter(_ENGINE, "KV cache blocks", collected, used=used, free=total - used)
        self._file.counter(_ENGINE, "requests", collected, running=load.num_running, waiting=load.num_waiting)

    def request(self, sequence: Sequence, ended: str) -> None:
        """A request from its arrival to now or its end, on the first track that is free for so long."""
        now = self._clock()
        start, end = sequence.arrival, sequence.finished or now
        lane = next((lane for lane, free in enumerate(self._lanes) if free <= start), len(self._lanes))
        if lane == len(self._lanes):
            self._lanes.append(0.0)
            self._file.name_track(_REQUESTS, 1 + lane, "Requests", f"requests {lane + 1}")
        self._lanes[lane] = end
        self._file.slice(
            *(_REQUESTS, 1 + lane, f"{sequence.request_id} ({ended})", start, end),
            seq_id=sequence.seq_id,
            num_prompt_tokens=sequence.num_prompt_tokens,
            num_cached_tokens=sequence.num_cached_tokens,
            num_output_tokens=len(sequence.output_token_ids),
            num_preemptions=len(sequence.preempted_at),
        )
        scheduled, first_token = sequence.first_scheduled, sequence.first_token
        self._file.slice(_REQUESTS, 1 + lane, "queued", start, end if scheduled is None else scheduled)
        if scheduled is not None:
            self._file.slice(_REQUESTS, 1 + lane, "prefill", scheduled, end if first_token is None else first_token)
        if first_token is not None:
            self._file.slice(_REQUESTS, 1 + lane, "decode", first_token, end)
        for preempted, resumed in zip_longest(sequence.preempted_at, sequence.resumed_at, fillvalue=end):
            self._file.slice(_REQUESTS, 1 + lane, "preempted", preempted, resumed)

    def flush(self) -> None:
        self._file.flush()

    def close(self, unfinished: Iterable[Sequence] = ()) -> None:
        for sequence in unfinished:
            self.request(sequence, "unfinished")
        self._file.close()


def open_timeline(clock: Callable[[], float], pipeline_depth: int) -> Timeline | None:
    """The timeline that NANOVLLM_TRACE_FILE asks for. Raises InvalidArgumentError if it cannot be written."""
    path = env.trace_file()
    return None if path is None else Timeline(TraceFile(path), clock, pipeline_depth)


def close_timeline(timeline: Timeline | None, unfinished: Iterable[Sequence]) -> None:
    if timeline is not None:
        timeline.close(unfinished)


def section(timeline: Timeline | None, name: str) -> AbstractContextManager[None]:
    return nullcontext() if timeline is None else timeline.section(name)
