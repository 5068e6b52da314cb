"""Where the model runs. The engine submits steps and collects their results in the same order."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from nanovllm.config import EngineConfig, ResolvedConfig
from nanovllm.engine.batch import ScheduledBatch, StepHandle, StepResult
from nanovllm.utils.stopwatch import Stopwatch

if TYPE_CHECKING:
    from nanovllm.diagnostics.memory import MemoryReport
    from nanovllm.diagnostics.step_times import StepTime


class Diagnostics(Protocol):
    """Looks into the device: profiler and memory. No step needs it."""

    def start_profile(self, folder: Path) -> None:
        """Records until `stop_profile`. Raises InvalidStateError when a profile runs already."""
        ...

    def stop_profile(self) -> str:
        """Writes the profile and returns its tables. Raises InvalidStateError when none runs."""
        ...

    def memory_report(self) -> MemoryReport:
        """Returns where the device's memory went."""
        ...

    def memory_use(self) -> tuple[int, int]:
        """Returns the bytes in use, and the number of Python objects, after garbage is collected."""
        ...

    def other_step_times(self) -> dict[int, list[StepTime]]:
        """Returns the steps of the ranks above 0 since the last call."""
        ...


class Executor(Protocol):
    """Runs batches in the order of submission. `submit` does not wait for the device."""

    resolved: ResolvedConfig

    def submit(self, batch: ScheduledBatch) -> StepHandle: ...

    def collect(self, handle: StepHandle) -> StepResult: ...

    def synchronize(self) -> None:
        """Waits until nothing is in flight, whatever became of it. Raises if the device cannot go on."""
        ...

    def shutdown(self) -> None:
        """Gives the device's memory back. Calling it again does nothing."""
        ...

    @property
    def diagnostics(self) -> Diagnostics:
        """Profiler and memory of the device."""
        ...


ExecutorFactory = Callable[[EngineConfig, Stopwatch], Executor]
