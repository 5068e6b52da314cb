"""A server on the tiny checkpoint, in a thread of the test's process, and short ways to ask it."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx2

from nanovllm import AsyncLLM
from nanovllm.server.serve import HttpServer
from nanovllm.server.service import Service
from nanovllm.server.settings import ServerSettings
from tests.processes import PATIENCE, until

ENGINE: dict[str, Any] = {"num_kvcache_blocks": 512, "max_num_seqs": 8, "max_num_batched_tokens": 512, "device": "cpu"}
QUESTION = [{"role": "user", "content": "What is 27 + 58?"}]
ANSWER = "27 + 58 = 85"
PROMPT, CONTINUATION = "27 + 58 =", " 85"


class RunningServer:
    """A server that listens, and a client of it."""

    def __init__(self, server: HttpServer, service: Service, engine: AsyncLLM) -> None:
        self.server, self.service, self.engine = server, service, engine
        self.url = server.address
        self.client = httpx2.Client(base_url=self.url, timeout=PATIENCE, trust_env=False)

    def post(self, path: str, **body: Any) -> httpx2.Response:
        return self.client.post(path, json=body)

    def complete(self, prompt: Any = PROMPT, **fields: Any) -> dict[str, Any]:
        return answer_of(self.post("/v1/completions", **{"prompt": prompt, "temperature": 0, **fields}))

    def chat(self, messages: Any = QUESTION, **fields: Any) -> dict[str, Any]:
        return answer_of(self.post("/v1/chat/completions", **{"messages": messages, "temperature": 0, **fields}))

    def stream(self, path: str, **body: Any) -> list[dict[str, Any]]:
        """Returns the chunks of a stream, which must end as OpenAI's do."""
        response = self.client.post(path, json={"stream": True, "temperature": 0, **body})
        assert response.headers["content-type"].startswith("text/event-stream"), response.text
        *events, done, end = response.text.split("\n\n")
        assert (done, end) == ("data: [DONE]", "")
        return [json.loads(each.removeprefix("data: ")) for each in events]

    def is_idle(self) -> bool:
        """Whether no request and no block of the KV cache is in use."""
        metrics = self.engine.metrics
        return (metrics.num_running, metrics.num_waiting, metrics.used_blocks) == (0, 0, 0)


def answer_of(response: httpx2.Response) -> dict[str, Any]:
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def error_of(response: httpx2.Response, status: int) -> dict[str, Any]:
    """Returns the error of an answer, which must have this status and OpenAI's form."""
    assert response.status_code == status, response.text
    (key, error), *rest = response.json().items()
    assert (key, rest) == ("error", [])
    assert set(error) == {"message", "type", "param", "code"}
    return error  # type: ignore[no-any-return]


@contextmanager
def running_server(engine: AsyncLLM | None = None, **settings: Any) -> Iterator[RunningServer]:
    """Serves `engine`, or one of its own, until the block ends."""
    service = Service(ServerSettings(**{"port": 0, "served_model_name": ("tiny", "small"), **settings}))
    server = HttpServer(service, lambda: AsyncLLM("tiny", **ENGINE) if engine is None else engine)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        assert until(lambda: service.state == "ready" or not thread.is_alive())
        running = RunningServer(server, service, service.engine)
        with running.client:
            yield running
    finally:
        server.force_exit = server.should_exit = True
        thread.join()
        if engine is None and server.engine is not None:
            server.engine.exit()
