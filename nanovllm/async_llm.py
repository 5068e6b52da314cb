"""AsyncLLM: inference for coroutines, with the engine in a process or a thread of its own (`async_engine/`).

Prompts are tokenised and checked in another thread, one at a time: neither the engine nor an event loop waits for it.
"""

from __future__ import annotations

import asyncio
import itertools
import weakref
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanovllm.async_engine.consumers import (
    CLIENT_REQUEST_ID,
    REQUEST_ID,
    AsyncRequest,
    Consumers,
    EngineConnection,
)
from nanovllm.async_engine.messages import AbortNamed, ResetPrefixCache, StartProfile, StopProfile
from nanovllm.async_engine.selection import make_connection
from nanovllm.compat.interface import VllmInterface
from nanovllm.compat.unsupported import REQUEST_ARGUMENTS, accepting
from nanovllm.config import EngineConfig, ResolvedConfig, takes_engine_arguments
from nanovllm.diagnostics import default_profile_folder
from nanovllm.errors import InvalidArgumentError
from nanovllm.metrics import MetricsSnapshot
from nanovllm.outputs import RequestOutput
from nanovllm.requests.chat import ChatArguments, ChatOptions, ChatRenderer, Conversation
from nanovllm.requests.preparation import PreparedRequest
from nanovllm.requests.tokenization import Prompt
from nanovllm.sampling_params import SamplingParams
from nanovllm.streaming import kind_of

if TYPE_CHECKING:
    from typing_extensions import Unpack


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
        self._connect(config, make_connection(config.for_serving()))

    def _connect(self, config: EngineConfig, connection: EngineConnection) -> None:
        self.config, self._connection = config, connection
        self._chat = ChatRenderer()
        # One thread, so that requests arrive in the order of the calls.
        self._preparing = ThreadPoolExecutor(1, "nanovllm-prepare")
        try:
            self._consumers = Consumers(self._connection)
        except BaseException:  # including Ctrl-C: a thread ends as soon as the engine has started
            self._connection.stop(wait=False)
            raise
        self._counter = itertools.count(connection.first_number)
        # A finalizer, so that the engine also ends when this object is garbage-collected or Python ends.
        self._exit = weakref.finalize(self, self._consumers.owner.guard(self._connection.stop))

    @accepting(REQUEST_ARGUMENTS)
    def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        delta: bool | None = None,
        client_request_id: str | None = None,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Completes one prompt. Each output has the text and tokens so far, or what `output_kind` asks for.

        prompt: a text, token ids, {"prompt": …} or {"prompt_token_ids": …}.
        sampling_params: None for those of the checkpoint's generation_config.json.
        delta: True means RequestOutputKind.DELTA: only what is new since the previous output.
        request_id: unique among the unfinished requests; None: chosen by the engine.
        client_request_id: the client's own name of the request, for the log; 1 to 128 printable characters.
        An output includes every token since the previous one. In the last one, `finished` is True. Leaving the loop,
        closing the generator or cancelling the task aborts the request and frees its blocks.
        Raises InvalidArgumentError and RequestTooLargeError, which concern this request alone; StepFailedError when a
        step failed, and all requests with it; and EngineDeadError when the engine has ended.
        """

        async def prepare() -> PreparedRequest:
            return await self._prepare(prompt, sampling_params)

        return self._outputs(prepare, sampling_params, request_id, delta, client_request_id)

    @accepting(REQUEST_ARGUMENTS)
    def chat(
        self,
        messages: Conversation,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        delta: bool | None = None,
        client_request_id: str | None = None,
        **options: Unpack[ChatArguments],
    ) -> AsyncGenerator[RequestOutput, None]:
        """Completes one conversation through the checkpoint's chat template; otherwise the same as `generate`.

        options: as in `LLM.chat`. The template is rendered in a thread, so that it does not hold up the event loop.
        """

        async def prepare() -> PreparedRequest:
            render = self._chat.prompt
            prompt = await asyncio.to_thread(render, self.get_tokenizer(), messages, ChatOptions(**options))
            return await self._prepare(prompt, sampling_params)

        return self._outputs(prepare, sampling_params, request_id, delta, client_request_id)

    def _outputs(
        self,
        prepare: Prepare,
        params: SamplingParams | None,
        request_id: str | None,
        delta: bool | None,
        client_request_id: str | None,
    ) -> AsyncGenerator[RequestOutput, None]:
        request_id = f"async-{next(self._counter)}" if request_id is None else request_id
        if not isinstance(request_id, str):
            raise InvalidArgumentError("request_id", request_id, REQUEST_ID)
        if client_request_id is not None and not CLIENT_REQUEST_ID.accepts(client_request_id):
            raise InvalidArgumentError("client_request_id", client_request_id, CLIENT_REQUEST_ID.allowed)
        return self.outputs_of(AsyncRequest(request_id, kind_of(delta, params), client_request_id), prepare)

    def outputs_of(self, request: AsyncRequest, prepare: Prepare) -> AsyncGenerator[RequestOutput, None]:
        """Returns the outputs of a request that `prepare` tokenises and checks."""
        return _Outputs(self._consumers, prepare, request)

    async def _prepare(self, prompt: Prompt, params: SamplingParams | None) -> PreparedRequest:
        """Tokenises and checks a request, while the event loop goes on."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._preparing, self._connection.preparation.prepare, prompt, params)

    async def abort(self, request_ids: str | Iterable[str]) -> None:
        """Ends one or several requests; their consumers get the tokens so far, with finish_reason "abort".

        Returns when the requests have ended. Ignores unknown and finished ids.
        """
        self._consumers.owner.check()
        loop = asyncio.get_running_loop()
        to_end: list[asyncio.Event] = []
        for request_id in [request_ids] if isinstance(request_ids, str) else request_ids:
            ended = asyncio.Event()
            if self._consumers.abort(request_id, partial(loop.call_soon_threadsafe, ended.set)):
                to_end.append(ended)
        for ended in to_end:
            await ended.wait()

    async def abort_named(self, request_ids: list[str]) -> int:
        """Ends requests of all clients of the engine, by their ids. Returns how many there were.

        An id `ID` also stands for `ID-0`, `ID-1` and so on.
        """
        number = await asyncio.wrap_future(self._consumers.ask(partial(AbortNamed, request_ids=request_ids)))
        return int(number)

    def get_tokenizer(self) -> Any:
        """Returns the transformers tokenizer. Raises InvalidArgumentError when the engine was made without one."""
        if self._connection.tokenizer is None:
            raise InvalidArgumentError("skip_tokenizer_init", True, "False to have a tokenizer")
        return self._connection.tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """Returns the parameters of requests without any: those of the checkpoint's generation_config.json."""
        return self._connection.preparation.default_params.clone()

    def reset_prefix_cache(self) -> None:
        """Forgets every cached prefix, and earlier requests' outputs for drafts, before the next step."""
        self._connection.send(ResetPrefixCache())

    async def start_profile(self, folder: str | Path | None = None) -> None:
        """Records every rank with torch's profiler until `stop_profile`, as `LLM.start_profile` does."""
        where = str(Path(folder or default_profile_folder(self.config)).absolute())
        await asyncio.wrap_future(self._consumers.ask(partial(StartProfile, folder=where)))

    async def stop_profile(self) -> str:
        """Ends the profile, writes its files and returns the tables, as `LLM.stop_profile` does.

        No step runs while the files are written.
        """
        return await asyncio.wrap_future(self._consumers.ask(StopProfile))

    @property
    def resolved(self) -> ResolvedConfig:
        """The settings that the engine runs with."""
        return self._connection.preparation.resolved

    @property
    def is_dead(self) -> bool:
        """Whether the engine has ended. New requests then raise EngineDeadError."""
        return self._consumers.is_dead

    @property
    def metrics(self) -> MetricsSnapshot:
        """The engine's counters, gauges and distributions at this moment. Any thread may ask for them."""
        self._consumers.owner.check()
        return self._connection.metrics()

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


def connected(config: EngineConfig, connection: EngineConnection) -> AsyncLLM:
    """Returns an AsyncLLM whose engine, with these settings, is at the other end of a connection."""
    engine = AsyncLLM.__new__(AsyncLLM)
    engine._connect(config, connection)
    return engine


Prepare = Callable[[], Awaitable[PreparedRequest]]


class _Outputs(AsyncGenerator[RequestOutput, None]):
    """The outputs of one request, for its consumer.

    Not an async generator function: Python would close such a one in a task of its event loop, which may end before.
    """

    def __init__(self, consumers: Consumers, prepare: Prepare, request: AsyncRequest) -> None:
        self._consumers, self._prepare, self._request = consumers, prepare, request
        self._is_open, self._is_closed = False, False

    async def __anext__(self) -> RequestOutput:
        try:
            if not self._is_open and not self._is_closed:
                await self._open()
            while not self._is_closed:
                output = self._consumers.take(self._request)
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
        self._consumers.open(self._request, asyncio.get_running_loop())
        try:
            prepared = await self._prepare()
        except InvalidArgumentError as error:
            self._consumers.refuse(self._request, error)
            raise
        self._consumers.start(self._request, prepared)

    def close(self) -> None:
        """Drops the request if it is unfinished."""
        if self._is_open and not self._is_closed:
            self._consumers.close(self._request)
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
