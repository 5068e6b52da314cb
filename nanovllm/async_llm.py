"""AsyncLLM: inference for coroutines, with the engine on a thread of its own.

The event loop and the engine's thread share two things only, one for each direction:

- `_EngineThread._commands`, a queue to the engine: add a request, abort it, drop it, stop. The engine takes commands
  between steps, in order.
- the unread output of each request, guarded by `_EngineThread._lock`: the tokens that its consumer has not fetched and,
  once the request has ended, its end. New tokens are appended to unread ones, so a slow consumer gets fewer and longer
  outputs, and delays no other request. At most one call that wakes consumers is pending in the event loop.
"""

from __future__ import annotations

import asyncio
import itertools
import queue
import threading
import weakref
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import Future
from typing import Any

from nanovllm.config import EngineConfig, takes_engine_arguments
from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.engine_factory import make_engine
from nanovllm.errors import EngineDeadError, InvalidArgumentError, InvalidStateError, NanoVLLMError, StepFailedError
from nanovllm.outputs import RequestOutput
from nanovllm.requests.tokenization import Prompt
from nanovllm.sampling_params import SamplingParams
from nanovllm.streaming import News, OutputStream, extend_news


class AsyncLLM:
    """Inference for coroutines on one model; each request is a stream of outputs.

        engine = AsyncLLM("tiny")
        async for output in engine.generate("Hello", SamplingParams(temperature=0), "my-request"):
            print(output.outputs[0].text)

    The arguments and errors are those of `LLM`. One event loop at a time may use it: a call from another one raises
    InvalidStateError. Use it as a context manager, or call `exit`, to free the device's memory.
    """

    @takes_engine_arguments
    def __init__(self, config: EngineConfig) -> None:
        self._thread = _EngineThread(config)
        self._counter = itertools.count()
        self._loop: asyncio.AbstractEventLoop | None = None
        try:
            self._engine = self._thread.start_engine()
        except BaseException:  # including Ctrl-C: the thread ends as soon as the engine has started
            self._thread.stop(wait=False)
            raise
        # A finalizer, so that the engine also ends when this object is garbage-collected or Python ends.
        self._exit = weakref.finalize(self, self._thread.stop)

    async def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        delta: bool = False,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Completes one prompt. Each output has the text and tokens so far, or with `delta` only the new ones.

        prompt: a text, token ids, {"prompt": …} or {"prompt_token_ids": …}.
        request_id: unique among the unfinished requests; None: chosen by the engine.
        An output includes every token since the previous one. In the last one, `finished` is True. Leaving the loop,
        closing the generator or cancelling the task aborts the request and frees its blocks.
        Raises InvalidArgumentError and RequestTooLargeError, which concern this request alone; StepFailedError when a
        step failed, and all requests with it; and EngineDeadError when the engine has ended.
        """
        if not isinstance(delta, bool):
            raise InvalidArgumentError("delta", delta, "True or False")
        request_id = f"async-{next(self._counter)}" if request_id is None else request_id
        request = _Request(request_id, prompt, sampling_params, delta)
        self._thread.open(request, self._running_loop())
        try:
            while True:
                await request.news.wait()
                output = self._thread.take(request)
                if output is not None:
                    yield output
                    if output.finished:
                        return
        finally:
            self._thread.close(request)

    async def abort(self, request_id: str) -> None:
        """Ends a request; its consumer gets the tokens so far, with finish_reason "abort".

        Returns when the request has ended. Ignores an unknown or finished id.
        """
        self._running_loop()
        request = self._thread.abort(request_id)
        if request is not None:
            await request.ended.wait()

    def get_tokenizer(self) -> Any:
        """Returns the transformers tokenizer. Raises InvalidArgumentError when the engine was made without one."""
        return self._engine.get_tokenizer()

    def exit(self) -> None:
        """Ends the engine and frees the device's memory. Calling it again does nothing.

        Waits for the running step. Unfinished requests raise EngineDeadError in their consumers.
        """
        self._exit()

    def shutdown(self) -> None:
        """The same as `exit`, under vLLM's name."""
        self.exit()

    def __enter__(self) -> AsyncLLM:
        return self

    def __exit__(self, *exception: object) -> None:
        self.exit()

    async def __aenter__(self) -> AsyncLLM:
        return self

    async def __aexit__(self, *exception: object) -> None:
        self.exit()

    def _running_loop(self) -> asyncio.AbstractEventLoop:
        """Returns the running event loop. Raises InvalidStateError while another one that used it is open."""
        loop = asyncio.get_running_loop()
        if self._loop is not None and self._loop is not loop and not self._loop.is_closed():
            raise InvalidStateError(
                "This AsyncLLM serves another event loop, which is still open: use it from there, or make another one."
            )
        self._loop = loop
        return loop


class _Request:
    """A request that its consumer and the engine's thread share. The thread's lock guards `waiting` and `end`."""

    def __init__(self, request_id: str, prompt: Prompt, params: SamplingParams | None, delta: bool) -> None:
        self.request_id, self.prompt, self.params, self.delta = request_id, prompt, params, delta
        self.stream: OutputStream | None = None  # made by the engine's thread when it adds the request
        self.waiting: News | None = None  # what the consumer has not fetched
        self.end: RequestOutput | BaseException | None = None
        self.news, self.ended = asyncio.Event(), asyncio.Event()  # set in the event loop only


_Command = Callable[[LLMEngine, _Request], None]
_Delivery = tuple[_Request, "News | RequestOutput | BaseException"]  # new tokens, the last output, or an error


class _EngineThread:
    """The thread that makes an engine, runs it and ends it.

    It holds no reference to its AsyncLLM, so that this can be garbage-collected.
    """

    def __init__(self, config: EngineConfig) -> None:
        self._commands: queue.SimpleQueue[tuple[_Command, _Request] | None] = queue.SimpleQueue()  # None: stop
        self._started: Future[LLMEngine] = Future()
        # A daemon thread: Python would wait for any other before it runs the finalizer that stops this one.
        self._thread = threading.Thread(target=self._run, args=(config,), name="nanovllm-engine", daemon=True)
        self._running: dict[str, _Request] = {}  # the engine's unfinished requests; only this thread uses it
        self._lock = threading.Lock()
        # Guarded by the lock:
        self._open: dict[str, _Request] = {}  # requests whose consumer has not left
        self._to_wake: dict[_Request, None] = {}  # if not empty, a call of `_wake` is pending
        self._loop: asyncio.AbstractEventLoop | None = None
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

    def open(self, request: _Request, loop: asyncio.AbstractEventLoop) -> None:
        """Sends a request to the engine. Its consumer runs in `loop`."""
        with self._lock:
            if self._dead is not None:
                raise EngineDeadError.after(self._dead)
            if loop is not self._loop:  # the previous one is closed
                self._drop_all()
                self._loop = loop
            if not isinstance(request.request_id, str) or request.request_id in self._open:
                allowed = "a text, unique among the unfinished requests"
                raise InvalidArgumentError("request_id", request.request_id, allowed)
            self._open[request.request_id] = request
            self._commands.put((self._add, request))

    def take(self, request: _Request) -> RequestOutput | None:
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

    def abort(self, request_id: str) -> _Request | None:
        """Asks the engine to end a request. Returns it, or None for an unknown id."""
        with self._lock:
            request = self._open.get(request_id)
            if request is not None:
                self._commands.put((self._abort, request))
        return request

    def close(self, request: _Request) -> None:
        """Forgets a request whose consumer leaves. Drops it from the engine if it is unfinished."""
        request.ended.set()
        with self._lock:
            if self._open.get(request.request_id) is request:
                del self._open[request.request_id]
                if request.end is None:
                    self._commands.put((self._drop, request))

    def _wake(self) -> None:
        """Wakes the consumers that have something to fetch. Runs in the event loop."""
        with self._lock:
            to_wake, self._to_wake = self._to_wake, {}
        for request in to_wake:
            request.news.set()
            if request.end is not None:
                request.ended.set()

    # The thread itself

    def _run(self, config: EngineConfig) -> None:
        try:
            engine = make_engine(config)
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
                self._deliver([(request, _step_failed(engine, error)) for request in lost.values()])
                continue
            news: list[_Delivery] = [(self._running.pop(output.request_id), output) for output in outputs]
            for request in self._running.values():
                new = request.stream.read() if request.stream is not None else None
                if new is not None:
                    news.append((request, new))
            self._deliver(news)

    def _add(self, engine: LLMEngine, request: _Request) -> None:
        try:
            sequences = engine.enqueue(request.request_id, engine.prepare(request.prompt, request.params))
        except Exception as error:  # concerns this request alone
            self._deliver([(request, error)])
            return
        request.stream = OutputStream(engine, request.request_id, sequences, delta=request.delta)
        self._running[request.request_id] = request

    def _abort(self, engine: LLMEngine, request: _Request) -> None:
        if self._running.get(request.request_id) is request:
            engine.abort_request(request.request_id)

    def _drop(self, engine: LLMEngine, request: _Request) -> None:
        if self._running.get(request.request_id) is request:
            del self._running[request.request_id]
            engine.discard_requests([request.request_id])

    def _deliver(self, news: list[_Delivery]) -> None:
        """Stores news for the consumers, and schedules `_wake` in the event loop unless a call is pending."""
        with self._lock:
            is_pending = bool(self._to_wake)
            for request, item in news:
                if not isinstance(item, dict):
                    request.end = request.end or item
                elif request.waiting is None:
                    request.waiting = item
                else:
                    extend_news(request.waiting, item)
                self._to_wake[request] = None
            if self._to_wake and not is_pending and self._loop is not None:
                try:
                    self._loop.call_soon_threadsafe(self._wake)
                except RuntimeError:  # the loop is closed, and its consumers with it
                    self._drop_all()

    def _drop_all(self) -> None:
        """Drops the requests of an event loop that is closed. The caller holds the lock."""
        for request in self._open.values():
            self._commands.put((self._drop, request))
        self._open.clear()
        self._to_wake.clear()


def _step_failed(engine: LLMEngine, cause: Exception) -> NanoVLLMError:
    if engine.is_dead:
        return EngineDeadError.after(cause)
    error = StepFailedError(f"A step failed ({cause!r}), and with it this request; the engine goes on.")
    error.__cause__ = cause
    return error
