"""An engine without a device, for measurements of what is around it: a step takes a given time and computes nothing.

Scheduler, loop, process and messages are the real ones; the tokens are random. `install(step_ms)` gives this engine to
every `AsyncLLM` of this process and to `nanovllm serve`, whose engine runs in a process of its own.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from nanovllm.async_engine import engine_loop, engine_process
from nanovllm.config import EngineConfig
from nanovllm.engine.batch import IntArray, ScheduledBatch, StepResult
from nanovllm.engine.executor import Diagnostics, StepTime, existing
from nanovllm.engine.in_process_executor import InProcessExecutor
from nanovllm.utils.stopwatch import Stopwatch

_FIRST_TOKEN, _LAST_TOKEN = 256, 500  # of the tiny checkpoint: words and parts of words
_IN_PROCESS = "import paced_engine\npaced_engine.replace_executor({step_ms})\n"


def install(step_ms: float) -> None:
    """Lets engines that start from now on run at this pace."""
    replace_executor(step_ms)
    forwards, marker, rest = engine_process._MAIN.partition("forward_records()\n")
    engine_process._MAIN = forwards + marker + _IN_PROCESS.format(step_ms=step_ms) + rest


def replace_executor(step_ms: float) -> None:
    """Lets engines of this process run at this pace."""

    def make(config: EngineConfig, stopwatch: Stopwatch) -> PacedExecutor:
        return PacedExecutor(config, stopwatch, step_ms / 1e3)

    engine_loop.make_executor = make  # type: ignore[assignment]


@dataclass
class _Handle:
    token_ids: IntArray
    ready: float

    def wait(self, check: Callable[[], None] | None = None) -> StepResult:
        time.sleep(max(self.ready - time.monotonic(), 0.0))
        return StepResult(self.token_ids)


class PacedExecutor:
    """Returns random tokens, `seconds` after the step before."""

    def __init__(self, config: EngineConfig, stopwatch: Stopwatch, seconds: float) -> None:
        with_model = InProcessExecutor(config, stopwatch)
        self.resolved = with_model.resolved
        with_model.shutdown()
        self._seconds, self._ready = seconds, 0.0
        self._tokens = np.random.default_rng(random.randrange(1 << 32))

    def submit(self, batch: ScheduledBatch) -> _Handle:
        self._ready = max(time.monotonic(), self._ready + self._seconds)
        num_tokens = len(batch.sampled_rows)
        return _Handle(self._tokens.integers(_FIRST_TOKEN, _LAST_TOKEN, num_tokens, dtype=np.int32), self._ready)

    def collect(self, handle: _Handle) -> StepResult:
        return handle.wait()

    def synchronize(self) -> None: ...

    def capture_ahead(self) -> bool:
        return False

    def shutdown(self) -> None: ...

    def other_step_times(self) -> dict[int, Sequence[StepTime]]:
        return {}

    @property
    def diagnostics(self) -> Diagnostics:
        return existing(None)
