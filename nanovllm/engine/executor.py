"""Executor: runs an engine's batches. The engine submits steps and collects their results in the same order."""

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
    """Profiler and memory of all ranks. No step needs it: the package `diagnostics` implements it."""

    def start_profile(self, folder: Path) -> None: ...

    def stop_profile(self) -> str: ...

    def cancel_profile(self) -> None: ...

    def memory_report(self) -> Any:
        """Returns a report whose type is the implementation's."""
        ...

    def memory_use(self) -> tuple[int, int]: ...


class RankDiagnostics(Diagnostics, Protocol):
    """Diagnostics of one rank. Rank 0 asks the others in bytes whose meaning only the implementation knows."""

    def of_all_ranks(self, ask: Callable[[bytes], list[bytes]]) -> Diagnostics: ...

    def answer(self, question: bytes | bytearray) -> bytes: ...

    def close(self) -> None: ...


class FunctionTrace(Protocol):
    """A trace of function calls that runs in a process."""

    def stop(self) -> None: ...


# Both are sent to worker processes, so they must be functions or classes of a module.
MakeDiagnostics = Callable[[Any], RankDiagnostics]  # gets the rank's ModelRunner
StartTrace = Callable[[int], FunctionTrace | None]  # gets the rank


@dataclass(frozen=True)
class StepTime:
    """When a rank ran a step, in seconds of the monotonic clock, which all processes of a machine share.

    began, ended: on the host; on a GPU the time of the launch, on a CPU that of the whole step.
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

    def submit(self, batch: ScheduledBatch) -> StepHandle: ...

    def collect(self, handle: StepHandle) -> StepResult: ...

    def synchronize(self) -> None:
        """Waits until no step is in flight. Raises when the device cannot continue."""
        ...

    def shutdown(self) -> None:
        """Frees the device's memory. Calling it again does nothing."""
        ...

    def other_step_times(self) -> dict[int, Sequence[StepTime]]:
        """Returns the steps of ranks 1, 2, … since the last call, by rank. Recorded only for a timeline."""
        ...

    @property
    def diagnostics(self) -> Diagnostics:
        """Profiler and memory. Raises InvalidStateError when the executor was built without diagnostics."""
        ...


ExecutorFactory = Callable[[EngineConfig, Stopwatch], Executor]


def existing(diagnostics: RankDiagnostics | None) -> RankDiagnostics:
    """Returns `diagnostics`. Raises InvalidStateError when there are none."""
    if diagnostics is None:
        raise InvalidStateError(
            "This engine has no diagnostics: pass make_diagnostics=nanovllm.diagnostics.make_diagnostics to its "
            "executor, or build the engine with LLM or AsyncLLM."
        )
    return diagnostics
