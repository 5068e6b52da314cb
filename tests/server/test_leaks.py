"""What requests leave behind in the server: no open descriptor, no task."""

from __future__ import annotations

import asyncio
import json
import os
import socket
from collections.abc import Callable
from typing import Any

import pytest

from nanovllm import AsyncLLM
from tests.processes import PATIENCE, until
from tests.server.running_server import RunningServer, running_server

LONG: dict[str, Any] = {"prompt": "count", "ignore_eos": True, "max_tokens": 500, "stream": True, "temperature": 1}
CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "count"}], "max_tokens": 8, "stream": True}


def post(path: str, body: bytes, headers: str = "Connection: close") -> bytes:
    head = f"POST {path} HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
    return f"{head}{headers}\r\n\r\n".encode() + body


def completion(**fields: Any) -> bytes:
    return post("/v1/completions", json.dumps({**LONG, **fields}).encode())


def read_all(connection: socket.socket) -> bytes:
    return b"".join(iter(lambda: connection.recv(4096), b""))


def ends(connection: socket.socket) -> None:
    connection.sendall(completion(max_tokens=8))
    assert b"data: [DONE]" in read_all(connection)


def ends_for_old_clients(connection: socket.socket) -> None:
    connection.sendall(completion(max_tokens=8).replace(b"HTTP/1.1", b"HTTP/1.0"))
    assert read_all(connection).endswith(b"data: [DONE]\n\n")


def keeps_the_connection(connection: socket.socket) -> None:
    connection.sendall(post("/v1/chat/completions", json.dumps(CHAT).encode(), "Connection: keep-alive"))
    while b"data: [DONE]" not in connection.recv(4096):
        pass


def leaves_at_once(connection: socket.socket) -> None:
    connection.sendall(completion())


def leaves_in_the_head(connection: socket.socket) -> None:
    connection.sendall(completion()[:40])


def leaves_in_the_body(connection: socket.socket) -> None:
    connection.sendall(completion()[:-4])


def leaves_after_the_first_chunk(connection: socket.socket) -> None:
    connection.sendall(completion(n=2))
    assert connection.recv(4096).startswith(b"HTTP/1.1 200")


def leaves_an_answer_in_one_piece(connection: socket.socket) -> None:
    connection.sendall(completion(stream=False))


def reads_slowly_and_leaves(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
    connection.sendall(completion(n=4, logprobs=5))
    for _ in range(20):
        connection.recv(10)


def asks_wrongly(connection: socket.socket) -> None:
    connection.sendall(completion(temperature=-1))
    assert read_all(connection).startswith(b"HTTP/1.1 400")


def sends_what_is_not_json(connection: socket.socket) -> None:
    connection.sendall(post("/v1/messages", b"{"))
    assert read_all(connection).startswith(b"HTTP/1.1 400")


def sends_what_is_not_http(connection: socket.socket) -> None:
    connection.sendall(b"\x00\x01\r\n\r\n")
    read_all(connection)


CLIENTS: list[Callable[[socket.socket], None]] = [
    ends,
    ends_for_old_clients,
    keeps_the_connection,
    leaves_at_once,
    leaves_in_the_head,
    leaves_in_the_body,
    leaves_after_the_first_chunk,
    leaves_an_answer_in_one_piece,
    reads_slowly_and_leaves,
    asks_wrongly,
    sends_what_is_not_json,
    sends_what_is_not_http,
]


def ask(server: RunningServer, client: Callable[[socket.socket], None]) -> None:
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=PATIENCE) as connection:
        client(connection)


def num_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def num_tasks(server: RunningServer) -> int:
    return len(asyncio.all_tasks(server.server.servers[0].get_loop()))


@pytest.mark.heavy("two hundred requests")
def test_no_request_leaves_a_descriptor_or_a_task() -> None:
    engine = AsyncLLM("tiny", device="cpu", max_num_seqs=8, num_kvcache_blocks=512)
    with engine, running_server(engine) as server:
        for client in CLIENTS:  # what stays from then on, stays once
            ask(server, client)
        assert until(server.is_idle)
        assert until(lambda: server.service.num_requests == 0 and not server.server.server_state.connections)
        descriptors, tasks = num_descriptors(), num_tasks(server)
        for number in range(200):
            ask(server, CLIENTS[number % len(CLIENTS)])
        assert until(server.is_idle)
        assert until(lambda: server.service.num_requests == 0)
        assert until(lambda: num_descriptors() <= descriptors)
        assert until(lambda: num_tasks(server) <= tasks)
