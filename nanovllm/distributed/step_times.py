"""StepTimes: when a worker ran its steps, for the timeline that rank 0 writes."""

from __future__ import annotations

import struct
import time
from collections import deque
from typing import Protocol

import torch

from nanovllm.engine.executor import StepTime

KINDS = ("prefill", "decode", "mixed")
_RECORD = struct.Struct("=QQdddd")  # step, index of KINDS, and the four times


class TimedStep(Protocol):
    """A step handle with the CUDA events before and after the step; None on a CPU."""

    @property
    def began(self) -> torch.cuda.Event | None: ...

    @property
    def done(self) -> torch.cuda.Event | None: ...


class StepTimes:
    """A rank's steps since the last `take`."""

    def __init__(self) -> None:
        self._steps: deque[tuple[StepTime, TimedStep]] = deque()
        self._passed: tuple[torch.cuda.Event, float] | None = None  # the last event whose time is known, and that time

    def add(self, step: int, kind: str, began: float, handle: TimedStep) -> None:
        """Records a step that was launched between `began` and now."""
        self._steps.append((StepTime(step, kind, began, time.monotonic()), handle))
        if handle.began is not None and self._passed is None:  # once: later times count from here
            handle.began.synchronize()
            self._passed = handle.began, time.monotonic()

    def take(self) -> list[StepTime]:
        """Returns the steps that have ended, and forgets them."""
        taken = []
        while self._steps and (self._steps[0][1].done is None or self._steps[0][1].done.query()):
            time_, handle = self._steps.popleft()
            taken.append(self._with_gpu(time_, handle))
        return taken

    def _with_gpu(self, time_: StepTime, handle: TimedStep) -> StepTime:
        if self._passed is None or handle.began is None or handle.done is None:
            return time_
        # From event to event: elapsed_time has single precision, which is too coarse over an hour.
        event, passed = self._passed
        gpu_began = passed + event.elapsed_time(handle.began) / 1e3
        gpu_ended = gpu_began + handle.began.elapsed_time(handle.done) / 1e3
        self._passed = handle.done, gpu_ended
        return StepTime(time_.step, time_.kind, time_.began, time_.ended, gpu_began, gpu_ended)


def pack_step_times(times: list[StepTime]) -> bytes:
    return b"".join(
        _RECORD.pack(step.step, KINDS.index(step.kind), step.began, step.ended, step.gpu_began, step.gpu_ended)
        for step in times
    )


def unpack_step_times(data: bytes) -> list[StepTime]:
    return [StepTime(step, KINDS[kind], *times) for step, kind, *times in _RECORD.iter_unpack(data)]
