"""Clients that leave, or read slowly."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
from typing import Any

import pytest

from nanovllm.server.app import make_app
from tests.processes import until
from tests.server.running_server import CONTINUATION, RunningServer, running_server

LONG: dict[str, Any] = {"prompt": "count", "ignore_eos": True, "max_tokens": 4000, "temperature": 1}


@pytest.mark.parametrize("fields", [{"stream": True}, {}, {"n": 2, "stream": True}, {"prompt": ["a", "b"]}])
def test_a_client_that_leaves_frees_its_blocks(
    server: RunningServer, fields: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "nanovllm")
    connection = send(server, {**LONG, **fields})
    assert until(lambda: server.engine.metrics.num_running >= 1)
    connection.close()
    assert until(server.is_idle)
    assert until(lambda: server.service.num_requests == 0)

    def statuses() -> list[int]:
        logged = [log["status"] for log in fields_of(caplog, "http.request")]
        return [status for status in logged if status != 200]  # another test's answer may be logged late

    assert until(lambda: statuses() == [499])  # it is logged after it is counted
    assert until(lambda: {each["cause"] for each in fields_of(caplog, "request.finished")} == {"left"})


def test_a_client_that_leaves_the_queue_is_forgotten(server: RunningServer) -> None:
    first = send(server, {**LONG, "n": 8})
    assert until(lambda: server.engine.metrics.num_running == 8)
    waiting = send(server, LONG)
    assert until(lambda: server.engine.metrics.num_waiting == 1)
    waiting.close()
    assert until(lambda: server.engine.metrics.num_waiting == 0)
    assert server.engine.metrics.num_running == 8
    first.close()
    assert until(server.is_idle)


def test_a_slow_reader_holds_up_nobody(server: RunningServer) -> None:
    """It takes the first part of its answer, and nothing more until its request has ended."""
    body = {**LONG, "max_tokens": 300, "stream": True}
    sent: list[bytes] = []

    async def read_slowly() -> None:
        may_read, gone = asyncio.Event(), asyncio.Event()
        messages = iter([{"type": "http.request", "body": json.dumps(body).encode()}])

        async def receive() -> Any:
            for message in messages:
                return message
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            sent.append(message.get("body", b""))
            if len(sent) > 1:
                await may_read.wait()

        task = asyncio.ensure_future(make_app(server.service)(scope_of("/v1/completions"), receive, send))
        while not sent:
            await asyncio.sleep(0.01)
        other = await asyncio.to_thread(server.complete)
        assert other["choices"][0]["text"] == CONTINUATION
        assert await asyncio.to_thread(until, server.is_idle)  # it has ended, though nobody reads
        assert len(sent) == 2  # the headers, and the part that waits
        may_read.set()
        await task

    asyncio.run(read_slowly())
    *chunks, done = b"".join(sent).decode().strip().split("\n\n")
    assert done == "data: [DONE]"
    assert len(chunks) in (2, 3)  # what was generated meanwhile is one chunk; the end may reach the server after it
    assert json.loads(chunks[-1].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"


def fields_of(caplog: pytest.LogCaptureFixture, event: str) -> list[dict[str, Any]]:
    return [record.fields for record in caplog.records if getattr(record, "event", "") == event]


def scope_of(path: str) -> dict[str, Any]:
    headers = [(b"content-type", b"application/json")]
    return {"type": "http", "method": "POST", "path": path, "query_string": b"", "headers": headers, "root_path": ""}


def test_an_abort_by_id(server: RunningServer) -> None:
    with server.client.stream("POST", "/v1/completions", json={**LONG, "stream": True}) as stream:
        lines = (line for line in stream.iter_lines() if line)
        next(lines)
        name = stream.headers["X-Request-Id"]
        assert server.post("/abort", request_id=name).json() == {"aborted": 1}
        *_, last, done = lines
    assert '"finish_reason":"abort"' in last
    assert done == "data: [DONE]"
    assert until(lambda: server.post("/abort", request_id=["other", name]).json() == {"aborted": 0})
    assert server.client.post("/reset_prefix_cache").status_code == 200


def test_endpoints_for_development_are_off_by_default(server: RunningServer) -> None:
    with running_server(server.engine) as plain:
        for path in ("/abort", "/reset_prefix_cache", "/start_profile", "/stop_profile"):
            assert plain.post(path, request_id="a").status_code == 404


def send(server: RunningServer, body: dict[str, Any]) -> socket.socket:
    """Sends a request and returns the connection, of which nothing is read."""
    host, port = server.url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)))
    request = server.client.build_request("POST", "/v1/completions", json=body)
    head = "".join(f"{name}: {value}\r\n" for name, value in request.headers.items())
    connection.sendall(f"POST /v1/completions HTTP/1.1\r\n{head}\r\n".encode() + request.content)
    return connection
