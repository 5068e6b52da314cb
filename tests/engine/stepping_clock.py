"""An engine on a clock that only steps move: each collected step takes a second."""

from __future__ import annotations

from nanovllm import LLMEngine
from nanovllm.engine.batch import StepResult
from tests.engine.breakable_executor import BreakableExecutor
from tests.engine.simulated_executor import Handle
from tests.engine.test_llm_engine import make_engine


class Clock:
    """Seconds."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def make_timed_engine(clock: Clock, **config: object) -> tuple[LLMEngine, BreakableExecutor]:
    engine, executor = make_engine(clock=clock, **config)
    original = executor.collect

    def collect(handle: Handle) -> StepResult:
        clock.now += 1
        return original(handle)

    executor.collect = collect  # type: ignore[method-assign]
    return engine, executor
