"""EngineObserver: what the engine tells those that watch it, one method a moment.

Logs, metrics, timelines and spans are observers. They are handed to the engine when it is built and cannot change what
it does. All of them run on the engine's thread, between two lines of the loop, so each method has to be quick.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from nanovllm.config import EngineConfig, ResolvedConfig
from nanovllm.engine.batch import ScheduledBatch
from nanovllm.engine.row_table import RowTable
from nanovllm.engine.sequence import Sequence
from nanovllm.engine.statistics import EngineStatistics, Load
from nanovllm.outputs import CompletionOutput
from nanovllm.utils.stopwatch import Stopwatch

if TYPE_CHECKING:
    from nanovllm.engine.executor import Executor

Phase = Literal["schedule", "launch", "wait", "update", "idle"]


@dataclass(frozen=True)
class EngineStart:
    """What an engine runs with, once its model is loaded."""

    resolved: ResolvedConfig
    executor: Executor
    statistics: EngineStatistics  # totals, which grow as the engine runs
    clock: Callable[[], float]  # of every time the engine tells; seconds
    stopwatch: Stopwatch  # how long each part of the start took


@dataclass(frozen=True)
class Preemption:
    """Blocks that a preempted sequence gives back."""

    freed: int  # free now
    coming: int  # free when the steps in flight that write them have ended
    num_tokens: int  # to compute again
    free_blocks: int  # in all, after this


@dataclass(frozen=True)
class CollectedStep:
    """A step whose tokens have come."""

    batch: ScheduledBatch
    submitted: float  # seconds of the engine's clock
    collected: float
    gpu_ms: float | None  # time on the GPU, where it was measured
    ended: list[Sequence]  # the sequences that it ended
    load: Load  # after it


class EngineObserver:
    """Does nothing at every moment. Derive from it and override the moments that matter."""

    def engine_starting(self, config: EngineConfig) -> None:
        """The engine begins to load."""

    def engine_resolved(self, resolved: ResolvedConfig) -> None:
        """The model is loaded and the KV cache is sized."""

    def engine_started(self, start: EngineStart) -> None:
        """The engine is ready for requests."""

    def work_began(self, now: float) -> None:
        """A request arrives at an idle engine. now: seconds of the engine's clock."""

    def request_added(self, sequence: Sequence) -> None:
        """A sequence joins the waiting queue."""

    def phase(self, phase: Phase) -> None:
        """The loop begins to do something else."""

    def sequence_scheduled(self, sequence: Sequence, num_cached: int) -> None:
        """A waiting sequence gets a row and blocks. num_cached: tokens of it found in the prefix cache."""

    def sequence_preempted(self, sequence: Sequence, preemption: Preemption) -> None:
        """A running sequence gives its blocks back and waits again."""

    def batch_scheduled(self, batch: ScheduledBatch, rows: RowTable) -> None:
        """A step is planned. rows: as they are after it."""

    def step_submitted(self, batch: ScheduledBatch, now: float, num_in_flight: int) -> None:
        """The executor has the step. num_in_flight: steps that were submitted before and are not collected."""

    def first_token(self, sequence: Sequence) -> None:
        """A sequence has its first token."""

    def sequence_finished(self, sequence: Sequence) -> None:
        """A sequence has ended, for whatever reason; its tokens and times are final."""

    def step_collected(self, step: CollectedStep) -> None:
        """A step's tokens have come, and the scheduler knows them."""

    def output_built(self, sequence: Sequence, completion: CompletionOutput) -> None:
        """The output of a sequence that has ended is built."""

    def engine_failed(self, error: BaseException, lost: Iterable[Sequence], goes_on: bool) -> None:
        """A step failed or was interrupted, and `lost` with it. goes_on: the engine takes new requests."""

    def engine_exiting(self, unfinished: Iterable[Sequence]) -> None:
        """The engine ends, by `exit`, because it is collected, or because Python ends. Its executor still runs."""

    def engine_exited(self) -> None:
        """`exit` has given the device's memory back."""


class Observers(EngineObserver):
    """Several observers as one. Each moment reaches, in their order, those that override it."""

    def __init__(self, observers: Iterable[EngineObserver] = ()) -> None:
        observers = tuple(observers)
        for moment, nothing in vars(EngineObserver).items():
            if not moment.startswith("_"):
                concerned = [observer for observer in observers if getattr(type(observer), moment) is not nothing]
                setattr(self, moment, _call_each([getattr(observer, moment) for observer in concerned]))


def _call_each(functions: list[Callable[..., None]]) -> Callable[..., None]:
    def call(*arguments: object, **named: object) -> None:
        for function in functions:
            function(*arguments, **named)

    return call
