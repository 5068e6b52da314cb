"""`nanovllm serve --api-server-count 2`: two processes answer as one server, and leave nothing behind."""

from __future__ import annotations

import json
import os
import signal
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx2
import pytest

from nanovllm import LLM, SamplingParams
from tests.distributed.rank_processes import ONLY_LINUX, is_alive, session_of
from tests.processes import PATIENCE, WATCHDOG, start_python, until
from tests.server.running_server import error_of
from tests.server.server_process import LONG, OPTIONS, Process, serving

pytestmark = ONLY_LINUX
TWO = ("--api-server-count", "2")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    with serving(tmp_path_factory.mktemp("log") / "log", *TWO, "--max-queue", "0", "--dev") as process:
        yield process


@contextmanager
def clients_of(server: Process, num_processes: int = 2) -> Iterator[dict[int, httpx2.Client]]:
    """Yields a client for each API process, by its pid: the one with which its connection is."""
    found: dict[int, httpx2.Client] = {}
    with ExitStack() as opened:
        while len(found) < num_processes:
            client = opened.enter_context(
                httpx2.Client(base_url=server.client.base_url, timeout=PATIENCE, trust_env=False)
            )
            client.headers["Authorization"] = "Bearer secret"
            found.setdefault(pid_of(server, client), client)
        yield found


def pid_of(server: Process, client: httpx2.Client) -> int:
    """The process that answers a client, as the access log has it."""
    name = os.urandom(8).hex()
    assert client.get("/version", headers={"X-Request-Id": name}).status_code == 200

    def pids() -> list[int]:
        return [each["pid"] for each in server.records("http.request") if each["client_request_id"] == name]

    assert until(lambda: len(pids()) == 1)
    return pids()[0]


def metric(client: httpx2.Client, name: str) -> float:
    """The sum of a metric over its labels."""
    lines = [line for line in client.get("/metrics").text.splitlines() if line.startswith(f"vllm:{name}{{")]
    assert lines
    return sum(float(line.rpartition(" ")[2]) for line in lines)


@contextmanager
def fresh(server: Process) -> Iterator[httpx2.Client]:
    """Yields a client that opens a connection for each request: any process may answer."""
    limits = httpx2.Limits(max_keepalive_connections=0)
    headers = {"Authorization": "Bearer secret"}
    with httpx2.Client(
        base_url=server.client.base_url, headers=headers, limits=limits, timeout=PATIENCE, trust_env=False
    ) as client:
        yield client


def is_draining(client: httpx2.Client) -> bool:
    with suppress(httpx2.TransportError):  # this process has ended
        return client.post("/v1/completions", json={"prompt": "a"}).status_code == 503
    return False


@contextmanager
def open_stream(client: httpx2.Client, **fields: Any) -> Iterator[Iterator[str]]:
    """Yields the lines of a stream that has begun."""
    with client.stream("POST", "/v1/completions", json={**LONG, "max_tokens": 4000, **fields}) as stream:
        lines = (line for line in stream.iter_lines() if line)
        assert next(lines).startswith("data: {"), stream.status_code
        yield lines


def test_both_give_the_texts_of_the_model(server: Process) -> None:
    prompts = [f"{number} + 58 =" for number in range(6)]
    with LLM("tiny", device="cpu", num_kvcache_blocks=512, max_num_seqs=8) as llm:
        expected = [each["text"] for each in llm.generate(prompts, SamplingParams(temperature=0, max_tokens=8))]
    with clients_of(server) as clients:
        before = metric(server.client, "request_success_total")
        for client in clients.values():
            body = {"prompt": prompts, "temperature": 0, "max_tokens": 8}
            # Without a queue there is room only once the other process has counted the end of its answer.
            assert until(lambda client=client: client.get("/load").json() == {"server_load": 0})
            choices = client.post("/v1/completions", json=body).json()["choices"]
            assert [choice["text"] for choice in choices] == expected
        counts = [metric(client, "request_success_total") - before for client in clients.values()]
        assert counts == [2 * len(prompts)] * 2, "each answers for the whole server"
        latest = [client.get("/events").json()["events"] for client in clients.values()]
        assert latest[0] == latest[1]
        assert "request.finished" in {each["event"] for each in latest[0]}


def test_the_queue_and_the_load_are_those_of_all(server: Process) -> None:
    with clients_of(server) as clients:
        one, other = clients.values()
        with open_stream(one, n=8):
            assert other.get("/load").json() == {"server_load": 1}
            assert error_of(other.post("/v1/completions", json={"prompt": "a"}), 429)["code"] == "queue_full"
        assert until(lambda: other.post("/v1/completions", json={"prompt": "a"}).status_code == 200)
        assert until(lambda: metric(other, "num_requests_running") == 0)


def test_any_process_aborts_the_requests_of_all(server: Process) -> None:
    with clients_of(server) as clients:
        one, other = clients.values()
        for prompt, count in (("count", 1), (["count", "on"], 2)):
            body = {**LONG, "prompt": prompt, "max_tokens": 4000}
            with one.stream("POST", "/v1/completions", json=body) as stream:
                lines = (line.removeprefix("data: ") for line in stream.iter_lines() if line)
                name = json.loads(next(lines))["id"]
                assert until(lambda count=count: metric(other, "num_requests_running") == count)  # type: ignore[misc]
                assert other.post("/abort", json={"request_id": name.partition("-")[0]}).json() == {"aborted": 0}
                assert other.post("/abort", json={"request_id": [name, "unknown"]}).json() == {"aborted": count}
                *chunks, done = lines
            assert done == "[DONE]"
            reasons = [choice["finish_reason"] for chunk in chunks for choice in json.loads(chunk)["choices"]]
            assert reasons.count("abort") == count
        assert other.post("/abort", json={"request_id": name}).json() == {"aborted": 0}


def test_a_process_that_is_killed_takes_its_requests_along(tmp_path: Path) -> None:
    with serving(tmp_path / "log", *TWO) as server, clients_of(server) as clients, fresh(server) as either:
        (killed, one), (stays, other) = clients.items()
        with open_stream(one, n=4), open_stream(other, max_tokens=300) as goes_on:
            assert until(lambda: metric(either, "num_requests_running") == 5)
            os.kill(killed, signal.SIGKILL)
            assert until(lambda: metric(either, "num_requests_running") <= 1)
            *_, done = goes_on
            assert done == "data: [DONE]"
        assert until(lambda: bool(server.records("api_process.lost")))  # the engine may notice first
        (lost,) = server.records("api_process.lost")
        assert f"{killed} was ended by SIGKILL" in lost["message"]
        with clients_of(server) as now:  # as soon as its successor listens
            assert stays in now
            assert killed not in now
            for client in now.values():
                assert until(lambda client=client: client.get("/health").status_code == 200)  # type: ignore[misc]
            with open_stream(next(iter(now.values())), max_tokens=300) as lines:
                server.process.send_signal(signal.SIGTERM)
                assert until(lambda: is_draining(either))
                *_, done = lines
            assert done == "data: [DONE]"
        assert server.end() == 0
        assert len(server.records("server.draining")) == len(server.records("server.stopped")) == 1
        assert len(server.records("server.started")) == 1
        assert until(lambda: session_of(server.process.pid) == [])
        assert "secret" not in (tmp_path / "log").read_text() + "".join(server.errors)


@contextmanager
def stopped(pid: int) -> Iterator[None]:
    """Suspends a process meanwhile."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


@pytest.mark.heavy("waits for half a minute")
def test_a_process_that_is_stopped_holds_up_nobody(tmp_path: Path) -> None:
    with (
        serving(tmp_path / "log", *TWO, "--num-kvcache-blocks", "2048") as server,
        clients_of(server) as clients,
        clients_of(server) as more,
        ThreadPoolExecutor(1) as executor,
    ):
        (pid, one), (_, other) = clients.items()
        body = {**LONG, "max_tokens": 4000, "stream": False}
        with open_stream(one, n=4) as lines:
            answer = executor.submit(more[pid].post, "/v1/completions", json=body)
            assert until(lambda: metric(other, "num_requests_running") == 5)
            with stopped(pid):
                with open_stream(other, max_tokens=2000) as goes_on:
                    *_, done = goes_on
                assert done == "data: [DONE]"
                assert until(lambda: bool(server.records("api_process.dropped")))
                assert until(lambda: metric(other, "num_requests_running") == 0)
                assert until(lambda: metric(other, "kv_cache_usage_perc") == 0)
            *_, last = lines
            assert json.loads(last.removeprefix("data: "))["error"]["code"] == "engine_dead"
            assert error_of(answer.result(), 500)["code"] == "engine_dead"
        (dropped,) = server.records("api_process.dropped")
        assert dropped["client_pid"] == pid
        assert until(lambda: bool(server.records("api_process.lost")))
        assert f"{pid} ended with exit code 1" in server.records("api_process.lost")[0]["message"]
        with clients_of(server) as now:
            assert pid not in now
            for client in now.values():
                assert client.post("/v1/completions", json={"prompt": "a"}).status_code == 200
        server.process.send_signal(signal.SIGTERM)
        assert server.end() == 0
        assert until(lambda: session_of(server.process.pid) == [])


@pytest.mark.heavy("starts a server")
def test_the_process_that_writes_the_log_is_stopped_and_holds_up_nobody(tmp_path: Path) -> None:
    level = {"NANOVLLM_LOG_LEVEL": "DEBUG"}  # more than the sockets hold
    with serving(tmp_path / "log", *TWO, **level) as server, clients_of(server) as clients:
        with stopped(server.process.pid):
            for client in clients.values():
                with open_stream(client, max_tokens=300) as lines:
                    *_, done = lines
                assert done == "data: [DONE]"
        assert until(lambda: bool(server.records("log.dropped")))
        dropped = server.records("log.dropped")[0]
        assert dropped["num_lost"] > 0
        assert dropped["pid"] == engine_of(server)
        server.process.send_signal(signal.SIGTERM)
        assert server.end() == 0
        assert until(lambda: session_of(server.process.pid) == [])


def engine_of(server: Process) -> int:
    """The pid of the engine's process, as its log has it."""
    return int(server.records("engine.init")[0]["pid"])


@pytest.mark.heavy("starts two servers")
@pytest.mark.parametrize("options", [(), ("--exit-on-death",)])
def test_the_death_of_the_engine_reaches_all(tmp_path: Path, options: tuple[str, ...]) -> None:
    with serving(tmp_path / "log", *TWO, *options) as server, clients_of(server) as clients:
        one, other = clients.values()
        with open_stream(one) as lines, open_stream(other) as others:
            os.kill(engine_of(server), signal.SIGKILL)
            for each in (lines, others):
                *_, last = each
                assert json.loads(last.removeprefix("data: "))["error"]["code"] == "engine_dead"
        assert until(lambda: len(server.records("engine_process.lost")) == 1)
        if options:
            assert server.end() == 1
        else:
            for client in clients.values():
                assert error_of(client.get("/health"), 503)["code"] == "engine_dead"
            server.process.send_signal(signal.SIGTERM)
            assert server.end() == 0
        assert until(lambda: session_of(server.process.pid) == [])


@pytest.mark.heavy("starts a server")
def test_all_end_with_the_process_that_was_started(tmp_path: Path) -> None:
    with serving(tmp_path / "log", *TWO) as server, open_stream(server.client):
        server.process.kill()
        assert until(lambda: session_of(server.process.pid) == [])


@pytest.mark.heavy("starts a server")
def test_a_second_signal_ends_all_at_once(tmp_path: Path) -> None:
    with serving(tmp_path / "log", *TWO) as server, clients_of(server) as clients:
        with open_stream(next(iter(clients.values()))):
            server.process.send_signal(signal.SIGINT)
            assert until(lambda: bool(server.records("server.draining")))
            server.process.send_signal(signal.SIGINT)
            assert server.end() == 128 + signal.SIGINT
        assert until(lambda: session_of(server.process.pid) == [])


@pytest.mark.heavy("starts a server")
def test_a_unix_socket(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with socket.socket(socket.AF_UNIX) as killed:
        killed.bind(str(path))  # of a server that was killed
    with serving(tmp_path / "log", *TWO, "--uds", str(path)) as server:
        with httpx2.Client(transport=httpx2.HTTPTransport(uds=str(path)), base_url="http://a") as client:
            client.headers["Authorization"] = "Bearer secret"
            answer = client.post("/v1/completions", json={"prompt": "27 + 58 =", "temperature": 0})
            assert answer.json()["choices"][0]["text"] == " 85"
        server.process.send_signal(signal.SIGTERM)
        assert server.end() == 0
    assert not path.exists()


def test_a_server_that_cannot_start(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        cases = (["tiny", "--port", port], "cannot listen"), ([str(tmp_path), "--port", "0"], "config.json")
        for options, word in cases:
            process = start_python("-m", "nanovllm", "serve", *OPTIONS, *TWO, *options)
            _, errors = process.communicate(timeout=WATCHDOG)
            assert process.returncode == 1
            (line,) = [line for line in errors.splitlines() if line.startswith("nanovllm serve: ")]
            assert word in line
            assert not is_alive(process.pid)
            assert until(lambda process=process: session_of(process.pid) == [])  # type: ignore[misc]
