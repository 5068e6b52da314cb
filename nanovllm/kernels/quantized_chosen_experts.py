"""The experts' MLP for few tokens with weights of 8 or 4 bits, which are converted in registers.

The launches are those of `kernels.chosen_experts`: only the chosen experts' weights are read, as they are stored. A
program sums the products of the inputs that share a scale first, and then the scaled sums.
"""

from __future__ import annotations

import torch

from nanovllm.kernels.expert_matrices import ExpertMatrices, split_planes
from nanovllm.kernels.expert_routing import Routing
from nanovllm.kernels.int4_packing import BLOCK_SIZE, PLANE_SIZE, load_group
from nanovllm.kernels.triton_support import (
    jit,
    let_next_kernel_start,
    next_power_of_2,
    pdl_options,
    tl,
    wait_for_previous_kernel,
)

# As measured on Qwen3-30B-A3B's shape.
_MAX_PROGRAM_WEIGHTS, _MAX_PROGRAM_INT4 = 16384, 8192  # of a gated program
_MAX_WEIGHTS_OF_A_WARP = 4096
_NUM_WARPS = 4


@jit
def _load_rows(
    weight_ptr: tl.tensor, row: tl.tensor, row_mask: tl.tensor, column: tl.tensor, ROW_SIZE: tl.constexpr
) -> tl.tensor:
    """Loads numbers [rows, groups, width] of the weight; column [groups, width]."""
    mask = row_mask[:, None, None] & (column < ROW_SIZE)[None, :, :]
    return tl.load(weight_ptr + row[:, None, None] * ROW_SIZE + column[None, :, :], mask=mask, other=0.0)


@jit
def _add_groups(
    out: tl.tensor,
    products: tl.tensor,
    x: tl.tensor,
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
    GROUP_SIZE: tl.constexpr,
    INPUT_SIZE: tl.constexpr,
) -> tl.tensor:
    """Returns out [rows] + the scaled sums of the products of stored weights with x, [rows or 1 for x, groups, width].

    column [groups]: the first input of each group.
    """
    scale, zero = load_group(
        scale_ptr, zero_ptr, scale_row[:, None], row_mask[:, None], column[None, :], scale_row_stride,
        scale_group_stride, offset, tl.float32, HAS_ZEROS, GROUP_SIZE, INPUT_SIZE,
    )  # fmt: skip
    sums = tl.sum(products, axis=2)  # [rows, groups]
    if IS_INT4:
        sums -= zero * tl.sum(x, axis=2)
    return out + tl.sum(sums * scale, axis=1)


@jit
def _quantized_gate_up_kernel(
    x_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    zero_ptr: tl.tensor,
    norm_weight_ptr: tl.tensor,
    topk_ids_ptr: tl.tensor,
    out_ptr: tl.tensor,
    x_stride: tl.tensor,
    scale_expert_stride: tl.tensor,
    scale_row_stride: tl.tensor,
    scale_group_stride: tl.tensor,
    eps: tl.tensor,
    IS_INT4: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    HAS_NORM: tl.constexpr,
    TOP_K: tl.constexpr,
    HIDDEN_SIZE: tl.constexpr,
    INNER_SIZE: tl.constexpr,
    ROW_SIZE: tl.constexpr,
    SCALE_ROWS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    NUM_PLANES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """Program (outputs, pair)."""
    PLANES_HAVE_SCALES: tl.constexpr = GROUP_SIZE < HIDDEN_SIZE and GROUP_SIZE % (NUM_PLANES * WIDTH) != 0
    UP_SCALE_ROW: tl.constexpr = (INNER_SIZE + SCALE_ROWS - 1) // SCALE_ROWS
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    wait_for_previous_kernel(PDL)
    let_next_kernel_start(PDL)  # after the wait: the next kernel may read what the kernel before this one wrote
    pair = tl.program_id(1).to(tl.int64)
    expert = tl.load(topk_ids_ptr + pair).to(tl.int64)
    output = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    output_mask = output < INNER_SIZE
    row = expert * (2 * INNER_SIZE) + output
    group, lane = tl.arange(0, BLOCK_GROUPS), tl.arange(0, WIDTH)
    number = group[:, None] * WIDTH + lane[None, :]
    gate_weight = _load_rows(weight_ptr, row, output_mask, number, ROW_SIZE)
    up_weight = _load_rows(weight_ptr, INNER_SIZE + row, output_mask, number, ROW_SIZE)
    gate_planes, offset = split_planes(gate_weight, dtype, IS_INT4)
    up_planes, offset = split_planes(up_weight, dtype, IS_INT4)
    scale_ptr += expert * scale_expert_stride
    zero_ptr += expert * scale_expert_stride
    scale_row = output // SCALE_ROWS
    gate = tl.zeros([BLOCK_N], tl.float32)
    up = tl.zeros([BLOCK_N], tl.float32)
    squares = tl.zeros([BLOCK_GROUPS], tl.float32)
    for plane in tl.static_range(NUM_PLANES):
        first = (group * NUM_PLANES + plane) * WIDTH
        column = first[:, None] + lane[None, :]
        mask = column < HIDDEN_SIZE
        x = tl.load(x_ptr + pair // TOP_K * x_stride + column, mask=mask, other=0.0).to(tl.float32)
        if HAS_NORM:  # as in `kernels.skinny_linear`, the division comes after the product
            squares += tl.sum(x * x, axis=1)
            x = x * tl.load(norm_weight_ptr + column, mask=mask, other=0.0).to(tl.float32)
        x = x[None, :, :]
        if plane == 0 or PLANES_HAVE_SCALES:
            gate_products = gate_planes[plane].to(tl.float32) * x
            up_products = up_planes[plane].to(tl.float32) * x
            x_sum = x
        else:
            gate_products += gate_planes[plane].to(tl.float32) * x
            up_products += up_planes[plane].to(tl.float32) * x
            x_sum += x
        if plane == NUM_PLANES - 1 or PLANES_HAVE_SCALES:
            gate = _add_groups(
                gate, gate_products, x_sum, scale_ptr, zero_ptr, scale_row, output_mask, first, scale_row_stride,
                scale_group_stride, offset, IS_INT4, HAS_ZEROS, GROUP_SIZE, HIDDEN_SIZE,
            )  # fmt: skip
            up = _add_groups(
                up, up_products, x_sum, scale_ptr, zero_ptr, UP_SCALE_ROW + scale_row, output_mask, first,
                scale_row_stride, scale_group_stride, offset, IS_INT4, HAS_ZEROS, GROUP_SIZE, HIDDEN_SIZE,
            )  # fmt: skip
    if HAS_NORM:
        norm = 1.0 / tl.sqrt(tl.sum(squares, axis=0) / HIDDEN_SIZE + eps)
        gate, up = gate * norm, up * norm
    out = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out_ptr + pair * INNER_SIZE + output, out.to(dtype), mask=output_mask)


@jit
def _quantized_down_kernel(
    inner_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    zero_ptr: tl.tensor,
    topk_ids_ptr: tl.tensor,
    topk_weights_ptr: tl.tensor,
    residual_ptr: tl.tensor,
    out_ptr: tl.tensor,
    residual_stride: tl.tensor,
    scale_expert_stride: tl.tensor,
    scale_row_stride: tl.tensor,
    scale_group_stride: tl.tensor,
    IS_INT4: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    TOP_K: tl.constexpr,
    HIDDEN_SIZE: tl.constexpr,
    INNER_SIZE: tl.constexpr,
    ROW_SIZE: tl.constexpr,
    SCALE_ROWS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    NUM_PLANES: tl.constexpr,
    BLOCK_TOP_K: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """Program (output, token): the rows of its tile are the token's choices."""
    PLANES_HAVE_SCALES: tl.constexpr = GROUP_SIZE < INNER_SIZE and GROUP_SIZE % (NUM_PLANES * WIDTH) != 0
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    let_next_kernel_start(PDL)
    output = tl.program_id(0)
    token = tl.program_id(1).to(tl.int64)
    choice = tl.arange(0, BLOCK_TOP_K)
    choice_mask = choice < TOP_K
    pair = token * TOP_K + choice
    group, lane = tl.arange(0, BLOCK_GROUPS), tl.arange(0, WIDTH)
    # The kernel ahead began after these were written. They are read past the first-level cache, which may be older.
    expert = tl.load(topk_ids_ptr + pair, mask=choice_mask, other=0, cache_modifier=".cg").to(tl.int64)
    number = group[:, None] * WIDTH + lane[None, :]
    weight = _load_rows(weight_ptr, expert * HIDDEN_SIZE + output, choice_mask, number, ROW_SIZE)
    wait_for_previous_kernel(PDL)
    planes, offset = split_planes(weight, dtype, IS_INT4)
    # The strides of scales count from each choice's expert on.
    scale_start = expert * scale_expert_stride + output // SCALE_ROWS * scale_row_stride
    out = tl.zeros([BLOCK_TOP_K], tl.float32)
    for plane in tl.static_range(NUM_PLANES):
        first = (group * NUM_PLANES + plane) * WIDTH
        column = first[:, None] + lane[None, :]
        mask = choice_mask[:, None, None] & (column < INNER_SIZE)[None, :, :]
        inner_ptrs = inner_ptr + pair[:, None, None] * INNER_SIZE + column[None, :, :]
        inner = tl.load(inner_ptrs, mask=mask, other=0.0).to(tl.float32)
        if plane == 0 or PLANES_HAVE_SCALES:
            products = planes[plane].to(tl.float32) * inner
            inner_sum = inner
        else:
            products += planes[plane].to(tl.float32) * inner
            inner_sum += inner
        if plane == NUM_PLANES - 1 or PLANES_HAVE_SCALES:
            out = _add_groups(
                out, products, inner_sum, scale_ptr, zero_ptr, scale_start, choice_mask, first, 1, scale_group_stride,
                offset, IS_INT4, HAS_ZEROS, GROUP_SIZE, INNER_SIZE,
            )  # fmt: skip
    out *= tl.load(topk_weights_ptr + pair, mask=choice_mask, other=0.0)
    total = tl.sum(out, axis=0)
    if HAS_RESIDUAL:
        total += tl.load(residual_ptr + token * residual_stride + output).to(tl.float32)
    tl.store(out_ptr + token * HIDDEN_SIZE + output, total.to(dtype))


def _groups(matrices: ExpertMatrices) -> dict[str, int]:
    """Returns the shape of a row of the weight: numbers side by side, whose inputs share a scale, and how many such."""
    width = PLANE_SIZE
    if not matrices.is_int4:
        width = min(BLOCK_SIZE, next_power_of_2(matrices.num_inputs if matrices.has_row_scale else matrices.block[1]))
    groups = next_power_of_2(-(-matrices.weight.shape[2] // width))
    return {"WIDTH": width, "BLOCK_GROUPS": groups, "NUM_PLANES": matrices.num_planes}


def quantized_chosen_experts(
    x: torch.Tensor,
    gate_up: ExpertMatrices,
    down: ExpertMatrices,
    routing: Routing,
    residual: torch.Tensor | None = None,
    *,
    norm_weight: torch.Tensor | None = None,
    eps: float = 0.0,
) -> torch.Tensor:
    """The kernels of `kernels.quantized_experts.quantized_experts_mlp` for few tokens."""
    num_tokens, hidden_size = x.shape
    inner_size, num_pairs = down.num_inputs, routing.topk_ids.numel()
    inner = x.new_empty(num_pairs, inner_size)  # [num_pairs, inner_size]
    most = _MAX_PROGRAM_INT4 if gate_up.is_int4 else _MAX_PROGRAM_WEIGHTS
    block_n = min(max(most // (2 * next_power_of_2(hidden_size)), 1), next_power_of_2(inner_size))
    _quantized_gate_up_kernel[(-(-inner_size // block_n), num_pairs)](
        x_ptr=x,
        norm_weight_ptr=x if norm_weight is None else norm_weight,
        topk_ids_ptr=routing.topk_ids,
        out_ptr=inner,
        x_stride=x.stride(0),
        eps=eps,
        HAS_NORM=norm_weight is not None,
        TOP_K=routing.top_k,
        HIDDEN_SIZE=hidden_size,
        INNER_SIZE=inner_size,
        BLOCK_N=block_n,
        num_warps=_NUM_WARPS,
        num_stages=1,
        **_groups(gate_up),
        **gate_up.arguments(),
        **pdl_options(x.device),
    )
    block_top_k = next_power_of_2(routing.top_k)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)  # [num_tokens, hidden_size]
    _quantized_down_kernel[(hidden_size, num_tokens)](
        inner_ptr=inner,
        topk_ids_ptr=routing.topk_ids,
        topk_weights_ptr=routing.topk_weights,
        residual_ptr=x if residual is None else residual,
        out_ptr=out,
        residual_stride=0 if residual is None else residual.stride(0),
        HAS_RESIDUAL=residual is not None,
        TOP_K=routing.top_k,
        HIDDEN_SIZE=hidden_size,
        INNER_SIZE=inner_size,
        BLOCK_TOP_K=block_top_k,
        num_warps=min(max(_NUM_WARPS, block_top_k * next_power_of_2(inner_size) // _MAX_WEIGHTS_OF_A_WARP), 16),
        num_stages=1,
        **_groups(down),
        **down.arguments(),
        **pdl_options(x.device),
    )
    return out
