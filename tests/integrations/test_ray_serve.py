"""examples/ray_serve.py with two replicas, each with its engine in a process of its own. The last test ends it."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest

from tests.distributed.rank_processes import ONLY_LINUX, is_alive, processes, session_of
from tests.processes import PATIENCE, ROOT, WATCHDOG, start_python, until
from tests.server.running_server import ANSWER, CONTINUATION, PROMPT, QUESTION, answer_of
from tests.server.server_process import LONG

pytestmark = [ONLY_LINUX, pytest.mark.heavy("two replicas of Ray Serve, which are started again")]
NUM_STREAMS, NUM_TOKENS = 200, 200


class Example:
    """The script, its log, and a client of its address."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self._log = folder / "log"
        self.process = start_python(
            *("examples/ray_serve.py", "--model", "tiny", "--replicas", "2", "--port", str(port)),
            cwd=ROOT,
            NANOVLLM_ENGINE_PROCESS="1",
            NANOVLLM_CPU_KVCACHE_GB="0.2",
            NANOVLLM_LOG_FILE=str(self._log),
            NANOVLLM_LOG_FILE_FORMAT="json",
            RAY_USAGE_STATS_ENABLED="0",
        )
        self.lines: list[str] = []
        for stream in (self.process.stdout, self.process.stderr):
            threading.Thread(target=self.lines.extend, args=(stream,)).start()
        assert until(lambda: any(line.startswith("curl") for line in self.lines) or self.process.poll() is not None)
        assert self.process.poll() is None, self.lines
        self.url = f"http://127.0.0.1:{port}"
        self.client = httpx2.Client(base_url=self.url, timeout=PATIENCE, trust_env=False)

    def records(self, event: str) -> list[dict[str, Any]]:
        lines = self._log.read_text().splitlines(keepends=True)
        records = [json.loads(line) for line in lines if line.endswith("\n")]
        return [record for record in records if record["event"] == event]

    def replicas(self) -> dict[int, int]:
        """Returns the live replicas: the process of each by that of its engine."""
        parents = {pid: parent for pid, state, parent, _ in processes() if state != "Z"}
        engines = {record["pid"] for record in self.records("engine.startup")}
        return {engine: parents[engine] for engine in engines & parents.keys()}

    def answering(self) -> set[int]:
        """Returns the processes of the engines that have finished a request."""
        return {record["pid"] for record in self.records("request.finished")}

    def complete(self, **fields: Any) -> str:
        body = {"prompt": PROMPT, "temperature": 0, **fields}
        text: str = answer_of(self.client.post("/v1/completions", json=body))["choices"][0]["text"]
        return text


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Example]:
    example = Example(tmp_path_factory.mktemp("ray_serve"))
    try:
        with example.client:
            yield example
    finally:
        for pid in session_of(example.process.pid):
            os.kill(pid, signal.SIGKILL)
        example.process.wait()


def test_clients_of_openai_stream_from_both_replicas(example: Example) -> None:
    client = openai.OpenAI(base_url=f"{example.url}/v1", api_key="none", max_retries=0, timeout=PATIENCE)
    with client:
        stream = client.chat.completions.create(model="tiny", messages=QUESTION, temperature=0, stream=True)  # type: ignore[call-overload]
        deltas = [chunk.choices[0].delta.content for chunk in stream]
        assert "".join(filter(None, deltas)) == ANSWER
        assert len(deltas) > 2
        for _ in range(8):
            completion = client.completions.create(model="tiny", prompt=PROMPT, temperature=0)
            assert completion.choices[0].text == CONTINUATION
    assert {example.complete(seed=5, temperature=1.5, max_tokens=20) for _ in range(8)} == {
        example.complete(seed=5, temperature=1.5, max_tokens=20)
    }
    assert until(lambda: len(example.answering()) == 2)
    seeds = {record["seed"] for record in example.records("engine.config")}
    assert len(seeds) == 2, "requests without a seed draw other tokens on each replica"


def test_a_client_that_leaves_frees_its_request(example: Example) -> None:
    with example.client.stream("POST", "/v1/completions", json={**LONG, "max_tokens": 3000}) as stream:
        first = chunk(next(stream.iter_lines()))
    assert until(lambda: any(record["request_id"] == first["id"] for record in example.records("request.finished")))
    (end,) = [record for record in example.records("request.finished") if record["request_id"] == first["id"]]
    assert end["cause"] == "left"


class Streams:
    """Many streams at the same time, and what they have received so far."""

    def __init__(self) -> None:
        self.num_begun = 0
        self.whole: dict[str, str] = {}  # why each ended, by its id
        self.broken: set[str] = set()  # ids

    async def read_all(self, url: str) -> None:
        limits = httpx2.Limits(max_connections=None)
        async with httpx2.AsyncClient(base_url=url, timeout=PATIENCE, limits=limits, trust_env=False) as client:
            await asyncio.gather(*(self._read(client) for _ in range(NUM_STREAMS)))

    async def _read(self, client: httpx2.AsyncClient) -> None:
        body = {**LONG, "temperature": 0, "max_tokens": NUM_TOKENS}
        events: list[str] = []
        try:
            async with client.stream("POST", "/v1/completions", json=body) as stream:
                async for line in stream.aiter_lines():
                    self.num_begun += not events
                    events += [line] * line.startswith("data: ")
        except httpx2.HTTPError:
            self.broken.add(chunk(events[0])["id"])
            return
        assert events[-1] == "data: [DONE]", events[-1]
        last = chunk(events[-2])
        self.whole[last["id"]] = last["choices"][0]["finish_reason"]


def chunk(event: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(event.removeprefix("data: "))
    return content


def test_streams_of_a_replica_that_is_killed_break_off_and_the_others_go_on(example: Example) -> None:
    streams = Streams()
    reader = threading.Thread(target=lambda: asyncio.run(streams.read_all(example.url)))
    reader.start()
    assert until(lambda: streams.num_begun == NUM_STREAMS)
    before = example.replicas()
    (lost, replica), (other, _) = before.items()
    os.kill(replica, signal.SIGKILL)
    assert until(lambda: bool(streams.broken))
    assert [example.complete() for _ in range(5)] == [CONTINUATION] * 5, "new requests go to the other replica"
    reader.join()
    assert len(streams.broken) + len(streams.whole) == NUM_STREAMS
    assert set(streams.whole.values()) == {"length"}
    others = {record["request_id"] for record in example.records("request.finished") if record["pid"] == other}
    assert others & streams.whole.keys(), "however Serve has divided the streams, some are the other replica's"
    assert others.isdisjoint(streams.broken), "and none of these breaks off"
    assert until(lambda: not is_alive(lost)), "the engine ends with its replica"
    assert until(lambda: len(example.replicas()) == 2), "Serve starts another replica"


def test_a_replica_whose_engine_has_died_is_replaced(example: Example) -> None:
    assert until(lambda: len(example.replicas()) == 2)
    (engine, replica), (_, other) = example.replicas().items()
    os.kill(engine, signal.SIGKILL)
    assert until(lambda: not is_alive(replica))
    assert until(lambda: len(example.replicas()) == 2)
    assert other in example.replicas().values()
    assert until(lambda: example.complete() == CONTINUATION and example.replicas().keys() <= example.answering())


def test_ctrl_c_lets_running_requests_end_and_leaves_nothing(example: Example) -> None:
    with example.client.stream("POST", "/v1/completions", json={**LONG, "max_tokens": 1000}) as stream:
        lines = stream.iter_lines()
        next(lines)
        os.killpg(example.process.pid, signal.SIGINT)  # as a terminal does
        assert until(lambda: any(line.startswith("Waiting") for line in example.lines))
        *_, last, _ = (line for line in lines if line)
    assert '"finish_reason":"length"' in last
    assert example.process.wait(WATCHDOG) == 0, example.lines
    assert until(lambda: not session_of(example.process.pid))
    assert {record["outcome"] for record in example.records("engine.exit")} == {"clean"}
