"""HttpProtocol: uvicorn's HTTP/1.1 for hostile, for modern and for old clients."""

from __future__ import annotations

import re
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

_MAX_HEAD = 65_536  # bytes of the request line and the headers
_HTTP_2 = re.compile(rb"(?i)\r\nupgrade:[ \t]*h2c")


class HttpProtocol(HttpToolsProtocol):
    """Refuses a head without end, and ignores an offer to go on with HTTP/2, as Java's clients send it.

    httptools stops reading at such an offer, and the body would be lost. Clients of HTTP/1.0 get no chunks.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._is_in_body = False
        self._head_size = 0

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
        if self.parser.get_http_version() == "1.0" and self.cycle is not None:
            self.cycle.send = _Unchunked(self.cycle).send  # type: ignore[method-assign]

    def on_message_complete(self) -> None:
        self._is_in_body = False
        super().on_message_complete()


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
