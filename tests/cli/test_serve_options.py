"""The options of `nanovllm serve`."""

from __future__ import annotations

import shlex
from typing import Any

import pytest

from nanovllm import InvalidArgumentError
from nanovllm.cli.serve import make_parser, read_settings


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


def test_an_empty_key_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="api_key"):
        read_settings(make_parser("nanovllm serve").parse_args(["tiny", "--api-key", ""]))
