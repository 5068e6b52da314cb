"""The MLP of a mixture of experts: each token's experts, weighted and added up."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from nanovllm.kernels.chosen_experts import MAX_FEW_TOKENS, chosen_experts
from nanovllm.kernels.expert_matrices import ExpertMatrices
from nanovllm.kernels.expert_routing import Routing
from nanovllm.kernels.grouped_experts import grouped_experts
from nanovllm.kernels.rms_norm import rms_norm_reference
from nanovllm.kernels.silu_and_mul import silu_and_mul_reference
from nanovllm.kernels.triton_support import runs_triton


def experts_mlp_reference(
    x: torch.Tensor,
    gate_up: torch.Tensor | ExpertMatrices,
    down: torch.Tensor | ExpertMatrices,
    routing: Routing,
    residual: torch.Tensor | None = None,
    *,
    norm_weight: torch.Tensor | None = None,
    eps: float = 0.0,
) -> torch.Tensor:
    """Reference for `experts_mlp` and `quantized_experts_mlp` in plain torch; also used on CPUs."""
    if norm_weight is not None:
        x = rms_norm_reference(x, norm_weight, eps)
    expert_ids, pairs = routing.topk_ids.flatten().sort(stable=True)  # [num_pairs]
    rows = x[pairs // routing.top_k]  # [num_pairs, hidden_size], sorted by expert
    counts: list[int] = torch.bincount(expert_ids, minlength=routing.num_experts).tolist()
    outputs = torch.empty_like(rows)  # [num_pairs, hidden_size], in the order of the pairs
    for expert, (some, of) in enumerate(zip(rows.split(counts), pairs.split(counts), strict=True)):
        if len(some):
            inner = silu_and_mul_reference(F.linear(some, gate_up[expert].to(x.dtype)))
            outputs[of] = F.linear(inner, down[expert].to(x.dtype))
    weighted = outputs.view(-1, routing.top_k, x.shape[1]).float() * routing.topk_weights.unsqueeze(-1)
    out = weighted.sum(dim=1)  # [num_tokens, hidden_size]
    return (out if residual is None else out + residual.float()).to(x.dtype)


def experts_mlp(
    x: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    routing: Routing,
    residual: torch.Tensor | None = None,
    *,
    norm_weight: torch.Tensor | None = None,
    eps: float = 0.0,
    use_triton: bool | None = None,
) -> torch.Tensor:
    """Returns Σ weight · down(silu(gate(x)) · up(x)) over each token's experts, + residual.

    x, residual [num_tokens, hidden_size]; gate_up [num_experts, 2 · inner_size, hidden_size], the gate first; down
    [num_experts, hidden_size, inner_size]; both contiguous. norm_weight [hidden_size]: x is RMS-normed with it and
    `eps` first; for few tokens only. → [num_tokens, hidden_size].
    """
    if not runs_triton(x, use_triton):
        return experts_mlp_reference(x, gate_up, down, routing, residual, norm_weight=norm_weight, eps=eps)
    if len(x) == 0:
        return torch.empty_like(x)
    if len(x) <= MAX_FEW_TOKENS:
        return chosen_experts(x, gate_up, down, routing, residual, norm_weight=norm_weight, eps=eps)
    assert norm_weight is None
    return grouped_experts(x, gate_up, down, routing, residual)
