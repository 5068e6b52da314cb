"""The experts' MLP for many tokens: grouped matrix products over tokens sorted by expert.

Four launches: sorting, gate and up with SiLU, down with the pair's weight, and the sum over each token's experts. The
order of the sum is fixed, so a token's result does not depend on the tokens beside it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nanovllm.kernels.expert_routing import Routing
from nanovllm.kernels.expert_tiles import ExpertTiles, sort_by_expert
from nanovllm.kernels.triton_support import (
    jit,
    join_launch_chain,
    let_next_kernel_start,
    next_power_of_2,
    pdl_options,
    shared_memory,
    tl,
    wait_for_previous_kernel,
)

_SUM_BLOCK = 1024  # columns that a program adds up


@dataclass(frozen=True)
class Tiling:
    """The shape of a program of a grouped product, apart from its rows."""

    block_outputs: int
    block_inputs: int
    num_warps: int
    num_stages: int


# Rows of a tile → the programs of the gated product and of the other, as measured in bf16 on Qwen3-30B-A3B's shape.
_TILINGS = {
    16: (Tiling(32, 256, 4, 3), Tiling(128, 128, 4, 3)),
    32: (Tiling(64, 128, 4, 3), Tiling(128, 128, 4, 3)),
    64: (Tiling(64, 64, 4, 3), Tiling(128, 64, 4, 4)),
    128: (Tiling(128, 64, 8, 4), Tiling(256, 64, 8, 4)),
}


@jit
def load_columns(ptrs: tl.tensor, column: tl.tensor, INPUT_SIZE: tl.constexpr, IS_EVEN: tl.constexpr) -> tl.tensor:
    """Loads columns of some rows, with zeros past the last column. IS_EVEN: none is past it."""
    return tl.load(ptrs) if IS_EVEN else tl.load(ptrs, mask=column < INPUT_SIZE, other=0.0)


@jit
def load_tile(
    tiles_ptr: tl.tensor, IS_GATED: tl.constexpr, PDL: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Returns the expert of a program's tile, its first row and the end of its rows, once its inputs can be read."""
    # The down product starts after the gated one has waited for the tiles, and may read them before it waits itself.
    if IS_GATED:
        wait_for_previous_kernel(PDL)
    let_next_kernel_start(PDL)
    tile_ptr = tiles_ptr + tl.program_id(1) * 3
    expert = tl.load(tile_ptr, cache_modifier=".cg").to(tl.int64)
    first = tl.load(tile_ptr + 1, cache_modifier=".cg")
    end = tl.load(tile_ptr + 2, cache_modifier=".cg")
    if not IS_GATED:
        wait_for_previous_kernel(PDL)
    return expert, first, end


@jit
def _grouped_product_kernel(
    x_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    pairs_ptr: tl.tensor,
    tiles_ptr: tl.tensor,
    topk_weights_ptr: tl.tensor,
    out_ptr: tl.tensor,
    x_stride: tl.tensor,
    IS_GATED: tl.constexpr,
    TOP_K: tl.constexpr,
    OUTPUT_SIZE: tl.constexpr,
    INPUT_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """Program (outputs, tile). IS_GATED: x has a row for each token, otherwise one for each sorted pair.

    The gated product writes sorted rows; the other multiplies them by the pairs' weights, and writes them in the order
    of the pairs.
    """
    expert, first, end = load_tile(tiles_ptr, IS_GATED, PDL)
    if first < end:
        row = first + tl.arange(0, BLOCK_M)
        in_tile = row < end
        row = tl.minimum(row, end - 1)  # rows past the end are computed and not stored
        pair = tl.load(pairs_ptr + row)
        source = (pair // TOP_K if IS_GATED else row).to(tl.int64)
        output = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
        weight_row = expert * (OUTPUT_SIZE * (1 + IS_GATED)) + output % OUTPUT_SIZE
        column = tl.arange(0, BLOCK_K)
        x_ptrs = x_ptr + source[:, None] * x_stride + column[None, :]
        weight_ptrs = weight_ptr + weight_row[None, :] * INPUT_SIZE + column[:, None]
        IS_EVEN: tl.constexpr = INPUT_SIZE % BLOCK_K == 0
        out = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        if IS_GATED:
            up = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for start in range(0, INPUT_SIZE, BLOCK_K):
            x = load_columns(x_ptrs + start, start + column[None, :], INPUT_SIZE, IS_EVEN)
            weight = load_columns(weight_ptrs + start, start + column[:, None], INPUT_SIZE, IS_EVEN)
            out = tl.dot(x, weight, out, input_precision=PRECISION)
            if IS_GATED:
                up_ptrs = weight_ptrs + OUTPUT_SIZE * INPUT_SIZE + start
                up_weight = load_columns(up_ptrs, start + column[:, None], INPUT_SIZE, IS_EVEN)
                up = tl.dot(x, up_weight, up, input_precision=PRECISION)
        if IS_GATED:
            out = out / (1.0 + tl.exp(-out)) * up
            target = row.to(tl.int64)
        else:
            out = out * tl.load(topk_weights_ptr + pair)[:, None]
            target = pair.to(tl.int64)
        mask = in_tile[:, None] & (output < OUTPUT_SIZE)[None, :]
        out_ptrs = out_ptr + target[:, None] * OUTPUT_SIZE + output[None, :]
        tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=mask)


@jit
def _sum_pairs_kernel(
    pairs_ptr: tl.tensor,
    residual_ptr: tl.tensor,
    out_ptr: tl.tensor,
    residual_stride: tl.tensor,
    HAS_RESIDUAL: tl.constexpr,
    TOP_K: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """Program (token, block of columns): the sum of the token's pairs, and the residual."""
    join_launch_chain(PDL)
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    mask = column < SIZE
    out = tl.zeros([BLOCK_SIZE], tl.float32)
    for index in tl.static_range(TOP_K):
        row_ptr = pairs_ptr + (token * TOP_K + index) * SIZE
        out += tl.load(row_ptr + column, mask=mask, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        out += tl.load(residual_ptr + token * residual_stride + column, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + token * SIZE + column, out.to(out_ptr.dtype.element_ty), mask=mask)


def _multiply(
    x: torch.Tensor,
    weight: torch.Tensor,
    out: torch.Tensor,
    order: ExpertTiles,
    routing: Routing,
    *,
    gated: bool,
    tiling: Tiling,
) -> None:
    """Writes out [num_pairs, outputs] for x [num_tokens if gated else num_pairs, inputs]."""
    output_size, input_size = out.shape[1], x.shape[1]
    block_n = min(tiling.block_outputs, max(next_power_of_2(output_size), 16))
    block_k = min(tiling.block_inputs * 2 // x.itemsize, max(next_power_of_2(input_size), 16))
    stage_bytes = (order.block_rows + block_n * (1 + gated)) * block_k * x.itemsize
    _grouped_product_kernel[(-(-output_size // block_n), len(order.tiles))](
        x_ptr=x,
        weight_ptr=weight,
        pairs_ptr=order.pairs,
        tiles_ptr=order.tiles,
        topk_weights_ptr=routing.topk_weights,
        out_ptr=out,
        x_stride=x.stride(0),
        IS_GATED=gated,
        TOP_K=routing.top_k,
        OUTPUT_SIZE=output_size,
        INPUT_SIZE=input_size,
        BLOCK_M=order.block_rows,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        PRECISION="ieee",
        num_warps=tiling.num_warps,
        num_stages=max(min(tiling.num_stages, shared_memory(x.device) // stage_bytes), 1),
        **pdl_options(x.device),
    )


def sum_pairs(outputs: torch.Tensor, routing: Routing, residual: torch.Tensor | None) -> torch.Tensor:
    """Returns the sum of each token's outputs [num_pairs, hidden_size], + residual: [num_tokens, hidden_size]."""
    num_tokens, hidden_size = routing.num_tokens, outputs.shape[1]
    out = outputs.new_empty(num_tokens, hidden_size)  # [num_tokens, hidden_size]
    _sum_pairs_kernel[(num_tokens, -(-hidden_size // _SUM_BLOCK))](
        pairs_ptr=outputs,
        residual_ptr=outputs if residual is None else residual,
        out_ptr=out,
        residual_stride=0 if residual is None else residual.stride(0),
        HAS_RESIDUAL=residual is not None,
        TOP_K=routing.top_k,
        SIZE=hidden_size,
        BLOCK_SIZE=_SUM_BLOCK,
        **pdl_options(outputs.device),
    )
    return out


def rows_of_a_tile(num_pairs: int, num_experts: int) -> int:
    """Returns the size of tiles: most experts fit into one where their rows are few."""
    return min(max(next_power_of_2(max(num_pairs * 3 // (num_experts * 2), 1)), min(_TILINGS)), max(_TILINGS))


def grouped_experts(
    x: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    routing: Routing,
    residual: torch.Tensor | None = None,
    *,
    block_rows: int | None = None,
    tilings: tuple[Tiling, Tiling] | None = None,
) -> torch.Tensor:
    """The kernels of `kernels.experts.experts_mlp` for many tokens. block_rows, tilings: None chooses."""
    hidden_size = x.shape[1]
    num_experts, _, inner_size = down.shape
    num_pairs = routing.topk_ids.numel()
    block_rows = block_rows or rows_of_a_tile(num_pairs, num_experts)
    gated_tiling, tiling = tilings or _TILINGS[block_rows]
    order = sort_by_expert(routing, block_rows)
    inner = x.new_empty(num_pairs, inner_size)  # [num_pairs, inner_size], sorted
    _multiply(x, gate_up, inner, order, routing, gated=True, tiling=gated_tiling)
    outputs = x.new_empty(num_pairs, hidden_size)  # [num_pairs, hidden_size]
    _multiply(inner, down, outputs, order, routing, gated=False, tiling=tiling)
    return sum_pairs(outputs, routing, residual)
