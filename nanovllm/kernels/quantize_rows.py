"""Activations in 8 bits with scales, for products on the tensor cores; the RMS norm before them is folded in."""

from __future__ import annotations

import torch

from nanovllm.kernels.rms_norm import rms_norm_reference
from nanovllm.kernels.triton_support import (
    INTERPRETED,
    constant,
    jit,
    jit_with_varying,
    join_launch_chain,
    next_power_of_2,
    pdl_options,
    runs_triton,
    tl,
)

GROUP_SIZE = 128
_COLUMNS_PER_WARP = 1024
_MAX_WARPS = 16
_IS_INTERPRETED = constant(INTERPRETED)
_LARGEST = {torch.float8_e4m3fn: 448.0, torch.int8: 127.0}


@jit
def _round_to(x: tl.tensor, step: tl.tensor) -> tl.tensor:
    """Returns the multiples of `step`, a power of two, that are nearest to x, of two the even one."""
    large = step * 12582912.0  # 1.5 · 2²³, where float32 has no digits behind the point
    return (x + large) - large


@jit_with_varying("num_rows")
def _quantize_rows_kernel(
    x_ptr: tl.tensor,
    norm_weight_ptr: tl.tensor,
    input_scale_ptr: tl.tensor,
    quantized_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    x_stride: tl.tensor,
    hidden_size: tl.tensor,
    num_rows: tl.tensor,
    num_groups: tl.tensor,
    eps: tl.tensor,
    HAS_NORM: tl.constexpr,
    IS_STATIC: tl.constexpr,
    LARGEST: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """Program (token): one row, normed and quantised in groups of GROUP_SIZE."""
    NUM_GROUPS: tl.constexpr = BLOCK_SIZE // GROUP_SIZE
    join_launch_chain(PDL)
    token = tl.program_id(0).to(tl.int64)
    group = tl.arange(0, NUM_GROUPS)
    column = group[:, None] * GROUP_SIZE + tl.arange(0, GROUP_SIZE)[None, :]
    mask = column < hidden_size
    x = tl.load(x_ptr + token * x_stride + column, mask=mask, other=0.0)
    if HAS_NORM:
        wide = x.to(tl.float32)
        mean_square = tl.sum(tl.sum(wide * wide, axis=1), axis=0) / hidden_size
        weight = tl.load(norm_weight_ptr + column, mask=mask, other=0.0).to(tl.float32)
        x = (wide * (1.0 / tl.sqrt(mean_square + eps)) * weight).to(x.dtype)
    wide = x.to(tl.float32)
    if IS_STATIC:
        scale = tl.load(input_scale_ptr) + tl.zeros([NUM_GROUPS], tl.float32)
    else:
        scale = tl.maximum(tl.max(tl.abs(wide), axis=1), 1e-12) / LARGEST
    scaled = tl.minimum(tl.maximum(wide / scale[:, None], -LARGEST), LARGEST)
    if quantized_ptr.dtype.element_ty == tl.int8:
        scaled = _round_to(scaled, 1.0)
    elif _IS_INTERPRETED:  # its conversion to FP8 is wrong where rounding reaches a power of two
        exponent = (scaled.to(tl.int32, bitcast=True) >> 23) & 255
        scaled = _round_to(scaled, tl.exp2((tl.maximum(exponent, 121) - 130).to(tl.float32)))
    quantized = scaled.to(quantized_ptr.dtype.element_ty)
    tl.store(quantized_ptr + token * hidden_size + column, quantized, mask=mask)
    tl.store(scale_ptr + group * num_rows + token, scale, mask=group < num_groups)


def quantize_rows_reference(
    x: torch.Tensor,
    dtype: torch.dtype,
    *,
    group_size: int | None = None,
    input_scale: torch.Tensor | None = None,
    norm_weight: torch.Tensor | None = None,
    eps: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Reference for `quantize_rows` in plain torch."""
    if norm_weight is not None:
        x = rms_norm_reference(x, norm_weight, eps)
    num_tokens, hidden_size = x.shape
    size = group_size or hidden_size
    padded = torch.nn.functional.pad(x.float(), (0, -hidden_size % size)).view(num_tokens, -1, size)
    if input_scale is None:
        scale = padded.abs().amax(-1).clamp(min=1e-12) / _LARGEST[dtype]  # [num_tokens, groups]
    else:
        scale = input_scale.float().expand(num_tokens, padded.shape[1])
    scaled = (padded / scale.unsqueeze(-1)).clamp(-_LARGEST[dtype], _LARGEST[dtype])
    quantized = scaled.round() if dtype is torch.int8 else scaled
    return quantized.to(dtype).flatten(1)[:, :hidden_size].contiguous(), scale.T.contiguous().T


def quantize_rows(
    x: torch.Tensor,
    dtype: torch.dtype,
    *,
    group_size: int | None = None,
    input_scale: torch.Tensor | None = None,
    num_rows: int | None = None,
    norm_weight: torch.Tensor | None = None,
    eps: float = 0.0,
    use_triton: bool | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns (x / scale in `dtype`, scale): [num_tokens, hidden_size] and [num_tokens, groups] float32.

    The scales of a group lie side by side in memory, as the product reads them. dtype: float8_e4m3fn or int8.
    group_size None: a row has one scale. The scale is the largest magnitude of the group over the largest number of
    `dtype`, or `input_scale` [1] if given. num_rows: of the results, which may have more than x; the rest is not
    written. norm_weight: x is RMS-normed first.
    """
    if not runs_triton(x, use_triton):
        return quantize_rows_reference(
            x, dtype, group_size=group_size, input_scale=input_scale, norm_weight=norm_weight, eps=eps
        )
    num_tokens, hidden_size = x.shape
    num_rows = num_rows or num_tokens
    num_groups = 1 if group_size is None else -(-hidden_size // group_size)
    quantized = torch.empty(num_rows, hidden_size, dtype=dtype, device=x.device)  # [num_rows, hidden_size]
    scale = torch.empty(num_groups, num_rows, dtype=torch.float32, device=x.device).T  # [num_rows, num_groups]
    if num_tokens == 0:
        return quantized, scale
    block_size = next_power_of_2(hidden_size)
    _quantize_rows_kernel[(num_tokens,)](
        x_ptr=x,
        norm_weight_ptr=x if norm_weight is None else norm_weight,  # parts that are left out are not read
        input_scale_ptr=scale if input_scale is None else input_scale,
        quantized_ptr=quantized,
        scale_ptr=scale,
        x_stride=x.stride(0),
        hidden_size=hidden_size,
        num_rows=num_rows,
        num_groups=num_groups,
        eps=eps,
        HAS_NORM=norm_weight is not None,
        IS_STATIC=input_scale is not None,
        LARGEST=_LARGEST[dtype],
        BLOCK_SIZE=max(block_size, group_size or 0),
        GROUP_SIZE=group_size or block_size,
        num_warps=min(max(block_size // _COLUMNS_PER_WARP, 1), _MAX_WARPS),
        **pdl_options(x.device),
    )
    return quantized, scale
