"""Matrix products of few rows, y = x · Wᵀ, with weights of 4 or 8 bits that are converted in registers.

As in `skinny_linear`, one launch does the norm before the product and the gate or the addition after it. The tensor
cores multiply, since converting a weight already takes most of the instructions that its bytes' time allows. A
program's few outputs are its rows, and the tokens are its columns. Each of its warps sums a slice of the inputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nanovllm.kernels.int4_packing import BLOCK_SIZE, NUM_PLANES, PLANE_SIZE, convert, load_group, unpack_planes
from nanovllm.kernels.triton_support import (
    constant,
    jit,
    jit_with_varying,
    let_next_kernel_start,
    next_power_of_2,
    pdl_options,
    tl,
    wait_for_previous_kernel,
)

MAX_TOKENS = 16
_MIN_BLOCK_M = 8
_BLOCK_K = constant(BLOCK_SIZE)
_NUM_PLANES = constant(NUM_PLANES)
_PLANE_SIZE = constant(PLANE_SIZE)


@dataclass(frozen=True)
class Tile:
    """The shape of a program: its outputs, and the slices of the inputs that its warps share."""

    outputs: int
    slices: int
    num_warps: int = 4
    num_stages: int = 4


@jit
def _load_inputs(
    x_ptr: tl.tensor,
    norm_weight_ptr: tl.tensor,
    column: tl.tensor,
    token: tl.tensor,
    x_stride: tl.tensor,
    num_tokens: tl.tensor,
    INPUT_SIZE: tl.constexpr,
    HAS_NORM: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Returns x [slices, columns, tokens], times the norm's weight if there is one, and x's squares."""
    column, token = column[:, :, None], token[None, None, :]
    mask = (column < INPUT_SIZE) & (token < num_tokens)
    x = tl.load(x_ptr + token.to(tl.int64) * x_stride + column, mask=mask, other=0.0)
    wide = x.to(tl.float32)
    if HAS_NORM:
        norm_weight = tl.load(norm_weight_ptr + column, mask=column < INPUT_SIZE, other=0.0).to(tl.float32)
        x = (wide * norm_weight).to(x.dtype)
    return x, wide * wide


@jit
def _multiply_block(
    x_0: tl.tensor,
    x_1: tl.tensor,
    x_2: tl.tensor,
    x_3: tl.tensor,
    acc: tl.tensor,
    weight_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    zero_ptr: tl.tensor,
    output: tl.tensor,
    block: tl.tensor,
    scale_row_stride: tl.tensor,
    scale_group_stride: tl.tensor,
    first_output: tl.constexpr,
    IS_INT4: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    OUTPUT_SIZE: tl.constexpr,
    INPUT_SIZE: tl.constexpr,
) -> tl.tensor:
    """Adds to acc [slices, outputs, tokens] the product of one block of 128 inputs in each slice.

    x_0 to x_3: planes of 32 inputs for 4-bit weights; else x_0 is the whole block.
    """
    NUM_BLOCKS: tl.constexpr = (INPUT_SIZE + _BLOCK_K - 1) // _BLOCK_K
    NUM_GROUPS: tl.constexpr = (INPUT_SIZE + GROUP_SIZE - 1) // GROUP_SIZE if GROUP_SIZE > 0 else 1
    row = (first_output + output).to(tl.int64)[None, :, None]
    row_mask = (output < OUTPUT_SIZE)[None, :, None]
    if IS_INT4:
        word = block[:, None, None] * _PLANE_SIZE + tl.arange(0, _PLANE_SIZE)[None, None, :]
        mask = row_mask & (block < NUM_BLOCKS)[:, None, None]
        words = tl.load(weight_ptr + row * (NUM_BLOCKS * _PLANE_SIZE) + word, mask=mask, other=0)
        w_0, w_1, w_2, w_3, offset = unpack_planes(words, x_0.dtype)
        planes = ((w_0, x_0), (w_1, x_1), (w_2, x_2), (w_3, x_3))
        for plane in tl.static_range(_NUM_PLANES):
            if plane == 0 or (plane * _PLANE_SIZE) % GROUP_SIZE == 0:
                column = (block * _BLOCK_K + plane * _PLANE_SIZE)[:, None, None]
                scale, zero = load_group(
                    scale_ptr, zero_ptr, row, row_mask, column, scale_row_stride, scale_group_stride,
                    offset, x_0.dtype, HAS_ZEROS, GROUP_SIZE, INPUT_SIZE,
                )  # fmt: skip
            weight, x = planes[plane]
            acc = tl.dot((weight - zero) * scale, x, acc, input_precision="ieee")
    else:
        column = block[:, None, None] * _BLOCK_K + tl.arange(0, _BLOCK_K)[None, None, :]
        mask = row_mask & (column < INPUT_SIZE)
        weight = tl.load(weight_ptr + row * INPUT_SIZE + column, mask=mask, other=0.0)
        weight = convert(weight, x_0.dtype)
        if GROUP_SIZE > 0:
            group_mask = row_mask & (block < NUM_BLOCKS)[:, None, None]
            scale_row = row // GROUP_SIZE * NUM_GROUPS
            scale = tl.load(scale_ptr + scale_row + block[:, None, None], mask=group_mask, other=0.0)
            acc += tl.dot(weight, x_0, input_precision="ieee") * scale
        else:
            acc = tl.dot(weight, x_0, acc, input_precision="ieee")
    return acc


@jit_with_varying("num_tokens")
def _converted_linear_kernel(
    x_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    zero_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    norm_weight_ptr: tl.tensor,
    residual_ptr: tl.tensor,
    out_ptr: tl.tensor,
    x_stride: tl.tensor,
    residual_stride: tl.tensor,
    scale_row_stride: tl.tensor,
    scale_group_stride: tl.tensor,
    num_tokens: tl.tensor,
    eps: tl.tensor,
    HAS_ZEROS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    IS_GATED: tl.constexpr,
    IS_INT4: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    SCALE_STRIDE: tl.constexpr,
    OUTPUT_SIZE: tl.constexpr,
    INPUT_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SLICES: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """Program (outputs): all tokens times the weights of BLOCK_N outputs.

    GROUP_SIZE: inputs that share a scale; 0: a scale for each output, SCALE_STRIDE apart.
    """
    NUM_BLOCKS: tl.constexpr = (INPUT_SIZE + _BLOCK_K - 1) // _BLOCK_K
    BLOCKS_A_SLICE: tl.constexpr = (NUM_BLOCKS + SLICES - 1) // SLICES
    let_next_kernel_start(PDL)
    output = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    token = tl.arange(0, BLOCK_M)
    first_block = tl.arange(0, SLICES) * BLOCKS_A_SLICE
    acc = tl.zeros([SLICES, BLOCK_N, BLOCK_M], tl.float32)
    up_acc = tl.zeros([SLICES, BLOCK_N, BLOCK_M], tl.float32)
    squares = tl.zeros([SLICES, _PLANE_SIZE if IS_INT4 else _BLOCK_K, BLOCK_M], tl.float32)
    wait_for_previous_kernel(PDL)

    for step in tl.range(BLOCKS_A_SLICE):
        block = first_block + step
        first_column = block[:, None] * _BLOCK_K
        if IS_INT4:
            column = first_column + tl.arange(0, _PLANE_SIZE)[None, :]
            x_0, squares_0 = _load_inputs(
                x_ptr, norm_weight_ptr, column, token, x_stride, num_tokens, INPUT_SIZE, HAS_NORM
            )
            x_1, squares_1 = _load_inputs(
                x_ptr, norm_weight_ptr, column + 32, token, x_stride, num_tokens, INPUT_SIZE, HAS_NORM
            )
            x_2, squares_2 = _load_inputs(
                x_ptr, norm_weight_ptr, column + 64, token, x_stride, num_tokens, INPUT_SIZE, HAS_NORM
            )
            x_3, squares_3 = _load_inputs(
                x_ptr, norm_weight_ptr, column + 96, token, x_stride, num_tokens, INPUT_SIZE, HAS_NORM
            )
            if HAS_NORM:
                squares += (squares_0 + squares_1) + (squares_2 + squares_3)
        else:
            column = first_column + tl.arange(0, _BLOCK_K)[None, :]
            x_0, squares_0 = _load_inputs(
                x_ptr, norm_weight_ptr, column, token, x_stride, num_tokens, INPUT_SIZE, HAS_NORM
            )
            x_1, x_2, x_3 = x_0, x_0, x_0
            if HAS_NORM:
                squares += squares_0
        acc = _multiply_block(
            x_0, x_1, x_2, x_3, acc, weight_ptr, scale_ptr, zero_ptr, output, block,
            scale_row_stride, scale_group_stride,
            0, IS_INT4, HAS_ZEROS, GROUP_SIZE, OUTPUT_SIZE, INPUT_SIZE,
        )  # fmt: skip
        if IS_GATED:
            up_acc = _multiply_block(
                x_0, x_1, x_2, x_3, up_acc, weight_ptr, scale_ptr, zero_ptr, output, block,
            scale_row_stride, scale_group_stride,
                OUTPUT_SIZE, IS_INT4, HAS_ZEROS, GROUP_SIZE, OUTPUT_SIZE, INPUT_SIZE,
            )  # fmt: skip

    output_mask = output < OUTPUT_SIZE
    out = tl.sum(acc, axis=0)  # [BLOCK_N, BLOCK_M]
    up = tl.sum(up_acc, axis=0)
    if HAS_NORM:
        mean_square = tl.sum(tl.sum(squares, axis=1), axis=0) / INPUT_SIZE
        norm = (1.0 / tl.sqrt(mean_square + eps))[None, :]
        out *= norm
        up *= norm
    if GROUP_SIZE == 0:  # for the whole input
        out *= tl.load(scale_ptr + output * SCALE_STRIDE, mask=output_mask, other=0.0)[:, None]
        if IS_GATED:
            up_output = (output + OUTPUT_SIZE) * SCALE_STRIDE
            up *= tl.load(scale_ptr + up_output, mask=output_mask, other=0.0)[:, None]
    if HAS_BIAS:
        out += tl.load(bias_ptr + output, mask=output_mask, other=0.0).to(tl.float32)[:, None]
        if IS_GATED:
            up += tl.load(bias_ptr + OUTPUT_SIZE + output, mask=output_mask, other=0.0).to(tl.float32)[:, None]
    if IS_GATED:
        out = out / (1.0 + tl.exp(-out)) * up
    mask = output_mask[:, None] & (token < num_tokens)[None, :]
    if HAS_RESIDUAL:
        position = token.to(tl.int64)[None, :] * residual_stride + output[:, None]
        out += tl.load(residual_ptr + position, mask=mask, other=0.0).to(tl.float32)
    position = token.to(tl.int64)[None, :] * OUTPUT_SIZE + output[:, None]
    tl.store(out_ptr + position, out.to(out_ptr.dtype.element_ty), mask=mask)


def converted_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    zeros: torch.Tensor | None = None,
    group_size: int = 0,
    norm_weight: torch.Tensor | None = None,
    eps: float = 0.0,
    gated: bool = False,
    residual: torch.Tensor | None = None,
    tile: Tile,
) -> torch.Tensor:
    """Returns act(rms_norm(x) · weightᵀ + bias) + residual for up to 16 tokens, of x's dtype.

    x [num_tokens, inputs]; weight, scale, zeros and group_size as in `quantized_matmul`.
    """
    num_tokens, input_size = x.shape
    output_size = weight.shape[0] // (1 + gated)
    out = torch.empty(num_tokens, output_size, dtype=x.dtype, device=x.device)  # [num_tokens, output_size]
    if num_tokens == 0:
        return out
    _converted_linear_kernel[(-(-output_size // tile.outputs),)](
        x_ptr=x,
        weight_ptr=weight,
        scale_ptr=scale,
        zero_ptr=scale if zeros is None else zeros,  # parts that are left out are not read
        bias_ptr=x if bias is None else bias,
        norm_weight_ptr=x if norm_weight is None else norm_weight,
        residual_ptr=x if residual is None else residual,
        out_ptr=out,
        x_stride=x.stride(0),
        residual_stride=0 if residual is None else residual.stride(0),
        scale_row_stride=scale.stride(0),
        scale_group_stride=scale.stride(1),
        num_tokens=num_tokens,
        eps=eps,
        HAS_ZEROS=zeros is not None,
        HAS_BIAS=bias is not None,
        HAS_NORM=norm_weight is not None,
        HAS_RESIDUAL=residual is not None,
        IS_GATED=gated,
        IS_INT4=weight.dtype is torch.int16,
        GROUP_SIZE=group_size,
        SCALE_STRIDE=0 if len(scale) == 1 else 1,
        OUTPUT_SIZE=output_size,
        INPUT_SIZE=input_size,
        BLOCK_M=max(next_power_of_2(num_tokens), _MIN_BLOCK_M),
        BLOCK_N=tile.outputs,
        SLICES=tile.slices,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        **pdl_options(x.device),
    )
    return out
