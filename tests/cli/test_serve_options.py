"""The options of `nanovllm serve`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest

from nanovllm import InvalidArgumentError
from nanovllm.cli.serve import main
from nanovllm.engine_args import AsyncEngineArgs
from nanovllm.server.options import make_parser, read_settings


@pytest.mark.parametrize(
    ("line", "name", "value"),
    [
        ("tiny", "served_model_name", ("tiny",)),
        ("tiny --served-model-name small", "served_model_name", ("small",)),
        ("--model tiny --served-model-name small large", "served_model_name", ("small", "large")),
        ("tiny --api-key one two", "api_key", ("one", "two")),
        ("tiny --api-key one --api-key two", "api_key", ("one", "two")),
        ("tiny --cors-origin '*'", "cors_origin", ("*",)),
        ("tiny --uds /tmp/socket", "uds", "/tmp/socket"),
        ("tiny --port 0", "port", 0),
        ("--disable-log-requests --enable-chunked-prefill tiny", "served_model_name", ("tiny",)),
        ("tiny --generation-config vllm", "generation_config", "vllm"),
    ],
)
def test_options_reach_the_settings(line: str, name: str, value: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NANOVLLM_API_KEY", raising=False)
    settings = read_settings(make_parser("nanovllm serve").parse_args(shlex.split(line)))
    assert getattr(settings, name) == value


@pytest.mark.parametrize(
    ("line", "arguments"),
    [
        ("tiny --max-model-len 2k -tp 2", {"max_model_len": 2000, "tensor_parallel_size": 2}),
        ("tiny --max-num-batched-tokens 1.5K", {"max_num_batched_tokens": 1536}),
        ("tiny --hf-overrides.rope_theta 5 --hf-overrides.a.b=c", {"hf_overrides": {"rope_theta": 5, "a": {"b": "c"}}}),
        ("tiny --profiler-config.torch-profiler-dir /x", {"profiler_config": {"torch_profiler_dir": "/x"}}),
        ("tiny --uvicorn-log-level warning --disable-uvicorn-access-log --max-log-len 100 --max-logprobs 20", {}),
        ("--enable-prompt-tokens-details --response-role assistant tiny -pp 1 --guided-decoding-backend auto", {}),
    ],
)
def test_options_as_vllm_writes_them(line: str, arguments: dict[str, Any]) -> None:
    args = make_parser("nanovllm serve").parse_args(shlex.split(line))
    assert read_settings(args).served_model_name == ("tiny",)
    assert AsyncEngineArgs.from_cli_args(args) == AsyncEngineArgs("tiny", **arguments)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("tiny --max-model-len 1.5", "'1.5' is not an integer ≥ 1"),
        ("tiny --max-model-len infk", "'infk' is not an integer ≥ 1"),
        ("tiny --max-model-len 1.0005k", "'1.0005k' is not an integer ≥ 1"),
        ("tiny --chat-template nowhere.jinja", "'nowhere.jinja' is not a file with a Jinja template, or a template"),
        ("tiny --override-generation-config.temperature 3", "is not an object with values of temperature, top_p"),
        ("tiny --config nowhere.yaml", "argument --config: the file cannot be read (FileNotFoundError)"),
        ("tiny --config", "argument --config: the file cannot be read"),
    ],
)
def test_a_mistake_in_an_option(line: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        make_parser("nanovllm serve").parse_args(shlex.split(line))
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--allowed-origins '[\"*\"]'", "Use --cors-origin."),
        ("--enable-log-outputs", "Set NANOVLLM_LOG_PROMPTS=1."),
        ("--lora-modules a=b", "Not supported: LoRA"),
        ("--enable-auto-tool-choice", "tool_call_parser=None is not allowed: it must be given with"),
    ],
)
def test_options_of_vllm_that_ask_for_what_is_not_there(line: str, message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        read_settings(make_parser("nanovllm serve").parse_args(["tiny", *shlex.split(line)]))


def test_several_api_processes_need_a_process_of_the_engine(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(shlex.split("tiny --api-server-count 2 --engine-process false"), "nanovllm serve") == 2
    assert capsys.readouterr().err.startswith("nanovllm serve: engine_process=False is not allowed")


def test_a_file_of_options(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(
        "model: small\nport: 6379\nuvicorn-log-level: info\nenforce_eager: true\nserved-model-name: [a, b]\n"
        "hf-overrides: {rope_theta: 2}\nenable-prefix-caching: false\nmax-model-len: 100\nseed: null\n"
    )
    args = make_parser("nanovllm serve").parse_args(["tiny", "--config", str(file), "--max-model-len", "200"])
    settings = read_settings(args)
    assert (settings.port, settings.served_model_name) == (6379, ("a", "b"))
    assert AsyncEngineArgs.from_cli_args(args) == AsyncEngineArgs(
        "tiny", enforce_eager=True, hf_overrides={"rope_theta": 2}, enable_prefix_caching=False, max_model_len=200
    )
    file.write_text("- model\n")
    with pytest.raises(SystemExit):
        make_parser("nanovllm serve").parse_args(["tiny", f"--config={file}"])


def test_an_empty_key_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="api_key"):
        read_settings(make_parser("nanovllm serve").parse_args(["tiny", "--api-key", ""]))
