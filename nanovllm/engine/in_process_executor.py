"""InProcessExecutor: one rank, in this process."""

from __future__ import annotations

from nanovllm.config import EngineConfig
from nanovllm.diagnostics.rank import RankDiagnostics
from nanovllm.engine.batch import ScheduledBatch, StepHandle, StepResult
from nanovllm.engine.model_runner import ModelRunner
from nanovllm.utils.stopwatch import Stopwatch


class InProcessExecutor:
    """One rank, in this process."""

    def __init__(self, config: EngineConfig, stopwatch: Stopwatch | None = None) -> None:
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
