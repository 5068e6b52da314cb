"""LLMEngine: the loop that turns requests into steps, and their tokens into outputs.

The way of a request:

    prepare → PreparedRequest → enqueue → Sequence → Scheduler.schedule → ScheduledBatch → Executor.submit … collect
    → StepResult → Scheduler.update → RequestOutput
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Container, Iterable
from typing import TYPE_CHECKING

import xxhash

from nanovllm.config import EngineConfig
from nanovllm.engine.executor import Diagnostics, Executor, ExecutorFactory
from nanovllm.engine.metrics import EngineMetrics
from nanovllm.engine.observer import CollectedStep, EngineObserver, EngineStart, Observers
from nanovllm.engine.scheduler import Scheduler
from nanovllm.engine.sequence import Sequence
from nanovllm.engine.statistics import EngineStatistics
from nanovllm.engine.unfinished_requests import SubmittedStep, UnfinishedRequests
from nanovllm.errors import EngineDeadError, InvalidArgumentError
from nanovllm.outputs import RequestOutput
from nanovllm.requests.grammar_compiler import GrammarCompiler
from nanovllm.requests.output_builder import NewTokens, OutputBuilder
from nanovllm.requests.parallel_sampling import ParallelSampling
from nanovllm.requests.preparation import PreparedRequest, RequestPreparation
from nanovllm.requests.tokenization import Prompt, load_tokenizer
from nanovllm.sampling_params import SamplingParams
from nanovllm.utils.stopwatch import Stopwatch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class LLMEngine:
    """Owns the scheduler and the executor, and keeps up to `pipeline_depth` steps in flight.

    make_executor: builds the executor, which runs the steps. observers: are called, in order, for every event; without
    any the engine logs nothing. `nanovllm.engine_factory.make_engine` chooses both, and `LLM` uses it.
    Use the engine as a context manager, or call `exit`, to free the device's memory.
    """

    def __init__(
        self,
        config: EngineConfig,
        make_executor: ExecutorFactory,
        observers: Iterable[EngineObserver] = (),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.config = config
        self.metrics = EngineMetrics()
        self._observers = Observers([self.metrics, *observers])
        self._clock = clock  # seconds; the source of every time that the engine reports
        self._observers.engine_starting(config)
        stopwatch = Stopwatch()
        self.executor: Executor = make_executor(config, stopwatch)
        # A finalizer, so that the device's memory is also freed when the engine is garbage-collected or Python ends.
        self._shut_down = weakref.finalize(self, self.executor.shutdown)
        self.resolved = self.executor.resolved
        try:
            self._observers.engine_resolved(self.resolved)
            self.tokenizer = None if config.skip_tokenizer_init else load_tokenizer(config, self.resolved.model)
            self._grammars = GrammarCompiler(self.tokenizer, self.resolved)
            self._preparation = RequestPreparation(self.tokenizer, self.resolved, self._grammars)
            self._output_builder = OutputBuilder(self.tokenizer)
            self.scheduler = Scheduler(self.resolved, self._observers, clock)
            stopwatch.lap("tokenizer")
            self._observers.engine_started(
                EngineStart(self.resolved, self.executor, self.metrics.totals, clock, stopwatch)
            )
        except BaseException:
            self._shut_down()
            raise
        self._unfinished = UnfinishedRequests()
        self._report_exit = weakref.finalize(self, _report_exit, self._observers, self._unfinished)
        self._num_arrivals = 0
        self._dead: BaseException | None = None

    # Requests

    def add_request(self, request_id: str, prompt: Prompt, params: SamplingParams | None = None) -> str:
        """Queues a request and returns its id: `prepare` and `enqueue` in one.

        prompt: a text, token ids, {"prompt": text} or {"prompt_token_ids": ids}.
        Raises what `prepare` and `enqueue` raise; the engine and its other requests continue.
        """
        self._check_alive()
        arrival = self._clock()
        self._check_request_id(request_id)
        self.enqueue(request_id, self.prepare(prompt, params), arrival)
        return request_id

    def prepare(self, prompt: Prompt, params: SamplingParams | None = None) -> PreparedRequest:
        """Tokenises and checks a request. Any thread may call it, as it does not touch the engine's state.

        Raises InvalidArgumentError for a prompt that is empty or has ids outside the vocabulary, or parameters that
        this model does not allow, and RequestTooLargeError for a request that could never run.
        """
        return self._preparation.prepare(prompt, params)

    def enqueue(self, request_id: str, request: PreparedRequest, arrival: float | None = None) -> None:
        """Queues a prepared request. arrival: when it arrived, on the engine's clock; None: now.

        Raises InvalidArgumentError when `request_id` is not a string, or belongs to an unfinished request.
        """
        self._check_alive()
        self._check_request_id(request_id)
        arrival = self._clock() if arrival is None else arrival
        if request.params.n == 1:
            self._add_sequence(request_id, request, request.params, arrival)
            return
        parallel = ParallelSampling(request_id, request.params)
        taken = [sequence_id for sequence_id in parallel.ids if sequence_id in self._unfinished]
        if taken:
            raise InvalidArgumentError("request_id", taken[0], "unique: completions of a request take /0, /1, …")
        self._unfinished.parallel.add(parallel)  # before its sequences, so that Ctrl-C in between leaves none behind
        try:
            for sequence_id, params in zip(parallel.ids, parallel.params, strict=True):
                self._add_sequence(sequence_id, request, params, arrival)
        except BaseException:
            self.discard_requests([request_id])
            raise

    def _add_sequence(self, sequence_id: str, request: PreparedRequest, params: SamplingParams, arrival: float) -> None:
        sequence = self._preparation.sequence(request, self._num_arrivals, sequence_id, params, self._next_seed())
        if request.grammar is not None:
            self._grammars.start(sequence, request.grammar)
        self._num_arrivals += 1
        self._unfinished.sequences[sequence_id] = sequence
        sequence.arrival, sequence.queued = arrival, self._clock()
        self.scheduler.add(sequence)
        self._observers.request_added(sequence)

    def abort_request(self, request_id: str) -> None:
        """Ends a request; the next `step` returns what it has so far. Ignores an unknown or finished id."""
        self._check_alive()
        for sequence in self._unfinished.sequences_of(request_id):
            if sequence.request_id not in self._unfinished.aborted:
                self.scheduler.abort(sequence)
                self._unfinished.aborted[sequence.request_id] = sequence

    def discard_requests(self, request_ids: Iterable[str]) -> None:
        """Ends requests without an output. Ignores unknown ids, and those whose output `step` has returned."""
        request_ids = dict.fromkeys(request_ids)
        self._unfinished.drop_outputs(request_ids)
        for request_id in request_ids:
            for sequence in self._unfinished.sequences_of(request_id):
                self.scheduler.abort(sequence)
            self._unfinished.remove(request_id)

    def sequences(self, request_id: str) -> list[Sequence]:
        """Returns a request's unfinished sequences, whose tokens grow; [] for an unknown or finished request."""
        return self._unfinished.sequences_of(request_id)

    def new_tokens(self, sequence: Sequence, start: int = 0) -> NewTokens:
        """Returns the output tokens of a sequence so far, from index `start` on. Call it between steps."""
        row = sequence.row
        known = sequence.token_ids if row is None else self.scheduler.rows.known_tokens(row)
        return self._output_builder.new_tokens(sequence, known, start)

    def has_unfinished_requests(self) -> bool:
        """Returns whether `step` has something left to compute, collect or return."""
        return bool(self._unfinished)

    @property
    def is_dead(self) -> bool:
        """Whether the engine has ended, because the device failed or `exit` was called. Most calls then raise."""
        return self._dead is not None

    @property
    def statistics(self) -> EngineStatistics:
        """Totals since the engine started. The object keeps changing: take a `copy` to compare."""
        return self.metrics.totals

    @property
    def is_draining(self) -> bool:
        """Whether only steps in flight are left, whose tokens no request needs any more."""
        return bool(self._unfinished.steps) and not self._unfinished.sequences

    @property
    def num_waiting_tokens(self) -> int:
        """Number of tokens of the waiting requests. A prompt that several completions share counts once."""
        others = self._unfinished.parallel.ids_but_first()
        return sum(len(each.token_ids) for each in self.scheduler.waiting if each.request_id not in others)

    # The loop

    def step(self, request_ids: Container[str] | None = None) -> list[RequestOutput]:
        """Fills the pipeline, collects the oldest step in flight, and returns the outputs of requests that ended.

        request_ids: return the outputs of these requests only, and keep others for a later call. None: return all.
        An error or Ctrl-C during a step aborts every unfinished request, loses their tokens, and is raised. The engine
        then continues with an empty queue, unless the device itself failed.
        """
        self._check_alive()
        unfinished = self._unfinished
        try:
            self._take_grammars()
            ended = [*unfinished.aborted.values(), *self._step()]
            unfinished.aborted.clear()
            unfinished.outputs += unfinished.parallel.join([self._finish(sequence) for sequence in ended])
        except BaseException as error:
            self._recover(error)
            raise
        return unfinished.take_outputs(request_ids)

    def drain(self) -> None:
        """Collects the steps in flight once no request is left, so that the blocks they write become free."""
        while self.is_draining:
            self.step(())

    def _take_grammars(self) -> None:
        """Lets sequences run whose grammar knows what may come next. Aborts those whose grammar failed."""
        for sequence in self._grammars.collect():
            if self._unfinished.sequences.get(sequence.request_id) is sequence:
                self.abort_request(sequence.request_id)

    def _step(self) -> list[Sequence]:
        """Fills the pipeline and collects the oldest step. Returns the sequences that ended."""
        steps, observers, scheduler = self._unfinished.steps, self._observers, self.scheduler
        while len(steps) < self.resolved.pipeline_depth:
            observers.phase("schedule")
            batch = scheduler.schedule()
            if batch is None:
                break
            observers.phase("launch")
            handle = self.executor.submit(batch)
            observers.step_submitted(batch, scheduler.now, len(steps))
            steps.append(SubmittedStep(batch, handle, scheduler.now))
        if not steps:
            observers.phase("idle")
            self._grammars.wait()
            return []
        observers.phase("wait")
        step = steps[0]
        result = self.executor.collect(step.handle)
        steps.popleft()
        observers.phase("update")
        ended = scheduler.update(step.batch, result)
        observers.phase("idle")
        observers.step_collected(
            CollectedStep(step.batch, step.submitted, scheduler.now, result.gpu_ms, ended, scheduler.load)
        )
        return ended

    def _finish(self, sequence: Sequence) -> RequestOutput:
        """Removes a sequence that has ended and returns its output."""
        del self._unfinished.sequences[sequence.request_id]
        completion = self._output_builder.completion(sequence)
        self._observers.output_built(sequence, completion)
        return self._output_builder.request(sequence, completion)

    def _recover(self, error: BaseException) -> None:
        """Starts over with an empty scheduler, since a step that stopped half-way leaves an unknown state."""
        lost = self._unfinished.running()
        self._unfinished.clear()
        # Before the wait, which Ctrl-C may interrupt.
        self.scheduler = Scheduler(self.resolved, self._observers, self._clock)
        try:
            self.executor.synchronize()
        except Exception:
            self._dead = error
        self._observers.engine_failed(error, lost, goes_on=self._dead is None)

    # The rest of the public API

    def reset_prefix_cache(self) -> None:
        """Forgets every cached prefix. Running requests continue."""
        self._check_alive()
        self.scheduler.block_manager.reset_prefix_cache()

    def exit(self) -> None:
        """Ends the engine and frees the device's memory. Calling it again does nothing; most other calls then raise."""
        if self._dead is None:
            self._dead = EngineDeadError("exit() was called")
        self._report_exit()
        self._unfinished.clear()
        self._unfinished.outputs.clear()
        self._grammars.shutdown()
        self._shut_down()
        self._observers.engine_exited()

    def get_tokenizer(self) -> PreTrainedTokenizerBase:
        """Returns the transformers tokenizer. Raises InvalidArgumentError when the engine was made without one."""
        if self.tokenizer is None:
            raise InvalidArgumentError("skip_tokenizer_init", True, "False to have a tokenizer")
        return self.tokenizer

    @property
    def diagnostics(self) -> Diagnostics:
        """Profiler and memory measurements of all ranks."""
        self._check_alive()
        return self.executor.diagnostics

    def __enter__(self) -> LLMEngine:
        return self

    def __exit__(self, *exception: object) -> None:
        self.exit()

    # Helpers

    def _check_alive(self) -> None:
        if self._dead is not None:
            raise EngineDeadError.after(self._dead)

    def _check_request_id(self, request_id: str) -> None:
        if not isinstance(request_id, str) or request_id in self._unfinished:
            raise InvalidArgumentError("request_id", request_id, "a text, unique among the unfinished requests")

    def _next_seed(self) -> int:
        """Returns the seed for the next sequence without one: a hash of the engine's seed and the order of arrival."""
        word = self._num_arrivals.to_bytes(8, "little")
        return xxhash.xxh3_64_intdigest(word, seed=self.config.seed) >> 1


def _report_exit(observers: Observers, unfinished: UnfinishedRequests) -> None:
    """Tells the observers that the engine ends. A function, since `weakref.finalize` must not hold the engine."""
    observers.engine_exiting(unfinished.running())
