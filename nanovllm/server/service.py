"""Service: the engine behind the HTTP endpoints, and whether it takes requests."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, TypeAlias, TypeVar, cast

from starlette.requests import Request

from nanovllm.async_llm import AsyncLLM
from nanovllm.config import EngineConfig
from nanovllm.data_parallel.engines import DataParallelLLM
from nanovllm.logs import events
from nanovllm.logs.recent_events import RecentEvents
from nanovllm.metrics import MetricsSnapshot
from nanovllm.outputs import RequestOutput
from nanovllm.requests.chat import ChatOptions, ChatRenderer
from nanovllm.requests.tokenization import Prompt, TemplatedText
from nanovllm.sampling_params import SamplingParams
from nanovllm.server.counts import Counts
from nanovllm.server.errors import ApiError, invalid
from nanovllm.server.exchange import Exchange
from nanovllm.server.settings import ServerSettings
from nanovllm.utils.logger import setup_logger

logger = setup_logger(__name__)

T = TypeVar("T")
Engine: TypeAlias = "AsyncLLM | DataParallelLLM"
State = Literal["starting", "ready", "draining"]

_RETRY_SECONDS = 1
_MAX_NAMES = 100  # unknown fields that are logged


def make_engine(engine_args: EngineConfig, num_replicas: int) -> Engine:
    """Starts an engine, or several that share the requests."""
    if num_replicas == 1:
        return AsyncLLM.from_engine_args(engine_args)
    return DataParallelLLM(engine_args, num_replicas)


class Service:
    """One engine and its model, for the endpoints. All methods belong to the server's event loop.

    settings: with a model name. engine: None while it starts; `start` sets it. counts: shared with other processes that
    serve the same engine.
    """

    def __init__(self, settings: ServerSettings, engine: Engine | None = None, counts: Counts | None = None) -> None:
        self.settings = settings
        self.state: State = "starting"
        self.counts = Counts() if counts is None else counts
        self.recent_events = RecentEvents()  # is a handler of the log while the server runs
        self.latest_events = self.recent_events.latest
        self._running: dict[str, Exchange] = {}  # by the engine's request ids
        self._engine: Engine | None = None
        self._chat = ChatRenderer()
        self._ignored: set[str] = set()
        self.defaults = SamplingParams()
        if engine is not None:
            self.start(engine)

    def start(self, engine: Engine) -> None:
        """Takes requests from now on."""
        self._engine = engine
        if self.settings.generation_config == "auto":
            self.defaults = engine.get_default_sampling_params()
        for name, value in (self.settings.override_generation_config or {}).items():
            setattr(self.defaults, name, value)
        if self.state == "starting":
            self.state = "ready"

    def drain(self) -> None:
        """Takes no further requests. Running ones continue."""
        self.state = "draining"

    @property
    def num_requests(self) -> int:
        """HTTP requests that this process is answering, except for /health, /ping, /metrics and /events."""
        return self.counts.own_requests

    @property
    def engine(self) -> Engine:
        """The engine. Raises ApiError while it starts, and when it has died."""
        if self._engine is None:
            raise ApiError(503, "The engine is starting.", code="starting", headers=_retry())
        if self._engine.is_dead:
            raise ApiError(500, "The engine has ended.", code="engine_dead")
        return self._engine

    @property
    def is_dead(self) -> bool:
        """Whether the engine has died."""
        return self._engine is not None and self._engine.is_dead

    def metrics(self) -> list[MetricsSnapshot]:
        """Returns the figures of each replica. Waits for the running steps: call it in a thread."""
        engine = self.engine
        return engine.replica_metrics() if isinstance(engine, DataParallelLLM) else [engine.metrics]

    def load(self) -> dict[str, Any]:
        """Returns what GET /load answers: the requests that are being answered, and the state of several replicas."""
        load: dict[str, Any] = {"server_load": self.counts.requests - 1}  # without the one that asks
        if isinstance(self._engine, DataParallelLLM):
            load |= {"degraded": self._engine.is_degraded, "replicas": self._engine.states()}
        return load

    @property
    def model(self) -> str:
        """The name of the model in answers."""
        return self.settings.served_model_name[0]

    @property
    def max_model_len(self) -> int:
        """Maximum number of tokens of a prompt and its output together."""
        return self.engine.resolved.max_model_len

    def check_model(self, name: str | None) -> None:
        """Raises ApiError if a request asks for another model."""
        if name is not None and name not in self.settings.served_model_name:
            names = ", ".join(self.settings.served_model_name)
            message = f"There is no such model. This server has {names}."
            raise ApiError(404, message, param="model", code="model_not_found")

    def report_ignored(self, fields: Mapping[str, Any]) -> None:
        """Logs the names of fields that no endpoint knows, each once."""
        for name in fields:
            if name not in self._ignored and len(self._ignored) < _MAX_NAMES:
                self._ignored.add(name)
                events.field_ignored.log(logger, field=name[:_MAX_NAMES])

    # Requests

    def admit(self, exchange: Exchange, num_completions: int) -> None:
        """Counts the completions of a request. Raises ApiError when it may not run now."""
        engine = self.engine
        if self.state == "draining":
            raise _draining()
        limit = self.settings.max_queue
        self.counts.add(completions=num_completions)  # before the check: another process may be here, too
        if limit is not None and self.counts.completions > engine.resolved.max_num_seqs + limit:
            self.counts.add(completions=-num_completions)
            raise ApiError(429, "The queue is full: try again later.", code="queue_full", headers=_retry())
        exchange.num_admitted += num_completions

    def release(self, exchange: Exchange) -> None:
        """Ends what `admit` began. The middleware calls it when the answer has ended."""
        self.counts.add(completions=-exchange.num_admitted)
        for request_id in exchange.engine_ids:
            self._running.pop(request_id, None)

    def generate(
        self, exchange: Exchange, prompt: Prompt, params: SamplingParams, request_id: str
    ) -> AsyncGenerator[RequestOutput, None]:
        """Completes a prompt, as `AsyncLLM.generate` does. Call `admit` before."""
        exchange.engine_ids.append(request_id)
        self._running[request_id] = exchange
        return self.engine.generate(prompt, params, request_id, client_request_id=exchange.client_request_id)

    async def abort(self, request_ids: list[str]) -> int:
        """Ends running requests, by the ids of their answers; these then have finish_reason "abort". Returns how many.

        A request to complete several prompts counts once for each of them.
        """
        names = [name for name, exchange in self._running.items() if exchange.request_id in request_ids]
        engine = self.engine
        await engine.abort(names)
        if self.settings.api_server_count == 1 or isinstance(engine, DataParallelLLM):
            return len(names)
        return len(names) + await engine.abort_named(request_ids)

    def aborted(self) -> ApiError:
        """Returns the error of a request that was aborted, for the APIs whose answers have no other form for it."""
        if self.state == "draining":
            return _draining()
        return ApiError(499, "The request was aborted.", code="aborted")

    async def abort_all(self) -> None:
        """Ends every running request."""
        if self._engine is not None and not self._engine.is_dead:
            await self._engine.abort(list(self._running))

    # Texts

    async def in_thread(self, function: Callable[..., T], *arguments: Any) -> T:
        """Returns what a function returns, which runs in a thread while the event loop goes on."""
        return await asyncio.to_thread(function, *arguments)

    async def render_chat(
        self, messages: Sequence[Mapping[str, Any]], options: ChatOptions, add_special_tokens: bool = False
    ) -> str:
        """Returns the prompt of a conversation. Raises InvalidArgumentError, which names the field."""
        if options.chat_template is not None and not self.settings.trust_request_chat_template:
            raise invalid("chat_template", "chat_template is not allowed: see --trust-request-chat-template.")
        if options.chat_template is None:
            options = replace(options, chat_template=self.settings.chat_template)
        tokenizer = self.engine.get_tokenizer()
        text = await self.in_thread(self._chat.prompt, tokenizer, messages, options)
        return str(text) if add_special_tokens else text

    @staticmethod
    def text_prompt(text: str, add_special_tokens: bool) -> Prompt:
        """Returns a prompt of text, to which the tokenizer adds its special tokens or does not."""
        return text if add_special_tokens else TemplatedText(text)

    @property
    def tokenizer(self) -> Any:
        """The model's transformers tokenizer."""
        return self.engine.get_tokenizer()


def service_of(request: Request) -> Service:
    """Returns the service of the app that answers a request."""
    return cast(Service, request.app.state.service)


def _draining() -> ApiError:
    return ApiError(503, "The server is shutting down.", code="draining", headers=_retry())


def _retry() -> dict[str, str]:
    return {"Retry-After": str(_RETRY_SECONDS)}
