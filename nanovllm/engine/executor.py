"""Executor: the interface to what runs an engine's batches.

The engine submits steps and collects their results in the same order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from nanovllm.config import EngineConfig, ResolvedConfig
from nanovllm.engine.batch import ScheduledBatch, StepHandle, StepResult
from nanovllm.errors import InvalidStateError
from nanovllm.utils.stopwatch import Stopwatch


class Diagnostics(Protocol):
    """Profiler and memory measurements. No step needs them; the package `diagnostics` implements them."""

    def start_profile(self, folder: Path) -> None: ...

    def stop_profile(self) -> str: ...

    def cancel_profile(self) -> None: ...

    def memory_report(self) -> Any:
        """Returns a report, whose type is up to the implementation."""
        ...

    def memory_use(self) -> tuple[int, int]:
        """Returns the bytes in use and the number of Python objects."""
        ...


class RankDiagnostics(Diagnostics, Protocol):
    """Diagnostics of one rank. Rank 0 asks the others with messages that only the implementation reads."""

    def of_all_ranks(self, ask: Callable[[bytes], list[bytes]]) -> Diagnostics:
        """Returns the diagnostics of all ranks. ask: sends a question to the other ranks and returns their answers."""
        ...

    def answer(self, question: bytes | bytearray) -> bytes:
        """Returns this rank's answer to a question of rank 0."""
        ...

    def close(self) -> None: ...


class FunctionTrace(Protocol):
    """A running trace of the function calls in a process."""

    def stop(self) -> None: ...


# Worker processes import both by name, so they must be functions or classes at the top level of a module.
MakeDiagnostics = Callable[[Any], RankDiagnostics]  # takes the rank's ModelRunner
StartTrace = Callable[[int], FunctionTrace | None]  # takes the rank


@dataclass(frozen=True)
class StepTime:
    """When a rank ran a step, in seconds of the monotonic clock, which all processes of a machine share.

    began, ended: on the host; they span the launch on a GPU, and the whole step on a CPU.
    gpu_began, gpu_ended: on the GPU; NaN without one.
    """

    step: int
    kind: str
    began: float
    ended: float
    gpu_began: float = math.nan
    gpu_ended: float = math.nan


class Executor(Protocol):
    """Runs batches in the order of submission. `submit` does not wait for the device."""

    resolved: ResolvedConfig

    def submit(self, batch: ScheduledBatch) -> StepHandle:
        """Launches a step."""
        ...

    def collect(self, handle: StepHandle) -> StepResult:
        """Waits for a step and returns its result."""
        ...

    def synchronize(self) -> None:
        """Waits until no step is in flight. Raises when the device cannot continue."""
        ...

    def capture_ahead(self) -> bool:
        """Captures one of the CUDA graphs that later steps may need. Returns False when none of these is missing.

        To be called while no step is in flight.
        """
        ...

    def shutdown(self) -> None:
        """Frees the device's memory. Calling it again does nothing."""
        ...

    def other_step_times(self) -> dict[int, Sequence[StepTime]]:
        """Returns the steps that ranks 1, 2, … ran since the last call, by rank. Recorded only for a timeline."""
        ...

    @property
    def diagnostics(self) -> Diagnostics:
        """The diagnostics of all ranks. Raises InvalidStateError when the executor was built without them."""
        ...


ExecutorFactory = Callable[[EngineConfig, Stopwatch], Executor]


def existing(diagnostics: RankDiagnostics | None) -> RankDiagnostics:
    """Returns `diagnostics`. Raises InvalidStateError when it is None."""
    if diagnostics is None:
        raise InvalidStateError(
            "This engine has no diagnostics: pass make_diagnostics=nanovllm.diagnostics.make_diagnostics to its "
            "executor, or build the engine with LLM or AsyncLLM."
        )
    return diagnostics
