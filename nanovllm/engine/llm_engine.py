"""LLMEngine: the loop that turns requests into steps, and their tokens into outputs.

The way of a request:

    prepare → PreparedRequest → enqueue → Sequence → Scheduler.schedule → ScheduledBatch → Executor.submit … collect
    → StepResult → Scheduler.update → RequestOutput
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Container, Iterable
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING

import xxhash

from nanovllm.compat.unsupported import REQUEST_ARGUMENTS, UnsupportedMethods, accepting
from nanovllm.config import EngineConfig
from nanovllm.engine.executor import Diagnostics, Executor, ExecutorFactory
from nanovllm.engine.metrics import EngineMetrics
from nanovllm.engine.observer import CollectedStep, EngineObserver, EngineStart, Observers
from nanovllm.engine.request_tracker import track_requests
from nanovllm.engine.scheduler import Scheduler
from nanovllm.engine.sequence import Sequence, SequenceStatus
from nanovllm.engine.speculation import SpeculationFactory, no_speculation
from nanovllm.engine.statistics import EngineStatistics
from nanovllm.engine.turns import Call, Turns
from nanovllm.engine.unfinished_requests import Request, SubmittedStep, UnfinishedRequests
from nanovllm.errors import EngineDeadError, InvalidArgumentError
from nanovllm.outputs import RequestOutput
from nanovllm.requests.grammar_compiler import GrammarCompiler
from nanovllm.requests.output_builder import NewTokens, OutputBuilder
from nanovllm.requests.parallel_sampling import ParallelSampling
from nanovllm.requests.preparation import PreparedRequest, RequestPreparation
from nanovllm.requests.tokenization import Prompt, load_tokenizer
from nanovllm.sampling_params import SamplingParams
from nanovllm.utils.owner_process import OwnerProcess
from nanovllm.utils.stopwatch import Stopwatch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class LLMEngine(UnsupportedMethods):
    """Owns the scheduler and the executor, and keeps up to `pipeline_depth` steps in flight.

    make_executor: builds the executor, which runs the steps. observers: are called, in order, for every event; without
    any the engine logs nothing. make_speculation: chooses what drafts tokens. `from_engine_args` chooses all three, as
    `LLM` does.
    Use the engine as a context manager, or call `exit`, to free the device's memory.
    Several threads may use an engine. Requests are added, aborted and discarded at any time, which the next step acts
    on; only a step changes the scheduler, and one step runs at a time.
    """

    def __init__(
        self,
        config: EngineConfig,
        make_executor: ExecutorFactory,
        observers: Iterable[EngineObserver] = (),
        clock: Callable[[], float] = time.monotonic,
        output_builder: Callable[[PreTrainedTokenizerBase | None], OutputBuilder] = OutputBuilder,
        make_speculation: SpeculationFactory = no_speculation,
    ) -> None:
        self.config = config
        self.owner = OwnerProcess()
        self.metrics = EngineMetrics()
        self._observers = track_requests([self.metrics, *observers])
        self.engine_id = self._observers.engine_id  # in the records of the log
        self.clock = clock  # seconds; the source of every time that the engine reports
        self._observers.engine_starting(config)
        stopwatch = Stopwatch()
        self.executor: Executor = make_executor(config, stopwatch)
        # A finalizer, so that the device's memory is also freed when the engine is garbage-collected or Python ends.
        self._shut_down = weakref.finalize(self, self.owner.guard(self.executor.shutdown))
        self.resolved = self.executor.resolved
        try:
            self._observers.engine_resolved(self.resolved)
            self.tokenizer = None if config.skip_tokenizer_init else load_tokenizer(config, self.resolved.model)
            self._grammars = GrammarCompiler(self.tokenizer, self.resolved)
            self.preparation = RequestPreparation(self.tokenizer, self.resolved, self._grammars)
            self._output_builder = output_builder(self.tokenizer)
            drafts = partial(make_speculation, config, self.resolved, self._observers)
            self._make_scheduler = partial(Scheduler, self.resolved, self._observers, clock, make_speculation=drafts)
            self.scheduler = self._make_scheduler()
            stopwatch.lap("tokenizer")
            self._observers.engine_started(
                EngineStart(self.resolved, self.executor, self.metrics.totals, clock, stopwatch)
            )
        except BaseException:
            self._shut_down()
            raise
        self._unfinished = UnfinishedRequests()
        self._turns = Turns()
        self._is_whole = True  # no step, and no recovery from one, broke off
        self._resets_cache = False
        self._report_exit = weakref.finalize(self, self.owner.guard(_report_exit), self._observers, self._unfinished)
        self._num_arrivals = 0
        self._dead: BaseException | None = None

    @classmethod
    def from_engine_args(cls, engine_args: EngineConfig) -> LLMEngine:
        """Returns an engine with the executor and the observers that the arguments and the environment ask for.

        engine_args: an EngineArgs or an EngineConfig. Raises what loading the model raises, and InvalidArgumentError
        for an argument or an environment variable that is not allowed.
        """
        # Imported here: an engine that is given its executor and observers does not need it.
        from nanovllm.engine_factory import default_observers, make_executor, make_speculation, reporting_start

        config = EngineConfig(**asdict(engine_args))  # an EngineArgs can be changed: this is a checked copy
        observers = default_observers(config)
        with reporting_start(observers):
            return cls(config, make_executor, observers, make_speculation=make_speculation)

    # Requests

    @accepting(REQUEST_ARGUMENTS)
    def add_request(self, request_id: str, prompt: Prompt, params: SamplingParams | None = None) -> str:
        """Queues a request and returns its id: `prepare` and `enqueue` in one.

        prompt: a text, token ids, {"prompt": text} or {"prompt_token_ids": ids}.
        Raises what `prepare` and `enqueue` raise; the engine and its other requests continue.
        """
        self._check_alive()
        arrival = self.clock()
        self._check_request_id(request_id)
        self.enqueue(request_id, self.prepare(prompt, params), arrival)
        return request_id

    def prepare(self, prompt: Prompt, params: SamplingParams | None = None) -> PreparedRequest:
        """Tokenises and checks a request. Any thread may call it, as it does not touch the engine's state.

        Raises InvalidArgumentError for a prompt that is empty or has ids outside the vocabulary, or parameters that
        this model does not allow, and RequestTooLargeError for a request that could never run.
        """
        return self.preparation.prepare(prompt, params)

    def enqueue(self, request_id: str, request: PreparedRequest, arrival: float | None = None) -> list[Sequence]:
        """Queues a prepared request. Returns its sequences, one for each completion, whose tokens grow.

        arrival: when it arrived, on the engine's clock; None: now.
        Raises InvalidArgumentError when `request_id` is not a string, or belongs to an unfinished request.
        """
        self._check_alive()
        arrival = self.clock() if arrival is None else arrival
        parallel = None if request.params.n == 1 else ParallelSampling(request_id, request.params)
        names = [request_id] if parallel is None else parallel.ids
        params = [request.params] if parallel is None else parallel.params
        with self._unfinished.lock:
            self._check_request_id(request_id)
            taken = [name for name in names if name in self._unfinished]
            if taken:
                raise InvalidArgumentError("request_id", taken[0], "unique: completions of a request take /0, /1, …")
            sequences = [self._sequence(name, request, own) for name, own in zip(names, params, strict=True)]
            for sequence in sequences:
                sequence.arrival, sequence.queued = arrival, self.clock()
            self._unfinished.add(Request(request_id, sequences, parallel, request.grammar))
        return sequences

    def _sequence(self, name: str, request: PreparedRequest, params: SamplingParams) -> Sequence:
        seq_id, seed = self._num_arrivals, self._next_seed()
        self._num_arrivals += 1
        return self.preparation.sequence(request, seq_id, name, params, seed)

    def refuse_request(self, request_id: str, error: Exception, client_request_id: str | None = None) -> None:
        """Reports to the log and the metrics that `prepare` or `enqueue` did not allow a request."""
        self._observers.request_refused(request_id, error, client_request_id)

    def abort_request(self, request_ids: str | Iterable[str]) -> None:
        """Ends one or several requests; the next `step` returns what they have so far. Ignores unknown ids."""
        self._check_alive()
        for request_id in [request_ids] if isinstance(request_ids, str) else request_ids:
            self._unfinished.abort(request_id)

    def discard_requests(self, request_ids: Iterable[str]) -> None:
        """Ends requests without an output. Ignores unknown ids, and those whose output `step` has returned.

        Their ids are free at once, their blocks after the next step.
        """
        self._unfinished.discard(request_ids)

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

    def capture_ahead(self) -> bool:
        """Captures a CUDA graph that later steps may need, for use while the engine is idle. False: none is missing."""
        return self.executor.capture_ahead()

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
        return self._unfinished.is_draining

    @property
    def num_waiting_tokens(self) -> int:
        """Number of tokens of the waiting requests. A prompt that several completions share counts once."""
        first = [request.sequences[0] for request in self._unfinished.requests()]
        return sum(len(each.token_ids) for each in first if each.status is SequenceStatus.WAITING)

    # The loop

    def step(self, request_ids: Container[str] | None = None) -> list[RequestOutput]:
        """Fills the pipeline, collects the oldest step in flight, and returns the outputs of requests that ended.

        request_ids: return the outputs of these requests only, and keep others for a later call. None: return all, but
        not those of a `generate` or `stream` that runs.
        An error or Ctrl-C during a step aborts every unfinished request, loses their tokens, and is raised. Requests
        that are not returned here get an output with a StepFailedError. The engine then continues with an empty queue,
        unless the device itself failed. Raises InvalidStateError while another thread runs a step.
        """
        self._check_alive()
        self._turns.check_free()
        self._turns.run(partial(self._run_step, request_ids))
        return self._unfinished.take_outputs(request_ids)

    def next_outputs(self, call: Call) -> list[RequestOutput]:
        """Runs a step like `step`, for the requests of `call`. Waits instead while another thread runs a step."""
        self._check_alive()
        if not self._turns.wait():
            self._turns.run(partial(self._run_step, call.request_ids))
        return self._unfinished.take_outputs(call.request_ids)

    def drain(self) -> None:
        """Frees the blocks of discarded requests and steps in flight, once no request is left. Never waits."""
        while self.is_draining and not self._turns.is_taken:
            self._turns.run(partial(self._run_step, ()))

    def open(self, call: Call) -> None:
        """Lets steps care for `call`, whose lock is held, until `close` or until it is released."""
        self._unfinished.calls.append(call)

    def close(self, call: Call) -> None:
        """Discards what is left of a call that has ended."""
        self.discard_requests(call.request_ids)
        self.drain()

    def _run_step(self, request_ids: Container[str] | None) -> None:
        if not self._is_whole:
            self._recover(KeyboardInterrupt(), ())
            self._check_alive()
        self._is_whole = False
        try:
            ended = [*self._take_changes(), *self._step()]
            for sequence in ended:
                self._finish(sequence)
            for call in self._unfinished.calls:
                call.step_ended()
        except BaseException as error:
            self._recover(error, request_ids)
            raise
        self._is_whole = True

    def _take_changes(self) -> list[Sequence]:
        """Ends discarded requests, starts new ones, and aborts others. Returns the aborted sequences."""
        unfinished, scheduler = self._unfinished, self.scheduler
        if self._resets_cache:
            scheduler.block_manager.reset_prefix_cache()
            scheduler.speculation.forget_outputs()
            self._resets_cache = False
        to_abort: list[Sequence] = []
        if unfinished.has_changes:
            discarded, arrived = unfinished.take_changes()
            for request in discarded:
                for sequence in request.sequences:
                    sequence.left = True
                    scheduler.abort(sequence)
            for request in arrived:
                for sequence in request.sequences:
                    if request.grammar is not None:
                        self._grammars.start(sequence, request.grammar)
                    scheduler.add(sequence)
                    self._observers.request_added(sequence)
            to_abort = unfinished.take_aborted()
        aborted: list[Sequence] = []
        for sequence in to_abort + self._grammars.collect():  # those whose grammar failed
            if unfinished.is_live(sequence):
                scheduler.abort(sequence)
                aborted.append(sequence)
        return aborted

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

    def _finish(self, sequence: Sequence) -> None:
        """Builds the output of a sequence that has ended."""
        completion = self._output_builder.completion(sequence)
        self._observers.output_built(sequence, completion)
        self._unfinished.finish(sequence, self._output_builder.request(sequence, completion))

    def _recover(self, error: BaseException, request_ids: Container[str] | None) -> None:
        """Starts over with an empty scheduler, since a step that stopped half-way leaves an unknown state.

        Ctrl-C may break this off, too: then the next step does it again.
        """
        lost = list(dict.fromkeys(self._unfinished.started_sequences()))
        scheduler = self._make_scheduler(last_step=self.scheduler.last_step)
        self._unfinished.lose(error, request_ids)
        self.scheduler = scheduler
        try:
            self.executor.synchronize()
        except Exception:
            self._dead = error
            self._unfinished.clear()
        self._observers.engine_failed(error, lost, goes_on=self._dead is None)
        self._is_whole = True

    # The rest of the public API

    def reset_prefix_cache(self) -> None:
        """Forgets cached prefixes, and outputs kept for drafts, before the next step. Running requests continue."""
        self._check_alive()
        self._resets_cache = True

    def exit(self) -> None:
        """Ends the engine and frees the device's memory. Calling it again does nothing; most other calls then raise.

        Waits for the step that another thread runs.
        """
        if not self.owner.is_current:
            return
        if self._dead is None:
            self._dead = EngineDeadError("exit() was called")
        self._exit() if self._turns.is_ours else self._turns.run(self._exit)

    def _exit(self) -> None:
        self._report_exit()
        self._unfinished.clear()
        self._grammars.shutdown()
        self._shut_down()
        self._observers.engine_exited()

    def get_default_sampling_params(self) -> SamplingParams:
        """Returns the parameters of requests without any: those of the checkpoint's generation_config.json."""
        return self.preparation.default_params.clone()

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
        self.owner.check()
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
