"""Matrix products of many rows, y = x · Wᵀ, with weights of 4 or 8 bits, on the tensor cores.

Activations of 8 bits (`quantize_rows`) are multiplied as they are; with 16-bit activations, weights are converted
block by block. A weight's outputs are the rows of the tensor cores' product and the tokens are its columns, for two
reasons: a few tokens then fill an instruction, and converted weights go to the tensor cores from registers.

Where a product has too few programs to keep all multiprocessors reading, the inputs are split, and a second kernel adds
the parts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nanovllm.kernels.add_splits import add_splits, finish, finishing_arguments
from nanovllm.kernels.int4_packing import BLOCK_SIZE, NUM_PLANES, PLANE_SIZE, convert, load_group, unpack_planes
from nanovllm.kernels.triton_support import (
    HostDescriptor,
    constant,
    jit,
    jit_with_varying,
    let_next_kernel_start,
    shared_memory,
    tl,
    wait_for_previous_kernel,
)

_BLOCK_K = constant(BLOCK_SIZE)
_NUM_PLANES = constant(NUM_PLANES)
_PLANE_SIZE = constant(PLANE_SIZE)
_TILES_IN_A_GROUP = constant(8)  # of tokens: neighbouring programs share a weight, which they find in the L2 cache


@dataclass(frozen=True)
class Tile:
    """The shape of a program."""

    outputs: int
    tokens: int
    inputs: int = 128
    splits: int = 1
    num_warps: int = 4
    num_stages: int = 4


@jit
def _load_block_scale(
    scale_ptr: tl.tensor,
    row: tl.tensor,
    num_rows: tl.constexpr,
    first_row: tl.tensor,
    block: tl.tensor,
    ROWS_SHARE_SCALE: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
) -> tl.tensor:
    """Loads the scale of a block of inputs: one for all rows, or [rows]."""
    block = tl.minimum(block, NUM_BLOCKS - 1)
    if ROWS_SHARE_SCALE:
        scale = tl.load(scale_ptr + first_row // GROUP_SIZE * NUM_BLOCKS + block)
    else:
        scale = tl.load(scale_ptr + row // GROUP_SIZE * NUM_BLOCKS + block, mask=row < num_rows, other=0.0)
    return scale


@jit
def _add_block(
    acc: tl.tensor,
    block_scale: tl.tensor,
    x_desc: tl.tensor,
    weight_desc: tl.tensor,
    scale_ptr: tl.tensor,
    zero_ptr: tl.tensor,
    row: tl.tensor,
    num_rows: tl.constexpr,
    first_row: tl.tensor,
    first_token: tl.tensor,
    column: tl.tensor,
    scale_row_stride: tl.tensor,
    scale_group_stride: tl.tensor,
    IS_INT4: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    INPUT_SIZE: tl.constexpr,
) -> tl.tensor:
    """Adds to acc [outputs, tokens] the product over the inputs from `column` on.

    block_scale, broadcast to acc: of all weights of 8 bits that are read, with the activations' scale, if GROUP_SIZE.
    """
    if IS_INT4:
        words = weight_desc.load([first_row, column // _NUM_PLANES])  # [BLOCK_N, 32]
        w_0, w_1, w_2, w_3, offset = unpack_planes(words, x_desc.dtype)
        planes = (w_0, w_1, w_2, w_3)
        for plane in tl.static_range(_NUM_PLANES):
            first = column + plane * _PLANE_SIZE
            if plane == 0 or (plane * _PLANE_SIZE) % GROUP_SIZE == 0:
                scale, zero = load_group(
                    scale_ptr, zero_ptr, row, row < num_rows, first, scale_row_stride, scale_group_stride,
                    offset, x_desc.dtype, HAS_ZEROS, GROUP_SIZE, INPUT_SIZE,
                )  # fmt: skip
            x = x_desc.load([first_token, first])  # [BLOCK_M, 32]
            acc = tl.dot((planes[plane] - zero[:, None]) * scale[:, None], x.T, acc)
    else:
        weight = weight_desc.load([first_row, column])  # [BLOCK_N, BLOCK_K]
        if weight.dtype != x_desc.dtype:
            weight = convert(weight, x_desc.dtype)
        x = x_desc.load([first_token, column])  # [BLOCK_M, BLOCK_K]
        if GROUP_SIZE > 0:
            acc += tl.dot(weight, x.T).to(tl.float32) * block_scale
        else:
            acc = tl.dot(weight, x.T, acc, out_dtype=acc.dtype)
    return acc


@jit_with_varying("num_tokens")
def _quantized_matmul_kernel(
    x_desc: tl.tensor,
    weight_desc: tl.tensor,
    x_scale_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    zero_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    residual_ptr: tl.tensor,
    out_ptr: tl.tensor,
    partial_ptr: tl.tensor,
    residual_stride: tl.tensor,
    scale_row_stride: tl.tensor,
    scale_group_stride: tl.tensor,
    num_tokens: tl.tensor,
    HAS_SCALE: tl.constexpr,
    HAS_X_SCALE: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    IS_GATED: tl.constexpr,
    IS_INT4: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    SCALE_STRIDE: tl.constexpr,
    OUTPUT_SIZE: tl.constexpr,
    INPUT_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLITS: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """Program (tile, split): BLOCK_N outputs of BLOCK_M tokens, over a part of the inputs.

    GROUP_SIZE: inputs that share a scale; 0: HAS_SCALE, for each output, SCALE_STRIDE apart. With splits, sums go to
    partial_ptr [splits, tokens, outputs, and as many ups if gated], unscaled but for groups.
    """
    NUM_ROWS: tl.constexpr = OUTPUT_SIZE * (2 if IS_GATED else 1)
    NUM_BLOCKS: tl.constexpr = (INPUT_SIZE + BLOCK_K - 1) // BLOCK_K
    BLOCKS_A_SPLIT: tl.constexpr = (NUM_BLOCKS + SPLITS - 1) // SPLITS
    NUM_OUTPUT_TILES: tl.constexpr = (OUTPUT_SIZE + BLOCK_N - 1) // BLOCK_N
    HAS_BLOCK_SCALE: tl.constexpr = GROUP_SIZE > 0 and not IS_INT4
    # A tile's outputs lie in one block of outputs.
    ROWS_SHARE_SCALE: tl.constexpr = BLOCK_N <= 128 and (not IS_GATED or OUTPUT_SIZE % BLOCK_N == 0)
    ACC_TYPE: tl.constexpr = tl.int32 if x_desc.dtype == tl.int8 else tl.float32
    let_next_kernel_start(PDL)
    tile = tl.program_id(0)
    num_token_tiles = tl.cdiv(num_tokens, BLOCK_M)
    token_group = tile // (_TILES_IN_A_GROUP * NUM_OUTPUT_TILES)
    first_tile = token_group * _TILES_IN_A_GROUP
    group_size = tl.minimum(num_token_tiles - first_tile, _TILES_IN_A_GROUP)
    index = tile % (_TILES_IN_A_GROUP * NUM_OUTPUT_TILES)
    # The last tile ends with the last token: the accelerator needs much longer for tokens that do not exist.
    first_token = tl.minimum((first_tile + index % group_size) * BLOCK_M, tl.maximum(num_tokens - BLOCK_M, 0))
    first_output = index // group_size * BLOCK_N
    token = first_token + tl.arange(0, BLOCK_M)
    output = first_output + tl.arange(0, BLOCK_N)
    acc = tl.zeros([BLOCK_N, BLOCK_M], ACC_TYPE)
    up_acc = tl.zeros([BLOCK_N, BLOCK_M], ACC_TYPE)
    wait_for_previous_kernel(PDL)

    split = tl.program_id(1)
    first_block = split * BLOCKS_A_SPLIT
    up_row, first_up_row = OUTPUT_SIZE + output, OUTPUT_SIZE + first_output
    if HAS_BLOCK_SCALE:  # loaded one block ahead
        next_scale = _load_block_scale(
            scale_ptr, output, NUM_ROWS, first_output, first_block, ROWS_SHARE_SCALE, GROUP_SIZE, NUM_BLOCKS
        )
        if IS_GATED:
            next_up_scale = _load_block_scale(
                scale_ptr, up_row, NUM_ROWS, first_up_row, first_block, ROWS_SHARE_SCALE, GROUP_SIZE, NUM_BLOCKS
            )
        next_x_scale = tl.load(x_scale_ptr + first_block * num_tokens + token, mask=token < num_tokens, other=0.0)
    for block in tl.range(first_block, tl.minimum(first_block + BLOCKS_A_SPLIT, NUM_BLOCKS)):
        column = block * BLOCK_K
        if HAS_BLOCK_SCALE:
            x_scale = next_x_scale[None, :]  # [1, BLOCK_M]
            scale = next_scale * x_scale if ROWS_SHARE_SCALE else next_scale[:, None] * x_scale
            next_scale = _load_block_scale(
                scale_ptr, output, NUM_ROWS, first_output, block + 1, ROWS_SHARE_SCALE, GROUP_SIZE, NUM_BLOCKS
            )
            if IS_GATED:
                up_scale = next_up_scale * x_scale if ROWS_SHARE_SCALE else next_up_scale[:, None] * x_scale
                next_up_scale = _load_block_scale(
                    scale_ptr, up_row, NUM_ROWS, first_up_row, block + 1, ROWS_SHARE_SCALE, GROUP_SIZE, NUM_BLOCKS
                )
            next_block = tl.minimum(block + 1, NUM_BLOCKS - 1)
            next_x_scale = tl.load(x_scale_ptr + next_block * num_tokens + token, mask=token < num_tokens, other=0.0)
        else:
            scale, up_scale = 1.0, 1.0
        acc = _add_block(
            acc, scale, x_desc, weight_desc, scale_ptr, zero_ptr, output, NUM_ROWS, first_output, first_token, column,
            scale_row_stride, scale_group_stride, IS_INT4, HAS_ZEROS, GROUP_SIZE, INPUT_SIZE,
        )  # fmt: skip
        if IS_GATED:
            up_acc = _add_block(
                up_acc, up_scale, x_desc, weight_desc, scale_ptr, zero_ptr, up_row, NUM_ROWS, first_up_row,
                first_token, column, scale_row_stride, scale_group_stride, IS_INT4, HAS_ZEROS, GROUP_SIZE, INPUT_SIZE,
            )  # fmt: skip

    out, up = acc.to(tl.float32), up_acc.to(tl.float32)
    if SPLITS == 1:
        finish(
            out, up, scale_ptr, x_scale_ptr, bias_ptr, residual_ptr, out_ptr, output, token, residual_stride,
            num_tokens, HAS_SCALE, HAS_X_SCALE, HAS_BIAS, HAS_RESIDUAL, IS_GATED, SCALE_STRIDE, OUTPUT_SIZE,
        )  # fmt: skip
    else:
        row = (split * num_tokens + token).to(tl.int64)[None, :] * NUM_ROWS
        mask = (output < OUTPUT_SIZE)[:, None] & (token < num_tokens)[None, :]
        tl.store(partial_ptr + row + output[:, None], out, mask=mask)
        if IS_GATED:
            tl.store(partial_ptr + row + OUTPUT_SIZE + output[:, None], up, mask=mask)


def quantized_matmul(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    x_scale: torch.Tensor | None = None,
    zeros: torch.Tensor | None = None,
    group_size: int = 0,
    gated: bool = False,
    residual: torch.Tensor | None = None,
    dtype: torch.dtype,
    tile: Tile,
) -> torch.Tensor:
    """Returns act(x · weightᵀ + bias) + residual: [num_tokens, outputs or half as many] of `dtype`.

    x [num_tokens, inputs]: of 16 bits, or of the weight's 8 bits with the scales of `quantize_rows`. weight
    [outputs, inputs] float8_e4m3fn or int8, or int16 words of `pack_int4`. group_size: inputs that share a scale, of
    blocks of outputs, too, for weights of 8 bits (128); 0: scale is [outputs, 1] or [1, 1].
    """
    num_tokens, input_size = x.shape
    is_int4 = weight.dtype is torch.int16
    arguments = finishing_arguments(
        num_tokens,
        len(weight),
        dtype,
        scale,
        bias,
        has_scale=group_size == 0,
        x_scale=x_scale,
        gated=gated,
        residual=residual,
        splits=tile.splits,
    )
    out: torch.Tensor = arguments["out_ptr"]
    if num_tokens == 0:
        return out
    weight_columns = PLANE_SIZE if is_int4 else tile.inputs
    weight_bytes = tile.outputs * (1 + gated) * weight_columns * weight.itemsize
    stage_bytes = tile.tokens * tile.inputs * x.itemsize + weight_bytes
    tiles = -(-out.shape[1] // tile.outputs) * -(-num_tokens // tile.tokens)
    _quantized_matmul_kernel[(tiles, tile.splits)](
        x_desc=HostDescriptor.from_tensor(x, [tile.tokens, PLANE_SIZE if is_int4 else tile.inputs]),
        weight_desc=HostDescriptor.from_tensor(weight, [tile.outputs, weight_columns]),
        zero_ptr=scale if zeros is None else zeros,
        HAS_ZEROS=zeros is not None,
        IS_INT4=is_int4,
        GROUP_SIZE=group_size,
        scale_row_stride=scale.stride(0),
        scale_group_stride=scale.stride(1),
        INPUT_SIZE=input_size,
        BLOCK_M=tile.tokens,
        BLOCK_N=tile.outputs,
        BLOCK_K=BLOCK_SIZE if is_int4 else tile.inputs,
        num_warps=tile.num_warps,
        num_stages=max(min(tile.num_stages, shared_memory(x.device) // stage_bytes), 1),
        **arguments,
    )
    if tile.splits > 1:
        add_splits(arguments)
    return out
