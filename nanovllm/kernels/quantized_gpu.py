"""Products with quantised weights on a GPU: which kernel computes one, by its number of tokens.

- One token: `row_linear`. `skinny_linear` multiplies by 8 bits where that cannot, and with two to four tokens if the
  weight is small.
- More tokens: `quantize_rows` brings activations to 8 bits, with the norm folded in, and `quantized_matmul` multiplies.
  On Hopper GPUs, `dense_matmul` multiplies FP8 with up to 512 tokens, or 128 with block scales.
- INT4, and INT8 with 16-bit activations: with some tokens, and with one token and very long rows of INT4,
  `mixed_matmul` on Hopper GPUs, or `quantized_matmul`, converts the weight block by block; with many, the weight is
  converted once, for the BLAS.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from nanovllm.kernels.dense_matmul import dense_matmul, suits_dense_matmul
from nanovllm.kernels.dequantize_weight import dequantize_weight
from nanovllm.kernels.fused_linear import fused_linear, suits_fused_linear
from nanovllm.kernels.mixed_matmul import mixed_matmul, suits_mixed_matmul
from nanovllm.kernels.quantize_rows import GROUP_SIZE, quantize_rows
from nanovllm.kernels.quantized_matmul import Tile, quantized_matmul
from nanovllm.kernels.rms_norm import rms_norm
from nanovllm.kernels.row_linear import row_linear, suits_row_linear
from nanovllm.kernels.silu_and_mul import silu_and_mul
from nanovllm.kernels.skinny_linear import scales_blocks, skinny_linear
from nanovllm.kernels.triton_support import HAS_TRITON, multiprocessor_count, next_power_of_2

_ALIGNMENT = 16  # bytes, of a row that the tensor memory accelerator reads
# As measured: which kernel and tile is fastest.
_MAX_SKINNY_TOKENS = 4
_MAX_EXTRA_PRODUCTS = 1 << 23  # multiplications for the tokens after the first
_MAX_ROW = 32768
_TORCH_SCALES_BLOCKS = torch.version.cuda is not None and tuple(map(int, torch.version.cuda.split("."))) >= (12, 9)
# With more, the BLAS gains more than one conversion of the whole weight costs.
_MAX_INT8_TOKENS = 128
_MAX_HOPPER_INT8_TOKENS = 512
_MAX_INT4_TOKENS = 256
_MAX_INT4_ROW = 25600  # inputs of one token; longer ones are for `mixed_matmul`, where it can
_MAX_HOPPER_INT4_TOKENS = 1536
_MAX_DENSE_TOKENS = 512
_MAX_DENSE_BLOCK_TOKENS = 128
_MAX_BLOCK_TOKENS = 64  # of `quantized_matmul`: with more, or here if gated, torch's product with scales is faster
_MAX_GATED_BLOCK_TOKENS = 32
_MIN_TILE_TOKENS = 16
_MAX_TILE_TOKENS = 128  # of up to 256 tokens
_MAX_GATED_INT4_TILE_TOKENS = 64
_INPUTS = 256
_FEW_TOKENS = 256
_MANY_TOKENS = 1024
_MAX_SPLITS = 4
_MIN_SPLIT_INPUTS = 1024


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


def _aligned(num_tokens: int) -> int:
    """Returns the rows of activations whose scales the accelerator, or torch, reads: a multiple of what it aligns."""
    return -(-num_tokens // _ALIGNMENT) * _ALIGNMENT


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
    if _is_skinny(hidden, weight):
        return _skinny_product(
            hidden, weight, scale, bias, norm_weight=norm_weight, eps=eps, gated=gated, residual=residual
        )
    has_blocks = scales_blocks(scale, weight)
    most = _MAX_DENSE_BLOCK_TOKENS if has_blocks else _MAX_DENSE_TOKENS
    is_dense = len(hidden) <= most and suits_dense_matmul(hidden, weight, gated=gated)
    if has_blocks and not is_dense and len(hidden) > (_MAX_GATED_BLOCK_TOKENS if gated else _MAX_BLOCK_TOKENS):
        return _many_rows_block_product(
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
    x, x_scale = quantize_rows(
        hidden,
        weight.dtype,
        group_size=GROUP_SIZE if has_blocks else None,
        input_scale=input_scale,
        num_rows=_aligned(len(hidden)) if is_dense and has_blocks else None,
        norm_weight=norm_weight,
        eps=eps,
    )
    given: dict[str, Any] = {"x_scale": x_scale, "gated": gated, "residual": residual, "dtype": hidden.dtype}
    if is_dense:
        return dense_matmul(x[: len(hidden)], weight, bias, scale=scale, **given)
    inputs, group_size = (GROUP_SIZE, GROUP_SIZE) if has_blocks else (_INPUTS, 0)
    tile = _choose_tile(hidden, weight, gated=gated, inputs=inputs)
    return quantized_matmul(x, weight, scale, bias, group_size=group_size, tile=tile, **given)


def _many_rows_block_product(
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
    """`fp8_linear` with block scales, by torch's own product where it has one for them."""
    if not (_TORCH_SCALES_BLOCKS and weight.shape[0] % GROUP_SIZE == 0 and weight.shape[1] % GROUP_SIZE == 0):
        dense = dequantize_weight(weight, scale, hidden.dtype, input_size=weight.shape[1], group_size=GROUP_SIZE)
        return _dense_product(hidden, dense, bias, norm_weight=norm_weight, eps=eps, gated=gated, residual=residual)
    num_tokens = len(hidden)
    x, x_scale = quantize_rows(
        hidden,
        weight.dtype,
        group_size=GROUP_SIZE,
        input_scale=input_scale,
        num_rows=_aligned(num_tokens),
        norm_weight=norm_weight,
        eps=eps,
    )
    out = torch._scaled_mm(x, weight.T, scale_a=x_scale, scale_b=scale.T, out_dtype=hidden.dtype)[:num_tokens]
    return _finished(out, bias, gated=gated, residual=residual)


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
    if _is_skinny(hidden, weight):
        return _skinny_product(
            hidden, weight, scale, bias, norm_weight=norm_weight, eps=eps, gated=gated, residual=residual
        )
    has_some = len(hidden) <= _MAX_HOPPER_INT8_TOKENS
    if quantize_input:
        x, x_scale = quantize_rows(hidden, weight.dtype, norm_weight=norm_weight, eps=eps)
    elif has_some and suits_mixed_matmul(hidden, weight, scale, gated=gated):
        return mixed_matmul(_normed(hidden, norm_weight, eps), weight, scale, bias, gated=gated, residual=residual)
    elif len(hidden) > _MAX_INT8_TOKENS:
        dense = dequantize_weight(weight, scale, hidden.dtype, input_size=hidden.shape[1])
        return _dense_product(hidden, dense, bias, norm_weight=norm_weight, eps=eps, gated=gated, residual=residual)
    else:
        x, x_scale = _normed(hidden, norm_weight, eps), None
    return quantized_matmul(
        x,
        weight,
        scale,
        bias,
        x_scale=x_scale,
        gated=gated,
        residual=residual,
        dtype=hidden.dtype,
        tile=_choose_tile(hidden, weight, gated=gated, inputs=_INPUTS if quantize_input else GROUP_SIZE),
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
    suits_mixed = suits_mixed_matmul(hidden, weight, scale, group_size=group_size, gated=gated)
    is_long = suits_mixed and hidden.shape[1] > _MAX_INT4_ROW
    if suits_row_linear(hidden, group_size) and not is_long:
        return row_linear(
            hidden,
            weight,
            scale,
            bias,
            zeros=zeros,
            group_size=group_size,
            norm_weight=norm_weight,
            eps=eps,
            gated=gated,
            residual=residual,
        )
    if suits_mixed and len(hidden) <= _MAX_HOPPER_INT4_TOKENS:
        return mixed_matmul(
            _normed(hidden, norm_weight, eps),
            weight,
            scale,
            bias,
            zeros=zeros,
            group_size=group_size,
            gated=gated,
            residual=residual,
        )
    if len(hidden) > _MAX_INT4_TOKENS:
        dense = dequantize_weight(
            weight, scale, hidden.dtype, input_size=hidden.shape[1], zeros=zeros, group_size=group_size
        )
        return _dense_product(hidden, dense, bias, norm_weight=norm_weight, eps=eps, gated=gated, residual=residual)
    return quantized_matmul(
        _normed(hidden, norm_weight, eps),
        weight,
        scale,
        bias,
        zeros=zeros,
        group_size=group_size,
        gated=gated,
        residual=residual,
        dtype=hidden.dtype,
        tile=_choose_tile(hidden, weight, gated=gated),
    )


def _normed(hidden: torch.Tensor, norm_weight: torch.Tensor | None, eps: float) -> torch.Tensor:
    return hidden.contiguous() if norm_weight is None else rms_norm(hidden, norm_weight, eps)


def _dense_product(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    norm_weight: torch.Tensor | None,
    eps: float,
    gated: bool,
    residual: torch.Tensor | None,
) -> torch.Tensor:
    """Returns act(rms_norm(hidden) · weightᵀ + bias) + residual, with a weight in hidden's dtype."""
    only_adds = residual is not None and bias is None
    if suits_fused_linear(hidden, weight, gated=gated, only_adds=only_adds):
        return fused_linear(hidden, weight, bias, norm_weight=norm_weight, eps=eps, gated=gated, residual=residual)
    x = _normed(hidden, norm_weight, eps)
    if residual is not None and bias is None and not gated:
        return torch.addmm(residual, x, weight.T)
    return _finished(F.linear(x, weight), bias, gated=gated, residual=residual)


def _finished(
    product: torch.Tensor, bias: torch.Tensor | None, *, gated: bool, residual: torch.Tensor | None
) -> torch.Tensor:
    """Returns the product with what follows it."""
    if bias is not None:
        product = product + bias
    if gated:
        product = silu_and_mul(product)
    return product if residual is None else product + residual


def _is_skinny(hidden: torch.Tensor, weight: torch.Tensor) -> bool:
    """Returns whether `_skinny_product` is faster than two kernels, of which one quantises the activations."""
    num_tokens, input_size = hidden.shape
    extra_products = (num_tokens - 1) * weight.numel()
    return num_tokens <= _MAX_SKINNY_TOKENS and extra_products <= _MAX_EXTRA_PRODUCTS and input_size <= _MAX_ROW


def _skinny_product(
    hidden: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None, **around: Any
) -> torch.Tensor:
    """Returns the product of few tokens with 8-bit weights, which become floats in registers."""
    if suits_row_linear(hidden):
        return row_linear(hidden, weight, scale, bias, **around)
    return skinny_linear(hidden, weight, bias, scale=scale, **around)


def _choose_tile(hidden: torch.Tensor, weight: torch.Tensor, *, gated: bool, inputs: int = GROUP_SIZE) -> Tile:
    """Returns the tile that was fastest, or nearly so, at the shapes of Qwen3-8B on an H200.

    inputs: that a program may take at a time, if it has few tokens; _INPUTS where both factors have 8 bits.
    """
    num_tokens, input_size = hidden.shape
    if num_tokens > _MANY_TOKENS:
        return Tile(64 if gated else 128, 256, num_warps=8, num_stages=3)
    if num_tokens > _FEW_TOKENS:
        return Tile(128, 128, num_warps=8)
    tokens = min(max(next_power_of_2(num_tokens), _MIN_TILE_TOKENS), _MAX_TILE_TOKENS)
    outputs, num_stages, most_programs = 64, 4, 2 * multiprocessor_count(hidden.device)
    if weight.dtype is torch.int16:
        tokens = min(tokens, _MAX_GATED_INT4_TILE_TOKENS) if gated else tokens
        num_stages = 4 if 32 < num_tokens <= 64 else 3
    elif inputs == _INPUTS and tokens >= 64:
        most_programs //= 2  # their blocks fill a multiprocessor's shared memory
        if gated:
            inputs, num_stages = _INPUTS if num_tokens > tokens else GROUP_SIZE, 3
    elif tokens == _MAX_TILE_TOKENS:
        inputs = GROUP_SIZE
    programs = -(-weight.shape[0] // (outputs * (1 + gated))) * -(-num_tokens // tokens)
    splits = 1
    most_splits = min(_MAX_SPLITS, most_programs // programs, input_size // _MIN_SPLIT_INPUTS)
    while 2 * splits <= most_splits:
        splits *= 2
    return Tile(outputs, tokens, inputs, splits=splits, num_stages=num_stages)
