"""The simulated executor with failures to order."""

from __future__ import annotations

from nanovllm.engine.batch import ScheduledBatch, StepResult
from tests.engine.simulated_executor import Handle, SimulatedExecutor, make_config


class BreakableExecutor(SimulatedExecutor):
    """Raises once, at a step of one's choice, where one chooses; `synchronize` forgets what was running."""

    def __init__(self, **config: object) -> None:
        super().__init__(make_config(**config))
        self.failures: dict[str, BaseException] = {}  # "submit", "collect", "synchronize" → what it raises once
        self.num_in_flight = self.most_in_flight = 0

    def _maybe_fail(self, where: str) -> None:
        if where in self.failures:
            raise self.failures.pop(where)

    def submit(self, batch: ScheduledBatch) -> Handle:
        self._maybe_fail("submit")
        self.num_in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.num_in_flight)
        return super().submit(batch)

    def collect(self, handle: Handle) -> StepResult:
        self._maybe_fail("collect")
        self.num_in_flight -= 1
        return super().collect(handle)

    def synchronize(self) -> None:
        self.tokens.clear()
        self.tables.clear()
        self._maybe_fail("synchronize")
