"""LLMEngine: the loop. Requests come in, steps run, results come out.

add_request → Sequence → Scheduler.schedule → ScheduledBatch → Executor.submit … collect → StepResult
→ Scheduler.update → RequestOutput
"""

from __future__ import annotations

import logging
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields

import xxhash

from nanovllm.config import EngineConfig
from nanovllm.engine.batch import IntArray, ScheduledBatch, StepHandle, StepResult
from nanovllm.engine.executor import Diagnostics, Executor, ExecutorFactory
from nanovllm.engine.metrics import EngineMetrics, EngineStatistics, StatisticsLine
from nanovllm.engine.scheduler import Scheduler
from nanovllm.engine.sequence import Sequence
from nanovllm.errors import EngineDeadError, InvalidArgumentError
from nanovllm.logs import events
from nanovllm.outputs import CompletionOutput, RequestOutput
from nanovllm.requests.grammar_compiler import GrammarCompiler
from nanovllm.requests.parallel_sampling import Branches, BranchTable
from nanovllm.requests.tokenization import NewTokens, Prompt, Tokenizing, load_tokenizer
from nanovllm.sampling_params import SamplingParams
from nanovllm.tracing.request_spans import close_request_spans, open_request_spans
from nanovllm.tracing.timeline import close_timeline, open_timeline, section
from nanovllm.utils import env
from nanovllm.utils.logger import configure_logging, log_rule, setup_logger
from nanovllm.utils.stopwatch import Stopwatch

logger = setup_logger(__name__)


@dataclass(frozen=True)
class _InFlight:
    """A step that was submitted and not collected yet."""

    batch: ScheduledBatch
    handle: StepHandle
    submitted: float  # seconds of the engine's clock


class LLMEngine:
    """Owns the scheduler and the executor, and keeps up to `pipeline_depth` steps in flight.

    Use as a context manager, or call `exit`, to give the device's memory back.
    """

    def __init__(
        self,
        config: EngineConfig,
        make_executor: ExecutorFactory,
        clock: Callable[[], float] = time.monotonic,
        on_exit: Callable[[], None] = lambda: None,
    ) -> None:
        self._clock = clock  # of every time that the engine tells; seconds
        configure_logging()
        self._on_exit = on_exit
        log_rule(logger)
        events.engine_init.log(logger)
        events.engine_model.log(logger, model=config.model)
        names = ["tensor_parallel_size", "max_model_len", *(f.name for f in fields(config) if f.name != "model")]
        events.engine_config.log(logger, **{name: getattr(config, name) for name in names})
        log_rule(logger)
        self.config = config
        stopwatch = Stopwatch()
        self.executor: Executor = make_executor(config, stopwatch)
        # Also when the engine is collected, and when Python ends: the device's memory is not left to chance.
        self._shut_down = weakref.finalize(self, self.executor.shutdown)
        self.resolved = self.executor.resolved
        events.engine_resolved.log(logger, **{f.name: getattr(self.resolved, f.name) for f in fields(self.resolved)})
        try:
            self.tokenizer = None if config.skip_tokenizer_init else load_tokenizer(config, self.resolved.model)
            self._tokenizing = Tokenizing(self.tokenizer, self.resolved)
            self._grammar_compiler = GrammarCompiler(self.tokenizer, self.resolved)
            self.metrics = EngineMetrics()
            self.scheduler = Scheduler(self.resolved, self.metrics, clock)
            self._statistics_line = StatisticsLine(env.log_stats_interval(), self.statistics)
            other_ranks = self.executor if config.tensor_parallel_size > 1 else None
            self._timeline = open_timeline(clock, self.resolved.pipeline_depth, other_ranks)
            self._spans = open_request_spans(config.model, clock)
        except BaseException:
            self._shut_down()
            raise
        stopwatch.lap("tokenizer")
        total, parts = stopwatch.total, str(stopwatch)
        events.engine_startup.log(logger, total_seconds=total, parts=parts, seconds=stopwatch.seconds)
        self._requests: dict[str, Sequence] = {}
        # As `_shut_down`: what has not ended by then is in the timeline too.
        self._close_timeline = weakref.finalize(self, close_timeline, self._timeline, self._requests.values())
        self._close_spans = weakref.finalize(self, close_request_spans, self._spans)
        self._branches = BranchTable()
        self._aborted: dict[str, Sequence] = {}  # not reported yet
        self._unclaimed: list[RequestOutput] = []  # handed back, reported by the next step
        self._in_flight: deque[_InFlight] = deque()
        self._num_arrivals = 0
        self._last_collected = 0.0
        self._preempted_before = 0  # as `step.done` last said
        self._dead: BaseException | None = None

    # Requests

    def add_request(self, request_id: str, prompt: Prompt, params: SamplingParams | None = None) -> str:
        """Queues a request and returns its id.

        prompt: a text, token ids, {"prompt": text} or {"prompt_token_ids": ids}.
        Raises InvalidArgumentError for a prompt that is empty or has ids outside the vocabulary, and
        RequestTooLargeError for one that could never run; the engine and its other requests go on.
        """
        self._check_alive()
        arrival = self._clock()
        params = SamplingParams() if params is None else params
        if not isinstance(params, SamplingParams):
            raise InvalidArgumentError("sampling_params", params, "a SamplingParams")
        if not isinstance(request_id, str) or request_id in self._requests or request_id in self._branches:
            raise InvalidArgumentError("request_id", request_id, "a text, unique among the unfinished requests")
        text, token_ids = self._tokenizing.read(prompt)
        if params.n == 1:
            self._add_sequence(request_id, text, token_ids, params, arrival)
            return request_id
        branches = Branches(request_id, params)
        taken = [name for name in branches.ids if name in self._requests or name in self._branches]
        if taken:
            raise InvalidArgumentError("request_id", taken[0], "unique: completions of a request take /0, /1, …")
        self._branches.add(branches)  # first: Ctrl-C may come in between
        try:
            for name, own in zip(branches.ids, branches.params, strict=True):
                self._add_sequence(name, text, token_ids, own, arrival)
        except BaseException:
            self.discard_requests([request_id])
            raise
        return request_id

    def _add_sequence(
        self, request_id: str, text: str | None, token_ids: IntArray, params: SamplingParams, arrival: float
    ) -> None:
        sequence = Sequence.from_prompt(
            self._num_arrivals,
            request_id,
            token_ids,
            params,
            max_model_len=self.resolved.max_model_len,
            seed=self._next_seed(),
            prompt=text,
        )
        sequence.stop_strings = self._tokenizing.stop_strings(params)
        sequence.logit_edits = self._tokenizing.logit_edits(params, len(token_ids))
        self._grammar_compiler.start(sequence)
        if not self.has_unfinished_requests():
            self._statistics_line.start(arrival)
        self._num_arrivals += 1
        self._requests[request_id] = sequence
        sequence.arrival, sequence.queued = arrival, self._clock()
        self.scheduler.add(sequence)
        if logger.isEnabledFor(logging.DEBUG):
            events.request_added.log(
                logger,
                request_id=request_id,
                seq_id=sequence.seq_id,
                num_prompt_tokens=sequence.num_prompt_tokens,
                max_tokens=params.max_tokens,
                **({"prompt": text} if env.log_prompts() else {}),
            )

    def abort_request(self, request_id: str) -> None:
        """Ends a request; the next `step` returns what it has so far. An unknown or finished id does nothing."""
        self._check_alive()
        for name in self._branches.sequence_ids(request_id):
            sequence = self._requests.get(name)
            if sequence is not None and name not in self._aborted:
                self.scheduler.abort(sequence)
                self._aborted[name] = sequence

    def discard_requests(self, request_ids: Iterable[str]) -> None:
        """Ends requests without an output; unknown ids, and those whose output `step` has returned, do nothing."""
        request_ids = dict.fromkeys(request_ids)
        self._unclaimed = [output for output in self._unclaimed if output.request_id not in request_ids]
        for request_id in request_ids:
            for name in self._branches.sequence_ids(request_id):
                sequence = self._requests.pop(name, None)
                if sequence is not None:
                    self.scheduler.abort(sequence)
                    self._aborted.pop(name, None)
                    if self._spans is not None:
                        self._spans.record(sequence)
            self._branches.forget(request_id)

    def sequences(self, request_id: str) -> list[Sequence]:
        """A request's unfinished completions, for who shows them while they grow; [] when there is no such request."""
        return [self._requests[name] for name in self._branches.sequence_ids(request_id) if name in self._requests]

    def new_tokens(self, sequence: Sequence, start: int = 0) -> NewTokens:
        """What is known of a sequence's output, from token `start` on. Only between steps."""
        row = sequence.row
        known = sequence.token_ids if row is None else self.scheduler.rows.known_tokens(row)
        return self._tokenizing.new_tokens(sequence, known, start)

    def hand_back(self, outputs: Iterable[RequestOutput]) -> None:
        """Outputs of requests that the caller did not make: the next `step` returns them again."""
        self._unclaimed += outputs

    def has_unfinished_requests(self) -> bool:
        """Whether `step` has something to compute, to collect or to report."""
        return bool(self._requests or self._in_flight or self._unclaimed)

    @property
    def is_dead(self) -> bool:
        """Whether it can do nothing any more: the device failed, or `exit` was called."""
        return self._dead is not None

    @property
    def statistics(self) -> EngineStatistics:
        """Totals since the engine started; a living object: `copy` it to compare."""
        return self.metrics.totals

    @property
    def is_draining(self) -> bool:
        """No request is left, only steps in flight that computed a token too many."""
        return bool(self._in_flight) and not self._requests

    @property
    def num_waiting_tokens(self) -> int:
        """Tokens of the requests that are not running yet, those of several completions once."""
        others = self._branches.ids_but_first()
        return sum(len(each.token_ids) for each in self.scheduler.waiting if each.request_id not in others)

    # The loop

    def step(self) -> list[RequestOutput]:
        """Fills the pipeline, collects the oldest step in flight, and returns the requests that ended.

        An error, or Ctrl-C, in a step aborts every unfinished request, whose tokens are lost, and is raised;
        the engine then goes on with an empty queue, unless the device itself is out of order.
        """
        self._check_alive()
        try:
            self._take_grammars()
            ended = [*self._aborted.values(), *self._step()]
            self._aborted.clear()
            unclaimed, self._unclaimed = self._unclaimed, []
            return unclaimed + self._branches.join([self._finish(sequence) for sequence in ended])
        except BaseException as error:
            self._recover(error)
            raise

    def _take_grammars(self) -> None:
        """What is compiled may run; a request whose grammar is of no use ends alone."""
        idle = not self._in_flight and all(sequence.waits_for_grammar for sequence in self._requests.values())
        for sequence in self._grammar_compiler.collect(idle):
            if self._requests.get(sequence.request_id) is sequence:
                self.abort_request(sequence.request_id)

    def _step(self) -> list[Sequence]:
        if not self._in_flight:  # nothing was running: idle time belongs to no step
            self._last_collected = self._clock()
        while len(self._in_flight) < self.resolved.pipeline_depth:
            with section(self._timeline, "schedule"):
                batch = self.scheduler.schedule()
            if batch is None:
                break
            with section(self._timeline, "launch"):
                self._in_flight.append(_InFlight(batch, self.executor.submit(batch), self.scheduler.now))
        if not self._in_flight:
            return []
        step = self._in_flight[0]
        with section(self._timeline, "wait"):
            result = self.executor.collect(step.handle)
        self._in_flight.popleft()
        with section(self._timeline, "update"):
            ended = self.scheduler.update(step.batch, result)
        self._count(step.batch)
        if self._timeline is not None:
            times = (step.submitted, self.scheduler.now, result.gpu_ms)
            self._timeline.step(step.batch, *times, self.scheduler.load)
        if logger.isEnabledFor(logging.DEBUG):
            self._log_step(step, result)
        if self._statistics_line.is_due(self.scheduler.now):
            self._statistics_line.log(self.scheduler.now, self.scheduler.load)
        return ended

    def _log_step(self, step: _InFlight, result: StepResult) -> None:
        chunks, load = step.batch.chunks, self.scheduler.load
        num_decode_seqs = len(step.batch.decode_rows)
        events.step_done.log(
            logger,
            step=step.batch.step,
            kind=step.batch.kind,
            num_prefill_tokens=step.batch.num_prefill_tokens,
            num_prefill_seqs=len(chunks),
            num_decode_seqs=num_decode_seqs,
            num_output_tokens=len(step.batch.sampled_rows),
            preempted=self.statistics.num_preemptions - self._preempted_before,
            num_running=load.num_running,
            num_waiting=load.num_waiting,
            used_blocks=load.used_blocks,
            num_blocks=load.num_blocks,
            wall_ms=(self.scheduler.now - step.submitted) * 1e3,
            gpu_ms=result.gpu_ms,
        )
        self._preempted_before = self.statistics.num_preemptions

    def _count(self, batch: ScheduledBatch) -> None:
        now = self.scheduler.now
        elapsed, self._last_collected = now - self._last_collected, now
        statistics = self.statistics
        statistics.num_steps += 1
        statistics.num_prompt_tokens += batch.num_prefill_tokens
        statistics.num_output_tokens += len(batch.sampled_rows)
        if len(batch.chunks):
            statistics.prefill_seconds += elapsed
        else:
            statistics.decode_seconds += elapsed

    def _finish(self, sequence: Sequence) -> RequestOutput:
        del self._requests[sequence.request_id]
        assert sequence.finish_reason is not None, "only ended sequences give an output"
        token_ids, logprobs = self.new_tokens(sequence)
        metrics = sequence.metrics()
        self.metrics.finish(sequence.finish_reason, metrics)
        if self._timeline is not None:
            self._timeline.request(sequence, sequence.finish_reason)
        if self._spans is not None:
            self._spans.record(sequence)
        text = self._tokenizing.output_text(sequence)
        if logger.isEnabledFor(logging.DEBUG) and env.log_prompts():
            events.request_output.log(logger, request_id=sequence.request_id, text=text)
        completion = CompletionOutput(
            index=0,
            text=text,
            token_ids=token_ids,
            finish_reason=sequence.finish_reason,
            logprobs=logprobs,
            cumulative_logprob=None if logprobs is None else sum(own.logprob for own in sequence.logprobs),
            stop_reason=sequence.stop_reason,
        )
        return RequestOutput(
            request_id=sequence.request_id,
            prompt=sequence.prompt,
            prompt_token_ids=sequence.prompt_token_ids,
            outputs=[completion],
            finished=True,
            num_cached_tokens=metrics.num_cached_tokens,
            metrics=metrics,
            prompt_logprobs=self._tokenizing.prompt_logprobs(sequence),
            error=sequence.error,
        )

    def _recover(self, error: BaseException) -> None:
        """Starts over with an empty scheduler: a step that stopped half-way leaves nothing that can be trusted."""
        if self._timeline is not None:
            for sequence in self._requests.values():
                self._timeline.request(sequence, "lost")
            self._timeline.flush()
        if self._spans is not None:
            for sequence in self._requests.values():
                self._spans.record(sequence, error)
        self._requests.clear()
        self._branches.clear()
        self._aborted.clear()
        self._in_flight.clear()
        self.scheduler = Scheduler(self.resolved, self.metrics, self._clock)  # first: Ctrl-C may end the wait
        try:
            self.executor.synchronize()
        except Exception:
            self._dead = error
        interrupted = not isinstance(error, Exception)
        event = events.engine_interrupted if interrupted else events.engine_error
        event.log(
            logger,
            what="was interrupted" if interrupted else "failed",
            error=repr(error),
            state="goes on" if self._dead is None else "can not go on",
        )

    # The rest of the face

    def reset_prefix_cache(self) -> None:
        """Forgets every cached prefix; running requests go on."""
        self._check_alive()
        self.scheduler.block_manager.reset_prefix_cache()

    def exit(self) -> None:
        """Gives the device's memory back. Calling it again does nothing; any other call raises after it."""
        if self._dead is None:
            self._dead = EngineDeadError("exit() was called")
        self._close_timeline()
        self._close_spans()
        for pending in (self._requests, self._branches, self._aborted, self._unclaimed, self._in_flight):
            pending.clear()
        self._grammar_compiler.shutdown()
        self._shut_down()
        self._on_exit()

    @property
    def diagnostics(self) -> Diagnostics:
        """Profiler and memory of the device."""
        self._check_alive()
        return self.executor.diagnostics

    def __enter__(self) -> LLMEngine:
        return self

    def __exit__(self, *exception: object) -> None:
        self.exit()

    # Helpers

    def _check_alive(self) -> None:
        if self._dead is not None:
            raise EngineDeadError(f"This engine has ended ({self._dead}): make a new one.") from self._dead

    def _next_seed(self) -> int:
        """What a request without a seed samples with: a function of the engine's seed and the order of arrival."""
        word = self._num_arrivals.to_bytes(8, "little")
        return xxhash.xxh3_64_intdigest(word, seed=self.config.seed) >> 1
