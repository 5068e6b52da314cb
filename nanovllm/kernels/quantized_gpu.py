"""Products with quantised weights on a GPU: which kernel computes one, by its number of tokens.

- One token, FP8 and INT8: `skinny_linear` converts the weight in registers.
- More tokens: `quantize_rows` brings activations to 8 bits, with the norm folded in, and `quantized_matmul` multiplies.
- INT4, and INT8 with 16-bit activations: `quantized_matmul` converts the weight block by block.
"""

from __future__ import annotations

import torch

from nanovllm.kernels.quantize_rows import GROUP_SIZE, quantize_rows
from nanovllm.kernels.quantized_matmul import Tile, quantized_matmul
from nanovllm.kernels.rms_norm import rms_norm
from nanovllm.kernels.skinny_linear import scales_blocks, skinny_linear
from nanovllm.kernels.triton_support import HAS_TRITON, multiprocessor_count, next_power_of_2

_ALIGNMENT = 16  # bytes, of a row that the tensor memory accelerator reads
_MAX_SKINNY_INPUTS = 32768


def suits_fused(hidden: torch.Tensor, weight: torch.Tensor) -> bool:
    """Returns whether the product of hidden [num_tokens, inputs] is best asked for with norm, gate and addition."""
    return (
        HAS_TRITON
        and hidden.is_cuda
        and hidden.dtype in (torch.bfloat16, torch.float16)
        and torch.cuda.get_device_capability(hidden.device) >= (9, 0)
        and hidden.shape[1] % _ALIGNMENT == 0
        and weight.shape[1] * weight.itemsize % _ALIGNMENT == 0
    )


def fp8_product(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    input_scale: torch.Tensor | None,
    norm_weight: torch.Tensor | None,
    eps: float,
    gated: bool,
    residual: torch.Tensor | None,
) -> torch.Tensor:
    """`fp8_linear` where `suits_fused`."""
    if _is_skinny(hidden):
        return skinny_linear(
            hidden, weight, bias, scale=scale, norm_weight=norm_weight, eps=eps, gated=gated, residual=residual
        )
    group_size = GROUP_SIZE if scales_blocks(scale, weight) else 0
    x, x_scale = quantize_rows(
        hidden,
        weight.dtype,
        group_size=group_size or None,
        input_scale=input_scale,
        norm_weight=norm_weight,
        eps=eps,
    )
    return quantized_matmul(
        x,
        weight,
        scale,
        bias,
        x_scale=x_scale,
        group_size=group_size,
        gated=gated,
        residual=residual,
        dtype=hidden.dtype,
        tile=_choose_tile(hidden, weight, gated=gated),
    )


def int8_product(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    quantize_input: bool,
    norm_weight: torch.Tensor | None,
    eps: float,
    gated: bool,
    residual: torch.Tensor | None,
) -> torch.Tensor:
    """`int8_linear` where `suits_fused`."""
    if _is_skinny(hidden):
        return skinny_linear(
            hidden, weight, bias, scale=scale, norm_weight=norm_weight, eps=eps, gated=gated, residual=residual
        )
    x, x_scale = hidden, None
    if quantize_input:
        x, x_scale = quantize_rows(hidden, weight.dtype, norm_weight=norm_weight, eps=eps)
    elif norm_weight is not None:
        x = rms_norm(hidden, norm_weight, eps)
    return quantized_matmul(
        x,
        weight,
        scale,
        bias,
        x_scale=x_scale,
        gated=gated,
        residual=residual,
        dtype=hidden.dtype,
        tile=_choose_tile(hidden, weight, gated=gated),
    )


def int4_product(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    zeros: torch.Tensor | None,
    bias: torch.Tensor | None,
    *,
    group_size: int,
    norm_weight: torch.Tensor | None,
    eps: float,
    gated: bool,
    residual: torch.Tensor | None,
) -> torch.Tensor:
    """`int4_linear` where `suits_fused`."""
    x = hidden if norm_weight is None else rms_norm(hidden, norm_weight, eps)
    return quantized_matmul(
        x,
        weight,
        scale,
        bias,
        zeros=zeros,
        group_size=hidden.shape[1] if group_size == -1 else group_size,
        gated=gated,
        residual=residual,
        dtype=hidden.dtype,
        tile=_choose_tile(hidden, weight, gated=gated),
    )


def _is_skinny(hidden: torch.Tensor) -> bool:
    return len(hidden) == 1 and hidden.shape[1] <= _MAX_SKINNY_INPUTS


def _choose_tile(hidden: torch.Tensor, weight: torch.Tensor, *, gated: bool) -> Tile:
    num_tokens = len(hidden)
    tokens = min(max(next_power_of_2(num_tokens), 16), 128)
    if num_tokens > 256:
        return Tile(64 if gated else 128, 128, num_warps=4 if gated else 8)
    outputs = 64
    tiles = -(-weight.shape[0] // (outputs * (1 + gated))) * -(-num_tokens // tokens)
    splits = min(max(2 * multiprocessor_count(hidden.device) // tiles, 1), 4)
    return Tile(outputs, tokens, splits=next_power_of_2(splits + 1) // 2)
