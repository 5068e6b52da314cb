"""The sparse block of a mixture of experts, which takes the place of a layer's dense MLP."""

from __future__ import annotations

import torch
from torch import nn

from nanovllm.experts.experts_method import Experts, ExpertsMethod
from nanovllm.kernels.expert_routing import Routing, route
from nanovllm.layers.context import LayerContext
from nanovllm.layers.layernorm import RMSNorm
from nanovllm.layers.linear_method import LinearLayer, UnquantizedLinear
from nanovllm.layers.parallel import Shard


class TopKRouter(LinearLayer):
    """Chooses `top_k` experts for each token; the same on every rank.

    renormalize: the weights of a token's experts add up to 1. The matrix is small and never quantised, because a
    small error in it chooses other experts.
    """

    def __init__(
        self, context: LayerContext, hidden_size: int, num_experts: int, *, top_k: int, renormalize: bool
    ) -> None:
        outputs: dict[str | None, Shard] = {None: Shard.whole(num_experts)}
        inputs = Shard.whole(hidden_size)
        super().__init__(outputs, inputs, method=UnquantizedLinear(), dtype=context.dtype, bias=False)
        self.top_k = top_k
        self.renormalize = renormalize

    def forward(self, hidden: torch.Tensor, norm: RMSNorm | None) -> Routing:
        """Returns the experts of hidden [num_tokens, hidden_size]. norm: hidden is normed with it; for few tokens."""
        if self.method.fuses(self, hidden):
            logits = self.method.multiply_fused(self, hidden, norm=norm)  # [num_tokens, num_experts]
        else:
            logits = self.method.multiply(self, hidden)
        return route(logits, self.top_k, self.renormalize)


class SparseMoeBlock(nn.Module):
    """A router, and the experts that it chooses from."""

    def __init__(
        self,
        context: LayerContext,
        method: ExpertsMethod,
        hidden_size: int,
        *,
        num_experts: int,
        top_k: int,
        intermediate_size: int,
        renormalize: bool,
    ) -> None:
        super().__init__()
        self.parallel = context.parallel
        self.gate = TopKRouter(context, hidden_size, num_experts, top_k=top_k, renormalize=renormalize)
        inner = context.parallel.shard("moe_intermediate_size", intermediate_size)
        self.experts = Experts(num_experts, hidden_size, inner, method=method, dtype=context.dtype)

    def forward(
        self, hidden: torch.Tensor, residual: torch.Tensor | None, norm: RMSNorm
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Returns the residual stream with the experts' result added to it, and None: [num_tokens, hidden_size]."""
        fuses = self.gate.method.fuses(self.gate, hidden) and self.experts.method.fuses(self.experts, hidden)
        folded = norm if fuses and residual is None else None
        normed, stream = norm(hidden, residual) if folded is None else (hidden, hidden)
        routing = self.gate(normed, folded)
        if self.parallel.size == 1:
            return self.experts(normed, routing, stream, folded), None
        return self.parallel.all_reduce(self.experts(normed, routing, None, folded), stream), None
