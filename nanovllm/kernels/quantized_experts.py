"""The MLP of a mixture of experts whose weights have 8 or 4 bits."""

from __future__ import annotations

import torch

from nanovllm.kernels.chosen_experts import MAX_FEW_TOKENS
from nanovllm.kernels.expert_matrices import ExpertMatrices
from nanovllm.kernels.expert_routing import Routing
from nanovllm.kernels.experts import experts_mlp_reference
from nanovllm.kernels.quantized_chosen_experts import quantized_chosen_experts
from nanovllm.kernels.quantized_grouped_experts import quantized_grouped_experts
from nanovllm.kernels.triton_support import runs_triton


def quantized_experts_mlp(
    x: torch.Tensor,
    gate_up: ExpertMatrices,
    down: ExpertMatrices,
    routing: Routing,
    residual: torch.Tensor | None = None,
    *,
    norm_weight: torch.Tensor | None = None,
    eps: float = 0.0,
    use_triton: bool | None = None,
) -> torch.Tensor:
    """Returns what `kernels.experts.experts_mlp` returns for the weights that gate_up and down stand for.

    Activations stay in x's dtype. The reference, which also runs on CPUs, converts the weights of one chosen expert
    after another.
    """
    if not runs_triton(x, use_triton):
        return experts_mlp_reference(x, gate_up, down, routing, residual, norm_weight=norm_weight, eps=eps)
    if len(x) == 0:
        return torch.empty_like(x)
    if len(x) <= MAX_FEW_TOKENS:
        return quantized_chosen_experts(x, gate_up, down, routing, residual, norm_weight=norm_weight, eps=eps)
    assert norm_weight is None
    return quantized_grouped_experts(x, gate_up, down, routing, residual)
