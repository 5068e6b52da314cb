"""HttpProtocol: uvicorn's HTTP/1.1 for hostile, for modern and for old clients."""

from __future__ import annotations

import re
from asyncio import TimerHandle
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

_MAX_HEAD = 65_536  # bytes of the request line and the headers
_HTTP_2 = re.compile(rb"(?i)\r\nupgrade:[ \t]*h2c")
_LINGER_SECONDS = 30.0  # in which a client that is answered may send the rest of its body


class HttpProtocol(HttpToolsProtocol):
    """Refuses a head without end, and ignores an offer to go on with HTTP/2, as Java's clients send it.

    httptools stops reading at such an offer, and the body would be lost. Clients of HTTP/1.0 get no chunks. Clients
    that send the whole body before they read get the answer that refuses it.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._is_in_body = False
        self._is_ending = False  # whether the server is
        self._head_size = 0
        self._lingering: TimerHandle | None = None  # ends it

    def data_received(self, data: bytes) -> None:
        if not self._is_in_body:
            self._head_size += len(data)
            head, end, rest = data.partition(b"\r\n\r\n")
            data = _HTTP_2.sub(b"\r\nX-Upgrade: h2c", head) + end + rest
        super().data_received(data)
        if not self._is_in_body and self._head_size > _MAX_HEAD and not self.transport.is_closing():
            self.send_400_response(f"The head of a request must have at most {_MAX_HEAD} bytes.")

    def on_headers_complete(self) -> None:
        self._is_in_body, self._head_size = True, 0
        super().on_headers_complete()
        cycle: RequestResponseCycle | None = self.cycle
        if cycle is not None and self.parser.get_http_version() == "1.0":
            cycle.send = _Unchunked(cycle).send  # type: ignore[method-assign]
        if cycle is not None and not cycle.keep_alive:
            cycle.send = _Lingering(self, cycle).send  # type: ignore[method-assign]

    def on_message_complete(self) -> None:
        self._is_in_body = False
        super().on_message_complete()
        if self._lingering is not None:
            self.transport.close()

    def send_400_response(self, msg: str) -> None:
        if self._lingering is None:
            super().send_400_response(msg)
        else:  # it has its answer
            self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._lingering is not None:
            self._lingering.cancel()
        super().connection_lost(exc)

    def shutdown(self) -> None:
        self._is_ending = True
        super().shutdown()

    @property
    def may_linger(self) -> bool:
        """Whether the body of the newest request is incomplete, and the server goes on."""
        return self._is_in_body and not self._is_ending

    def linger(self) -> None:
        """Closes the connection once the body is complete, or after some time. The body is dropped."""
        if self.transport.is_closing():
            return
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self._lingering = self.loop.call_later(_LINGER_SECONDS, self.transport.close)


class _Lingering:
    """Answers a client that asks for the end of the connection, and reads the rest of its body after that.

    To close a connection with data that is not read is to reset it, and the client might lose the answer.
    """

    def __init__(self, protocol: HttpProtocol, cycle: RequestResponseCycle) -> None:
        self._protocol, self._cycle, self._send = protocol, cycle, cycle.send

    async def send(self, message: Any) -> None:
        is_last = message["type"] == "http.response.body" and not message.get("more_body", False)
        lingers = is_last and self._protocol.may_linger
        self._cycle.keep_alive = lingers  # else the cycle closes the connection; the head was sent before
        await self._send(message)
        if lingers:
            self._protocol.linger()


class _Unchunked:
    """Sends a body of unknown length as it is. The end of the connection, which uvicorn does not keep, is its end."""

    def __init__(self, cycle: RequestResponseCycle) -> None:
        self._cycle, self._send = cycle, cycle.send
        self._has_length = False

    async def send(self, message: Any) -> None:
        cycle = self._cycle
        if message["type"] == "http.response.start":
            self._has_length = any(name.lower() == b"content-length" for name, _ in message.get("headers", ()))
            if not self._has_length:
                cycle.chunked_encoding = False
        elif not self._has_length:
            cycle.expected_content_length = len(message.get("body", b""))
        await self._send(message)
