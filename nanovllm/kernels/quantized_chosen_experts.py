"""The experts' MLP for few tokens with weights of 8 or 4 bits, which are converted in registers.

The launches are those of `kernels.chosen_experts`: only the chosen experts' weights are read, as they are stored.
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
_MAX_PROGRAM_WEIGHTS = 16384  # of a gated program
_DOWN_BLOCK_N = 1  # outputs of a program of the down product
_GATE_UP_WARPS, _DOWN_WARPS = 4, 4


@jit
def _load_rows(
    weight_ptr: tl.tensor, row: tl.tensor, row_mask: tl.tensor, column: tl.tensor, ROW_SIZE: tl.constexpr
) -> tl.tensor:
    """Loads numbers [rows, groups, width] of the weight; column [groups, width]."""
    mask = row_mask[:, None, None] & (column < ROW_SIZE)[None, :, :]
    return tl.load(weight_ptr + row[:, None, None] * ROW_SIZE + column[None, :, :], mask=mask, other=0.0)


@jit
def _scale_products(
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
    """Returns products [rows, groups, width] of weights as they are stored and of x, or sums of such, scaled.

    x [rows or 1, groups, width]: what the weights were multiplied by. column [groups]: the first input of each group.
    """
    scale, zero = load_group(
        scale_ptr, zero_ptr, scale_row[:, None], row_mask[:, None], column[None, :], scale_row_stride,
        scale_group_stride, offset, tl.float32, HAS_ZEROS, GROUP_SIZE, INPUT_SIZE,
    )  # fmt: skip
    if IS_INT4:
        products -= zero[:, :, None] * x
    return products * scale[:, :, None]


@jit
def _sum_inputs(products: tl.tensor) -> tl.tensor:
    """Returns the sums [rows] of products [rows, groups, width]; each thread adds up its own products first."""
    rows: tl.constexpr = products.shape[0]
    inputs: tl.constexpr = products.shape[1] * products.shape[2]
    return tl.sum(tl.reshape(products, [rows, inputs]), axis=1)


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
    gate = tl.zeros([BLOCK_N, BLOCK_GROUPS, WIDTH], tl.float32)
    up = tl.zeros([BLOCK_N, BLOCK_GROUPS, WIDTH], tl.float32)
    x_sum = tl.zeros([1, BLOCK_GROUPS, WIDTH], tl.float32)
    squares = tl.zeros([1, BLOCK_GROUPS, WIDTH], tl.float32)
    first = group * (NUM_PLANES * WIDTH)
    for plane in tl.static_range(NUM_PLANES):
        column = (first + plane * WIDTH)[:, None] + lane[None, :]
        mask = column < HIDDEN_SIZE
        x = tl.load(x_ptr + pair // TOP_K * x_stride + column, mask=mask, other=0.0).to(tl.float32)[None, :, :]
        if HAS_NORM:  # as in `kernels.skinny_linear`, the division comes after the product
            squares += x * x
            x = x * tl.load(norm_weight_ptr + column, mask=mask, other=0.0).to(tl.float32)[None, :, :]
        gate_products = gate_planes[plane].to(tl.float32) * x
        up_products = up_planes[plane].to(tl.float32) * x
        if PLANES_HAVE_SCALES:
            gate_products = _scale_products(
                gate_products, x, scale_ptr, zero_ptr, scale_row, output_mask, first + plane * WIDTH, scale_row_stride,
                scale_group_stride, offset, IS_INT4, HAS_ZEROS, GROUP_SIZE, HIDDEN_SIZE,
            )  # fmt: skip
            up_products = _scale_products(
                up_products, x, scale_ptr, zero_ptr, UP_SCALE_ROW + scale_row, output_mask, first + plane * WIDTH,
                scale_row_stride, scale_group_stride, offset, IS_INT4, HAS_ZEROS, GROUP_SIZE, HIDDEN_SIZE,
            )  # fmt: skip
        gate += gate_products
        up += up_products
        x_sum += x
    if not PLANES_HAVE_SCALES:
        gate = _scale_products(
            gate, x_sum, scale_ptr, zero_ptr, scale_row, output_mask, first, scale_row_stride, scale_group_stride,
            offset, IS_INT4, HAS_ZEROS, GROUP_SIZE, HIDDEN_SIZE,
        )  # fmt: skip
        up = _scale_products(
            up, x_sum, scale_ptr, zero_ptr, UP_SCALE_ROW + scale_row, output_mask, first, scale_row_stride,
            scale_group_stride, offset, IS_INT4, HAS_ZEROS, GROUP_SIZE, HIDDEN_SIZE,
        )  # fmt: skip
    gate, up = _sum_inputs(gate), _sum_inputs(up)
    if HAS_NORM:
        norm = 1.0 / tl.sqrt(_sum_inputs(squares) / HIDDEN_SIZE + eps)
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
    BLOCK_N: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """Program (outputs, token): the rows of its tile are the token's choices, each with BLOCK_N outputs."""
    PLANES_HAVE_SCALES: tl.constexpr = GROUP_SIZE < INNER_SIZE and GROUP_SIZE % (NUM_PLANES * WIDTH) != 0
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    let_next_kernel_start(PDL)
    token = tl.program_id(1).to(tl.int64)
    row = tl.arange(0, BLOCK_TOP_K * BLOCK_N)
    choice = row // BLOCK_N
    output = tl.program_id(0) * BLOCK_N + row % BLOCK_N
    row_mask = (choice < TOP_K) & (output < HIDDEN_SIZE)
    pair = token * TOP_K + choice
    group, lane = tl.arange(0, BLOCK_GROUPS), tl.arange(0, WIDTH)
    # The kernel ahead began after these were written. They are read past the first-level cache, which may be older.
    expert = tl.load(topk_ids_ptr + pair, mask=row_mask, other=0, cache_modifier=".cg").to(tl.int64)
    number = group[:, None] * WIDTH + lane[None, :]
    weight = _load_rows(weight_ptr, expert * HIDDEN_SIZE + output, row_mask, number, ROW_SIZE)
    wait_for_previous_kernel(PDL)
    planes, offset = split_planes(weight, dtype, IS_INT4)
    # The strides of scales count from each choice's expert on.
    scale_start = expert * scale_expert_stride + output // SCALE_ROWS * scale_row_stride
    out = tl.zeros([BLOCK_TOP_K * BLOCK_N, BLOCK_GROUPS, WIDTH], tl.float32)
    inner_sum = tl.zeros([BLOCK_TOP_K * BLOCK_N, BLOCK_GROUPS, WIDTH], tl.float32)
    first = group * (NUM_PLANES * WIDTH)
    for plane in tl.static_range(NUM_PLANES):
        column = (first + plane * WIDTH)[:, None] + lane[None, :]
        mask = row_mask[:, None, None] & (column < INNER_SIZE)[None, :, :]
        inner_ptrs = inner_ptr + pair[:, None, None] * INNER_SIZE + column[None, :, :]
        inner = tl.load(inner_ptrs, mask=mask, other=0.0).to(tl.float32)
        products = planes[plane].to(tl.float32) * inner
        if PLANES_HAVE_SCALES:
            products = _scale_products(
                products, inner, scale_ptr, zero_ptr, scale_start, row_mask, first + plane * WIDTH, 1,
                scale_group_stride, offset, IS_INT4, HAS_ZEROS, GROUP_SIZE, INNER_SIZE,
            )  # fmt: skip
        out += products
        inner_sum += inner
    if not PLANES_HAVE_SCALES:
        out = _scale_products(
            out, inner_sum, scale_ptr, zero_ptr, scale_start, row_mask, first, 1, scale_group_stride, offset, IS_INT4,
            HAS_ZEROS, GROUP_SIZE, INNER_SIZE,
        )  # fmt: skip
    weighted = _sum_inputs(out) * tl.load(topk_weights_ptr + pair, mask=row_mask, other=0.0)
    total = tl.sum(tl.reshape(weighted, [BLOCK_TOP_K, BLOCK_N]), axis=0)  # [BLOCK_N]
    output = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = output < HIDDEN_SIZE
    if HAS_RESIDUAL:
        residual = tl.load(residual_ptr + token * residual_stride + output, mask=mask, other=0.0)
        total += residual.to(tl.float32)
    tl.store(out_ptr + token * HIDDEN_SIZE + output, total.to(dtype), mask=mask)


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
    block_n = min(max(_MAX_PROGRAM_WEIGHTS // (2 * next_power_of_2(hidden_size)), 1), next_power_of_2(inner_size))
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
        num_warps=_GATE_UP_WARPS,
        num_stages=1,
        **_groups(gate_up),
        **gate_up.arguments(),
        **pdl_options(x.device),
    )
    block_top_k = next_power_of_2(routing.top_k)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)  # [num_tokens, hidden_size]
    _quantized_down_kernel[(-(-hidden_size // _DOWN_BLOCK_N), num_tokens)](
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
        BLOCK_N=_DOWN_BLOCK_N,
        num_warps=_DOWN_WARPS,
        num_stages=1,
        **_groups(down),
        **down.arguments(),
        **pdl_options(x.device),
    )
    return out
