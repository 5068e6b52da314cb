"""The experts' MLP for many tokens with weights of 8 or 4 bits.

The launches are those of `kernels.grouped_experts`. Where the tensor cores multiply FP8, activations are quantised
first (`quantize_rows`), which are two launches more; other weights are converted in registers. As in
`kernels.quantized_matmul`, a weight's outputs are the rows of the tensor cores' product and the tokens are its columns,
so that converted weights need no shared memory.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from nanovllm.kernels.expert_matrices import ExpertMatrices, split_planes
from nanovllm.kernels.expert_routing import Routing
from nanovllm.kernels.expert_tiles import ExpertTiles, sort_by_expert
from nanovllm.kernels.grouped_experts import Tiling, load_columns, load_tile, rows_of_a_tile, sum_pairs
from nanovllm.kernels.int4_packing import BLOCK_SIZE, load_group
from nanovllm.kernels.quantize_rows import quantize_rows
from nanovllm.kernels.triton_support import (
    jit,
    next_power_of_2,
    pdl_options,
    shared_memory,
    tl,
)

_MIN_BLOCK = 16  # of a product on the tensor cores
_MIN_FP8_INPUTS = 32
# Rows of a tile → the programs of the gated product and of the other, as measured on Qwen3-30B-A3B's shape.
_FP8_TILINGS = {
    16: (Tiling(64, 128, 4, 3), Tiling(128, 128, 4, 3)),
    32: (Tiling(64, 128, 4, 3), Tiling(128, 128, 4, 3)),
    64: (Tiling(64, 128, 4, 3), Tiling(128, 128, 4, 3)),
    128: (Tiling(128, 128, 8, 4), Tiling(128, 128, 8, 4)),
}
_FP8_BLOCK_TILINGS = {**_FP8_TILINGS, 128: (Tiling(64, 128, 8, 3), Tiling(64, 128, 4, 3))}
_INT8_TILINGS = {
    16: (Tiling(64, 128, 4, 3), Tiling(128, 128, 4, 3)),
    32: (Tiling(64, 128, 4, 3), Tiling(64, 128, 4, 3)),
    64: (Tiling(64, 128, 4, 3), Tiling(128, 128, 8, 3)),
    128: (Tiling(64, 128, 4, 2), Tiling(64, 128, 4, 2)),
}
_INT4_TILINGS = {
    16: (Tiling(128, 128, 4, 3), Tiling(128, 128, 4, 3)),
    32: (Tiling(128, 128, 4, 3), Tiling(128, 128, 4, 3)),
    64: (Tiling(128, 128, 4, 3), Tiling(128, 128, 4, 3)),
    128: (Tiling(128, 128, 8, 3), Tiling(128, 128, 8, 3)),
}


def _tilings(matrices: ExpertMatrices) -> Mapping[int, tuple[Tiling, Tiling]]:
    if matrices.is_int4:
        return _INT4_TILINGS
    if matrices.weight.dtype is torch.int8:
        return _INT8_TILINGS
    return _FP8_TILINGS if matrices.has_row_scale else _FP8_BLOCK_TILINGS


@jit
def _add_plane(
    out: tl.tensor,
    weight: tl.tensor,
    x: tl.tensor,
    x_scale: tl.tensor,
    scale_ptr: tl.tensor,
    zero_ptr: tl.tensor,
    scale_row: tl.tensor,
    row_mask: tl.tensor,
    column: tl.tensor,
    scale_row_stride: tl.tensor,
    scale_group_stride: tl.tensor,
    offset: tl.constexpr,
    IS_INT4: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    ROWS_SHARE_SCALE: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    INPUT_SIZE: tl.constexpr,
    PRECISION: tl.constexpr,
) -> tl.tensor:
    """Returns out [outputs, rows] + weight [outputs, inputs] · xᵀ over inputs from `column` on, which share a scale.

    scale_row, row_mask: [outputs], or of all if ROWS_SHARE_SCALE. x_scale, broadcast to out: of the activations' block.
    Scales that all inputs share are left to the end, but for those of INT4.
    """
    if IS_INT4:
        scale, zero = load_group(
            scale_ptr, zero_ptr, scale_row, row_mask, column, scale_row_stride, scale_group_stride, offset, x.dtype,
            HAS_ZEROS, GROUP_SIZE, INPUT_SIZE,
        )  # fmt: skip
        out = tl.dot((weight - zero[:, None]) * scale[:, None], x.T, out, input_precision=PRECISION)
    elif GROUP_SIZE < INPUT_SIZE:
        scale, zero = load_group(
            scale_ptr, zero_ptr, scale_row, row_mask, column, scale_row_stride, scale_group_stride, offset, tl.float32,
            HAS_ZEROS, GROUP_SIZE, INPUT_SIZE,
        )  # fmt: skip
        if not ROWS_SHARE_SCALE:
            scale = scale[:, None]
        out += tl.dot(weight, x.T, input_precision=PRECISION) * (scale * x_scale)
    else:
        out = tl.dot(weight, x.T, out, input_precision=PRECISION)
    return out


@jit
def _quantized_grouped_product_kernel(
    x_ptr: tl.tensor,
    x_scale_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    zero_ptr: tl.tensor,
    pairs_ptr: tl.tensor,
    tiles_ptr: tl.tensor,
    topk_weights_ptr: tl.tensor,
    out_ptr: tl.tensor,
    x_stride: tl.tensor,
    x_scale_group_stride: tl.tensor,
    scale_expert_stride: tl.tensor,
    scale_row_stride: tl.tensor,
    scale_group_stride: tl.tensor,
    HAS_X_SCALE: tl.constexpr,
    IS_GATED: tl.constexpr,
    IS_INT4: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    TOP_K: tl.constexpr,
    OUTPUT_SIZE: tl.constexpr,
    INPUT_SIZE: tl.constexpr,
    ROW_SIZE: tl.constexpr,
    SCALE_ROWS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    NUM_PLANES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """Program (outputs, tile), as `_grouped_product_kernel`; WIDTH numbers of a weight's row at a time.

    HAS_X_SCALE: both factors are FP8. The activations' scales are shared by as many inputs as the weight's.
    """
    UP_SCALE_ROW: tl.constexpr = (OUTPUT_SIZE + SCALE_ROWS - 1) // SCALE_ROWS
    IS_EVEN: tl.constexpr = ROW_SIZE % WIDTH == 0
    X_IS_EVEN: tl.constexpr = INPUT_SIZE % (NUM_PLANES * WIDTH) == 0
    HAS_ROW_SCALE: tl.constexpr = GROUP_SIZE >= INPUT_SIZE and not IS_INT4
    ROWS_SHARE_SCALE: tl.constexpr = SCALE_ROWS % BLOCK_N == 0 and not HAS_ROW_SCALE
    multiplied_as: tl.constexpr = x_ptr.dtype.element_ty
    expert, first, end = load_tile(tiles_ptr, IS_GATED, PDL)
    if first < end:
        row = first + tl.arange(0, BLOCK_M)
        in_tile = row < end
        row = tl.minimum(row, end - 1)  # rows past the end are computed and not stored
        pair = tl.load(pairs_ptr + row)
        source = (pair // TOP_K if IS_GATED else row).to(tl.int64)
        output = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
        output_mask = output < OUTPUT_SIZE
        weight_row = expert * (OUTPUT_SIZE * (1 + IS_GATED)) + output % OUTPUT_SIZE
        scale_row, scale_mask = output // SCALE_ROWS, output_mask
        if ROWS_SHARE_SCALE:
            scale_row, scale_mask = tl.program_id(0) * BLOCK_N // SCALE_ROWS, True
        scale_ptr += expert * scale_expert_stride
        zero_ptr += expert * scale_expert_stride
        lane = tl.arange(0, WIDTH)
        x_ptrs = x_ptr + source[:, None] * x_stride + lane[None, :]
        weight_ptrs = weight_ptr + weight_row[:, None] * ROW_SIZE + lane[None, :]
        out = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
        if IS_GATED:
            up = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
        for start in range(0, ROW_SIZE, WIDTH):
            x_scale = 1.0
            if HAS_X_SCALE and not HAS_ROW_SCALE:
                x_scale = tl.load(x_scale_ptr + start // GROUP_SIZE * x_scale_group_stride + source)[None, :]
            number = start + lane[None, :]
            planes, offset = split_planes(
                load_columns(weight_ptrs + start, number, ROW_SIZE, IS_EVEN), multiplied_as, IS_INT4
            )
            if IS_GATED:
                up_ptrs = weight_ptrs + OUTPUT_SIZE * ROW_SIZE + start
                up_planes, offset = split_planes(
                    load_columns(up_ptrs, number, ROW_SIZE, IS_EVEN), multiplied_as, IS_INT4
                )
            for plane in tl.static_range(NUM_PLANES):
                column = start * NUM_PLANES + plane * WIDTH
                x = load_columns(x_ptrs + column, column + lane[None, :], INPUT_SIZE, X_IS_EVEN)
                out = _add_plane(
                    out, planes[plane], x, x_scale, scale_ptr, zero_ptr, scale_row, scale_mask, column,
                    scale_row_stride, scale_group_stride, offset, IS_INT4, HAS_ZEROS, ROWS_SHARE_SCALE, GROUP_SIZE,
                    INPUT_SIZE, PRECISION,
                )  # fmt: skip
                if IS_GATED:
                    up = _add_plane(
                        up, up_planes[plane], x, x_scale, scale_ptr, zero_ptr, UP_SCALE_ROW + scale_row, scale_mask,
                        column, scale_row_stride, scale_group_stride, offset, IS_INT4, HAS_ZEROS, ROWS_SHARE_SCALE,
                        GROUP_SIZE, INPUT_SIZE, PRECISION,
                    )  # fmt: skip
        if HAS_ROW_SCALE:
            if HAS_X_SCALE:
                row_scale = tl.load(x_scale_ptr + source)[None, :]
                out *= row_scale
                if IS_GATED:
                    up *= row_scale
            scale_ptrs = scale_ptr + scale_row * scale_row_stride
            out *= tl.load(scale_ptrs, mask=output_mask, other=0.0)[:, None]
            if IS_GATED:
                up_scale = tl.load(scale_ptrs + UP_SCALE_ROW * scale_row_stride, mask=output_mask, other=0.0)
                up *= up_scale[:, None]
        if IS_GATED:
            out = out / (1.0 + tl.exp(-out)) * up
            target = row.to(tl.int64)
        else:
            out = out * tl.load(topk_weights_ptr + pair)[None, :]
            target = pair.to(tl.int64)
        mask = output_mask[:, None] & in_tile[None, :]
        out_ptrs = out_ptr + target[None, :] * OUTPUT_SIZE + output[:, None]
        tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=mask)


def _multiply(
    x: torch.Tensor,
    matrices: ExpertMatrices,
    out: torch.Tensor,
    order: ExpertTiles,
    routing: Routing,
    *,
    gated: bool,
    tiling: Tiling | None = None,
) -> None:
    """Writes out [num_pairs, outputs] for x [num_tokens if gated else num_pairs, inputs]. tiling: None chooses."""
    output_size, input_size = out.shape[1], x.shape[1]
    x_scale = None  # [groups, rows]
    if matrices.weight.dtype is torch.float8_e4m3fn and x.itemsize == 2:
        group_size = None if matrices.has_row_scale else matrices.block[1]
        x, by_row = quantize_rows(x, matrices.weight.dtype, group_size=group_size, use_triton=True)
        x_scale = by_row.T
    if tiling is None:
        tiling = _tilings(matrices)[order.block_rows][not gated]
    block_n = min(tiling.block_outputs, max(next_power_of_2(output_size), _MIN_BLOCK))
    block_k = BLOCK_SIZE  # inputs
    if not matrices.is_int4:
        most = input_size if matrices.has_row_scale else matrices.block[1]
        least = _MIN_BLOCK if x_scale is None else _MIN_FP8_INPUTS
        block_k = max(min(tiling.block_inputs, next_power_of_2(most)), least)
    stage_bytes = (order.block_rows * x.itemsize + block_n * (1 + gated)) * block_k
    _quantized_grouped_product_kernel[(-(-output_size // block_n), len(order.tiles))](
        x_ptr=x,
        x_scale_ptr=x if x_scale is None else x_scale,
        pairs_ptr=order.pairs,
        tiles_ptr=order.tiles,
        topk_weights_ptr=routing.topk_weights,
        out_ptr=out,
        x_stride=x.stride(0),
        x_scale_group_stride=0 if x_scale is None else x_scale.stride(0),
        HAS_X_SCALE=x_scale is not None,
        IS_GATED=gated,
        TOP_K=routing.top_k,
        OUTPUT_SIZE=output_size,
        INPUT_SIZE=input_size,
        NUM_PLANES=matrices.num_planes,
        BLOCK_M=order.block_rows,
        BLOCK_N=block_n,
        WIDTH=block_k // matrices.num_planes,
        PRECISION="ieee",
        num_warps=tiling.num_warps,
        num_stages=max(min(tiling.num_stages, shared_memory(x.device) // stage_bytes), 1),
        **matrices.arguments(),
        **pdl_options(x.device),
    )


def quantized_grouped_experts(
    x: torch.Tensor,
    gate_up: ExpertMatrices,
    down: ExpertMatrices,
    routing: Routing,
    residual: torch.Tensor | None = None,
    *,
    block_rows: int | None = None,
) -> torch.Tensor:
    """The kernels of `kernels.quantized_experts.quantized_experts_mlp` for many tokens. block_rows: None chooses."""
    num_pairs = routing.topk_ids.numel()
    order = sort_by_expert(routing, block_rows or rows_of_a_tile(num_pairs, routing.num_experts))
    inner = x.new_empty(num_pairs, down.num_inputs)  # [num_pairs, inner_size], sorted
    _multiply(x, gate_up, inner, order, routing, gated=True)
    outputs = x.new_empty(num_pairs, x.shape[1])  # [num_pairs, hidden_size]
    _multiply(inner, down, outputs, order, routing, gated=False)
    return sum_pairs(outputs, routing, residual)
