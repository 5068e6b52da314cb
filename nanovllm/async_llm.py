"""AsyncLLM: requests from coroutines, the engine on a thread of its own.

Two queues, one each way, are all that is shared:

- to the engine, `_EngineThread._commands`: add a request, abort it, drop it, stop. The engine takes them between steps,
  in order.
- to the consumers, under `_EngineThread._lock`: each request has one place for the tokens that its consumer has not
  fetched and, once it has ended, for its end. New tokens join those that wait, so that a slow consumer gets fewer and
  longer outputs. It delays no other request, and never more than its own request's output waits for it. At most one
  call to wake consumers is pending in the event loop.
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

    The arguments are those of `LLM`. Raises what `LLM` raises. One event loop at a time may use it; a call from
    another one is an InvalidStateError. Use it as a context manager, or call `exit`, to give the device's memory back.
    """

    @takes_engine_arguments
    def __init__(self, config: EngineConfig) -> None:
        self._thread = _EngineThread(config)
        self._counter = itertools.count()
        self._loop: asyncio.AbstractEventLoop | None = None
        try:
            self._engine = self._thread.start_engine()
        except BaseException:  # Ctrl-C included: the thread ends as soon as the engine is there
            self._thread.stop(wait=False)
            raise
        # Also when it is collected, and when Python ends.
        self._exit = weakref.finalize(self, self._thread.stop)

    async def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        delta: bool = False,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Completes one prompt. Each output has the text and tokens so far, or with `delta` what is new in them.

        prompt: a text, token ids, {"prompt": …} or {"prompt_token_ids": …}.
        request_id: unique among the unfinished requests; None makes one up.
        An output brings every token since the one before; the last is `finished`. Leaving
        the loop, closing the generator or cancelling the task aborts the request and frees its blocks.
        Raises InvalidArgumentError and RequestTooLargeError for this request alone; StepFailedError when a step took
        this and all other requests with it, and EngineDeadError when the engine has ended.
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

        Returns when it has ended. An unknown or finished id does nothing.
        """
        self._running_loop()
        request = self._thread.abort(request_id)
        if request is not None:
            await request.ended.wait()

    def get_tokenizer(self) -> Any:
        """Returns the transformers tokenizer. Raises InvalidArgumentError when the engine was made without one."""
        if self._engine.tokenizer is None:
            raise InvalidArgumentError("skip_tokenizer_init", True, "False to have a tokenizer")
        return self._engine.tokenizer

    def exit(self) -> None:
        """Ends the engine and gives the device's memory back; calling it again does nothing.

        Waits for the step that runs. Consumers that still wait get an EngineDeadError.
        """
        self._exit()

    def shutdown(self) -> None:
        """vLLM's name of `exit`."""
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
        loop = asyncio.get_running_loop()
        if self._loop is not None and self._loop is not loop and not self._loop.is_closed():
            raise InvalidStateError(
                "This AsyncLLM serves another event loop, which is still open: use it from there, or make another one."
            )
        self._loop = loop
        return loop


class _Request:
    """A request between its consumer and the engine's thread, whose lock guards `waiting` and `end`."""

    def __init__(self, request_id: str, prompt: Prompt, params: SamplingParams | None, delta: bool) -> None:
        self.request_id, self.prompt, self.params, self.delta = request_id, prompt, params, delta
        self.stream: OutputStream | None = None  # made by the engine's thread, before there is any news
        self.waiting: News | None = None  # what the consumer has not fetched
        self.end: RequestOutput | BaseException | None = None
        self.news, self.ended = asyncio.Event(), asyncio.Event()  # set in the event loop only


_Command = Callable[[LLMEngine, _Request], None]
_Told = tuple[_Request, "News | RequestOutput | BaseException"]


class _EngineThread:
    """One thread that makes an engine, runs it and ends it. It does not know its AsyncLLM: that may be collected."""

    def __init__(self, config: EngineConfig) -> None:
        self._commands: queue.SimpleQueue[tuple[_Command, _Request] | None] = queue.SimpleQueue()  # None: stop
        self._started: Future[LLMEngine] = Future()
        # A daemon: Python waits for the others before it runs what ends this one (`weakref.finalize`).
        self._thread = threading.Thread(target=self._run, args=(config,), name="nanovllm-engine", daemon=True)
        self._running: dict[str, _Request] = {}  # the engine's unfinished requests; this thread's own
        self._lock = threading.Lock()
        # Guarded by the lock:
        self._open: dict[str, _Request] = {}  # those whose consumer has not left
        self._to_wake: dict[_Request, None] = {}  # not empty: `_wake` is under way
        self._loop: asyncio.AbstractEventLoop | None = None
        self._dead: BaseException | None = None

    # Called by consumers

    def start_engine(self) -> LLMEngine:
        """Raises what making the engine raises."""
        self._thread.start()
        return self._started.result()

    def stop(self, wait: bool = True) -> None:
        self._commands.put(None)
        if wait and self._thread is not threading.current_thread():  # garbage is collected in any thread
            self._thread.join()

    def open(self, request: _Request, loop: asyncio.AbstractEventLoop) -> None:
        with self._lock:
            if self._dead is not None:
                raise _engine_has_ended(self._dead)
            if loop is not self._loop:  # the one before is closed
                self._drop_all()
                self._loop = loop
            if not isinstance(request.request_id, str) or request.request_id in self._open:
                allowed = "a text, unique among the unfinished requests"
                raise InvalidArgumentError("request_id", request.request_id, allowed)
            self._open[request.request_id] = request
            self._commands.put((self._add, request))

    def take(self, request: _Request) -> RequestOutput | None:
        """Returns all that waits for the consumer as one output. Raises the error that ended the request."""
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
        if end is not None:  # it holds all tokens, those that wait included
            return request.stream.end(end)
        return None if waiting is None else request.stream.grow(waiting)

    def abort(self, request_id: str) -> _Request | None:
        with self._lock:
            request = self._open.get(request_id)
            if request is not None:
                self._commands.put((self._abort, request))
        return request

    def close(self, request: _Request) -> None:
        """Called when the consumer leaves."""
        request.ended.set()
        with self._lock:
            if self._open.get(request.request_id) is request:
                del self._open[request.request_id]
                if request.end is None:
                    self._commands.put((self._drop, request))

    def _wake(self) -> None:
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
        self._tell([(request, _engine_has_ended(dead)) for request in left])

    def _serve(self, engine: LLMEngine) -> None:
        """Steps while there is something to do, else waits for commands; until one says stop."""
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
                self._tell([(request, _step_failed(engine, error)) for request in lost.values()])
                continue
            news: list[_Told] = [(self._running.pop(output.request_id), output) for output in outputs]
            for request in self._running.values():
                new = request.stream.read() if request.stream is not None else None
                if new is not None:
                    news.append((request, new))
            self._tell(news)

    def _add(self, engine: LLMEngine, request: _Request) -> None:
        try:
            engine.add_request(request.request_id, request.prompt, request.params)
        except Exception as error:  # this request's own
            self._tell([(request, error)])
            return
        request.stream = OutputStream(engine, request.request_id, delta=request.delta)
        self._running[request.request_id] = request

    def _abort(self, engine: LLMEngine, request: _Request) -> None:
        if self._running.get(request.request_id) is request:
            engine.abort_request(request.request_id)

    def _drop(self, engine: LLMEngine, request: _Request) -> None:
        if self._running.get(request.request_id) is request:
            del self._running[request.request_id]
            engine.discard_requests([request.request_id])

    def _tell(self, news: list[_Told]) -> None:
        """Hands each request its news, and wakes the event loop unless a wake-up is pending."""
        with self._lock:
            is_under_way = bool(self._to_wake)
            for request, what in news:
                if not isinstance(what, dict):
                    request.end = request.end or what
                elif request.waiting is None:
                    request.waiting = what
                else:
                    extend_news(request.waiting, what)
                self._to_wake[request] = None
            if self._to_wake and not is_under_way and self._loop is not None:
                try:
                    self._loop.call_soon_threadsafe(self._wake)
                except RuntimeError:  # the loop is closed, and its consumers with it
                    self._drop_all()

    def _drop_all(self) -> None:
        """Drops the requests of an event loop that is closed. The lock is held."""
        for request in self._open.values():
            self._commands.put((self._drop, request))
        self._open.clear()
        self._to_wake.clear()


def _engine_has_ended(cause: BaseException) -> EngineDeadError:
    error = EngineDeadError(f"This engine has ended ({cause}): make a new one.")
    error.__cause__ = cause
    return error


def _step_failed(engine: LLMEngine, cause: Exception) -> NanoVLLMError:
    if engine.is_dead:
        return _engine_has_ended(cause)
    error = StepFailedError(f"A step failed ({cause!r}), and with it this request; the engine goes on.")
    error.__cause__ = cause
    return error
