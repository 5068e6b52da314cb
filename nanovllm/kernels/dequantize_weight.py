"""Weights of 4 or 8 bits in 16 bits again, for products of so many rows that the conversion is a small part of them."""

from __future__ import annotations

import torch

from nanovllm.kernels.int4_packing import (
    BLOCK_SIZE,
    NUM_PLANES,
    PLANE_SIZE,
    convert,
    load_group,
    unpack_planes,
)
from nanovllm.kernels.triton_support import constant, jit, join_launch_chain, pdl_options, tl

_BLOCK_K = constant(BLOCK_SIZE)
_NUM_PLANES = constant(NUM_PLANES)
_PLANE_SIZE = constant(PLANE_SIZE)
_BLOCK_N = 32


@jit
def _dequantize_weight_kernel(
    weight_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    zero_ptr: tl.tensor,
    out_ptr: tl.tensor,
    scale_row_stride: tl.tensor,
    scale_group_stride: tl.tensor,
    HAS_ZEROS: tl.constexpr,
    IS_INT4: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    SCALE_STRIDE: tl.constexpr,
    NUM_ROWS: tl.constexpr,
    INPUT_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """Program (outputs, block of 128 inputs)."""
    NUM_BLOCKS: tl.constexpr = (INPUT_SIZE + _BLOCK_K - 1) // _BLOCK_K
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    join_launch_chain(PDL)
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    block = tl.program_id(1)
    row_mask = row < NUM_ROWS
    wide_row = row.to(tl.int64)[:, None]
    if IS_INT4:
        word = block * _PLANE_SIZE + tl.arange(0, _PLANE_SIZE)[None, :]
        words = tl.load(weight_ptr + wide_row * (NUM_BLOCKS * _PLANE_SIZE) + word, mask=row_mask[:, None], other=0)
        w_0, w_1, w_2, w_3, offset = unpack_planes(words, dtype)
        planes = (w_0, w_1, w_2, w_3)
        for plane in tl.static_range(_NUM_PLANES):
            first = block * _BLOCK_K + plane * _PLANE_SIZE
            scale, zero = load_group(
                scale_ptr, zero_ptr, row, row_mask, first, scale_row_stride, scale_group_stride,
                offset, dtype, HAS_ZEROS, GROUP_SIZE, INPUT_SIZE,
            )  # fmt: skip
            column = first + tl.arange(0, _PLANE_SIZE)[None, :]
            mask = row_mask[:, None] & (column < INPUT_SIZE)
            tl.store(out_ptr + wide_row * INPUT_SIZE + column, (planes[plane] - zero[:, None]) * scale[:, None], mask)
    else:
        column = block * _BLOCK_K + tl.arange(0, _BLOCK_K)[None, :]
        mask = row_mask[:, None] & (column < INPUT_SIZE)
        weight = convert(tl.load(weight_ptr + wide_row * INPUT_SIZE + column, mask=mask, other=0.0), dtype)
        if GROUP_SIZE > 0:
            scale_ptr += row // GROUP_SIZE * NUM_BLOCKS + block
        else:
            scale_ptr += row * SCALE_STRIDE
        scale = tl.load(scale_ptr, mask=row_mask, other=0.0)[:, None]
        tl.store(out_ptr + wide_row * INPUT_SIZE + column, (weight.to(tl.float32) * scale).to(dtype), mask=mask)


def dequantize_weight(
    weight: torch.Tensor,
    scale: torch.Tensor,
    dtype: torch.dtype,
    *,
    input_size: int,
    zeros: torch.Tensor | None = None,
    group_size: int = 0,
) -> torch.Tensor:
    """Returns the weight that `weight`, `scale` and `zeros` stand for: [outputs, input_size] of `dtype`.

    The arguments are those of `quantized_matmul`.
    """
    outputs = len(weight)
    out = torch.empty(outputs, input_size, dtype=dtype, device=weight.device)  # [outputs, input_size]
    _dequantize_weight_kernel[(-(-outputs // _BLOCK_N), -(-input_size // BLOCK_SIZE))](
        weight_ptr=weight,
        scale_ptr=scale,
        zero_ptr=scale if zeros is None else zeros,  # not read without zeros
        out_ptr=out,
        scale_row_stride=scale.stride(0),
        scale_group_stride=scale.stride(1),
        HAS_ZEROS=zeros is not None,
        IS_INT4=weight.dtype is torch.int16,
        GROUP_SIZE=group_size,
        SCALE_STRIDE=0 if len(scale) == 1 else 1,
        NUM_ROWS=outputs,
        INPUT_SIZE=input_size,
        BLOCK_N=_BLOCK_N,
        **pdl_options(weight.device),
    )
    return out
