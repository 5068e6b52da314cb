"""Products with quantised weights: FP8, INT8 and INT4.

On a GPU, `quantized_gpu` computes them. The references convert weights to float32 and multiply. Where a format
quantises the activations too, so does its product.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from nanovllm.kernels.int4_packing import pack_int4, unpack_int4
from nanovllm.kernels.quantized_gpu import fp8_product, int4_product, int8_product, suits_fused
from nanovllm.kernels.rms_norm import rms_norm_reference
from nanovllm.kernels.silu_and_mul import silu_and_mul_reference

__all__ = [
    "FP8_BLOCK",
    "FP8_MAX",
    "fp8_activations",
    "fp8_linear",
    "int4_linear",
    "int8_activations",
    "int8_linear",
    "pack_int4",
    "suits_fused",
    "unpack_int4",
]

FP8_BLOCK = 128  # outputs, and inputs, that share a block scale
FP8_MAX = 448.0  # the largest number of float8_e4m3fn
_INT8_MAX = 127
_INT4_ZERO = 8  # the zero point of symmetric weights
_SMALLEST_SCALE = 1e-12


def fp8_linear(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    input_scale: torch.Tensor | None = None,
    norm_weight: torch.Tensor | None = None,
    eps: float = 0.0,
    gated: bool = False,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """Returns act(rms_norm(hidden) · (weight · scale)ᵀ + bias) + residual, with activations in FP8 too.

    hidden [num_tokens, inputs], weight [outputs, inputs] float8_e4m3fn, scale float32: [outputs, 1], [1, 1], or
    [ceil(outputs / 128), ceil(inputs / 128)]. input_scale: of all activations; None: each token has its own, with block
    scales each group of 128 inputs of a token.
    → [num_tokens, outputs, or half as many if gated], of hidden's dtype.
    """
    if suits_fused(hidden, weight):
        return fp8_product(
            hidden,
            weight,
            scale,
            bias,
            input_scale=input_scale,
            norm_weight=norm_weight,
            eps=eps,
            gated=gated,
            residual=residual,
        )
    outputs, inputs = weight.shape
    has_blocks = scale.shape[1] > 1 or scale.shape[0] not in (1, outputs) or outputs == 1 < scale.shape[0]
    normed = _normed(hidden, norm_weight, eps)
    activations = fp8_activations(normed, FP8_BLOCK if has_blocks else inputs, input_scale)
    if has_blocks:
        scale = scale.repeat_interleave(FP8_BLOCK, 0)[:outputs].repeat_interleave(FP8_BLOCK, 1)[:, :inputs]
    return _finished(F.linear(activations, weight.float() * scale), bias, gated, residual, hidden.dtype)


def fp8_activations(hidden: torch.Tensor, group: int, scale: torch.Tensor | None = None) -> torch.Tensor:
    """Returns hidden [num_tokens, inputs] rounded to FP8, with a scale for each token and `group` inputs, as float32.

    scale: of all activations, instead.
    """
    hidden = hidden.float()
    if scale is not None:
        return (hidden / scale).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn).float() * scale
    inputs = hidden.shape[1]
    groups = F.pad(hidden, (0, -inputs % group)).unflatten(1, (-1, group))  # [num_tokens, groups, group]
    own = (groups.abs().amax(-1, keepdim=True) / FP8_MAX).clamp(min=_SMALLEST_SCALE)  # [num_tokens, groups, 1]
    rounded: torch.Tensor = (groups / own).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn).float() * own
    return rounded.flatten(1)[:, :inputs]


def int8_linear(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    quantize_input: bool,
    norm_weight: torch.Tensor | None = None,
    eps: float = 0.0,
    gated: bool = False,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """Returns act(rms_norm(hidden) · (weight · scale)ᵀ + bias) + residual.

    weight [outputs, inputs] int8, scale [outputs, 1] float32. quantize_input: activations are INT8 too, with a scale
    for each token. → [num_tokens, outputs, or half as many if gated], of hidden's dtype.
    """
    if suits_fused(hidden, weight):
        return int8_product(
            hidden,
            weight,
            scale,
            bias,
            quantize_input=quantize_input,
            norm_weight=norm_weight,
            eps=eps,
            gated=gated,
            residual=residual,
        )
    normed = _normed(hidden, norm_weight, eps)
    activations = int8_activations(normed) if quantize_input else normed.float()
    return _finished(F.linear(activations, weight.float()) * scale.T, bias, gated, residual, hidden.dtype)


def int8_activations(hidden: torch.Tensor) -> torch.Tensor:
    """Returns hidden [num_tokens, inputs] rounded to 255 steps of a scale for each token, as float32."""
    hidden = hidden.float()
    scale = (hidden.abs().amax(-1, keepdim=True) / _INT8_MAX).clamp(min=_SMALLEST_SCALE)  # [num_tokens, 1]
    return (hidden / scale).round() * scale


def int4_linear(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    zeros: torch.Tensor | None,
    bias: torch.Tensor | None = None,
    *,
    group_size: int,
    norm_weight: torch.Tensor | None = None,
    eps: float = 0.0,
    gated: bool = False,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """Returns act(rms_norm(hidden) · ((weight − zeros) · scale)ᵀ + bias) + residual.

    weight: from `pack_int4`. scale [outputs, inputs / group_size] float16, or float32 where hidden is. zeros: as scale,
    from 0 to 16; None: 8. On a GPU both are read fastest where outputs are side by side in memory. group_size −1: all
    inputs.
    → [num_tokens, outputs, or half as many if gated], of hidden's dtype.
    """
    inputs = hidden.shape[1]
    group_size = inputs if group_size == -1 else group_size
    if suits_fused(hidden, weight):
        return int4_product(
            hidden,
            weight,
            scale,
            zeros,
            bias,
            group_size=group_size,
            norm_weight=norm_weight,
            eps=eps,
            gated=gated,
            residual=residual,
        )
    zero: torch.Tensor | int = _INT4_ZERO if zeros is None else zeros.float().repeat_interleave(group_size, 1)
    dense = (unpack_int4(weight, inputs).float() - zero) * scale.float().repeat_interleave(
        group_size, 1
    )  # [outputs, inputs]
    return _finished(F.linear(_normed(hidden, norm_weight, eps).float(), dense), bias, gated, residual, hidden.dtype)


def _normed(hidden: torch.Tensor, norm_weight: torch.Tensor | None, eps: float) -> torch.Tensor:
    return hidden if norm_weight is None else rms_norm_reference(hidden, norm_weight, eps)


def _finished(
    product: torch.Tensor,
    bias: torch.Tensor | None,
    gated: bool,
    residual: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Returns the product with what follows it, rounded once."""
    if bias is not None:
        product = product + bias.float()
    if gated:
        product = silu_and_mul_reference(product)
    if residual is not None:
        product = product + residual.float()
    return product.to(dtype)
