"""OpenAIEngine: sends the benchmark's requests to an OpenAI server, as streamed completions of token ids.

It counts tokens by the usage that the server reports, and reads no text. What one read of the socket brings counts as
one delta.
"""

from __future__ import annotations

import json
import re
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from nanovllm.benchmarks.arrivals import OnlineRequest
from nanovllm.benchmarks.online_settings import Server
from nanovllm.benchmarks.settings import WorkloadError
from nanovllm.errors import NanoVLLMError, shown

if TYPE_CHECKING:
    import aiohttp

# Seconds. Nothing may arrive for so long before a request fails; a long queue is not a failure.
_SILENCE, _CONNECT = 600.0, 30.0
# Reading the JSON of each event would take several times as long. In a text the quotes would be escaped.
_USAGE = re.compile(rb'"completion_tokens":\s*(\d+)')
_KEEP_ALIVE = 3.0  # less than the 5 s after which uvicorn closes an idle connection


class ServerResponseError(NanoVLLMError):
    """The server refused a request, reported an error in its stream, or ended the stream early."""


@asynccontextmanager
async def open_server(server: Server, temperature: float) -> AsyncGenerator[OpenAIEngine, None]:
    """Opens the connections to a server. Raises WorkloadError if aiohttp is missing or no model is found."""
    try:
        import aiohttp
    except ImportError:
        raise WorkloadError("--url needs aiohttp: pip install aiohttp") from None
    base = server.url.rstrip("/")
    base = base if base.endswith("/v1") else f"{base}/v1"
    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEP_ALIVE),
        headers={"Authorization": f"Bearer {server.api_key}"} if server.api_key else {},
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT, sock_read=_SILENCE),
    ) as session:
        try:
            model = server.served_model_name or await _first_model(session, base)
        except (aiohttp.ClientError, OSError, ValueError, ServerResponseError) as error:
            raise WorkloadError(
                f"{base}/models gives no model ({type(error).__name__}: {error}): check --url and --api-key, "
                "or name the model with --served-model-name."
            ) from error
        yield OpenAIEngine(session, f"{base}/completions", model, temperature)


async def _first_model(session: aiohttp.ClientSession, base: str) -> str:
    async with session.get(f"{base}/models") as response:
        body = await response.read()
        if response.status != 200:
            raise ServerResponseError(_refusal(response.status, body))
    try:
        return str(json.loads(body)["data"][0]["id"])
    except (LookupError, TypeError):
        raise ServerResponseError(f"unexpected answer {shown(body)}") from None


class OpenAIEngine:
    """A model of an OpenAI server, as a `StreamingEngine`."""

    def __init__(self, session: aiohttp.ClientSession, url: str, model: str, temperature: float) -> None:
        self.model = model
        self._session, self._url, self._temperature = session, url, temperature

    async def stream(self, request: OnlineRequest) -> AsyncIterator[int | None]:
        """Yields the number of tokens so far; None if the server reports usage at the end only."""
        body = {
            "model": self.model,
            "prompt": request.prompt,
            "max_tokens": request.output_len,
            "temperature": self._temperature,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        }
        events = EventReader()
        async with self._session.post(self._url, json=body) as response:
            if response.status != 200:
                raise ServerResponseError(_refusal(response.status, await response.read()))
            async for data in response.content.iter_any():
                has_uncounted = events.feed(data)
                if has_uncounted:
                    yield None
                if events.num_tokens is not None:
                    yield events.num_tokens
        events.check_end()


class EventReader:
    """Reads the server-sent events of one completion from pieces of any size."""

    def __init__(self) -> None:
        self.num_tokens: int | None = None  # by the newest usage of the last piece; None if it had none
        self._rest = b""
        self._is_done = False
        self._has_usage = False

    def feed(self, data: bytes) -> bool:
        """Reads one piece. Returns whether it has a part of the output without a usage.

        Raises ServerResponseError for an error in the stream and for what is not JSON.
        """
        self.num_tokens = None
        has_uncounted = False
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                has_uncounted |= self._read_event(line[5:].strip())
        return has_uncounted

    def _read_event(self, data: bytes) -> bool:
        if data == b"[DONE]":
            self._is_done = True
            return False
        if match := _USAGE.search(data):
            self.num_tokens = int(match[1])
            self._has_usage = True
            return False
        try:
            event: dict[str, Any] = json.loads(data.decode())
            if event.get("error"):
                raise ServerResponseError(f"The stream has an error: {_message(event)}")
            return bool(event["choices"])
        except (ValueError, LookupError, TypeError, AttributeError):
            raise ServerResponseError(f"The stream has an event that is no completion: {shown(data)}") from None

    def check_end(self) -> None:
        """Raises ServerResponseError if the stream ended early or never said how many tokens it has."""
        if not self._is_done:
            raise ServerResponseError("The stream ended before [DONE].")
        if not self._has_usage:
            raise ServerResponseError("The stream reports no usage: stream_options.include_usage is needed.")


def _refusal(status: int, body: bytes) -> str:
    """Returns what an answer other than 200 says."""
    try:
        text = _message(json.loads(body))
    except (ValueError, AttributeError):
        text = shown(body.decode("utf-8", "replace"))
    return f"status {status}: {text}"


def _message(answer: dict[str, Any]) -> str:
    """Returns the message of an error object, of OpenAI's form if it has it."""
    error = answer.get("error", answer)
    message = error.get("message") if isinstance(error, dict) else None
    return message[:200] if isinstance(message, str) else shown(error)
