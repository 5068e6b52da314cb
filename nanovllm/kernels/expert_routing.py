"""The choice of experts: softmax over the router's logits, the top k, and their weights (arXiv:2101.03961).

All shapes depend on the number of tokens alone, so that a CUDA graph can hold a step whatever the router chooses.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nanovllm.kernels.triton_support import (
    jit_with_varying,
    join_launch_chain,
    next_power_of_2,
    pdl_options,
    runs_triton,
    tl,
)

_FEW_TOKENS = 1024
_BLOCK_TOKENS, _LARGE_BLOCK_TOKENS = 16, 64  # tokens of a program, for few tokens and for more
_MAX_BLOCK_LOGITS = 8192  # of a program


@dataclass(frozen=True)
class RoutingCounts:
    """What sorting by expert starts from, for each block of `block_tokens` consecutive tokens."""

    block_tokens: int
    experts: torch.Tensor  # [blocks, num_experts] int32: how many tokens of the block chose each expert
    ranks: torch.Tensor  # [num_tokens, top_k] int32: how many earlier tokens of its block chose a token's expert


@dataclass(frozen=True)
class Routing:
    """The experts of each token, the likeliest first. Of equally likely ones the lowest is first.

    A token whose logits have NaN or +inf gets the lowest experts, with NaN as weights.
    """

    topk_ids: torch.Tensor  # [num_tokens, top_k] int32
    topk_weights: torch.Tensor  # [num_tokens, top_k] float32
    num_experts: int
    counts: RoutingCounts | None = None  # None: not counted

    @property
    def num_tokens(self) -> int:
        return self.topk_ids.shape[0]

    @property
    def top_k(self) -> int:
        return self.topk_ids.shape[1]


@jit_with_varying("num_tokens")
def _route_kernel(
    logits_ptr: tl.tensor,
    topk_ids_ptr: tl.tensor,
    topk_weights_ptr: tl.tensor,
    block_counts_ptr: tl.tensor,
    ranks_ptr: tl.tensor,
    logits_stride: tl.tensor,
    num_tokens: tl.tensor,
    RENORMALIZE: tl.constexpr,
    TOP_K: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_TOP_K: tl.constexpr,
    BLOCK_EXPERTS: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """Program (block of tokens)."""
    join_launch_chain(PDL)
    block = tl.program_id(0)
    token = (block * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)).to(tl.int64)
    expert = tl.arange(0, BLOCK_EXPERTS)
    choice = tl.arange(0, BLOCK_TOP_K)
    in_batch = token < num_tokens
    is_expert = expert < NUM_EXPERTS
    row = tl.minimum(token, num_tokens - 1)  # rows past the end are computed and not stored
    logits_ptrs = logits_ptr + row[:, None] * logits_stride + expert[None, :]
    logits = tl.load(logits_ptrs, mask=is_expert[None, :], other=-float("inf")).to(tl.float32)
    exponentials = tl.exp(logits - tl.max(logits, axis=1)[:, None])
    total = tl.sum(exponentials, axis=1)  # one NaN makes it NaN
    probabilities = exponentials / total[:, None]
    probabilities = tl.where((total == total)[:, None], probabilities, 1.0)
    # Non-negative floats are in the order of their bits. Of two equal ones, the lower expert has the larger key.
    bits = probabilities.to(tl.int32, bitcast=True).to(tl.int64)
    keys = tl.where(is_expert[None, :], (bits << 32) | (BLOCK_EXPERTS - expert)[None, :], -2)
    ids = tl.zeros([BLOCK_TOKENS, BLOCK_TOP_K], tl.int32)
    weights = tl.zeros([BLOCK_TOKENS, BLOCK_TOP_K], tl.float32)
    for index in tl.static_range(TOP_K):
        best = tl.max(keys, axis=1)
        keys = tl.where(keys == best[:, None], -1, keys)
        is_choice = (choice == index)[None, :]
        ids = tl.where(is_choice, (BLOCK_EXPERTS - (best & 0x7FFFFFFF)).to(tl.int32)[:, None], ids)
        weights = tl.where(is_choice, (best >> 32).to(tl.int32).to(tl.float32, bitcast=True)[:, None], weights)
    if RENORMALIZE:
        weights = weights / tl.sum(weights, axis=1)[:, None]
    weights = tl.where((total == total)[:, None], weights, float("nan"))
    pair = token[:, None] * TOP_K + choice[None, :]
    mask = in_batch[:, None] & (choice < TOP_K)[None, :]
    tl.store(topk_ids_ptr + pair, ids, mask=mask)
    tl.store(topk_weights_ptr + pair, weights, mask=mask)
    taken = ((keys == -1) & in_batch[:, None]).to(tl.int32)
    earlier = tl.cumsum(taken, axis=0) - taken
    tl.store(ranks_ptr + pair, tl.gather(earlier, ids, axis=1), mask=mask)
    tl.store(block_counts_ptr + block * NUM_EXPERTS + expert, tl.sum(taken, axis=0), mask=is_expert)


def route_reference(logits: torch.Tensor, top_k: int, renormalize: bool) -> Routing:
    """Reference for `route` in plain torch; also used on CPUs."""
    probabilities = logits.float().softmax(dim=-1)
    weights, expert_ids = probabilities.sort(dim=-1, descending=True, stable=True)  # `topk` leaves ties open
    weights = weights[:, :top_k]
    if renormalize:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    return Routing(expert_ids[:, :top_k].to(torch.int32), weights, logits.shape[1])


def route(logits: torch.Tensor, top_k: int, renormalize: bool, *, use_triton: bool | None = None) -> Routing:
    """Returns the `top_k` likeliest experts of each token, with their probabilities as weights.

    logits [num_tokens, num_experts]. renormalize: a token's weights add up to 1.
    """
    if not runs_triton(logits, use_triton):
        return route_reference(logits, top_k, renormalize)
    num_tokens, num_experts = logits.shape
    block_experts = next_power_of_2(num_experts)
    block_tokens = _BLOCK_TOKENS if num_tokens <= _FEW_TOKENS else _LARGE_BLOCK_TOKENS
    block_tokens = min(block_tokens, next_power_of_2(max(num_tokens, 1)), max(_MAX_BLOCK_LOGITS // block_experts, 1))
    num_blocks = -(-num_tokens // block_tokens)
    device = logits.device
    topk_ids = torch.empty(num_tokens, top_k, dtype=torch.int32, device=device)  # [num_tokens, top_k]
    topk_weights = torch.empty(num_tokens, top_k, dtype=torch.float32, device=device)  # [num_tokens, top_k]
    counts = RoutingCounts(
        block_tokens,
        experts=torch.empty(num_blocks, num_experts, dtype=torch.int32, device=device),  # [num_blocks, num_experts]
        ranks=torch.empty_like(topk_ids),  # [num_tokens, top_k]
    )
    if num_tokens > 0:
        _route_kernel[(num_blocks,)](
            logits_ptr=logits,
            topk_ids_ptr=topk_ids,
            topk_weights_ptr=topk_weights,
            block_counts_ptr=counts.experts,
            ranks_ptr=counts.ranks,
            logits_stride=logits.stride(0),
            num_tokens=num_tokens,
            RENORMALIZE=renormalize,
            TOP_K=top_k,
            NUM_EXPERTS=num_experts,
            BLOCK_TOKENS=block_tokens,
            BLOCK_TOP_K=next_power_of_2(top_k),
            BLOCK_EXPERTS=block_experts,
            num_warps=1 if block_tokens * block_experts <= 256 else 4,
            **pdl_options(device),
        )
    return Routing(topk_ids, topk_weights, num_experts, counts)
