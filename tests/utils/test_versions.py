"""Versions and the device's name, as far as they are known without torch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from nanovllm.utils import versions
from nanovllm.utils.versions import device_name
from tests.processes import run_python


def test_versions_are_those_that_torch_tells_and_need_no_torch() -> None:
    found = versions.versions()
    assert (found["torch"], found["cuda"]) == (torch.__version__, torch.version.cuda)
    script = (
        "import sys; from nanovllm.utils.versions import device_name, versions\n"
        "versions(); device_name('auto')\n"
        "assert 'torch' not in sys.modules"
    )
    assert run_python("-c", script).returncode == 0


@pytest.mark.parametrize(
    ("device", "cuda", "name"),
    [
        ("auto", "12.8", "NVIDIA One"),
        ("cuda", "12.8", "NVIDIA One"),
        ("cuda:1", "12.8", "NVIDIA Two"),
        ("cuda:2", "12.8", "cuda:2"),
        ("cuda:x", "12.8", "cuda:x"),
        ("cpu", "12.8", "cpu"),
        ("auto", None, "cpu"),
    ],
)
def test_the_device_s_name(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, device: str, cuda: str | None, name: str
) -> None:
    for bus, model in (("0000:b7:00.0", "NVIDIA Two"), ("0000:04:00.0", "NVIDIA One")):
        (tmp_path / bus).mkdir()
        (tmp_path / bus / "information").write_text(f"Model: \t\t {model}\nIRQ: 1\n", "utf-8")
    monkeypatch.setattr(versions, "_GPUS", tmp_path)
    monkeypatch.setattr(versions, "_cuda", lambda: cuda)
    assert device_name(device) == name


def test_a_driver_that_does_not_tell(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(versions, "_GPUS", tmp_path / "none")
    monkeypatch.setattr(versions, "_cuda", lambda: "12.8")
    assert device_name("auto") == "auto"
