"""EngineObserver: callbacks for what happens in an engine, one method per event.

Logs, metrics, timelines and spans are observers. They are passed to the engine when it is built, and cannot change what
it does. Their methods run on the engine's thread, in the middle of the loop, so they must be quick.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt

from nanovllm.config import EngineConfig, ResolvedConfig
from nanovllm.engine.batch import ScheduledBatch
from nanovllm.engine.prefill_policy import PrefillBudget
from nanovllm.engine.request_end import RequestEnd
from nanovllm.engine.row_table import RowArray, RowTable
from nanovllm.engine.sequence import Sequence
from nanovllm.engine.statistics import EngineStatistics, Load
from nanovllm.logs.records import current_engine
from nanovllm.outputs import CompletionOutput
from nanovllm.utils.stopwatch import Stopwatch

if TYPE_CHECKING:
    from nanovllm.engine.executor import Executor

Phase = Literal["schedule", "launch", "wait", "update", "idle"]


@dataclass(frozen=True)
class EngineStart:
    """The parts of an engine that has started."""

    resolved: ResolvedConfig
    executor: Executor
    statistics: EngineStatistics  # totals, which grow as the engine runs
    clock: Callable[[], float]  # seconds; the source of every time that the engine reports
    stopwatch: Stopwatch  # how long each part of the start took


@dataclass(frozen=True)
class Shortage:
    """Why a sequence is preempted: a step needs more blocks than are free."""

    step: int  # the step that is being planned
    oldest: Sequence  # the oldest of the sequences that need a block, which may be the preempted one itself
    needed: int  # blocks that the step needs
    free: int  # blocks that are free


@dataclass(frozen=True)
class Preemption:
    """The blocks that a preempted sequence gives back, and its tokens."""

    shortage: Shortage
    freed: int  # blocks that are free now
    coming: int  # blocks that become free when the steps in flight that write them have ended
    num_tokens: int  # tokens to compute again
    free_blocks: int  # all free blocks, after this


@dataclass(frozen=True)
class SampledStep:
    """The tokens of a step, at the moment when the scheduler takes them."""

    batch: ScheduledBatch
    rows: RowTable  # before it has the new tokens
    sampled: RowArray  # rows that get a token
    gaps: npt.NDArray[np.float64]  # for each of them, seconds since its previous token; -inf for its first
    now: float  # seconds of the engine's clock
    gpu_ms: float | None  # time on the GPU; None if it was not measured
    load: Load  # while the sequences that end with it still hold their blocks


@dataclass(frozen=True)
class VerifiedDrafts:
    """What became of a step's drafts. The lists have an item for each draft."""

    num_drafted: list[int]  # tokens
    num_accepted: list[int]  # of those, the first ones that were right
    gained: list[tuple[Sequence, int]]  # sequences, and how many tokens they got beside the step's first one


@dataclass(frozen=True)
class CollectedStep:
    """A step whose tokens are on the host."""

    batch: ScheduledBatch
    submitted: float  # seconds of the engine's clock
    collected: float
    gpu_ms: float | None  # time on the GPU; None if it was not measured
    ended: list[Sequence]  # the sequences that ended with it
    load: Load  # after it


@dataclass(frozen=True)
class Delay:
    """A step, or a request's wait for its next token or in the queue, that is slow by NANOVLLM_LOG_SLOW_SECONDS."""

    kind: Literal["step", "wait", "queue"]
    seconds: float
    step: int
    request_id: str | None  # the request that waited longest; None if the step gave no request its next token
    reason: str
    now: float  # seconds of the engine's clock


class EngineObserver:
    """Ignores every event. Subclasses override the methods of the events that they need."""

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

    def request_refused(self, request_id: str, error: BaseException, client_request_id: str | None = None) -> None:
        """A request is not allowed, and is not queued."""

    def phase(self, phase: Phase) -> None:
        """The loop enters another phase of a step."""

    def sequence_scheduled(self, sequence: Sequence, num_cached: int) -> None:
        """A waiting sequence gets a row and blocks. num_cached: number of its tokens found in the prefix cache."""

    def sequence_preempted(self, sequence: Sequence, preemption: Preemption) -> None:
        """A running sequence gives its blocks back and waits again."""

    def prefill_budgeted(self, budget: PrefillBudget) -> None:
        """The step with prompt tokens that `batch_scheduled` is about to report has this budget for them."""

    def batch_scheduled(self, batch: ScheduledBatch, rows: RowTable) -> None:
        """A step is planned. rows: the row table after planning."""

    def step_submitted(self, batch: ScheduledBatch, now: float, num_in_flight: int) -> None:
        """The executor has the step. num_in_flight: number of earlier steps that are not collected yet."""

    def tokens_sampled(self, step: SampledStep) -> None:
        """A step's tokens are on the host, and the scheduler is about to process them."""

    def drafts_verified(self, drafts: VerifiedDrafts) -> None:
        """The scheduler has processed the tokens of a step that had drafts."""

    def delayed(self, delay: Delay) -> None:
        """A step or a wait took too long."""

    def first_token(self, sequence: Sequence) -> None:
        """A sequence has its first token."""

    def sequence_finished(self, sequence: Sequence) -> None:
        """A sequence has ended, for any reason. Its tokens and times are final."""

    def request_finished(self, end: RequestEnd) -> None:
        """A request has ended: all its sequences have, or a failure, `exit` or a refusal ended it."""

    def step_collected(self, step: CollectedStep) -> None:
        """A step's tokens are on the host, and the scheduler has processed them."""

    def output_built(self, sequence: Sequence, completion: CompletionOutput) -> None:
        """The output of a sequence that has ended is built."""

    def engine_failed(self, error: BaseException, lost: Iterable[Sequence], goes_on: bool) -> None:
        """A step failed or was interrupted, and lost the sequences `lost`. goes_on: the engine takes new requests."""

    def engine_start_failed(self, error: BaseException) -> None:
        """The engine could not start. Nothing follows."""

    def engine_exiting(self, unfinished: Iterable[Sequence]) -> None:
        """The engine ends: `exit` was called, it is garbage-collected, or Python ends. Its executor still runs."""

    def engine_exited(self) -> None:
        """`exit` has freed the device's memory."""


class Observers(EngineObserver):
    """Several observers as one. Each call reaches the observers that override the method, in order.

    What they log has this engine's `engine_id`, a count of the engines of the process from 0. So has what the thread
    logs while the engine starts, and during a step.
    """

    def __init__(self, observers: Iterable[EngineObserver] = (), engine_id: int | None = None) -> None:
        observers = tuple(observers)
        self.engine_id = next(engine_ids) if engine_id is None else engine_id
        for name, default in vars(EngineObserver).items():
            if not name.startswith("_"):
                overriding = [observer for observer in observers if getattr(type(observer), name) is not default]
                setattr(self, name, self._call_each([getattr(observer, name) for observer in overriding], name))

    def _call_each(self, functions: list[Callable[..., None]], name: str) -> Callable[..., None]:
        """Returns a function that calls all of `functions` in order."""
        is_phase, number = name == "phase", self.engine_id
        begins = is_phase or name == "engine_starting"  # what follows on this thread is this engine's
        ends = name in ("engine_started", "engine_failed")

        def call(*arguments: object, **named: object) -> None:
            before = current_engine.number
            if before != number:
                current_engine.number = number
            try:
                for function in functions:
                    function(*arguments, **named)
            finally:
                if ends or (is_phase and arguments[0] == "idle"):
                    current_engine.number = None
                elif before != number and not begins:
                    current_engine.number = before

        return call if functions or begins or ends else _ignore


engine_ids = itertools.count()


def _ignore(*_arguments: object, **_named: object) -> None:
    """Does nothing, for a method that no observer overrides."""
