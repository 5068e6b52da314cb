"""The experts' MLP for few tokens: each token's experts are multiplied on their own, and no other weights are read.

Two launches: gate and up with SiLU for every pair of a token and an expert, then down with the weighted sum over the
token's experts and the addition to the residual stream. Programs are shaped as those of `kernels.skinny_linear`.
"""

from __future__ import annotations

import torch

from nanovllm.kernels.expert_routing import Routing
from nanovllm.kernels.triton_support import jit, join_launch_chain, next_power_of_2, pdl_options, tl

_MAX_PROGRAM_WEIGHTS = 8192  # of a gated program
_DOWN_BLOCK_N = 1  # outputs of a program of the down product
_DOWN_BLOCK_K = 256  # inputs that it reads at a time
_NUM_WARPS = 4


@jit
def _gate_up_kernel(
    x_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    expert_ids_ptr: tl.tensor,
    out_ptr: tl.tensor,
    x_stride: tl.tensor,
    TOP_K: tl.constexpr,
    HIDDEN_SIZE: tl.constexpr,
    INNER_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """Program (outputs, pair)."""
    join_launch_chain(PDL)
    pair = tl.program_id(1).to(tl.int64)
    expert = tl.load(expert_ids_ptr + pair).to(tl.int64)
    output = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    column = tl.arange(0, BLOCK_K)
    mask = (output < INNER_SIZE)[:, None] & (column < HIDDEN_SIZE)[None, :]
    weight_ptrs = weight_ptr + (expert * (2 * INNER_SIZE) + output)[:, None] * HIDDEN_SIZE + column[None, :]
    gate_weight = tl.load(weight_ptrs, mask=mask, other=0.0).to(tl.float32)
    up_weight = tl.load(weight_ptrs + INNER_SIZE * HIDDEN_SIZE, mask=mask, other=0.0).to(tl.float32)
    x_ptrs = x_ptr + pair // TOP_K * x_stride + column
    x = tl.load(x_ptrs, mask=column < HIDDEN_SIZE, other=0.0).to(tl.float32)  # [BLOCK_K]
    gate = tl.sum(x[None, :] * gate_weight, axis=1)  # [BLOCK_N]
    up = tl.sum(x[None, :] * up_weight, axis=1)
    out = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out_ptr + pair * INNER_SIZE + output, out.to(out_ptr.dtype.element_ty), mask=output < INNER_SIZE)


@jit
def _down_kernel(
    inner_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    expert_ids_ptr: tl.tensor,
    pair_weights_ptr: tl.tensor,
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
    """Program (outputs, token): the rows of its tiles are the token's choices, each with BLOCK_N outputs."""
    join_launch_chain(PDL)
    token = tl.program_id(1).to(tl.int64)
    row = tl.arange(0, BLOCK_TOP_K * BLOCK_N)
    choice = row // BLOCK_N
    output = tl.program_id(0) * BLOCK_N + row % BLOCK_N
    row_mask = (choice < TOP_K) & (output < HIDDEN_SIZE)
    pair = token * TOP_K + choice
    expert = tl.load(expert_ids_ptr + pair, mask=choice < TOP_K, other=0).to(tl.int64)
    weight_ptrs = weight_ptr + (expert * HIDDEN_SIZE + output)[:, None] * INNER_SIZE
    out = tl.zeros([BLOCK_TOP_K * BLOCK_N], tl.float32)
    for start in tl.static_range(0, INNER_SIZE, BLOCK_K):
        column = start + tl.arange(0, BLOCK_K)
        mask = row_mask[:, None] & (column < INNER_SIZE)[None, :]
        weight = tl.load(weight_ptrs + column[None, :], mask=mask, other=0.0).to(tl.float32)
        inner = tl.load(inner_ptr + pair[:, None] * INNER_SIZE + column[None, :], mask=mask, other=0.0).to(tl.float32)
        out += tl.sum(weight * inner, axis=1)
    out *= tl.load(pair_weights_ptr + pair, mask=choice < TOP_K, other=0.0)
    out = tl.sum(tl.reshape(out, [BLOCK_TOP_K, BLOCK_N]), axis=0)
    output = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = output < HIDDEN_SIZE
    if HAS_RESIDUAL:
        out += tl.load(residual_ptr + token * residual_stride + output, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + token * HIDDEN_SIZE + output, out.to(out_ptr.dtype.element_ty), mask=mask)


def chosen_experts(
    x: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    routing: Routing,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """The kernels of `kernels.experts.experts_mlp` for few tokens."""
    num_tokens, hidden_size = x.shape
    inner_size = down.shape[2]
    num_pairs = routing.expert_ids.numel()
    inner = x.new_empty(num_pairs, inner_size)  # [num_pairs, inner_size]
    block_k = next_power_of_2(hidden_size)
    block_n = min(max(_MAX_PROGRAM_WEIGHTS // (2 * block_k), 1), next_power_of_2(inner_size))
    _gate_up_kernel[(-(-inner_size // block_n), num_pairs)](
        x_ptr=x,
        weight_ptr=gate_up,
        expert_ids_ptr=routing.expert_ids,
        out_ptr=inner,
        x_stride=x.stride(0),
        TOP_K=routing.top_k,
        HIDDEN_SIZE=hidden_size,
        INNER_SIZE=inner_size,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        num_warps=_NUM_WARPS,
        num_stages=1,
        **pdl_options(x.device),
    )
    out = torch.empty_like(x, memory_format=torch.contiguous_format)  # [num_tokens, hidden_size]
    _down_kernel[(-(-hidden_size // _DOWN_BLOCK_N), num_tokens)](
        inner_ptr=inner,
        weight_ptr=down,
        expert_ids_ptr=routing.expert_ids,
        pair_weights_ptr=routing.weights,
        residual_ptr=x if residual is None else residual,
        out_ptr=out,
        residual_stride=0 if residual is None else residual.stride(0),
        HAS_RESIDUAL=residual is not None,
        TOP_K=routing.top_k,
        HIDDEN_SIZE=hidden_size,
        INNER_SIZE=inner_size,
        BLOCK_TOP_K=next_power_of_2(routing.top_k),
        BLOCK_N=_DOWN_BLOCK_N,
        BLOCK_K=min(_DOWN_BLOCK_K, next_power_of_2(inner_size)),
        num_warps=_NUM_WARPS,
        num_stages=1,
        **pdl_options(x.device),
    )
    return out
