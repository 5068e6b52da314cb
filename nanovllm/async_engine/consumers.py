"""Consumers: what the consumers of `AsyncLLM` share with an engine that runs elsewhere.

They send commands to it, and a thread hands its events to `Consumers.receive`. The unread tokens of each request and,
once it has ended, its end are guarded by a lock. New tokens are appended to unread ones, so a slow consumer gets fewer
and longer outputs, and delays no other request. At most one call that wakes consumers is pending in each event loop.
"""

from __future__ import annotations

import asyncio
import contextvars
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

from nanovllm.async_engine.messages import (
    AbortRequest,
    AddRequest,
    Answer,
    Command,
    DropRequest,
    EngineEnded,
    Event,
    Question,
    RefuseRequest,
    RequestEnd,
    RequestRefused,
    RequestsLost,
    StepNews,
)
from nanovllm.engine.sequence import TokenLogprob
from nanovllm.errors import EngineDeadError, InvalidArgumentError, InvalidStateError, StepFailedError
from nanovllm.metrics import MetricsSnapshot
from nanovllm.outputs import RequestOutput
from nanovllm.requests.output_builder import OutputBuilder
from nanovllm.requests.parallel_sampling import ParallelSampling
from nanovllm.requests.preparation import PreparedRequest, RequestPreparation
from nanovllm.sampling_params import RequestOutputKind
from nanovllm.streaming import OutputStream
from nanovllm.utils.arguments import Rule
from nanovllm.utils.owner_process import OwnerProcess

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

REQUEST_ID = "a text, unique among the unfinished requests"  # what a request id must be
CLIENT_REQUEST_ID = Rule(
    "a text of 1 to 128 printable characters",
    lambda value: isinstance(value, str) and 0 < len(value) <= 128 and value.isprintable(),
)


class EngineConnection(Protocol):
    """An engine that runs elsewhere, in a thread (`EngineThread`) or a process (`EngineProcess`)."""

    tokenizer: PreTrainedTokenizerBase | None  # these three once it has started
    preparation: RequestPreparation
    first_number: int  # of the requests that are sent here

    def start(self, receive: Callable[[Event], None]) -> None:
        """Starts the engine, whose events `receive` takes. Raises what making the engine raises."""

    def send(self, command: Command) -> None:
        """Sends a command. Does nothing once the engine has ended."""

    def metrics(self) -> MetricsSnapshot:
        """Returns the engine's figures of this moment; once it has ended, the last ones."""

    def stop(self, wait: bool = True) -> None:
        """Ends the engine and, with `wait`, waits for that."""


class AsyncRequest:
    """A request and what its consumer has not fetched. The lock of `Consumers` guards all but the first five."""

    def __init__(self, request_id: str, kind: RequestOutputKind, client_request_id: str | None) -> None:
        self.request_id, self.kind, self.client_request_id = request_id, kind, client_request_id
        self.context = contextvars.copy_context()  # its consumer's, with the current span if there is one
        self.news = asyncio.Event()  # set in the event loop only
        self.loop: asyncio.AbstractEventLoop | None = None  # the consumer's, once it has begun
        self.arrival = 0.0  # when its consumer began, unless it is set before
        self.is_aborted = False
        self.when_ended: list[Callable[[], object]] = []
        self.started: StartedRequest | None = None
        self.has_news = False  # tokens or an end that its consumer has not fetched
        self.end: RequestEnd | BaseException | None = None


class StartedRequest:
    """The consumers' side of a request that the engine has: its own sequences, and their unread tokens."""

    def __init__(
        self,
        number: int,
        request: AsyncRequest,
        prepared: PreparedRequest,
        preparation: RequestPreparation,
        builder: OutputBuilder,
    ) -> None:
        self.number, self._request, self._builder = number, request, builder
        params = prepared.params
        self._parallel = None if params.n == 1 else ParallelSampling(request.request_id, params)
        names = [request.request_id] if self._parallel is None else self._parallel.ids
        each = [params] if self._parallel is None else self._parallel.params
        self.sequences = [
            preparation.sequence(prepared, index, name, own, seed=0)
            for index, (name, own) in enumerate(zip(names, each, strict=True))
        ]
        for sequence in self.sequences:
            sequence.arrival = request.arrival
        self.is_streamed = (params.output_kind or request.kind) is not RequestOutputKind.FINAL_ONLY
        self._stream = OutputStream(builder.tokenizer, request.request_id, self.sequences, request.kind)
        self._unread: dict[int, tuple[list[int], list[TokenLogprob]]] = {}  # by index of the completion

    def add(self, index: int, token_id: int, logprob: TokenLogprob | None) -> None:
        """Takes the next token of a completion."""
        token_ids, logprobs = self._unread.setdefault(index, ([], []))
        token_ids.append(token_id)
        if logprob is not None:
            logprobs.append(logprob)

    def take(self) -> dict[int, tuple[list[int], list[TokenLogprob]]]:
        """Removes and returns the unread tokens."""
        unread, self._unread = self._unread, {}
        return unread

    def grow(self, unread: dict[int, tuple[list[int], list[TokenLogprob]]]) -> RequestOutput:
        """Returns the next output, which includes `unread`."""
        news = {
            index: self._builder.tokens(self.sequences[index].params, token_ids, logprobs)
            for index, (token_ids, logprobs) in unread.items()
        }
        return self._stream.grow(news)

    def end(self, end: RequestEnd) -> RequestOutput:
        """Returns the last output. Raises the error of a request that has failed."""
        final: RequestOutput | None = None
        for sequence, completion in zip(self.sequences, end.completions, strict=True):
            completion.apply(sequence)
            output = self._builder.request(sequence, self._builder.completion(sequence))
            final = output if self._parallel is None else self._parallel.add(output)
        assert final is not None, "all completions have ended"
        if final.error is not None:
            raise final.error
        return self._stream.end(final)


class Consumers:
    """The open requests of an engine. Raises what starting the engine raises."""

    def __init__(self, connection: EngineConnection) -> None:
        self._connection = connection
        self.owner = OwnerProcess()
        self._lock = threading.RLock()  # a garbage collection may close a request while it is held
        # Guarded by the lock:
        self._open: dict[str, AsyncRequest] = {}  # requests whose consumer has not left
        self._completions: dict[
            int, tuple[AsyncRequest, StartedRequest, int]
        ] = {}  # of the open ones, with their index
        self._loops: set[asyncio.AbstractEventLoop] = set()  # of the open requests, and perhaps others
        self._to_wake: dict[
            asyncio.AbstractEventLoop, list[AsyncRequest]
        ] = {}  # by loops in which a `_wake` is pending
        self._questions: dict[int, Future[str]] = {}  # those without an answer
        self._dead: BaseException | None = None
        connection.start(self.receive)
        self._next_number = self._next_question = connection.first_number
        self._builder = OutputBuilder(connection.tokenizer)

    # Called by consumers

    @property
    def is_dead(self) -> bool:
        """Whether the engine has ended."""
        return self._dead is not None

    def open(self, request: AsyncRequest, loop: asyncio.AbstractEventLoop) -> None:
        """Takes the id of a request. Its consumer runs in `loop`."""
        self.owner.check()
        with self._lock:
            if self._dead is not None:
                raise EngineDeadError.after(self._dead)
            for closed in [each for each in self._loops if each.is_closed()]:
                self._drop_loop(closed)
            if request.request_id in self._open:
                raise InvalidArgumentError("request_id", request.request_id, REQUEST_ID)
            request.loop, request.arrival = loop, request.arrival or time.monotonic()
            self._loops.add(loop)
            self._open[request.request_id] = request

    def start(self, request: AsyncRequest, prepared: PreparedRequest) -> None:
        """Sends a request to the engine."""
        with self._lock:
            number = self._next_number
            self._next_number += prepared.params.n
            started = StartedRequest(number, request, prepared, self._connection.preparation, self._builder)
            if self._open.get(request.request_id) is not request:  # its consumer has left
                return
            request.started = started
            for index in range(prepared.params.n):
                self._completions[number + index] = request, started, index
            self._connection.send(
                AddRequest(
                    number=number,
                    request_id=request.request_id,
                    prepared=replace(prepared, client_request_id=request.client_request_id),
                    arrival=request.arrival,
                    is_streamed=started.is_streamed,
                    is_aborted=request.is_aborted,
                    context=request.context,
                )
            )

    def refuse(self, request: AsyncRequest, error: InvalidArgumentError) -> None:
        """Reports a request that is not allowed to the log and the metrics."""
        refusal = RefuseRequest(request.request_id, error, request.context, request.client_request_id)
        self._connection.send(refusal)

    def take(self, request: AsyncRequest) -> RequestOutput | None:
        """Returns everything that the consumer has not fetched as one output; None if there is nothing.

        Raises the error that ended the request, if any.
        """
        request.news.clear()
        if not request.has_news:  # set before the event loop is told to wake the consumer
            return None
        with self._lock:
            request.has_news = False
            end, started = request.end, request.started
            unread = {} if started is None else started.take()
        if isinstance(end, BaseException):
            raise end
        assert started is not None, "the engine has it"
        # The end has all tokens, including the unread ones.
        return started.grow(unread) if end is None else started.end(end)

    def abort(self, request_id: str, when_ended: Callable[[], object]) -> bool:
        """Asks the engine to end a request. Returns False for an unknown id; else `when_ended` is called at its end."""
        with self._lock:
            request = self._open.get(request_id)
            if request is None or request.end is not None:
                return False
            request.when_ended.append(when_ended)
            request.is_aborted = True
            if request.started is not None:
                self._connection.send(AbortRequest(request.started.number, request_id))
            return True

    def ask(self, make_question: Callable[[int], Question]) -> Future[str]:
        """Sends a question, made with its number, to the engine. Returns the answer to come."""
        self.owner.check()
        with self._lock:
            if self._dead is not None:
                raise EngineDeadError.after(self._dead)
            number, answer = self._next_question, Future[str]()
            self._next_question += 1
            self._questions[number] = answer
            self._connection.send(make_question(number))
        return answer

    def close(self, request: AsyncRequest) -> None:
        """Forgets a request whose consumer leaves. Drops it from the engine if it is unfinished."""
        with self._lock:
            if self._open.get(request.request_id) is request:
                del self._open[request.request_id]
                self._drop(request, tell=request.end is None)
                self._has_ended(request)

    def _drop(self, request: AsyncRequest, tell: bool) -> None:
        started = request.started
        if started is not None:
            for index in range(len(started.sequences)):
                self._completions.pop(started.number + index, None)
            if tell:
                self._connection.send(DropRequest(started.number, request.request_id))

    def _wake(self, loop: asyncio.AbstractEventLoop) -> None:
        """Wakes the consumers that have something to fetch. Runs in `loop`, which is theirs."""
        with self._lock:
            to_wake = self._to_wake.pop(loop, [])
        for request in to_wake:
            with suppress(RuntimeError):  # its consumer went on in another loop, which is closed
                request.news.set()

    # Called by the thread that receives the engine's events

    def receive(self, event: Event) -> None:
        """Stores an event for the consumers that it concerns, and lets their event loops wake them."""
        with self._lock:
            if isinstance(event, StepNews):
                self._take_news(event)
            elif isinstance(event, RequestRefused):
                self._end(event.number, event.error)
            elif isinstance(event, RequestsLost):
                kind = StepFailedError if event.goes_on else EngineDeadError
                self._dead = self._dead if event.goes_on else event.error
                for number in event.numbers:
                    self._end(number, kind.after(event.error))
            elif isinstance(event, Answer):
                self._take_answer(event)
            else:
                self._take_death(event)

    def _take_news(self, news: StepNews) -> None:
        logprobs = [] if news.logprobs is None else news.logprobs.unpack()
        scores = dict(zip(news.scored.tolist(), logprobs, strict=True))
        for number, num_cached in news.cached:
            if (known := self._completions.get(number)) is not None:
                known[1].sequences[known[2]].num_cached_tokens = num_cached
        for place, (number, token_id) in enumerate(zip(news.numbers.tolist(), news.token_ids.tolist(), strict=True)):
            known = self._completions.get(number)
            if known is not None:
                request, started, index = known
                started.add(index, token_id, scores.get(place))
                self._has_news(request)
        for end in news.ended:
            self._end(end.number, end)

    def _take_death(self, event: EngineEnded) -> None:
        self._dead = event.error
        for request in list(self._open.values()):
            request.end = request.end or EngineDeadError.after(event.error)
            self._has_news(request)
            self._has_ended(request)
        for number in list(self._questions):
            self._take_answer(Answer(number, error=EngineDeadError.after(event.error)))

    def _take_answer(self, answer: Answer) -> None:
        future = self._questions.pop(answer.question)
        if not future.set_running_or_notify_cancel():  # nobody waits for it
            return
        if answer.error is None:
            future.set_result(answer.text)
        else:
            future.set_exception(answer.error)

    def _end(self, number: int, end: RequestEnd | BaseException) -> None:
        known = self._completions.get(number)
        if known is not None:
            request = known[0]
            request.end = request.end or end
            self._has_news(request)
            self._drop(request, tell=False)
            self._has_ended(request)  # told last: the consumer has its end when `abort` returns

    def _has_news(self, request: AsyncRequest) -> None:
        """Lets the consumer's event loop wake it, unless it is about to."""
        loop = request.loop
        if request.has_news or loop is None:
            return
        request.has_news = True
        if loop in self._to_wake and not loop.is_closed():
            self._to_wake[loop].append(request)
            return
        self._to_wake[loop] = [request]
        try:
            loop.call_soon_threadsafe(self._wake, loop)
        except RuntimeError:  # it is closed, and its consumers with it
            self._drop_loop(loop)

    def _drop_loop(self, loop: asyncio.AbstractEventLoop) -> None:
        """Drops the requests of an event loop that is closed. The caller holds the lock."""
        for request in [request for request in self._open.values() if request.loop is loop]:
            is_unfinished = request.end is None
            request.end = request.end or InvalidStateError("The event loop of this request is closed.")
            request.has_news = True
            del self._open[request.request_id]
            self._drop(request, tell=is_unfinished)
            self._has_ended(request)
        self._loops.discard(loop)
        self._to_wake.pop(loop, None)

    @staticmethod
    def _has_ended(request: AsyncRequest) -> None:
        """Tells those who wait for the end of a request. The caller holds the lock."""
        when_ended, request.when_ended = request.when_ended, []
        for tell in when_ended:
            with suppress(RuntimeError):  # an event loop that is closed
                tell()
