"""SubmissionDelay: how long the next step can wait for requests to arrive, while the device runs the one before it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from nanovllm.engine.batch import ScheduledBatch
from nanovllm.engine.observer import CollectedStep, EngineObserver
from nanovllm.engine.sequence import Sequence

_SAFETY = 0.5e-3  # seconds that the next step is launched before it is needed, on top of the time that launching takes
_SHARE = 0.9  # of the predicted time: steps differ
_NUM_STEPS = 8  # by which time is predicted


@dataclass(frozen=True)
class _InFlight:
    has_chunks: bool
    submitted: float  # seconds of the clock


class SubmissionDelay(EngineObserver):
    """Measures steps, and says how long the next one can wait.

    With two steps in flight the second is launched when the first begins, so a request that arrives a moment later
    waits for both. The device needs the second only when the first ends. Until shortly before that, requests that
    arrive can still be part of it, and get their first token a step earlier.

    A step takes at least as long as the shortest of the last few steps without prompt tokens: this is the prediction.
    clock: seconds; not the scheduler's, which is read once a step.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._in_flight: deque[_InFlight] = deque()
        self._collected = 0.0
        self._step_seconds: deque[float] = deque(maxlen=_NUM_STEPS)  # of steps without prompt tokens
        self._launch_seconds: deque[float] = deque(maxlen=_NUM_STEPS)

    def seconds(self) -> float:
        """Returns how long the next step can wait from now: 0 unless exactly one step is in flight."""
        if len(self._in_flight) != 1 or not self._step_seconds:
            return 0.0
        ends = self._began(self._in_flight[0]) + _SHARE * min(self._step_seconds)
        return max(0.0, ends - max(self._launch_seconds) - _SAFETY - self._clock())

    def _began(self, step: _InFlight) -> float:
        """Returns when the oldest step in flight began on the device, about."""
        return max(step.submitted, self._collected)

    def step_submitted(self, batch: ScheduledBatch, now: float, num_in_flight: int) -> None:
        submitted = self._clock()
        self._in_flight.append(_InFlight(len(batch.chunks) > 0, submitted))
        self._launch_seconds.append(submitted - now)

    def step_collected(self, step: CollectedStep) -> None:
        now, oldest = self._clock(), self._in_flight.popleft()
        if not oldest.has_chunks:
            self._step_seconds.append(now - self._began(oldest))
        self._collected = now

    def engine_failed(self, error: BaseException, lost: Iterable[Sequence], goes_on: bool) -> None:
        self._in_flight.clear()
