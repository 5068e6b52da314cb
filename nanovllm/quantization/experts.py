"""QuantizedExperts: the experts method of every scheme. DequantizedExperts: for parts that no scheme can keep.

Each expert has two stacks of matrices, gate and up, and down. A linear method keeps each as the weight of a layer; the
parameters of `Experts` are those of such layers, with a dimension of experts in front.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import nn

from nanovllm.experts.experts_method import Experts, UnquantizedExperts
from nanovllm.kernels.chosen_experts import suits_chosen_experts
from nanovllm.kernels.expert_matrices import ExpertMatrices
from nanovllm.kernels.expert_routing import Routing
from nanovllm.kernels.quantized_experts import quantized_experts_mlp
from nanovllm.layers.layernorm import RMSNorm, norm_arguments
from nanovllm.layers.linear_method import LinearLayer, LinearMethod, UnquantizedLinear
from nanovllm.layers.parallel import Shard
from nanovllm.layers.parameter import WeightPart, empty_parameter
from nanovllm.quantization.linear import DequantizedLinear, QuantizedLinear, matrix_parts
from nanovllm.quantization.matrix import Format, MatrixPart

_STACKS: Mapping[str, Sequence[str]] = {"gate_up": ("gate_proj", "up_proj"), "down": ("down_proj",)}


def expert_layer(experts: Experts, stack: str, method: LinearMethod) -> LinearLayer:
    """Returns a stack of one expert's matrices as a layer, without memory."""
    hidden, inner = Shard.whole(experts.hidden_size), experts.inner
    outputs, inputs = (hidden, inner) if stack == "down" else (inner, hidden)
    pieces: dict[str | None, Shard] = dict.fromkeys(_STACKS[stack], outputs)
    return LinearLayer(pieces, inputs, method=method, dtype=experts.dtype, bias=False)


def expert_parts(experts: Experts, prefix: str) -> list[dict[str, list[MatrixPart]]]:
    """Returns this rank's part of each checkpoint matrix of each expert, by stack."""
    layers = {stack: expert_layer(experts, stack, UnquantizedLinear()) for stack in _STACKS}
    return [
        {stack: matrix_parts(layer, f"{prefix}.{expert}.{stack}") for stack, layer in layers.items()}
        for expert in range(experts.num_experts)
    ]


def quantized_experts(experts: Experts, form: Format) -> QuantizedExperts | None:
    """Returns the method that keeps experts of this format; None if there is none for this rank's part of them."""
    methods: dict[str, QuantizedLinear] = {}
    for stack in _STACKS:
        method = form.expert_method(expert_layer(experts, stack, UnquantizedLinear()))
        if not isinstance(method, QuantizedLinear):
            return None
        methods[stack] = method
    return QuantizedExperts(methods)


class QuantizedExperts:
    """Keeps the weights quantised. Activations of the product are in the model's dtype.

    Parameters: those of `methods`, such as `gate_up_weight` and `gate_up_weight_scale`.
    """

    def __init__(self, methods: Mapping[str, QuantizedLinear]) -> None:
        """methods: of each stack."""
        self.methods = methods
        self.kept_as = methods["down"].kept_as

    def create_weights(self, layer: Experts) -> None:
        for stack, method in self.methods.items():
            for name, parameter in expert_layer(layer, stack, method).named_parameters():
                stacked = empty_parameter(layer.num_experts, *parameter.shape, dtype=parameter.dtype)
                layer.register_parameter(f"{stack}_{name}", stacked)

    def weight_parts(self, layer: Experts, prefix: str) -> Mapping[str, Sequence[WeightPart]]:
        return {}  # no parameter is a copy of a checkpoint tensor

    def layers(self, experts: Experts, prefix: str) -> Iterator[tuple[str, LinearLayer]]:
        for stack, method in self.methods.items():
            layer = expert_layer(experts, stack, method)
            stacked = {name: experts.get_parameter(f"{stack}_{name}") for name, _ in layer.named_parameters()}
            for expert in range(experts.num_experts):
                for name, parameter in stacked.items():
                    setattr(layer, name, nn.Parameter(parameter[expert], requires_grad=False))
                yield f"{prefix}.{expert}.{stack}", layer

    def finish_loading(self, layer: Experts) -> None:
        """The weights are in their final layout already."""

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
        gate_up, down = self.matrices(layer, "gate_up"), self.matrices(layer, "down")
        return quantized_experts_mlp(hidden, gate_up, down, routing, residual, **norm_arguments(norm))

    def matrices(self, layer: Experts, stack: str) -> ExpertMatrices:
        """Returns a stack of every expert, as the product takes it."""
        method = self.methods[stack]
        num_inputs = layer.inner.size if stack == "down" else layer.hidden_size
        rows, columns = (dim + 1 for dim in method.scale_dims)
        weight, scale = (getattr(layer, f"{stack}_{name}") for name in ("weight", "weight_scale"))
        zeros: torch.Tensor | None = getattr(layer, f"{stack}_weight_zeros", None)
        return ExpertMatrices(
            weight=weight,
            scale=scale.permute(0, rows, columns),
            zeros=None if zeros is None else zeros.permute(0, rows, columns),
            num_inputs=num_inputs,
            block=method.block(num_inputs),
            num_pieces=len(_STACKS[stack]),
        )


class DequantizedExperts(UnquantizedExperts):
    """Keeps the weights in the model's dtype: for experts of several formats, and for parts that no scheme can keep."""

    def __init__(self, formats: Sequence[Mapping[str, Sequence[Format]]]) -> None:
        """formats: of each expert's matrices, by stack."""
        self.formats = formats

    def weight_parts(self, layer: Experts, prefix: str) -> Mapping[str, Sequence[WeightPart]]:
        return {}

    def layers(self, experts: Experts, prefix: str) -> Iterator[tuple[str, LinearLayer]]:
        for stack in _STACKS:
            stacked = experts.get_parameter(f"{stack}_proj").unflatten(0, (experts.num_experts, -1))
            for expert, formats in enumerate(self.formats):
                layer = expert_layer(experts, stack, DequantizedLinear(formats[stack]))
                layer.weight = nn.Parameter(stacked[expert], requires_grad=False)
                yield f"{prefix}.{expert}.{stack}", layer
