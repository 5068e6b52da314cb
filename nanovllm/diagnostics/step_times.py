"""When a rank ran its steps, for the timeline that rank 0 writes."""

from __future__ import annotations

import math
import struct
import time
from collections import deque
from dataclasses import dataclass
from typing import Protocol

import torch

KINDS = ("prefill", "decode", "mixed")
_RECORD = struct.Struct("=QQdddd")  # step, index of KINDS, and the four times


class TimedStep(Protocol):
    """A step in flight, with the events that a GPU passes before and after it; None on a CPU."""

    @property
    def began(self) -> torch.cuda.Event | None: ...

    @property
    def done(self) -> torch.cuda.Event | None: ...


@dataclass(frozen=True)
class StepTime:
    """Seconds of the machine's monotonic clock, which all processes share.

    began, ended: on the host; on a GPU that is the launch, on a CPU all of the step.
    gpu_began, gpu_ended: on the GPU; NaN without one.
    """

    step: int
    kind: str
    began: float
    ended: float
    gpu_began: float = math.nan
    gpu_ended: float = math.nan


class StepTimes:
    """A rank's steps since they were last taken."""

    def __init__(self) -> None:
        self._steps: deque[tuple[StepTime, TimedStep]] = deque()
        self._passed: tuple[torch.cuda.Event, float] | None = None  # the last known event, and when it was

    def add(self, step: int, kind: str, began: float, in_flight: TimedStep) -> None:
        """A step that was launched between `began` and now."""
        self._steps.append((StepTime(step, kind, began, time.monotonic()), in_flight))
        if in_flight.began is not None and self._passed is None:  # once: what is measured later counts from here
            in_flight.began.synchronize()
            self._passed = in_flight.began, time.monotonic()

    def take(self) -> list[StepTime]:
        """Those that are done."""
        taken = []
        while self._steps and (self._steps[0][1].done is None or self._steps[0][1].done.query()):
            time_, in_flight = self._steps.popleft()
            taken.append(self._with_gpu(time_, in_flight))
        return taken

    def _with_gpu(self, time_: StepTime, in_flight: TimedStep) -> StepTime:
        if self._passed is None or in_flight.began is None or in_flight.done is None:
            return time_
        # From event to event, for the figures are of single precision: over an hour it would be too coarse.
        event, passed = self._passed
        gpu_began = passed + event.elapsed_time(in_flight.began) / 1e3
        gpu_ended = gpu_began + in_flight.began.elapsed_time(in_flight.done) / 1e3
        self._passed = in_flight.done, gpu_ended
        return StepTime(time_.step, time_.kind, time_.began, time_.ended, gpu_began, gpu_ended)


def pack_step_times(times: list[StepTime]) -> bytes:
    return b"".join(
        _RECORD.pack(time.step, KINDS.index(time.kind), time.began, time.ended, time.gpu_began, time.gpu_ended)
        for time in times
    )


def unpack_step_times(data: bytes) -> list[StepTime]:
    return [StepTime(step, KINDS[kind], *times) for step, kind, *times in _RECORD.iter_unpack(data)]
