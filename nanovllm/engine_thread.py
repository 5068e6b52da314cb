"""EngineThread: makes an engine in a thread of its own and runs it for the consumers of `AsyncLLM`.

Consumers and the thread share two things only, one for each direction:

- `EngineThread._commands`, a queue to the engine: add a request, abort it, drop it, stop. The engine takes commands
  between steps, in order.
- the unread output of each request, guarded by `EngineThread._lock`: the tokens that its consumer has not fetched and,
  once the request has ended, its end. New tokens are appended to unread ones, so a slow consumer gets fewer and longer
  outputs, and delays no other request. At most one call that wakes consumers is pending in each event loop.
"""

from __future__ import annotations

import asyncio
import contextvars
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from functools import partial

from nanovllm.config import EngineConfig
from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.errors import EngineDeadError, InvalidArgumentError, InvalidStateError, StepFailedError
from nanovllm.outputs import RequestOutput
from nanovllm.requests.preparation import PreparedRequest
from nanovllm.sampling_params import RequestOutputKind
from nanovllm.streaming import News, OutputStream, extend_news

REQUEST_ID = "a text, unique among the unfinished requests"  # what a request id must be


class AsyncRequest:
    """A request that its consumer and the engine's thread share. The thread's lock guards all but the first four."""

    def __init__(self, request_id: str, kind: RequestOutputKind) -> None:
        self.request_id, self.kind = request_id, kind
        self.context = contextvars.copy_context()  # its consumer's, with the current span if there is one
        self.news = asyncio.Event()  # set in the event loop only
        self.loop: asyncio.AbstractEventLoop | None = None  # the consumer's, once it has begun
        self.prepared: PreparedRequest | None = None
        self.arrival: float | None = None
        self.is_aborted = False
        self.when_ended: list[Callable[[], object]] = []
        self.stream: OutputStream | None = None  # made by the engine's thread when it adds the request
        self.waiting: News | None = None  # what the consumer has not fetched
        self.end: RequestOutput | BaseException | None = None


_Command = Callable[[LLMEngine, AsyncRequest], None]
_Delivery = tuple[AsyncRequest, "News | RequestOutput | BaseException"]  # new tokens, the last output, or an error


class EngineThread:
    """The thread that makes an engine, runs it and ends it.

    It holds no reference to its AsyncLLM, so that this can be garbage-collected.
    """

    def __init__(self, config: EngineConfig) -> None:
        self._commands: queue.SimpleQueue[tuple[_Command, AsyncRequest] | None] = queue.SimpleQueue()  # None: stop
        self._started: Future[LLMEngine] = Future()
        # A daemon thread: Python would wait for any other before it runs the finalizer that stops this one.
        self._thread = threading.Thread(target=self._run, args=(config,), name="nanovllm-engine", daemon=True)
        self._running: dict[str, AsyncRequest] = {}  # the engine's unfinished requests; only this thread uses it
        self._lock = threading.RLock()  # a garbage collection may close a request while it is held
        # Guarded by the lock:
        self._open: dict[str, AsyncRequest] = {}  # requests whose consumer has not left
        self._loops: set[asyncio.AbstractEventLoop] = set()  # of the open requests, and perhaps others
        self._to_wake: dict[
            asyncio.AbstractEventLoop, list[AsyncRequest]
        ] = {}  # by loops in which a `_wake` is pending
        self._dead: BaseException | None = None

    # Called by consumers

    def start_engine(self) -> LLMEngine:
        """Starts the thread and returns its engine. Raises what making the engine raises."""
        self._thread.start()
        return self._started.result()

    def stop(self, wait: bool = True) -> None:
        """Ends the engine and, with `wait`, waits for that."""
        self._commands.put(None)
        # Garbage collection may call this on the engine's thread, which cannot join itself.
        if wait and self._thread is not threading.current_thread():
            self._thread.join()

    def open(self, request: AsyncRequest, loop: asyncio.AbstractEventLoop) -> None:
        """Takes the id of a request. Its consumer runs in `loop`."""
        engine = self._started.result()
        engine.owner.check()
        with self._lock:
            if self._dead is not None:
                raise EngineDeadError.after(self._dead)
            for closed in [each for each in self._loops if each.is_closed()]:
                self._drop_loop(closed)
            if request.request_id in self._open:
                raise InvalidArgumentError("request_id", request.request_id, REQUEST_ID)
            request.loop = loop
            request.arrival = engine.clock()
            self._loops.add(loop)
            self._open[request.request_id] = request

    def start(self, request: AsyncRequest, prepared: PreparedRequest) -> None:
        """Sends a request to the engine."""
        with self._lock:
            request.prepared = prepared
            self._commands.put((self._add, request))
            if request.is_aborted:
                self._commands.put((self._abort, request))

    def refuse(self, request: AsyncRequest, error: InvalidArgumentError) -> None:
        """Reports a request that is not allowed to the log and the metrics."""
        request.context.run(self._started.result().refuse_request, request.request_id, error)

    def take(self, request: AsyncRequest) -> RequestOutput | None:
        """Returns everything that the consumer has not fetched as one output; None if there is nothing.

        Raises the error that ended the request, if any.
        """
        request.news.clear()
        with self._lock:
            waiting, request.waiting = request.waiting, None
            end = request.end
        if isinstance(end, BaseException):
            raise end
        if end is not None and end.error is not None:
            raise end.error
        if request.stream is None or (end is None and waiting is None):
            return None
        if end is not None:  # it has all tokens, including the waiting ones
            return request.stream.end(end)
        return None if waiting is None else request.stream.grow(waiting)

    def abort(self, request_id: str, when_ended: Callable[[], object]) -> bool:
        """Asks the engine to end a request. Returns False for an unknown id; else `when_ended` is called at its end."""
        with self._lock:
            request = self._open.get(request_id)
            if request is None or request.end is not None:
                return False
            request.when_ended.append(when_ended)
            request.is_aborted = True
            if request.prepared is not None:
                self._commands.put((self._abort, request))
            return True

    def close(self, request: AsyncRequest) -> None:
        """Forgets a request whose consumer leaves. Drops it from the engine if it is unfinished."""
        with self._lock:
            if self._open.get(request.request_id) is request:
                del self._open[request.request_id]
                if request.end is None:
                    self._commands.put((self._drop, request))
                self._has_ended(request)

    def _wake(self, loop: asyncio.AbstractEventLoop) -> None:
        """Wakes the consumers that have something to fetch. Runs in `loop`, which is theirs."""
        with self._lock:
            to_wake = self._to_wake.pop(loop, [])
        for request in to_wake:
            with suppress(RuntimeError):  # its consumer went on in another loop, which is closed
                request.news.set()

    # The thread itself

    def _run(self, config: EngineConfig) -> None:
        try:
            engine = LLMEngine.from_engine_args(config.with_fast_start(False))
        except BaseException as error:
            self._started.set_exception(error)
            return
        self._started.set_result(engine)
        dead: BaseException = EngineDeadError("exit() was called")
        try:
            with engine:
                self._serve(engine)
        except BaseException as error:
            dead = error
        with self._lock:
            self._dead = dead
            self._running.clear()
            left = list(self._open.values())
        self._deliver([(request, EngineDeadError.after(dead)) for request in left])

    def _serve(self, engine: LLMEngine) -> None:
        """Runs steps while there are requests, and commands between them. Returns at the command to stop."""
        while True:
            while not engine.has_unfinished_requests() or not self._commands.empty():
                command = self._commands.get()
                if command is None:
                    return
                act, request = command
                act(engine, request)
            try:
                outputs = engine.step()
            except Exception as error:  # the requests are lost; `is_dead` says whether the engine goes on
                lost, self._running = self._running, {}
                kind = EngineDeadError if engine.is_dead else StepFailedError
                self._deliver([(request, kind.after(error)) for request in lost.values()])
                continue
            news: list[_Delivery] = [(self._running.pop(output.request_id), output) for output in outputs]
            for request in self._running.values():
                new = request.stream.read() if request.stream is not None else None
                if new is not None:
                    news.append((request, new))
            self._deliver(news)

    def _add(self, engine: LLMEngine, request: AsyncRequest) -> None:
        assert request.prepared is not None, "it is started"
        try:
            enqueue = partial(engine.enqueue, request.request_id, request.prepared, request.arrival)
            sequences = request.context.run(enqueue)
        except Exception as error:  # concerns this request alone
            if isinstance(error, InvalidArgumentError):
                self.refuse(request, error)
            self._deliver([(request, error)])
            return
        request.stream = OutputStream(engine, request.request_id, sequences, request.kind)
        self._running[request.request_id] = request

    def _abort(self, engine: LLMEngine, request: AsyncRequest) -> None:
        if self._running.get(request.request_id) is request:
            engine.abort_request(request.request_id)

    def _drop(self, engine: LLMEngine, request: AsyncRequest) -> None:
        if self._running.get(request.request_id) is request:
            del self._running[request.request_id]
            engine.discard_requests([request.request_id])

    def _deliver(self, news: list[_Delivery]) -> None:
        """Stores news for the consumers. Schedules `_wake` in their event loops, unless a call is pending there."""
        with self._lock:
            for request, item in news:
                if isinstance(item, dict):
                    if request.waiting is None:
                        request.waiting = item
                    else:
                        extend_news(request.waiting, item)
                else:
                    request.end = request.end or item
                loop = request.loop
                if loop is None or self._open.get(request.request_id) is not request:
                    continue
                if loop in self._to_wake and not loop.is_closed():
                    self._to_wake[loop].append(request)
                    continue
                self._to_wake[loop] = [request]
                try:
                    loop.call_soon_threadsafe(self._wake, loop)
                except RuntimeError:  # it is closed, and its consumers with it
                    self._drop_loop(loop)
            for request, item in news:
                if not isinstance(item, dict):  # told last: the consumer has its end when `abort` returns
                    self._has_ended(request)

    def _drop_loop(self, loop: asyncio.AbstractEventLoop) -> None:
        """Drops the requests of an event loop that is closed. The caller holds the lock."""
        for request in [request for request in self._open.values() if request.loop is loop]:
            request.end = request.end or InvalidStateError("The event loop of this request is closed.")
            self.close(request)
            self._commands.put((self._drop, request))
        self._loops.discard(loop)
        self._to_wake.pop(loop, None)

    @staticmethod
    def _has_ended(request: AsyncRequest) -> None:
        """Tells those who wait for the end of a request. The caller holds the lock."""
        when_ended, request.when_ended = request.when_ended, []
        for tell in when_ended:
            with suppress(RuntimeError):  # an event loop that is closed
                tell()
