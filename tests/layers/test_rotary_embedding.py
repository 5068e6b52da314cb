"""The rotary table against transformers' own, to the last bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

from nanovllm.layers.rope_parameters import RopeParameters
from nanovllm.layers.rotary_embedding import build_cos_sin_cache, rope_frequencies

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
CASES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 2.5},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "llama3": {**LLAMA3, "original_max_position_embeddings": 128},
    "llama3, length of the config": LLAMA3,
    "yarn": YARN,
    "yarn, length of the config": {"rope_type": "yarn", "factor": 2.0},
    "yarn, no factor": {**YARN, "factor": None},
    "yarn, attention_factor": {**YARN, "attention_factor": 0.75},
    "yarn, mscale": {**YARN, "mscale": 0.7, "mscale_all_dim": 1.3},
    "yarn, mscale alone": {**YARN, "mscale": 0.7},
    "yarn, betas": {**YARN, "beta_fast": 16, "beta_slow": 2},
    "yarn, not truncated": {**YARN, "truncate": False},
    "yarn, factor 1": {**YARN, "factor": 1.0},
}


@pytest.mark.parametrize("theta", [10_000.0, 1_000_000.0])
@pytest.mark.parametrize("head_dim", [16, 80, 128])
@pytest.mark.parametrize("case", CASES)
def test_equal_to_transformers(case: str, head_dim: int, theta: float) -> None:
    fields = {**CASES[case], "rope_theta": theta}
    max_positions = 512
    reference = Qwen3RotaryEmbedding(
        Qwen3Config(head_dim=head_dim, max_position_embeddings=max_positions, rope_parameters=dict(fields))
    )
    rope = RopeParameters.from_fields(fields, max_positions)
    inv_freq, attention_scaling = rope_frequencies(head_dim, rope)
    assert torch.equal(inv_freq, reference.inv_freq)
    assert attention_scaling == reference.attention_scaling
    cos, sin = reference(torch.zeros(1), torch.arange(max_positions)[None])  # each [1, max_positions, head_dim]
    cache = build_cos_sin_cache(head_dim, max_positions, rope, "cpu")
    assert cache.dtype == torch.float32
    torch.testing.assert_close(cache[:, : head_dim // 2], cos[0, :, : head_dim // 2], rtol=0, atol=1e-6)
    torch.testing.assert_close(cache[:, head_dim // 2 :], sin[0, :, : head_dim // 2], rtol=0, atol=1e-6)
