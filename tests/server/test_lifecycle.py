"""The server's process: start, signals, and an engine that dies."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import threading
from pathlib import Path
from typing import Any

import httpx2
import pytest

from nanovllm import AsyncLLM
from nanovllm.async_engine.engine_process import EngineProcess
from nanovllm.async_engine.engine_thread import EngineThread
from nanovllm.server.serve import HttpServer
from nanovllm.server.service import Service
from nanovllm.server.settings import ServerSettings
from tests.processes import PATIENCE, WATCHDOG, start_python, until
from tests.server.running_server import ENGINE, error_of, running_server
from tests.server.server_process import LONG, serving


def test_sigterm_lets_running_requests_end(tmp_path: Path) -> None:
    with serving(tmp_path / "log") as server:
        assert error_of(httpx2.get(f"{server.client.base_url}/v1/models", trust_env=False), 401)
        with server.client.stream("POST", "/v1/completions", json={**LONG, "max_tokens": 300}) as stream:
            lines = stream.iter_lines()
            next(lines)
            server.process.send_signal(signal.SIGTERM)
            assert until(lambda: bool(server.records("server.draining")))
            assert error_of(server.client.post("/v1/completions", json={"prompt": "a"}), 503)["code"] == "draining"
            assert error_of(server.client.get("/health"), 503)["code"] == "draining"
            *_, last, done = (line for line in lines if line)
        assert done == "data: [DONE]"
        assert '"finish_reason":"length"' in last
        assert server.end() == 0
    (record,) = server.records("engine.exit")
    assert record["outcome"] == "clean"
    (record,) = server.records("server.stopped")
    assert (record["outcome"], record["status"]) == ("clean", 0)
    assert "secret" not in (tmp_path / "log").read_text() + "".join(server.errors)


def test_requests_that_take_too_long_are_aborted(tmp_path: Path) -> None:
    with serving(tmp_path / "log", "--drain-timeout", "0") as server:
        with server.client.stream("POST", "/v1/completions", json={**LONG, "max_tokens": 4000}) as stream:
            lines = stream.iter_lines()
            next(lines)
            server.process.send_signal(signal.SIGTERM)
            *_, last, done = (line for line in lines if line)
        assert done == "data: [DONE]"
        assert '"finish_reason":"abort"' in last
        assert server.end() == 0


def test_a_second_signal_ends_the_process_at_once(tmp_path: Path) -> None:
    with (
        serving(tmp_path / "log", "--drain-timeout", "1000") as server,
        server.client.stream("POST", "/v1/completions", json={**LONG, "max_tokens": 4000}) as stream,
    ):
        lines = stream.iter_lines()
        next(lines)
        server.process.send_signal(signal.SIGINT)
        assert until(lambda: bool(server.records("server.draining")))
        server.process.send_signal(signal.SIGINT)
        assert server.end() == 128 + signal.SIGINT


def test_a_mistake_in_an_option_ends_with_one_line() -> None:
    for options, word in (
        (["tiny", "--port", "x"], "--port"),
        (["tiny", "--max-num-seqs", "0"], "max-num-seqs"),
        (["tiny", "--max-num-batched-tokens", "4"], "max_num_batched_tokens"),
        (["tiny", "--reasoning-parser", "unknown"], "--reasoning-parser"),
    ):
        done = start_python("-m", "nanovllm", "serve", *options)
        _, errors = done.communicate(timeout=WATCHDOG)
        assert done.returncode == 2
        assert word in errors.splitlines()[-1]


def test_a_model_that_is_missing_ends_the_process(tmp_path: Path) -> None:
    process = start_python("-m", "nanovllm", "serve", str(tmp_path), "--port", "0")
    _, errors = process.communicate(timeout=WATCHDOG)
    assert process.returncode == 1
    assert re.search(r"^nanovllm serve: .*config\.json", errors, re.MULTILINE), errors


def test_a_port_that_is_taken() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        process = start_python("-m", "nanovllm", "serve", "tiny", "--port", str(taken.getsockname()[1]))
        _, errors = process.communicate(timeout=WATCHDOG)
    assert process.returncode == 1
    assert "address already in use" in errors
    assert "nanovllm serve: cannot listen at 127.0.0.1:" in errors


def test_requests_are_refused_until_the_engine_has_started() -> None:
    may_start = threading.Event()

    def make_engine() -> AsyncLLM:
        may_start.wait(WATCHDOG)
        return AsyncLLM("tiny", **ENGINE)

    service = Service(ServerSettings(port=0, served_model_name=("tiny",)))
    server = HttpServer(service, make_engine)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        assert until(lambda: server.started)
        with httpx2.Client(base_url=server.address, timeout=PATIENCE, trust_env=False) as client:
            for path in ("/health", "/v1/models", "/metrics"):
                assert error_of(client.get(path), 503)["code"] == "starting"
            assert client.get("/version").status_code == 200
            response = client.post("/v1/completions", json={"prompt": "a"})
            assert error_of(response, 503)["code"] == "starting"
            assert response.headers["Retry-After"]
            may_start.set()
            assert until(lambda: client.get("/health").status_code == 200)
    finally:
        may_start.set()
        server.force_exit = server.should_exit = True
        thread.join()
        if server.engine is not None:
            server.engine.exit()


def kill_engine(engine: AsyncLLM) -> None:
    """Ends the engine's process; or makes the next step of its thread fail, and the recovery from it."""
    connection = engine._connection
    if isinstance(connection, EngineProcess):
        assert connection._process is not None
        connection._process.kill()
        return
    assert isinstance(connection, EngineThread)
    executor = connection._made.result().engine.executor

    def fail(*arguments: object) -> Any:
        raise RuntimeError("CUDA error: /secret/path")

    executor.collect = executor.synchronize = fail  # type: ignore[method-assign]


@pytest.mark.parametrize(("exit_on_death", "engine_process"), [(False, False), (True, False), (False, True)])
def test_an_engine_that_dies(exit_on_death: bool, engine_process: bool) -> None:
    engine = AsyncLLM("tiny", engine_process=engine_process, **ENGINE)
    with engine, running_server(engine, exit_on_death=exit_on_death) as running:
        server = running.server
        with running.client.stream("POST", "/v1/completions", json={**LONG, "max_tokens": 4000}) as stream:
            lines = (line for line in stream.iter_lines() if line)
            next(lines)
            kill_engine(engine)
            *_, last = lines
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "engine_dead"
        assert "secret" not in last
        if exit_on_death:
            assert until(lambda: server.should_exit)
            assert server.status == 1
            return
        assert error_of(running.client.get("/health"), 503)["code"] == "engine_dead"
        for path in ("/v1/completions", "/v1/chat/completions"):
            response = running.post(path, prompt="a", messages=[{"role": "user", "content": "a"}])
            assert error_of(response, 500)["code"] == "engine_dead"
        assert (server.should_exit, server.status) == (False, 0)


@pytest.mark.parametrize(
    "options", [["--uds", "/no/such/folder/socket"], ["--ssl-certfile", "/no/such/file", "--ssl-keyfile", "/no/such"]]
)
def test_what_cannot_be_listened_to_is_one_line(options: list[str]) -> None:
    process = start_python(
        "-m",
        "nanovllm",
        "serve",
        "tiny",
        "--device",
        "cpu",
        "--max-model-len",
        "512",
        *options,
        NANOVLLM_LOG_LEVEL="WARNING",
    )
    _, errors = process.communicate(timeout=WATCHDOG)
    assert process.returncode == 1
    (line,) = errors.splitlines()
    assert line.startswith("nanovllm serve: cannot listen: No such file or directory.")


def test_the_options_are_listed_with_their_defaults() -> None:
    process = start_python("-m", "nanovllm", "serve", "--help")
    text, _ = process.communicate(timeout=WATCHDOG)
    assert process.returncode == 0
    for name in ServerSettings.__dataclass_fields__:
        assert f"--{name.replace('_', '-')}" in text
    assert subprocess.list2cmdline(["--max-num-seqs"]) in text
