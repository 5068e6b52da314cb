"""How the weights of experts are stored, loaded and multiplied.

`experts.sparse_moe` knows the shapes of the model's matrices and the part of them that is on its rank. The
`ExpertsMethod` does the rest, as `layers.linear_method.LinearMethod` does for linear layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import nn

from nanovllm.kernels.chosen_experts import suits_chosen_experts
from nanovllm.kernels.expert_routing import Routing
from nanovllm.kernels.experts import experts_mlp
from nanovllm.layers.layernorm import RMSNorm, norm_arguments
from nanovllm.layers.parallel import Shard
from nanovllm.layers.parameter import WeightPart, empty_parameter


class Experts(nn.Module):
    """The gated MLPs of a layer's experts, all of one shape. `method` owns the parameters.

    Each expert is cut across the ranks by its inner size: a rank's results are summands of the result.
    """

    gate_up_proj: nn.Parameter  # created by UnquantizedExperts; other methods may create other parameters
    down_proj: nn.Parameter

    def __init__(
        self, num_experts: int, hidden_size: int, inner: Shard, *, method: ExpertsMethod, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.hidden_size = hidden_size
        self.inner = inner
        self.dtype = dtype
        self.method = method
        method.create_weights(self)

    def weight_parts(self, prefix: str) -> Mapping[str, Sequence[WeightPart]]:
        return self.method.weight_parts(self, prefix)

    def forward(
        self,
        hidden: torch.Tensor,
        routing: Routing,
        residual: torch.Tensor | None = None,
        norm: RMSNorm | None = None,
    ) -> torch.Tensor:
        """Returns the weighted sum of each token's experts, plus residual: [num_tokens, hidden_size] each."""
        return self.method.multiply(self, hidden, routing, residual=residual, norm=norm)


class ExpertsMethod(Protocol):
    """A way to store, load and multiply the weights of experts. One object may serve many layers."""

    def create_weights(self, layer: Experts) -> None:
        """Adds the parameters of the weights, without memory, to the layer; called when it is built."""
        ...

    def weight_parts(self, layer: Experts, prefix: str) -> Mapping[str, Sequence[WeightPart]]:
        """Returns which tensors of the checkpoint fill the parameters that `create_weights` added."""
        ...

    def finish_loading(self, layer: Experts) -> None:
        """Converts the loaded parameters to the layout that `multiply` reads; may replace them."""
        ...

    def fuses(self, layer: Experts, hidden: torch.Tensor) -> bool:
        """Returns whether `multiply` takes a norm. False: the layer norms first."""
        ...

    def multiply(
        self,
        layer: Experts,
        hidden: torch.Tensor,
        routing: Routing,
        *,
        residual: torch.Tensor | None = None,
        norm: RMSNorm | None = None,
    ) -> torch.Tensor:
        """Returns Σ weight · down(silu(gate(x)) · up(x)) over each token's experts, + residual. x is norm(hidden)."""
        ...


class UnquantizedExperts:
    """Stores the weights unquantised, in the model's dtype.

    Rows of `gate_up_proj` are the gates of expert 0, its ups, the gates of expert 1 and so on; those of `down_proj` are
    the outputs of expert 0, of expert 1 and so on.
    """

    def create_weights(self, layer: Experts) -> None:
        num_experts, hidden_size, inner_size = layer.num_experts, layer.hidden_size, layer.inner.size
        layer.gate_up_proj = empty_parameter(num_experts * 2 * inner_size, hidden_size, dtype=layer.dtype)
        layer.down_proj = empty_parameter(num_experts * hidden_size, inner_size, dtype=layer.dtype)

    def weight_parts(self, layer: Experts, prefix: str) -> Mapping[str, Sequence[WeightPart]]:
        inner, hidden_size = layer.inner, layer.hidden_size
        gate_up, down = [], []
        for expert in range(layer.num_experts):
            name = f"{prefix}.{expert}"
            for index, matrix in enumerate(("gate_proj", "up_proj")):
                row = (2 * expert + index) * inner.size
                shape = (inner.total, hidden_size)
                gate_up.append(WeightPart(f"{name}.{matrix}.weight", shape, 0, inner.start, inner.stop, row))
            shape = (hidden_size, inner.total)
            down.append(WeightPart(f"{name}.down_proj.weight", shape, 1, inner.start, inner.stop, expert * hidden_size))
        return {f"{prefix}.gate_up_proj": gate_up, f"{prefix}.down_proj": down}

    def finish_loading(self, layer: Experts) -> None:
        """Nothing is to be converted."""

    def fuses(self, layer: Experts, hidden: torch.Tensor) -> bool:
        return suits_chosen_experts(hidden)

    def multiply(
        self,
        layer: Experts,
        hidden: torch.Tensor,
        routing: Routing,
        *,
        residual: torch.Tensor | None = None,
        norm: RMSNorm | None = None,
    ) -> torch.Tensor:
        num_experts, hidden_size, inner_size = layer.num_experts, layer.hidden_size, layer.inner.size
        gate_up = layer.gate_up_proj.view(num_experts, 2 * inner_size, hidden_size)
        down = layer.down_proj.view(num_experts, hidden_size, inner_size)
        return experts_mlp(hidden, gate_up, down, routing, residual, **norm_arguments(norm))


def finish_loading_experts(model: nn.Module) -> None:
    """Converts the weights of a loaded model's experts to the layouts that their methods multiply fastest."""
    for module in model.modules():
        if isinstance(module, Experts):
            module.method.finish_loading(module)
