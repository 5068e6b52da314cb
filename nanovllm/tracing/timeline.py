"""NANOVLLM_TRACE_FILE: what the engine does over time, for Perfetto.

Tracks: the loop (schedule, launch, wait, update), steps from launch to their tokens, each on the track of its place in
the pipeline; the GPU's time of each step; the other ranks' steps, as they say themselves; requests, each from arrival
to end with queue, prefill and decode within.
Counters: blocks of the KV cache, running and waiting requests. docs/timeline.md shows how to read it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from itertools import zip_longest
from typing import TYPE_CHECKING

from nanovllm.engine.batch import ScheduledBatch
from nanovllm.engine.metrics import Load
from nanovllm.engine.sequence import Sequence
from nanovllm.tracing.trace_file import TraceFile
from nanovllm.utils import env

if TYPE_CHECKING:
    from collections.abc import Iterator

    from nanovllm.engine.executor import Executor, StepTime

_ENGINE, _RANK, _REQUESTS = 1, 2, 3  # the trace's processes; the other ranks follow
_LOOP = 1
_GPU = 100  # after the steps' tracks
_ASK_STEPS = 64  # after so many, the other ranks are asked for theirs


class Timeline:
    """One engine's trace. Every method is cheap, and is called once a step or once a request.

    executor: where there are other ranks, which are asked for their steps now and then.
    """

    def __init__(
        self, file: TraceFile, clock: Callable[[], float], pipeline_depth: int, executor: Executor | None
    ) -> None:
        self._file, self._clock, self._depth = file, clock, pipeline_depth
        self._executor, self._named = executor, set[tuple[int, int]]()
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
        submitted: float,
        collected: float,
        gpu_ms: float | None,
        load: Load,
    ) -> None:
        """A step whose tokens have come. The GPU's time is drawn as if it had ended where the host saw the tokens."""
        details = {"step": batch.step, "num_prefill_tokens": batch.num_prefill_tokens}
        details["num_decode_seqs"] = len(batch.decode_rows)
        kind = batch.kind
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

        if batch.step % _ASK_STEPS == _ASK_STEPS - 1:
            self._draw_other_ranks()

    def _draw_other_ranks(self) -> None:
        if self._executor is None:
            return
        for rank, steps in self._executor.other_step_times().items():
            for step in steps:
                self._other_step(rank, 1, "steps", step, step.began, step.ended)
                if not math.isnan(step.gpu_began):
                    self._other_step(rank, _GPU, "GPU", step, step.gpu_began, step.gpu_ended)

    def _other_step(self, rank: int, thread: int, track: str, step: StepTime, start: float, end: float) -> None:
        if (rank, thread) not in self._named:
            self._named.add((rank, thread))
            self._file.name_track(_REQUESTS + rank, thread, f"Rank {rank}", track)
        self._file.slice(_REQUESTS + rank, thread, step.kind, start, end, step=step.step)

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
        with suppress(Exception):  # whatever became of the other ranks, the file is closed
            self._draw_other_ranks()
        self._file.close()


def open_timeline(clock: Callable[[], float], pipeline_depth: int, executor: Executor | None) -> Timeline | None:
    """The timeline that NANOVLLM_TRACE_FILE asks for. Raises InvalidArgumentError if it cannot be written."""
    path = env.trace_file()
    return None if path is None else Timeline(TraceFile(path), clock, pipeline_depth, executor)


def close_timeline(timeline: Timeline | None, unfinished: Iterable[Sequence]) -> None:
    if timeline is not None:
        timeline.close(unfinished)


def section(timeline: Timeline | None, name: str) -> AbstractContextManager[None]:
    return nullcontext() if timeline is None else timeline.section(name)
