"""How the weight of a linear layer is stored, loaded and multiplied.

A layer of `layers.linear` knows which outputs and inputs of the model's matrices are on its rank, and what
surrounds the product: the norm, the gate, the residual stream, the collectives. Its `LinearMethod` does the rest, so a
quantisation scheme is one class with these methods and needs no change in a layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from nanovllm.kernels.fused_linear import fused_linear, suits_fused_linear
from nanovllm.kernels.linear import linear, pack_weight
from nanovllm.layers.layernorm import RMSNorm, norm_arguments
from nanovllm.layers.parallel import Shard
from nanovllm.layers.parameter import WeightPart, empty_parameter


@dataclass(frozen=True)
class Piece:
    """Outputs of one checkpoint matrix; they are rows `row`, `row + 1`, … of a layer's weight."""

    name: str | None  # the matrix's module in the checkpoint, a sibling of the layer; None: the layer itself
    outputs: Shard
    row: int

    def source(self, prefix: str) -> str:
        """Returns the full name of the checkpoint's module, for the layer named `prefix`."""
        return prefix if self.name is None else f"{prefix.rpartition('.')[0]}.{self.name}".removeprefix(".")


class LinearLayer(nn.Module):
    """A product hidden · weightᵀ + bias. The layer owns the bias; `method` owns the parameters of the weight.

    The weight stacks the outputs of one or several checkpoint matrices (`pieces`), which share their inputs. A layer is
    sharded across the ranks either by outputs or by inputs.
    """

    weight: nn.Parameter  # created by UnquantizedLinear; other methods may create other parameters

    def __init__(
        self,
        outputs: Mapping[str | None, Shard],
        inputs: Shard,
        *,
        method: LinearMethod,
        dtype: torch.dtype,
        bias: bool,
    ) -> None:
        super().__init__()
        pieces: list[Piece] = []
        num_outputs = 0
        for name, shard in outputs.items():
            pieces.append(Piece(name, shard, num_outputs))
            num_outputs += shard.size
        self.pieces = tuple(pieces)
        self.inputs = inputs
        self.num_outputs = num_outputs  # on this rank
        self.dtype = dtype
        self.method = method
        method.create_weights(self)
        self.bias = empty_parameter(num_outputs, dtype=dtype) if bias else None

    def weight_parts(self, prefix: str) -> Mapping[str, Sequence[WeightPart]]:
        parts = dict(self.method.weight_parts(self, prefix))
        if self.bias is not None:
            parts[f"{prefix}.bias"] = [
                WeightPart(
                    f"{piece.source(prefix)}.bias",
                    shape=(piece.outputs.total,),
                    start=piece.outputs.start,
                    stop=piece.outputs.stop,
                    row=piece.row,
                )
                for piece in self.pieces
            ]
        return parts


class LinearMethod(Protocol):
    """A way to store, load and multiply the weight of a linear layer.

    One object may serve many layers: what belongs to a layer is stored in that layer's parameters. A layer's
    `method` is chosen while the model is on the meta device, where parameters cost nothing.
    """

    def create_weights(self, layer: LinearLayer) -> None:
        """Adds the parameters of the weight, without memory, to the layer; called when it is built."""
        ...

    def weight_parts(self, layer: LinearLayer, prefix: str) -> Mapping[str, Sequence[WeightPart]]:
        """Returns which tensors of the checkpoint fill the parameters that `create_weights` added."""
        ...

    def finish_loading(self, layer: LinearLayer) -> None:
        """Converts the loaded parameters to the layout that `multiply` reads; may replace them."""
        ...

    def fuses(self, layer: LinearLayer, hidden: torch.Tensor, *, gated: bool = False, only_adds: bool = False) -> bool:
        """Returns whether `multiply_fused` is faster than separate kernels. False: the layer calls `multiply` alone.

        hidden [num_tokens, inputs of this rank]. gated: as in `multiply_fused`. only_adds: all that follows is an
        addition: there is a residual, and neither a bias nor a sum over ranks comes before it.
        """
        ...

    def multiply(self, layer: LinearLayer, hidden: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Returns hidden · weightᵀ + bias [num_tokens, layer.num_outputs]."""
        ...

    def multiply_fused(
        self,
        layer: LinearLayer,
        hidden: torch.Tensor,
        bias: torch.Tensor | None = None,
        *,
        norm: RMSNorm | None = None,
        gated: bool = False,
        residual: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Returns act(norm(hidden) · weightᵀ + bias) + residual. Called only where `fuses` says so.

        gated: the outputs are gates followed by as many ups, and act is silu(gate) · up; otherwise act does nothing.
        → [num_tokens, layer.num_outputs, or half as many if gated]. It may overwrite residual.
        """
        ...


class HasWeight(Protocol):
    """A module with a plain weight, which `UnquantizedLinear` multiplies by: a linear layer or the vocabulary table."""

    weight: nn.Parameter  # [outputs, inputs]


class UnquantizedLinear:
    """Stores the weight unquantised: [num_outputs, inputs] in the model's dtype.

    For the tokens of a decode step on a GPU it uses our own kernels, which fuse gate, addition and, for a few tokens,
    the norm. For more tokens it uses the BLAS, but fuses the gate of more than a thousand tokens, and stores the
    addition of more than four thousand in the residual's place. On a CPU, float32 weights are packed for oneDNN.
    """

    def create_weights(self, layer: LinearLayer) -> None:
        layer.weight = empty_parameter(layer.num_outputs, layer.inputs.size, dtype=layer.dtype)

    def weight_parts(self, layer: LinearLayer, prefix: str) -> Mapping[str, Sequence[WeightPart]]:
        parts = []
        for piece in layer.pieces:
            dim, shard = (1, layer.inputs) if layer.inputs.is_cut else (0, piece.outputs)
            parts.append(
                WeightPart(
                    f"{piece.source(prefix)}.weight",
                    shape=(piece.outputs.total, layer.inputs.total),
                    dim=dim,
                    start=shard.start,
                    stop=shard.stop,
                    row=piece.row,
                )
            )
        return {f"{prefix}.weight": parts}

    def finish_loading(self, layer: LinearLayer) -> None:
        packed = pack_weight(layer.weight)
        if packed is not layer.weight:
            layer.weight = nn.Parameter(packed, requires_grad=False)

    def fuses(self, layer: HasWeight, hidden: torch.Tensor, *, gated: bool = False, only_adds: bool = False) -> bool:
        return suits_fused_linear(hidden, layer.weight, gated=gated, only_adds=only_adds)

    def multiply(self, layer: HasWeight, hidden: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return linear(hidden, layer.weight, bias)

    def multiply_fused(
        self,
        layer: HasWeight,
        hidden: torch.Tensor,
        bias: torch.Tensor | None = None,
        *,
        norm: RMSNorm | None = None,
        gated: bool = False,
        residual: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return fused_linear(hidden, layer.weight, bias, gated=gated, residual=residual, **norm_arguments(norm))


def finish_loading(model: nn.Module) -> None:
    """Converts the weights of a loaded model's linear layers to the layouts that their methods multiply fastest."""
    for module in model.modules():
        if isinstance(module, LinearLayer):
            module.method.finish_loading(module)
