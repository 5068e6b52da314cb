"""What is decided before anything is loaded."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from nanovllm.config import EngineConfig
from nanovllm.runner.model_plan import ModelPlan


@pytest.mark.parametrize(
    ("device", "asked", "overlap", "depth"),
    [
        ("cuda", None, None, 2),  # the host's work hides behind the GPU
        ("cpu", None, None, 1),  # where nothing overlaps
        ("cpu", 3, "1", 3),
        ("cuda", 1, None, 1),
        ("cuda", None, "0", 1),
        ("cuda", 2, "0", 1),  # the switch for debugging beats the script's argument
    ],
)
def test_steps_in_flight(
    monkeypatch: pytest.MonkeyPatch, device: str, asked: int | None, overlap: str | None, depth: int
) -> None:
    monkeypatch.delenv("NANOVLLM_OVERLAP", raising=False)
    if overlap is not None:
        monkeypatch.setenv("NANOVLLM_OVERLAP", overlap)
    config = EngineConfig("tiny", device="cpu", pipeline_depth=asked)
    plan = replace(ModelPlan.of(config), device=torch.device(device))
    assert plan.pipeline_depth(config) == depth
