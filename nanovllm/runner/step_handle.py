"""DeviceStepHandle: waits for a step that was launched on the device."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from nanovllm.engine.batch import StepLogprobs, StepResult
from nanovllm.kernels.logprobs import SampledTokens, TokenLogprobs

_POLL_SECONDS = 20e-6


@dataclass(frozen=True)
class DeviceStepHandle:
    """A launched step, whose results are in `sampled` once the event `done` has completed."""

    sampled: SampledTokens  # on the host
    done: torch.cuda.Event | None  # None on a CPU, where the step is done
    began: torch.cuda.Event | None  # None if the step's time is not measured

    def wait(self, check: Callable[[], None] | None = None) -> StepResult:
        if self.done is not None:
            wait_for(self.done, check)
        gpu_ms = self.began.elapsed_time(self.done) if self.began is not None and self.done is not None else None
        sampled = self.sampled
        logprobs = _step_logprobs(sampled.logprobs) if sampled.logprobs else None
        return StepResult(
            token_ids=sampled.token_ids.numpy(),
            gpu_ms=gpu_ms,
            logprobs=logprobs,
            prompt_logprobs=tuple(map(_step_logprobs, sampled.prompt_logprobs)),
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
