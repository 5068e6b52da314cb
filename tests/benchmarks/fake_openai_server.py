"""A small server that streams completions as its prompts ask: `python -m tests.benchmarks.fake_openai_server`.

It prints its port. The first token of a prompt chooses what it does; `max_tokens` is the number of tokens. It writes
one chunk a token, of the size that servers send.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

FINE, REFUSED, ERROR_LATER, NOT_JSON, DISCONNECT, NO_DONE, NO_USAGE, FINAL_USAGE, SHORT, HTML, SPLIT = range(11)
KEY = "a-key"


def event(data: object) -> bytes:
    text = data if isinstance(data, str) else json.dumps(data)
    return f"data: {text}\n\n".encode()


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


def completion(num_tokens: int | None, text: str = " word") -> dict[str, Any]:
    choices = [{"index": 0, "text": text, "logprobs": None, "finish_reason": None}]
    head = {"id": "cmpl-0123456789abcdef", "object": "text_completion", "created": 1_764_000_000, "model": "fake"}
    return {**head, "choices": choices, **({} if num_tokens is None else usage(num_tokens))}


def usage(num_tokens: int) -> dict[str, Any]:
    return {"usage": {"prompt_tokens": 8, "total_tokens": 8 + num_tokens, "completion_tokens": num_tokens}}


async def answer(writer: asyncio.StreamWriter, status: str, body: object) -> None:
    content = body.encode() if isinstance(body, str) else json.dumps(body).encode()
    writer.write(f"HTTP/1.1 {status}\r\nContent-Length: {len(content)}\r\n\r\n".encode() + content)
    await writer.drain()


async def stream(writer: asyncio.StreamWriter, kind: int, num_tokens: int) -> None:
    """Streams a completion. Closes the connection where the kind says so."""
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
    for index in range(1, num_tokens + 1):
        if index == 3 and kind == DISCONNECT:
            writer.close()
            return
        if index == 3 and kind == ERROR_LATER:
            writer.write(chunk(event({"error": {"message": "the engine has ended", "code": 500}})))
            break
        if index == 3 and kind == SHORT:
            break
        counted = None if kind in (NO_USAGE, FINAL_USAGE) else index
        data = event("{not json" if index == 3 and kind == NOT_JSON else completion(counted))
        for part in [data[:9], data[9:]] if kind == SPLIT else [data]:
            writer.write(chunk(part))
            await writer.drain()
            await asyncio.sleep(0)
    if kind == FINAL_USAGE:
        writer.write(chunk(b": a comment\r\n\r\n" + event({"choices": [], **usage(2 * num_tokens)})))
    if kind != NO_DONE:
        writer.write(chunk(event("[DONE]")))
    writer.write(b"0\r\n\r\n")
    await writer.drain()


async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answers the requests of one connection."""
    try:
        while not writer.is_closing():
            head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
            length = next((line.split(":")[1] for line in head.split("\r\n") if line.startswith("content-length")), "0")
            body = await reader.readexactly(int(length))
            if f"authorization: bearer {KEY}" not in head:
                await answer(writer, "401 Unauthorized", {"error": {"message": "a key is needed", "code": 401}})
            elif head.startswith("get /v1/models "):
                await answer(writer, "200 OK", {"data": [{"id": "fake"}]})
            else:
                await complete(writer, json.loads(body))
    except (asyncio.IncompleteReadError, ConnectionError):
        pass
    finally:
        writer.close()


async def complete(writer: asyncio.StreamWriter, request: dict[str, Any]) -> None:
    assert request["model"] == "fake"
    assert request["stream"]
    assert request["ignore_eos"]
    assert request["stream_options"] == {"include_usage": True, "continuous_usage_stats": True}
    kind, num_tokens = request["prompt"][0], request["max_tokens"]
    if kind == REFUSED:
        await answer(writer, "429 Too Many Requests", {"error": {"message": "the queue is full", "code": 429}})
    elif kind == HTML:
        await answer(writer, "502 Bad Gateway", "<html>" + "x" * 10_000)
    else:
        await stream(writer, kind, num_tokens // 2 if kind == FINAL_USAGE else num_tokens)


async def main() -> None:
    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main())
