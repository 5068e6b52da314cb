"""Where the model runs. The engine submits steps and collects their results in the same order."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from nanovllm.config import EngineConfig, ResolvedConfig
from nanovllm.engine.batch import ScheduledBatch, StepHandle, StepResult
from nanovllm.utils.stopwatch import Stopwatch

if TYPE_CHECKING:
    from nanovllm.diagnostics.all_ranks import AllRanksDiagnostics
    from nanovllm.diagnostics.rank import RankDiagnostics


class Executor(Protocol):
    """Runs batches in the order of submission. `submit` does not wait for the device."""

    resolved: ResolvedConfig

    def submit(self, batch: ScheduledBatch) -> StepHandle: ...

    def collect(self, handle: StepHandle) -> StepResult: ...

    def synchronize(self) -> None:
        """Waits until nothing is in flight, whatever became of it. Raises if the device can not go on."""
        ...

    def shutdown(self) -> None:
        """Gives the device's memory back. Calling it again does nothing."""
        ...

    @property
    def diagnostics(self) -> RankDiagnostics | AllRanksDiagnostics:
        """Profiler and memory, for who asks; no step needs it."""
        ...


ExecutorFactory = Callable[[EngineConfig, Stopwatch], Executor]


class InProcessExecutor:
    """One rank, in this process."""

    def __init__(self, config: EngineConfig, stopwatch: Stopwatch | None = None) -> None:
        stopwatch = stopwatch or Stopwatch()
        # Imported here: torch begins with the runner, and deciding does not need it.
        from nanovllm.engine.model_runner import ModelRunner

        stopwatch.lap("imports")
        self._runner: ModelRunner | None = ModelRunner(config, stopwatch=stopwatch)
        self._diagnostics: RankDiagnostics | None = None
        self.resolved = self._runner.resolved

    def submit(self, batch: ScheduledBatch) -> StepHandle:
        assert self._runner is not None, "the executor was shut down"
        return self._runner.submit(batch)

    def collect(self, handle: StepHandle) -> StepResult:
        return handle.wait()

    def synchronize(self) -> None:
        if self._runner is not None:
            self._runner.synchronize()

    @property
    def diagnostics(self) -> RankDiagnostics:
        from nanovllm.diagnostics.rank import RankDiagnostics

        assert self._runner is not None, "the executor was shut down"
        if self._diagnostics is None:
            self._diagnostics = RankDiagnostics(self._runner)
        return self._diagnostics

    def shutdown(self) -> None:
        runner, self._runner = self._runner, None
        if self._diagnostics is not None:
            self._diagnostics.close()
        if runner is not None:
            runner.shutdown()
