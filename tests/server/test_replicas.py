"""A server with several replicas: it answers while one is alive, and says which one did what."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from nanovllm import AsyncLLM
from nanovllm.config import EngineConfig
from nanovllm.data_parallel.engines import DataParallelLLM
from tests.distributed.rank_processes import ONLY_LINUX, is_alive
from tests.processes import until
from tests.server.running_server import ENGINE, RunningServer, answer_of, error_of, running_server
from tests.server.test_lifecycle import LONG, serving

pytestmark = ONLY_LINUX
NUM_STREAMS = 24


@pytest.fixture(scope="module")
def replicas() -> Iterator[RunningServer]:
    with running_server(engine=DataParallelLLM(EngineConfig("tiny", **ENGINE), 2), dev=True) as running:  # type: ignore[arg-type]
        yield running
    running.engine.exit()


def metric(server: RunningServer, name: str) -> dict[str, float]:
    """Returns the values of a metric by engine."""
    families = text_string_to_metric_families(server.client.get("/metrics").text)
    (family,) = [family for family in families if family.name == f"vllm:{name}"]
    return {sample.labels["engine"]: sample.value for sample in family.samples}


def test_answers_metrics_and_load(replicas: RunningServer, server: RunningServer) -> None:
    for _ in range(4):
        assert replicas.complete(max_tokens=8)["choices"] == server.complete(max_tokens=8)["choices"]
    assert answer_of(replicas.client.get("/load")) == {
        "server_load": 0,
        "degraded": False,
        "replicas": [
            {"engine": 0, "alive": True, "unfinished": 0},
            {"engine": 1, "alive": True, "unfinished": 0},
        ],
    }
    assert metric(replicas, "num_requests_waiting") == {"0": 0, "1": 0}
    assert replicas.post("/reset_prefix_cache").status_code == 200


def read_stream(server: RunningServer) -> tuple[int, dict[str, Any]]:
    """Returns how many chunks a stream has, and the last one."""
    body = {**LONG, "temperature": 0, "max_tokens": 300}
    with server.client.stream("POST", "/v1/completions", json=body) as stream:
        events = [line for line in stream.iter_lines() if line.startswith("data: {")]
    return len(events), json.loads(events[-1].removeprefix("data: "))


def test_streams_of_a_replica_that_is_killed_end_with_an_error_and_the_others_go_on(replicas: RunningServer) -> None:
    engines: Any = replicas.engine
    with ThreadPoolExecutor(NUM_STREAMS) as pool:
        streams = [pool.submit(read_stream, replicas) for _ in range(NUM_STREAMS)]
        assert until(lambda: min(metric(replicas, "generation_tokens").values()) > 200)
        assert min(metric(replicas, "num_requests_running").values()) > 0
        os.kill(engines.replicas[1].connection._process.pid, signal.SIGKILL)
        assert until(lambda: bool(answer_of(replicas.client.get("/load"))["degraded"]))
        assert replicas.client.get("/health").status_code == 200
        assert replicas.complete(max_tokens=4)
        ends = [stream.result()[1] for stream in streams]
    lost = [end["error"] for end in ends if "error" in end]
    assert {error["code"] for error in lost} == {"replica_lost"}
    assert "Send it again." in lost[0]["message"]
    whole = [end for end in ends if "error" not in end]
    assert {end["choices"][0]["finish_reason"] for end in whole} == {"length"}
    assert len(whole) >= NUM_STREAMS // 2, "those of the other replica, and those that had no output yet"
    assert until(lambda: not answer_of(replicas.client.get("/load"))["degraded"])
    assert metric(replicas, "num_requests_running") == {"0": 0, "1": 0}


def test_signals_reach_all_processes(tmp_path: Path) -> None:
    with serving(tmp_path / "log", "--data-parallel-size", "2") as server:
        pids = {record["pid"] for record in server.records("engine.init")}
        assert len(pids) == 2
        with server.client.stream("POST", "/v1/completions", json={**LONG, "max_tokens": 300}) as stream:
            lines = stream.iter_lines()
            next(lines)
            server.process.send_signal(signal.SIGTERM)
            assert until(lambda: bool(server.records("server.draining")))
            assert error_of(server.client.get("/health"), 503)["code"] == "draining"
            *_, last, _ = (line for line in lines if line)
        assert '"finish_reason":"length"' in last
        assert server.end() == 0
    assert until(lambda: not any(map(is_alive, pids)))
    assert [record["outcome"] for record in server.records("engine.exit")] == ["clean", "clean"]
    assert not server.records("replica.lost")


def test_no_process_outlives_a_server_that_is_killed(tmp_path: Path) -> None:
    with serving(tmp_path / "log", "--data-parallel-size", "2") as server:
        pids = {record["pid"] for record in server.records("engine.init")}
        assert all(map(is_alive, pids))
        server.process.kill()
        assert until(lambda: not any(map(is_alive, pids)))


def test_one_object_has_one_replica() -> None:
    with pytest.raises(ValueError, match="--data-parallel-size"):
        AsyncLLM("tiny", data_parallel_size=2)  # type: ignore[call-arg]
