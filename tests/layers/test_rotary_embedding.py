"""The rotary table against transformers' own, to the last bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

from nanovllm.layers.rotary_embedding import build_cos_sin_cache, rope_frequencies
from nanovllm.models.model_config import ModelConfig
from nanovllm.models.rope_fields import read_rope_parameters
from tests.properties import examples

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
    "yarn, attn_factor": {**YARN, "attn_factor": 0.8782488562869419},  # as in DeepSeek-R1-0528-Qwen3-8B
    "yarn, attn_factor and attention_factor": {**YARN, "attn_factor": 0.5, "attention_factor": 0.75},
    "yarn, mscale of DeepSeek-V3": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0},
    "yarn, mscale_all_dim alone": {**YARN, "mscale_all_dim": 0.7},
    "yarn, mscale 0": {**YARN, "mscale": 0, "mscale_all_dim": 0.7},
    "yarn, betas 0": {**YARN, "beta_fast": 0, "beta_slow": 0},
    "yarn, betas swapped": {**YARN, "beta_fast": 1, "beta_slow": 32},
    "yarn, finetuned": {**YARN, "finetuned": True},
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
    rope = read_rope_parameters(fields, max_positions)
    inv_freq, attention_scaling = rope_frequencies(head_dim, rope)
    assert torch.equal(inv_freq, reference.inv_freq)
    assert attention_scaling == reference.attention_scaling
    cos, sin = reference(torch.zeros(1), torch.arange(max_positions)[None])  # each [1, max_positions, head_dim]
    cache = build_cos_sin_cache(head_dim, max_positions, rope, "cpu")
    assert cache.dtype == torch.float32
    torch.testing.assert_close(cache[:, : head_dim // 2], cos[0, :, : head_dim // 2], rtol=0, atol=1e-6)
    torch.testing.assert_close(cache[:, head_dim // 2 :], sin[0, :, : head_dim // 2], rtol=0, atol=1e-6)


def positive(lowest: float, highest: float) -> st.SearchStrategy[float]:
    return st.one_of(st.floats(lowest, highest), st.integers(int(lowest) + 1, int(highest)))


@settings(max_examples=examples(1200), deadline=None)
@given(
    st.fixed_dictionaries(
        {"factor": positive(1, 64), "original_max_position_embeddings": st.integers(8, 512)},
        optional={
            "attention_factor": st.one_of(st.none(), st.floats(0.01, 10)),
            "attn_factor": st.floats(0.01, 10),
            "beta_fast": st.one_of(st.none(), positive(1, 64)),
            "beta_slow": st.one_of(st.none(), positive(0.01, 8)),
            "mscale": st.one_of(st.none(), st.floats(0, 10)),
            "mscale_all_dim": st.one_of(st.none(), st.floats(0, 10)),
            "truncate": st.booleans(),
        },
    ),
    st.sampled_from([16, 64, 80]),
)
def test_any_yarn_is_equal_to_transformers(fields: dict[str, Any], head_dim: int) -> None:
    fields |= {"rope_type": "yarn", "rope_theta": 10_000.0}
    config = Qwen3Config(head_dim=head_dim, max_position_embeddings=512, rope_parameters=dict(fields))
    reference = Qwen3RotaryEmbedding(config)
    inv_freq, attention_scaling = rope_frequencies(head_dim, read_rope_parameters(fields, 512))
    assert torch.equal(inv_freq, reference.inv_freq)
    assert attention_scaling == reference.attention_scaling


def test_a_trained_length_beside_the_scaling_goes_before_the_one_in_it() -> None:
    fields = {**YARN, "rope_theta": 10_000.0}
    config = Qwen3Config(head_dim=64, rope_parameters=dict(fields), original_max_position_embeddings=256)
    file = config.to_dict() | {"architectures": ["Qwen3ForCausalLM"], "rope_parameters": fields}
    rope = ModelConfig.from_dict(file).rope
    assert rope.original_max_position_embeddings == 256
    assert torch.equal(rope_frequencies(64, rope)[0], Qwen3RotaryEmbedding(config).inv_freq)
