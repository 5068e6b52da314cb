"""A thousand streams at a time: all are answered, memory is bounded, and nothing is left."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from typing import Any

import pytest

from nanovllm import AsyncLLM
from tests.processes import until
from tests.server.running_server import RunningServer, running_server

NUM_STREAMS, NUM_TOKENS = 1000, 6


async def stream(host: str, port: int, number: int) -> int:
    """Returns the number of tokens of one stream. Plain sockets: a client's own memory would hide the server's."""
    body: dict[str, Any] = {"prompt": f"count from {number}", "stream": True, "ignore_eos": True, "temperature": 1}
    body |= {"max_tokens": NUM_TOKENS, "stream_options": {"include_usage": True}}
    data = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: {len(data)}\r\nConnection: close\r\n"
    reader, writer = await asyncio.open_connection(host, port)
    writer.write(f"{head}Content-Type: application/json\r\n\r\n".encode() + data)
    answer = (await reader.read()).decode()
    writer.close()
    assert answer.startswith("HTTP/1.1 200"), answer[:200]
    assert "data: [DONE]" in answer
    usage = next(line for line in answer.splitlines() if line.startswith("data: ") and '"choices":[]' in line)
    return int(json.loads(usage.removeprefix("data: "))["usage"]["completion_tokens"])


def ask_all(server: RunningServer) -> None:
    host, port = server.url.removeprefix("http://").split(":")

    async def ask() -> list[int]:
        return await asyncio.gather(*(stream(host, int(port), number) for number in range(NUM_STREAMS)))

    assert Counter(asyncio.run(ask())) == {NUM_TOKENS: NUM_STREAMS}


def resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


@pytest.mark.heavy("two thousand requests")
def test_a_thousand_streams() -> None:
    engine = AsyncLLM("tiny", device="cpu", max_num_seqs=128, num_kvcache_blocks=1024)
    with engine, running_server(engine) as server:
        ask_all(server)
        before = resident_bytes()
        ask_all(server)
        assert resident_bytes() - before < 50e6
        assert until(server.is_idle)
        assert until(lambda: server.service.num_requests == 0)
        assert server.engine.metrics.finished["length"] == 2 * NUM_STREAMS
