"""EngineLoop: runs an `LLMEngine` for the consumers of `AsyncLLM`, between the commands that they send.

It sends one event a step, with the new tokens of all requests. Texts and log-probabilities are built by the consumers'
side.
"""

from __future__ import annotations

import queue
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from typing_extensions import assert_never

from nanovllm.async_engine.messages import (
    AbortNamed,
    AbortRequest,
    AddRequest,
    Answer,
    Command,
    CompletionEnd,
    DropClient,
    DropRequest,
    Event,
    Logprobs,
    RefuseRequest,
    RequestEnd,
    RequestRefused,
    RequestsLost,
    ResetPrefixCache,
    StartProfile,
    StepNews,
    StopProfile,
)
from nanovllm.async_engine.routing import client_of
from nanovllm.config import EngineConfig
from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.engine.observer import EngineObserver, SampledStep, VerifiedDrafts
from nanovllm.engine.sequence import Sequence, TokenLogprob
from nanovllm.engine.submission_delay import SubmissionDelay
from nanovllm.engine_factory import default_observers, make_executor, make_speculation, reporting_start
from nanovllm.errors import InvalidArgumentError
from nanovllm.outputs import RequestOutput
from nanovllm.requests.output_builder import OutputBuilder
from nanovllm.utils import env


@dataclass(frozen=True)
class _Request:
    number: int
    sequences: list[Sequence]


class EngineLoop(EngineObserver):
    """Makes an engine. `run` then serves commands until it is told to stop, in the same thread.

    deliver: takes the events. observers: further ones of the engine.
    """

    def __init__(
        self, config: EngineConfig, deliver: Callable[[Event], None], observer: EngineObserver | None = None
    ) -> None:
        self._deliver = deliver
        self._commands: queue.SimpleQueue[Command | None] = queue.SimpleQueue()  # None: stop
        self._requests: dict[str, _Request] = {}  # unfinished
        self._numbers: dict[Sequence, int] = {}  # of the sequences whose tokens are sent
        self._unstarted: set[Sequence] = set()  # those without a token
        self._step: SampledStep | None = None  # the last one, and the sequences of its tokens
        self._sampled: list[Sequence] = []
        self._gained: dict[Sequence, int] = {}  # tokens that some of these got beside the first
        self._delay = SubmissionDelay(time.monotonic)
        observers = [*default_observers(config), self, self._delay, *([] if observer is None else [observer])]
        with reporting_start(observers):
            self.engine = LLMEngine(
                config, make_executor, observers, output_builder=_output_builder, make_speculation=make_speculation
            )

    def send(self, command: Command | None) -> None:
        """Lets the loop act on a command between steps. None: stop. Any thread may call it."""
        self._commands.put(command)

    def run(self) -> None:
        """Runs steps while there are requests, and commands between them. Returns at the command to stop."""
        engine = self.engine
        while True:
            with suppress(queue.Empty):  # a step is due
                while True:
                    command = self._next_command()
                    if command is None:
                        return
                    self._act(command)
            self._step = None
            try:
                outputs = engine.step()
            except Exception as error:  # the requests are lost; `is_dead` says whether the engine goes on
                self._lose(error)
                continue
            news = self._news(outputs)
            if len(news.numbers) or news.ended:
                self._deliver(news)

    # Commands

    def _next_command(self) -> Command | None:
        """Returns the next command. Waits for it while the engine is idle, or while the next step can wait.

        Raises queue.Empty when a step is due.
        """
        engine, commands = self.engine, self._commands
        if engine.has_unfinished_requests():
            return commands.get(timeout=self._delay.seconds())
        while commands.empty() and engine.capture_ahead():
            pass
        return commands.get()

    def _act(self, command: Command) -> None:
        if isinstance(command, RefuseRequest):
            self._refuse(command)
        elif isinstance(command, AddRequest):
            self._add(command)
        elif isinstance(command, AbortRequest):
            if self._is_running(command):
                self.engine.abort_request(command.request_id)
        elif isinstance(command, DropRequest):
            if self._is_running(command):
                self._discard(command.request_id)
        elif isinstance(command, DropClient):
            for request_id, request in list(self._requests.items()):
                if client_of(request.number) == command.client:
                    self._discard(request_id)
        elif isinstance(command, ResetPrefixCache):
            self.engine.reset_prefix_cache()
        elif isinstance(command, AbortNamed):
            self._abort_named(command)
        elif isinstance(command, (StartProfile, StopProfile)):
            self._profile(command)
        else:
            assert_never(command)

    def _add(self, command: AddRequest) -> None:
        engine, request_id = self.engine, command.request_id
        try:
            sequences = command.context.run(engine.enqueue, request_id, command.prepared, command.arrival)
        except Exception as error:  # concerns this request alone
            if isinstance(error, InvalidArgumentError):
                self._refuse(RefuseRequest(request_id, error, command.context, command.prepared.client_request_id))
            self._deliver(RequestRefused(command.number, error))
            return
        self._requests[request_id] = _Request(command.number, sequences)
        if command.is_aborted:
            engine.abort_request(request_id)
        for number, sequence in enumerate(sequences, command.number):
            sequence.streamed = True
            if command.is_streamed:
                self._numbers[sequence] = number
                self._unstarted.add(sequence)

    def _refuse(self, command: RefuseRequest) -> None:
        refuse = self.engine.refuse_request
        command.context.run(refuse, command.request_id, command.error, command.client_request_id)

    def _abort_named(self, command: AbortNamed) -> None:
        def is_named(request_id: str) -> bool:
            whole, _, number = request_id.rpartition("-")
            return request_id in command.request_ids or (number.isdecimal() and whole in command.request_ids)

        found = [request_id for request_id in self._requests if is_named(request_id)]
        self.engine.abort_request(found)
        self._deliver(Answer(command.question, str(len(found))))

    def _profile(self, command: StartProfile | StopProfile) -> None:
        engine, text = self.engine, ""
        try:
            if isinstance(command, StartProfile):
                engine.diagnostics.start_profile(Path(command.folder))
            else:
                text = engine.diagnostics.stop_profile()
        except Exception as error:  # the engine goes on
            self._deliver(Answer(command.question, error=error))
        else:
            self._deliver(Answer(command.question, text))

    def _is_running(self, command: AbortRequest | DropRequest) -> bool:
        request = self._requests.get(command.request_id)
        return request is not None and request.number == command.number

    def _discard(self, request_id: str) -> None:
        self._forget(request_id)
        self.engine.discard_requests([request_id])

    def _forget(self, request_id: str) -> _Request:
        request = self._requests.pop(request_id)
        for sequence in request.sequences:
            self._numbers.pop(sequence, None)
            self._unstarted.discard(sequence)
        return request

    # Events

    def tokens_sampled(self, step: SampledStep) -> None:
        sequences = step.rows.sequences
        self._step, self._sampled = step, [sequences[row] for row in step.sampled.tolist()]
        self._gained = {}

    def drafts_verified(self, drafts: VerifiedDrafts) -> None:
        self._gained = dict(drafts.gained)

    def _news(self, outputs: list[RequestOutput]) -> StepNews:
        """Returns what the last step brought. outputs: of the requests that ended."""
        ended = [self._end(output) for output in outputs]
        numbers: list[int] = []
        token_ids: list[int] = []
        scored: list[int] = []
        scores: list[TokenLogprob] = []
        cached: list[tuple[int, int]] = []
        if self._step is not None:
            rows, sampled = self._step.rows, self._step.sampled
            newest = rows.token_ids[sampled, rows.num_tokens[sampled] - 1].tolist()
            for sequence, token_id in zip(self._sampled, newest, strict=True):
                number = self._numbers.get(sequence)
                # The tokens of a sequence that has ended are sent with the end of its request.
                if number is None or sequence.finish_reason is not None:
                    continue
                num_new = 1 + self._gained.get(sequence, 0)
                if sequence.row is None:  # preempted since
                    new = sequence.token_ids[-num_new:].tolist()
                else:
                    new = [token_id] if num_new == 1 else rows.known_tokens(sequence.row)[-num_new:].tolist()
                if sequence.params.logprobs is not None:
                    scored += range(len(numbers), len(numbers) + num_new)
                    scores += sequence.logprobs[-num_new:]
                if sequence in self._unstarted:
                    self._unstarted.remove(sequence)
                    cached.append((number, sequence.num_cached_tokens or 0))
                numbers += [number] * num_new
                token_ids += new
        return StepNews(
            numbers=np.array(numbers, dtype=np.int64),
            token_ids=np.array(token_ids, dtype=np.int32),
            scored=np.array(scored, dtype=np.int32),
            logprobs=Logprobs.pack(scores),
            cached=cached,
            ended=ended,
        )

    def _end(self, output: RequestOutput) -> RequestEnd:
        request = self._forget(output.request_id)
        pairs = zip(request.sequences, output.outputs, strict=True)
        return RequestEnd(request.number, [CompletionEnd.of(*pair) for pair in pairs])

    def _lose(self, error: Exception) -> None:
        lost = [self._forget(request_id).number for request_id in list(self._requests)]
        self._deliver(RequestsLost(lost, error, goes_on=not self.engine.is_dead))


def _output_builder(tokenizer: object) -> OutputBuilder:
    """Returns what builds the engine's own outputs. Only the log reads their texts, if it is asked to show them."""
    return OutputBuilder(tokenizer if env.log_prompts() else None, with_logprobs=False)
