"""Clients that leave, or read slowly."""

from __future__ import annotations

import logging
import socket
from typing import Any

import pytest

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
    (log,) = [record.fields for record in caplog.records if getattr(record, "event", "") == "http.request"]
    assert log["status"] == 499
    causes = [record.fields["cause"] for record in caplog.records if getattr(record, "event", "") == "request.finished"]
    assert set(causes) == {"left"}


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
    """It reads nothing, and its answer is longer than what the sockets take."""
    fields = {"stream": True, "logprobs": 20, "max_tokens": 2000}
    slow = [send(server, {**LONG, **fields}, buffer=4096) for _ in range(3)]
    assert until(lambda: server.engine.metrics.num_running == 3)
    for _ in range(5):
        assert server.complete()["choices"][0]["text"] == CONTINUATION
    assert until(server.is_idle)  # they have ended, though nobody reads
    for connection in slow:
        data = b""
        while b"[DONE]" not in data and (chunk := connection.recv(1 << 20)):
            data = data[-20:] + chunk
        assert b"[DONE]" in data
        connection.close()


def test_an_abort_by_id(server: RunningServer) -> None:
    with server.client.stream("POST", "/v1/completions", json={**LONG, "stream": True}) as stream:
        lines = (line for line in stream.iter_lines() if line)
        next(lines)
        name = stream.headers["X-Request-Id"]
        assert server.post("/abort", request_id=name).json() == {"aborted": 1}
        *_, last, done = lines
    assert '"finish_reason":"abort"' in last
    assert done == "data: [DONE]"
    assert server.post("/abort", request_id=["other", name]).json() == {"aborted": 0}
    assert server.client.post("/reset_prefix_cache").status_code == 200


def test_endpoints_for_development_are_off_by_default(server: RunningServer) -> None:
    with running_server(server.engine) as plain:
        for path in ("/abort", "/start_profile", "/stop_profile", "/reset_prefix_cache"):
            assert plain.post(path, request_id="a").status_code == 404


def send(server: RunningServer, body: dict[str, Any], buffer: int | None = None) -> socket.socket:
    """Sends a request and returns the connection, of which nothing is read. buffer: bytes that it takes unread."""
    host, port = server.url.removeprefix("http://").split(":")
    connection = socket.socket()
    if buffer is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
    connection.connect((host, int(port)))
    request = server.client.build_request("POST", "/v1/completions", json=body)
    head = "".join(f"{name}: {value}\r\n" for name, value in request.headers.items())
    connection.sendall(f"POST /v1/completions HTTP/1.1\r\n{head}\r\n".encode() + request.content)
    return connection
