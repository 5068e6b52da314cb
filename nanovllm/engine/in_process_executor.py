"""InProcessExecutor: one rank, in this process."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from nanovllm.config import EngineConfig
from nanovllm.engine.batch import ScheduledBatch, StepHandle, StepResult
from nanovllm.engine.executor import Diagnostics, MakeDiagnostics, StepTime, existing
from nanovllm.runner.cpu_threads import choose_cpu_threads, load_torch, uses_cpu
from nanovllm.utils.stopwatch import Stopwatch

if TYPE_CHECKING:
    from nanovllm.engine.model_runner import ModelRunner


class InProcessExecutor:
    """Runs a model runner in this process, without other ranks."""

    def __init__(
        self,
        config: EngineConfig,
        stopwatch: Stopwatch | None = None,
        make_diagnostics: MakeDiagnostics | None = None,
    ) -> None:
        stopwatch = stopwatch or Stopwatch()
        is_fresh = load_torch(config.device)
        # Imported here because it imports torch, which the rest of `engine` does not need.
        from nanovllm.engine.model_runner import ModelRunner

        stopwatch.lap("imports")
        if uses_cpu(config.device):
            choose_cpu_threads(is_fresh)
        self._runner: ModelRunner | None = ModelRunner(config, stopwatch=stopwatch)
        self._diagnostics = None if make_diagnostics is None else make_diagnostics(self._runner)
        self.resolved = self._runner.resolved

    def submit(self, batch: ScheduledBatch) -> StepHandle:
        assert self._runner is not None, "the executor was shut down"
        return self._runner.submit(batch)

    def collect(self, handle: StepHandle) -> StepResult:
        return handle.wait()

    def synchronize(self) -> None:
        if self._runner is not None:
            self._runner.synchronize()

    def capture_ahead(self) -> bool:
        return self._runner is not None and self._runner.capture_ahead()

    def other_step_times(self) -> dict[int, Sequence[StepTime]]:
        return {}

    @property
    def diagnostics(self) -> Diagnostics:
        return existing(self._diagnostics)

    def shutdown(self) -> None:
        runner, self._runner = self._runner, None
        if self._diagnostics is not None:
            self._diagnostics.close()
        if runner is not None:
            runner.shutdown()
