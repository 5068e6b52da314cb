"""/start_profile and /stop_profile: the files are written, and answers name no other path of the machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nanovllm import AsyncLLM
from tests.server.running_server import ENGINE, RunningServer, answer_of, error_of, running_server


def test_a_profile_into_the_folder_of_the_options(tmp_path: Path) -> None:
    folder = str(tmp_path / "profile")
    settings: dict[str, Any] = {**ENGINE, "engine_process": True, "profiler_config": {"torch_profiler_dir": folder}}
    with AsyncLLM("tiny", **settings) as engine, running_server(engine, dev=True) as server:
        assert error_of(server.post("/stop_profile"), 400)["code"] == "invalid_state"
        assert server.client.post("/start_profile").content == b""
        error = error_of(server.post("/start_profile"), 400)
        assert error["message"].startswith("No profile was started: one runs already")
        server.complete()
        answer = answer_of(server.client.post("/stop_profile"))
    assert (answer["folder"], answer["files"]) == (folder, ["profile_rank0.json", "profile_rank0.txt"])
    trace, table = (tmp_path / "profile" / name for name in answer["files"])
    assert "aten::" in answer["table"] == table.read_text()
    assert json.loads(trace.read_text())["traceEvents"]


def test_a_temporary_folder_is_in_the_log_alone(server: RunningServer, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "nanovllm"):
        assert server.client.post("/start_profile").status_code == 200
        second = server.client.post("/start_profile").text
        response = server.client.post("/stop_profile")
    (record,) = (record for record in caplog.records if getattr(record, "event", "") == "profile.started")
    folder = record.fields["folder"]  # type: ignore[attr-defined]
    assert (answer_of(response)["folder"], folder in response.text + second) == (None, False)
    assert {path.name for path in Path(folder).iterdir()} == set(response.json()["files"])
