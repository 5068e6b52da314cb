"""DeviceStepHandle: waits for a step that was launched on the device."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from nanovllm.engine.batch import StepLogprobs, StepResult
from nanovllm.kernels.logprobs import SampledTokens, TokenLogprobs

_POLL_SECONDS = 20e-6


class EventPool:
    """CUDA events that are recorded again after their step: creating and freeing one takes longer than recording it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._free: dict[bool, list[torch.cuda.Event]] = {True: [], False: []}  # by whether they have a time

    def record(self, *, with_time: bool) -> torch.cuda.Event | None:
        """Records an event on the current stream. Returns None on a CPU, where calls return when their work is done."""
        if self._device.type == "cpu":
            return None
        free = self._free[with_time]
        event = free.pop() if free else torch.cuda.Event(enable_timing=with_time)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def release(self, *events: torch.cuda.Event, with_time: bool) -> None:
        """Takes back events that have completed and that nobody reads any more."""
        self._free[with_time] += events


@dataclass(frozen=True)
class DeviceStepHandle:
    """A launched step, whose results are in `sampled` once the event `done` has completed."""

    sampled: SampledTokens  # on the host
    done: torch.cuda.Event | None  # None on a CPU, where the step is done
    began: torch.cuda.Event | None  # None if the step's time is not measured
    events: EventPool  # gets both back from `wait`

    def wait(self, check: Callable[[], None] | None = None) -> StepResult:
        """Returns the results when they are there. It is called once."""
        gpu_ms = None
        if self.done is not None:
            wait_for(self.done, check)
            if self.began is None:
                self.events.release(self.done, with_time=False)
            else:
                gpu_ms = self.began.elapsed_time(self.done)
                self.events.release(self.began, self.done, with_time=True)
        sampled = self.sampled
        logprobs = _step_logprobs(sampled.logprobs) if sampled.logprobs else None
        return StepResult(
            token_ids=sampled.token_ids.numpy(),
            gpu_ms=gpu_ms,
            logprobs=logprobs,
            prompt_logprobs=tuple(map(_step_logprobs, sampled.prompt_logprobs)),
            drafts=None if sampled.drafts is None else sampled.drafts.numpy(),
        )


def _step_logprobs(logprobs: TokenLogprobs) -> StepLogprobs:
    return StepLogprobs(
        tokens=logprobs.tokens.numpy(),
        ranks=logprobs.ranks.numpy(),
        top_ids=logprobs.top_ids.numpy(),
        top=logprobs.top.numpy(),
    )


def wait_for(event: torch.cuda.Event, check: Callable[[], None] | None) -> None:
    """Waits until `event` has completed. Calls `check`, if any, repeatedly meanwhile; it may raise."""
    if check is None:
        event.synchronize()
        return
    while not event.query():
        check()
        time.sleep(_POLL_SECONDS)
