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
        self.resolved = self._runner.resolved

    def submit(self, batch: ScheduledBatch) -> StepHandle:
        assert self._runner is not None, "the executor was shut down"
        try:
            return self._runner.submit(batch)
        except Exception as error:
            self._runner.diagnostics.explain(error, batch.num_tokens, self.resolved)
            raise

    def collect(self, handle: StepHandle) -> StepResult:
        return handle.wait()

    def synchronize(self) -> None:
        if self._runner is not None:
            self._runner.synchronize()

    @property
    def diagnostics(self) -> RankDiagnostics:
        assert self._runner is not None, "the executor was shut down"
        return self._runner.diagnostics

    def shutdown(self) -> None:
        runner, self._runner = self._runner, None
        if runner is not None:
            runner.shutdown()
