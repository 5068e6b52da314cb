"""Timeline: writes what the engine does over time to NANOVLLM_TRACE_FILE, for Perfetto.

Tracks show the phases of the loop (schedule, launch, wait, update), the steps from launch to their tokens with one
track per place in the pipeline, the GPU's time of each step, the steps of the other ranks, and the requests from
arrival to end, divided into queue, prefill and decode, with arrows to the steps that admitted them. Counters show the
blocks of the KV cache, and the running and waiting requests. docs/timeline.md shows how to read it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING

from nanovllm.config import EngineConfig
from nanovllm.engine.batch import ScheduledBatch
from nanovllm.engine.observer import CollectedStep, EngineObserver, EngineStart, Phase, Preemption
from nanovllm.engine.request_end import cause_of
from nanovllm.engine.row_table import RowTable
from nanovllm.engine.sequence import Sequence
from nanovllm.tracing.request_tracks import RequestTracks, preemption_details
from nanovllm.tracing.trace_file import TraceFile

if TYPE_CHECKING:
    from nanovllm.engine.executor import Executor, StepTime

_ENGINE, _RANK, _REQUESTS = 1, 2, 3  # processes of the trace; rank r is _REQUESTS + r for r > 0
_LOOP, _STARTUP = 1, 2  # threads of _ENGINE
_GPU = 100  # a thread of each rank, after those of the steps
_MAX_NAMES = 64  # requests that a step names
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
        self._admitted: list[int] = []  # seq_ids that the step that is being planned admits
        self._names: dict[int, list[str]] = {}  # requests of each step in flight
        self._in_flight: dict[int, tuple[ScheduledBatch, float]] = {}  # by step, with when it was submitted

    def engine_starting(self, config: EngineConfig) -> None:
        self._has_other_ranks = config.tensor_parallel_size > 1

    def engine_started(self, start: EngineStart) -> None:
        self._executor, self._clock = start.executor, start.clock
        self._depth = start.resolved.pipeline_depth
        self._file = TraceFile(self._path)
        self._file.name_track(_ENGINE, _LOOP, "Engine", "loop")
        for place in range(self._depth):
            self._file.name_track(_RANK, 1 + place, "Rank 0", f"steps ({place + 1} of {self._depth} in flight)")
        self._requests = RequestTracks(self._file, _REQUESTS)
        self._draw_start(start)

    def _draw_start(self, start: EngineStart) -> None:
        """Draws the parts of the start, and the moment that ties the trace's clock to the time of day."""
        now, seconds = self._clock(), start.stopwatch.seconds
        utc = datetime.fromtimestamp(time.time(), timezone.utc).isoformat(timespec="microseconds")
        self._file.instant(_ENGINE, _LOOP, f"wall clock {utc}", now, utc=utc, monotonic=now)
        self._file.name_track(_ENGINE, _STARTUP, "Engine", "start-up")
        began = now - start.stopwatch.total
        self._file.slice(_ENGINE, _STARTUP, "start-up", began, now)
        for name, duration in seconds.items():
            self._file.slice(_ENGINE, _STARTUP, name, began, min(began + duration, now))
            began += duration

    def phase(self, phase: Phase) -> None:
        (before, began), now = self._phase, self._clock()
        if before != "idle":
            self._file.slice(_ENGINE, _LOOP, before, began, now)
        self._phase = phase, now

    def sequence_scheduled(self, sequence: Sequence, num_cached: int) -> None:
        self._admitted.append(sequence.seq_id)

    def sequence_preempted(self, sequence: Sequence, preemption: Preemption) -> None:
        self._requests.preempted(sequence.seq_id, preemption)
        details = preemption_details(sequence, preemption)
        self._file.instant(
            _ENGINE,
            _LOOP,
            "preempted",
            self._clock(),
            request_id=sequence.request_id,
            seq_id=sequence.seq_id,
            **details,
        )

    def batch_scheduled(self, batch: ScheduledBatch, rows: RowTable) -> None:
        shown = [*batch.chunks["row"][:_MAX_NAMES].tolist(), *batch.decode_rows[:_MAX_NAMES].tolist()]
        self._names[batch.step] = [rows.sequence(row).request_id for row in shown[:_MAX_NAMES]]

    def step_submitted(self, batch: ScheduledBatch, now: float, num_in_flight: int) -> None:
        for seq_id in self._admitted:
            self._requests.admitted(seq_id, _RANK, 1 + batch.step % self._depth, now)
        self._admitted.clear()
        self._in_flight[batch.step] = batch, now

    def step_collected(self, step: CollectedStep) -> None:
        """Draws a step. The GPU's time is drawn as if it ended when the host got the tokens."""
        batch, collected, gpu_ms = step.batch, step.collected, step.gpu_ms
        self._in_flight.pop(batch.step, None)
        details = {
            "step": batch.step,
            "num_prefill_tokens": batch.num_prefill_tokens,
            "num_decode_seqs": len(batch.decode_rows),
            "requests": self._names.pop(batch.step),
        }
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
        self._requests.draw(sequence, cause_of(sequence), self._clock())

    def engine_failed(self, error: BaseException, lost: Iterable[Sequence], goes_on: bool) -> None:
        self.phase("idle")
        for sequence in lost:
            self._requests.draw(sequence, "lost", self._clock())
        self._draw_lost_steps()
        self._file.flush()

    def engine_exiting(self, unfinished: Iterable[Sequence]) -> None:
        for sequence in unfinished:
            self._requests.draw(sequence, "unfinished", self._clock())
        self._draw_lost_steps()
        with suppress(Exception):  # the file is closed even if other ranks have failed
            self._draw_other_ranks()
        self._file.close()
        self._executor = None

    def _draw_lost_steps(self) -> None:
        """Draws the steps in flight, whose tokens nobody collects."""
        for step, (batch, submitted) in self._in_flight.items():
            names = self._names.get(step, [])
            place = 1 + step % self._depth
            self._file.slice(_RANK, place, f"{batch.kind} (lost)", submitted, self._clock(), step=step, requests=names)
        self._admitted.clear()
        self._names.clear()
        self._in_flight.clear()

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
