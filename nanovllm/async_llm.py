"""AsyncLLM: inference for coroutines, with the engine on a thread of its own.

Event loops and the engine's thread share two things only, one for each direction:

- `_EngineThread._commands`, a queue to the engine: add a request, abort it, drop it, stop. The engine takes commands
  between steps, in order.
- the unread output of each request, guarded by `_EngineThread._lock`: the tokens that its consumer has not fetched and,
  once the request has ended, its end. New tokens are appended to unread ones, so a slow consumer gets fewer and longer
  outputs, and delays no other request. At most one call that wakes consumers is pending in each event loop.

Prompts are tokenised and checked in a third thread, one at a time: neither the engine nor an event loop waits for it.
"""

from __future__ import annotations

import asyncio
import contextvars
import itertools
import queue
import threading
import weakref
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

from nanovllm.compat.interface import VllmInterface
from nanovllm.compat.unsupported import REQUEST_ARGUMENTS, accepting
from nanovllm.config import EngineConfig, takes_engine_arguments
from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.errors import EngineDeadError, InvalidArgumentError, InvalidStateError, NanoVLLMError, StepFailedError
from nanovllm.metrics import MetricsSnapshot
from nanovllm.outputs import RequestOutput
from nanovllm.requests.chat import ChatArguments, ChatOptions, ChatRenderer, Conversation
from nanovllm.requests.preparation import PreparedRequest
from nanovllm.requests.tokenization import Prompt
from nanovllm.sampling_params import RequestOutputKind, SamplingParams
from nanovllm.streaming import News, OutputStream, extend_news, kind_of

if TYPE_CHECKING:
    from typing_extensions import Unpack


_REQUEST_ID = "a text, unique among the unfinished requests"


class AsyncLLM(VllmInterface):
    """Inference for coroutines on one model; each request is a stream of outputs.

        engine = AsyncLLM("tiny")
        async for output in engine.generate("Hello", SamplingParams(temperature=0), "my-request"):
            print(output.outputs[0].text)

    The arguments and errors are those of `LLM`. Several event loops, in several threads, may use it; each request
    belongs to the one that asked for it. Use it as a context manager, or call `exit`, to free the device's memory.
    """

    @takes_engine_arguments
    def __init__(self, config: EngineConfig) -> None:
        self._thread = _EngineThread(config)
        self._counter = itertools.count()
        self._chat = ChatRenderer()
        # One thread, so that requests arrive in the order of the calls.
        self._preparing = ThreadPoolExecutor(1, "nanovllm-prepare")
        try:
            self._engine = self._thread.start_engine()
        except BaseException:  # including Ctrl-C: the thread ends as soon as the engine has started
            self._thread.stop(wait=False)
            raise
        # A finalizer, so that the engine also ends when this object is garbage-collected or Python ends.
        self._exit = weakref.finalize(self, self._thread.stop)

    @accepting(REQUEST_ARGUMENTS)
    def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        delta: bool | None = None,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Completes one prompt. Each output has the text and tokens so far, or what `output_kind` asks for.

        prompt: a text, token ids, {"prompt": …} or {"prompt_token_ids": …}.
        sampling_params: None for those of the checkpoint's generation_config.json.
        delta: True means RequestOutputKind.DELTA: only what is new since the previous output.
        request_id: unique among the unfinished requests; None: chosen by the engine.
        An output includes every token since the previous one. In the last one, `finished` is True. Leaving the loop,
        closing the generator or cancelling the task aborts the request and frees its blocks.
        Raises InvalidArgumentError and RequestTooLargeError, which concern this request alone; StepFailedError when a
        step failed, and all requests with it; and EngineDeadError when the engine has ended.
        """

        async def prepare() -> PreparedRequest:
            return await self._prepare(prompt, sampling_params)

        return self._outputs(prepare, sampling_params, request_id, delta)

    @accepting(REQUEST_ARGUMENTS)
    def chat(
        self,
        messages: Conversation,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        delta: bool | None = None,
        **options: Unpack[ChatArguments],
    ) -> AsyncGenerator[RequestOutput, None]:
        """Completes one conversation through the checkpoint's chat template; otherwise the same as `generate`.

        options: as in `LLM.chat`. The template is rendered in a thread, so that it does not hold up the event loop.
        """

        async def prepare() -> PreparedRequest:
            render = self._chat.prompt
            prompt = await asyncio.to_thread(render, self.get_tokenizer(), messages, ChatOptions(**options))
            return await self._prepare(prompt, sampling_params)

        return self._outputs(prepare, sampling_params, request_id, delta)

    def _outputs(
        self, prepare: _Prepare, params: SamplingParams | None, request_id: str | None, delta: bool | None
    ) -> AsyncGenerator[RequestOutput, None]:
        request_id = f"async-{next(self._counter)}" if request_id is None else request_id
        if not isinstance(request_id, str):
            raise InvalidArgumentError("request_id", request_id, _REQUEST_ID)
        return _Outputs(self._thread, prepare, _Request(request_id, kind_of(delta, params)))

    async def _prepare(self, prompt: Prompt, params: SamplingParams | None) -> PreparedRequest:
        """Tokenises and checks a request, while the event loop goes on."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._preparing, self._engine.prepare, prompt, params)

    async def abort(self, request_ids: str | Iterable[str]) -> None:
        """Ends one or several requests; their consumers get the tokens so far, with finish_reason "abort".

        Returns when the requests have ended. Ignores unknown and finished ids.
        """
        self._engine.owner.check()
        loop = asyncio.get_running_loop()
        to_end: list[asyncio.Event] = []
        for request_id in [request_ids] if isinstance(request_ids, str) else request_ids:
            ended = asyncio.Event()
            if self._thread.abort(request_id, partial(loop.call_soon_threadsafe, ended.set)):
                to_end.append(ended)
        for ended in to_end:
            await ended.wait()

    def get_tokenizer(self) -> Any:
        """Returns the transformers tokenizer. Raises InvalidArgumentError when the engine was made without one."""
        return self._engine.get_tokenizer()

    @property
    def metrics(self) -> MetricsSnapshot:
        """The engine's counters, gauges and distributions at this moment. Any thread may ask for them."""
        return self._engine.metrics.snapshot(self._engine.scheduler.load)

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


class _Request:
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


_Prepare = Callable[[], Awaitable[PreparedRequest]]


class _Outputs(AsyncGenerator[RequestOutput, None]):
    """The outputs of one request, for its consumer.

    Not an async generator function: Python would close such a one in a task of its event loop, which may end before.
    """

    def __init__(self, thread: _EngineThread, prepare: _Prepare, request: _Request) -> None:
        self._thread, self._prepare, self._request = thread, prepare, request
        self._is_open, self._is_closed = False, False

    async def __anext__(self) -> RequestOutput:
        try:
            if not self._is_open and not self._is_closed:
                await self._open()
            while not self._is_closed:
                output = self._thread.take(self._request)
                if output is not None:
                    if output.finished:
                        self.close()
                    return output
                await self._request.news.wait()
        except BaseException:
            self.close()
            raise
        raise StopAsyncIteration

    async def _open(self) -> None:
        self._is_open = True
        self._thread.open(self._request, asyncio.get_running_loop())
        try:
            prepared = await self._prepare()
        except InvalidArgumentError as error:
            self._thread.refuse(self._request, error)
            raise
        self._thread.start(self._request, prepared)

    def close(self) -> None:
        """Drops the request if it is unfinished."""
        if self._is_open and not self._is_closed:
            self._thread.close(self._request)
        self._is_closed = True

    async def aclose(self) -> None:
        self.close()
        self._request.news.set()  # for a task that waits for the next output

    async def asend(self, value: None) -> RequestOutput:
        return await self.__anext__()

    async def athrow(self, *exception: Any) -> RequestOutput:
        self.close()
        raise exception[0]

    def __del__(self) -> None:
        self.close()


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
        self._lock = threading.RLock()  # a garbage collection may close a request while it is held
        # Guarded by the lock:
        self._open: dict[str, _Request] = {}  # requests whose consumer has not left
        self._loops: set[asyncio.AbstractEventLoop] = set()  # of the open requests, and perhaps others
        self._to_wake: dict[asyncio.AbstractEventLoop, list[_Request]] = {}  # by loops in which a `_wake` is pending
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
        """Takes the id of a request. Its consumer runs in `loop`."""
        engine = self._started.result()
        engine.owner.check()
        with self._lock:
            if self._dead is not None:
                raise EngineDeadError.after(self._dead)
            for closed in [each for each in self._loops if each.is_closed()]:
                self._drop_loop(closed)
            if request.request_id in self._open:
                raise InvalidArgumentError("request_id", request.request_id, _REQUEST_ID)
            request.loop = loop
            request.arrival = engine.clock()
            self._loops.add(loop)
            self._open[request.request_id] = request

    def start(self, request: _Request, prepared: PreparedRequest) -> None:
        """Sends a request to the engine."""
        with self._lock:
            request.prepared = prepared
            self._commands.put((self._add, request))
            if request.is_aborted:
                self._commands.put((self._abort, request))

    def refuse(self, request: _Request, error: InvalidArgumentError) -> None:
        """Reports a request that is not allowed to the log and the metrics."""
        request.context.run(self._started.result().refuse_request, request.request_id, error)

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

    def close(self, request: _Request) -> None:
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
                self._deliver([(request, _step_failed(engine, error)) for request in lost.values()])
                continue
            news: list[_Delivery] = [(self._running.pop(output.request_id), output) for output in outputs]
            for request in self._running.values():
                new = request.stream.read() if request.stream is not None else None
                if new is not None:
                    news.append((request, new))
            self._deliver(news)

    def _add(self, engine: LLMEngine, request: _Request) -> None:
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

    def _abort(self, engine: LLMEngine, request: _Request) -> None:
        if self._running.get(request.request_id) is request:
            engine.abort_request(request.request_id)

    def _drop(self, engine: LLMEngine, request: _Request) -> None:
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
    def _has_ended(request: _Request) -> None:
        """Tells those who wait for the end of a request. The caller holds the lock."""
        when_ended, request.when_ended = request.when_ended, []
        for tell in when_ended:
            with suppress(RuntimeError):  # an event loop that is closed
                tell()


def _step_failed(engine: LLMEngine, cause: Exception) -> NanoVLLMError:
    if engine.is_dead:
        return EngineDeadError.after(cause)
    error = StepFailedError(f"A step failed ({cause!r}), and with it this request; the engine goes on.")
    error.__cause__ = cause
    return error
