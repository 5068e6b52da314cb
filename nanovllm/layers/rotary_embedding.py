"""Rotary position embedding (Su et al., 2021, arXiv:2104.09864): the table of cosines and sines.

A head's dimensions i and i + head_dim/2 form a pair that turns by position · inv_freq[i]. The table is computed
once, for every position that a context may have; `kernels.qk_norm_rope_store` applies it.
"""

from __future__ import annotations

import math

import torch

from nanovllm.layers.rope_parameters import RopeParameters


def build_cos_sin_cache(
    head_dim: int, max_positions: int, rope: RopeParameters, device: torch.device | str
) -> torch.Tensor:
    """Returns the table [max_positions, head_dim], float32: cosines in the first half of a row, sines in the second.

    Always float32: at position 40,000 bfloat16 cannot distinguish neighbouring positions.
    """
    inv_freq, attention_scaling = rope_frequencies(head_dim, rope)
    positions = torch.arange(max_positions, dtype=torch.float32, device=device)  # [max_positions]
    angles = torch.outer(positions, inv_freq.to(device))  # [max_positions, head_dim / 2]
    return torch.cat((angles.cos(), angles.sin()), dim=-1) * attention_scaling


def rope_frequencies(head_dim: int, rope: RopeParameters) -> tuple[torch.Tensor, float]:
    """Returns the angles per position [head_dim / 2] (float32, CPU) and the factor on cosines and sines.

    The formulas are those of `transformers.modeling_rope_utils`, in the same order of operations, so that
    results are equal to the last bit. "dynamic" is the default up to `max_position_embeddings`, where contexts end.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim  # [head_dim / 2]
    wave_lengths = rope.theta**exponents  # in positions per radian
    inv_freq = 1.0 / wave_lengths
    if rope.rope_type == "linear":
        return inv_freq / rope.factor, 1.0
    if rope.rope_type == "llama3":
        return _llama3(inv_freq, rope), 1.0
    if rope.rope_type == "yarn":
        return _yarn(wave_lengths, head_dim, rope), _yarn_attention_scaling(rope)
    return inv_freq, 1.0


def _llama3(inv_freq: torch.Tensor, rope: RopeParameters) -> torch.Tensor:
    """Llama 3.1: keeps fast rotations, slows those longer than the trained context, and blends in between."""
    length, low, high = rope.original_max_position_embeddings, rope.low_freq_factor, rope.high_freq_factor
    wave_lengths = 2 * math.pi / inv_freq  # positions per full turn
    blend = (length / wave_lengths - low) / (high - low)
    blended = (1 - blend) * inv_freq / rope.factor + blend * inv_freq
    scaled = torch.where(wave_lengths > length / low, inv_freq / rope.factor, blended)
    return torch.where(wave_lengths < length / high, inv_freq, scaled)


def _yarn(wave_lengths: torch.Tensor, head_dim: int, rope: RopeParameters) -> torch.Tensor:
    """YaRN (Peng et al., 2023, arXiv:2309.00071): a ramp over dimensions from the trained to the slowed rotation."""

    def dimension_with(turns: float) -> float:
        """Returns the dimension whose pair makes `turns` full turns over the trained context."""
        return (head_dim * math.log(rope.original_max_position_embeddings / (turns * 2 * math.pi))) / (
            2 * math.log(rope.theta)
        )

    low, high = dimension_with(rope.beta_fast), dimension_with(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001
    ramp = ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    keep = 1 - ramp  # 1: as trained, 0: slowed by factor
    return 1.0 / (rope.factor * wave_lengths) * (1 - keep) + 1.0 / wave_lengths * keep


def _yarn_attention_scaling(rope: RopeParameters) -> float:
    """YaRN's temperature on the attention logits, applied to cosines and sines (section 3.4 of the paper)."""
    if rope.attention_factor is not None:
        return rope.attention_factor

    def magnitude(mscale: float) -> float:
        return 1.0 if rope.factor <= 1 else 0.1 * mscale * math.log(rope.factor) + 1.0

    if rope.mscale and rope.mscale_all_dim:
        return magnitude(rope.mscale) / magnitude(rope.mscale_all_dim)
    return magnitude(1.0)
