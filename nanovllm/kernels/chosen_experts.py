"""The experts' MLP for few tokens: each token's experts are multiplied on their own, and no other weights are read.

Two launches: norm, gate and up with SiLU for every pair of a token and an expert, then down with the weighted sum over
the token's experts and the addition to the residual stream. The second one loads its weights before the first one has
ended. Programs are shaped as those of `kernels.skinny_linear`.
"""

from __future__ import annotations

import torch

from nanovllm.kernels.expert_routing import Routing
from nanovllm.kernels.triton_support import (
    HAS_TRITON,
    jit,
    let_next_kernel_start,
    next_power_of_2,
    pdl_options,
    tl,
    wait_for_previous_kernel,
)

MAX_FEW_TOKENS = 4  # with more, several tokens choose the same expert
_MAX_PROGRAM_WEIGHTS = 4096  # of a gated program
_DOWN_BLOCK_N = 1  # outputs of a program of the down product
_GATE_UP_WARPS, _DOWN_WARPS = 4, 4
_MAX_WEIGHTS_OF_A_WARP = 2048


@jit
def _gate_up_kernel(
    x_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    norm_weight_ptr: tl.tensor,
    topk_ids_ptr: tl.tensor,
    out_ptr: tl.tensor,
    x_stride: tl.tensor,
    eps: tl.tensor,
    HAS_NORM: tl.constexpr,
    TOP_K: tl.constexpr,
    HIDDEN_SIZE: tl.constexpr,
    INNER_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """Program (outputs, pair)."""
    wait_for_previous_kernel(PDL)
    let_next_kernel_start(PDL)  # after the wait: the next kernel may read what the kernel before this one wrote
    pair = tl.program_id(1).to(tl.int64)
    expert = tl.load(topk_ids_ptr + pair).to(tl.int64)
    output = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    column = tl.arange(0, BLOCK_K)
    mask = (output < INNER_SIZE)[:, None] & (column < HIDDEN_SIZE)[None, :]
    weight_ptrs = weight_ptr + (expert * (2 * INNER_SIZE) + output)[:, None] * HIDDEN_SIZE + column[None, :]
    gate_weight = tl.load(weight_ptrs, mask=mask, other=0.0).to(tl.float32)
    up_weight = tl.load(weight_ptrs + INNER_SIZE * HIDDEN_SIZE, mask=mask, other=0.0).to(tl.float32)
    x_ptrs = x_ptr + pair // TOP_K * x_stride + column
    x = tl.load(x_ptrs, mask=column < HIDDEN_SIZE, other=0.0).to(tl.float32)  # [BLOCK_K]
    scale = 1.0
    if HAS_NORM:  # as in `kernels.skinny_linear`, the division comes after the product
        scale = 1.0 / tl.sqrt(tl.sum(x * x, axis=0) / HIDDEN_SIZE + eps)
        x = x * tl.load(norm_weight_ptr + column, mask=column < HIDDEN_SIZE, other=0.0).to(tl.float32)
    gate = tl.sum(x[None, :] * gate_weight, axis=1) * scale  # [BLOCK_N]
    up = tl.sum(x[None, :] * up_weight, axis=1) * scale
    out = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out_ptr + pair * INNER_SIZE + output, out.to(out_ptr.dtype.element_ty), mask=output < INNER_SIZE)


@jit
def _down_kernel(
    inner_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    topk_ids_ptr: tl.tensor,
    topk_weights_ptr: tl.tensor,
    residual_ptr: tl.tensor,
    out_ptr: tl.tensor,
    residual_stride: tl.tensor,
    HAS_RESIDUAL: tl.constexpr,
    TOP_K: tl.constexpr,
    HIDDEN_SIZE: tl.constexpr,
    INNER_SIZE: tl.constexpr,
    BLOCK_TOP_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """Program (outputs, token): the rows of its tile are the token's choices, each with BLOCK_N outputs."""
    let_next_kernel_start(PDL)
    token = tl.program_id(1).to(tl.int64)
    row = tl.arange(0, BLOCK_TOP_K * BLOCK_N)
    choice = row // BLOCK_N
    output = tl.program_id(0) * BLOCK_N + row % BLOCK_N
    pair = token * TOP_K + choice
    column = tl.arange(0, BLOCK_K)
    mask = ((choice < TOP_K) & (output < HIDDEN_SIZE))[:, None] & (column < INNER_SIZE)[None, :]
    # The kernel ahead began after these were written. They are read past the first-level cache, which may be older.
    expert = tl.load(topk_ids_ptr + pair, mask=choice < TOP_K, other=0, cache_modifier=".cg").to(tl.int64)
    weight_ptrs = weight_ptr + (expert * HIDDEN_SIZE + output)[:, None] * INNER_SIZE + column[None, :]
    weight = tl.load(weight_ptrs, mask=mask, other=0.0)
    wait_for_previous_kernel(PDL)
    inner = tl.load(inner_ptr + pair[:, None] * INNER_SIZE + column[None, :], mask=mask, other=0.0)
    out = tl.sum(weight.to(tl.float32) * inner.to(tl.float32), axis=1)
    out *= tl.load(topk_weights_ptr + pair, mask=choice < TOP_K, other=0.0)
    out = tl.sum(tl.reshape(out, [BLOCK_TOP_K, BLOCK_N]), axis=0)
    output = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = output < HIDDEN_SIZE
    if HAS_RESIDUAL:
        out += tl.load(residual_ptr + token * residual_stride + output, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + token * HIDDEN_SIZE + output, out.to(out_ptr.dtype.element_ty), mask=mask)


def suits_chosen_experts(x: torch.Tensor) -> bool:
    """Returns whether `chosen_experts` is the faster one for x [num_tokens, hidden_size]: few tokens, on a GPU."""
    return HAS_TRITON and x.is_cuda and len(x) <= MAX_FEW_TOKENS


def chosen_experts(
    x: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    routing: Routing,
    residual: torch.Tensor | None = None,
    *,
    norm_weight: torch.Tensor | None = None,
    eps: float = 0.0,
) -> torch.Tensor:
    """The kernels of `kernels.experts.experts_mlp` for few tokens."""
    num_tokens, hidden_size = x.shape
    inner_size = down.shape[2]
    num_pairs = routing.topk_ids.numel()
    inner = x.new_empty(num_pairs, inner_size)  # [num_pairs, inner_size]
    block_k = next_power_of_2(hidden_size)
    block_n = min(max(_MAX_PROGRAM_WEIGHTS // (2 * block_k), 1), next_power_of_2(inner_size))
    _gate_up_kernel[(-(-inner_size // block_n), num_pairs)](
        x_ptr=x,
        weight_ptr=gate_up,
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
        BLOCK_K=block_k,
        num_warps=_GATE_UP_WARPS,
        num_stages=1,
        **pdl_options(x.device),
    )
    block_top_k, block_inner = next_power_of_2(routing.top_k), next_power_of_2(inner_size)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)  # [num_tokens, hidden_size]
    _down_kernel[(-(-hidden_size // _DOWN_BLOCK_N), num_tokens)](
        inner_ptr=inner,
        weight_ptr=down,
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
        BLOCK_K=block_inner,
        num_warps=min(max(_DOWN_WARPS, block_top_k * _DOWN_BLOCK_N * block_inner // _MAX_WEIGHTS_OF_A_WARP), 16),
        num_stages=1,
        **pdl_options(x.device),
    )
    return out
