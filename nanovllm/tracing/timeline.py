"""Timeline: writes what the engine does over time to NANOVLLM_TRACE_FILE, for Perfetto.

Tracks show the phases of the loop (schedule, launch, wait, update), the steps from launch to their tokens with one
track per place in the pipeline, the GPU's time of each step, the steps of the other ranks, and the requests from
arrival to end, divided into queue, prefill and decode. Counters show the blocks of the KV cache, and the running and
waiting requests. docs/timeline.md shows how to read it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from contextlib import suppress
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING

from nanovllm.config import EngineConfig
from nanovllm.engine.observer import CollectedStep, EngineObserver, EngineStart, Phase
from nanovllm.engine.sequence import Sequence
from nanovllm.tracing.trace_file import TraceFile

if TYPE_CHECKING:
    from nanovllm.engine.executor import Executor, StepTime

_ENGINE, _RANK, _REQUESTS = 1, 2, 3  # processes of the trace; rank r is _REQUESTS + r for r > 0
_LOOP = 1  # a thread of _ENGINE
_GPU = 100  # a thread of each rank, after those of the steps
_ASK_STEPS = 64  # the other ranks are asked for their steps once in so many steps


class Timeline(EngineObserver):
    """Writes one engine's trace. Raises InvalidArgumentError at the engine's start if `path` cannot be written."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._named: set[tuple[int, int]] = set()  # tracks of the other ranks that have a name
        self._has_other_ranks = False
        self._executor: Executor | None = None
        self._phase: tuple[Phase, float] = ("idle", 0.0)  # the current phase, and when it began
        self._gpu_end = 0.0  # end of the last step on the GPU's track
        self._lanes: list[float] = []  # for each track of requests, when it is free again

    def engine_starting(self, config: EngineConfig) -> None:
        self._has_other_ranks = config.tensor_parallel_size > 1

    def engine_started(self, start: EngineStart) -> None:
        self._executor, self._clock = start.executor, start.clock
        self._depth = start.resolved.pipeline_depth
        self._file = TraceFile(self._path)
        self._file.name_track(_ENGINE, _LOOP, "Engine", "loop")
        for place in range(self._depth):
            self._file.name_track(_RANK, 1 + place, "Rank 0", f"steps ({place + 1} of {self._depth} in flight)")

    def phase(self, phase: Phase) -> None:
        (before, began), now = self._phase, self._clock()
        if before != "idle":
            self._file.slice(_ENGINE, _LOOP, before, began, now)
        self._phase = phase, now

    def step_collected(self, step: CollectedStep) -> None:
        """Draws a step. The GPU's time is drawn as if it ended when the host got the tokens."""
        batch, collected, gpu_ms = step.batch, step.collected, step.gpu_ms
        details = {"step": batch.step, "num_prefill_tokens": batch.num_prefill_tokens}
        details["num_decode_seqs"] = len(batch.decode_rows)
        self._file.slice(_RANK, 1 + batch.step % self._depth, batch.kind, step.submitted, collected, **details)
        if gpu_ms is not None:
            if not self._gpu_end:
                self._file.name_track(_RANK, _GPU, "Rank 0", "GPU")
            start = max(self._gpu_end, collected - gpu_ms / 1e3)
            self._file.slice(_RANK, _GPU, batch.kind, start, collected, **details, gpu_ms=gpu_ms)
            self._gpu_end = collected
        load = step.load
        used, free = load.used_blocks, load.num_blocks - load.used_blocks
        self._file.counter(_ENGINE, "KV cache blocks", collected, used=used, free=free)
        self._file.counter(_ENGINE, "requests", collected, running=load.num_running, waiting=load.num_waiting)
        if batch.step % _ASK_STEPS == _ASK_STEPS - 1:
            self._draw_other_ranks()

    def sequence_finished(self, sequence: Sequence) -> None:
        self._draw_request(sequence, str(sequence.finish_reason))

    def engine_failed(self, error: BaseException, lost: Iterable[Sequence], goes_on: bool) -> None:
        self.phase("idle")
        for sequence in lost:
            self._draw_request(sequence, "lost")
        self._file.flush()

    def engine_exiting(self, unfinished: Iterable[Sequence]) -> None:
        for sequence in unfinished:
            self._draw_request(sequence, "unfinished")
        with suppress(Exception):  # the file is closed even if other ranks have failed
            self._draw_other_ranks()
        self._file.close()
        self._executor = None

    def _draw_other_ranks(self) -> None:
        if self._executor is None or not self._has_other_ranks:
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

    def _draw_request(self, sequence: Sequence, ended: str) -> None:
        """Draws a request from its arrival to its end, or to now, on the first track that is free at its arrival."""
        now = self._clock()
        start, end = sequence.arrival, sequence.finished or now
        lane = next((lane for lane, free in enumerate(self._lanes) if free <= start), len(self._lanes))
        if lane == len(self._lanes):
            self._lanes.append(0.0)
            self._file.name_track(_REQUESTS, 1 + lane, "Requests", f"requests {lane + 1}")
        self._lanes[lane] = end
        self._file.slice(
            _REQUESTS,
            1 + lane,
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
        self._file.slice(_REQUESTS, 1 + lane, "queued", start, end if scheduled is None else scheduled)
        if scheduled is not None:
            self._file.slice(_REQUESTS, 1 + lane, "prefill", scheduled, end if first_token is None else first_token)
        if first_token is not None:
            self._file.slice(_REQUESTS, 1 + lane, "decode", first_token, end)
        for preempted, resumed in zip_longest(sequence.preempted_at, sequence.resumed_at, fillvalue=end):
            self._file.slice(_REQUESTS, 1 + lane, "preempted", preempted, resumed)
