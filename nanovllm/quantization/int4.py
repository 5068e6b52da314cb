"""INT4 weights: integers from 0 to 15 with a scale, and a zero point where there is one, for each group of inputs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import torch

from nanovllm.kernels.quantized_linear import int4_linear, pack_int4
from nanovllm.layers.linear_method import LinearLayer
from nanovllm.layers.parameter import empty_parameter
from nanovllm.quantization.linear import QuantizedLinear
from nanovllm.quantization.matrix import Format, QuantizedMatrix

MIN_GROUP = 32  # inputs
WHOLE_ROW = -1  # one group of all inputs
_GROUP = 128  # of weights that are made here
_LARGEST = 15


class Int4Linear(QuantizedLinear):
    """Parameters: `weight` as `pack_int4` makes it, `weight_scale` [groups, outputs], and `weight_zeros` unless all
    are 8.

    group_size: inputs that share a scale. is_permuted: groups are not neighbouring inputs; the buffer `input_order`
    says which input each column of the weight belongs to.
    """

    kept_as = "int4"

    def __init__(
        self, formats: Sequence[Format], group_size: int, *, has_zeros: bool, is_permuted: bool = False
    ) -> None:
        super().__init__(formats)
        self.group_size = group_size
        self.has_zeros = has_zeros
        self.is_permuted = is_permuted

    def create_weights(self, layer: LinearLayer) -> None:
        outputs, inputs = layer.num_outputs, layer.inputs.size
        packed = pack_int4(torch.empty(outputs, inputs, dtype=torch.int8, device="meta"))
        layer.weight = empty_parameter(*packed.shape, dtype=packed.dtype)
        shape = (1 if self.group_size == WHOLE_ROW else inputs // self.group_size, outputs)
        layer.weight_scale = empty_parameter(*shape, dtype=torch.float32)
        zeros = empty_parameter(*shape, dtype=torch.float32) if self.has_zeros else None
        layer.register_parameter("weight_zeros", zeros)

    def quantize(self, weight: torch.Tensor) -> QuantizedMatrix:
        """Returns integers of which 0 and 15 are the smallest and the largest value of a group."""
        weight = weight.float()
        outputs, inputs = weight.shape
        size = inputs if self.group_size == WHOLE_ROW else self.group_size
        groups = weight.view(outputs, -1, size)
        if self.has_zeros:
            low, high = groups.amin(-1).clamp_(max=0), groups.amax(-1).clamp_(min=0)  # [outputs, groups]
            scale = _nonzero((high - low) / _LARGEST)
            zeros = (-low / scale).round_()
        else:
            scale = _nonzero(groups.abs().amax(-1) / 7)
            zeros = torch.full_like(scale, 8.0)
        values = ((groups / scale.unsqueeze(-1)).round_() + zeros.unsqueeze(-1)).clamp_(0, _LARGEST)
        return QuantizedMatrix(values.flatten(1).to(torch.int8), scale, (1, size), zeros.to(torch.uint8))

    def fill(self, layer: LinearLayer, matrices: Sequence[QuantizedMatrix]) -> None:
        layer.weight.copy_(pack_int4(torch.cat([each.values for each in matrices])))
        cast(torch.Tensor, layer.weight_scale).copy_(torch.cat([each.scale for each in matrices]).T)
        if self.has_zeros:
            zeros = torch.cat([cast(torch.Tensor, each.zeros) for each in matrices])
            cast(torch.Tensor, layer.weight_zeros).copy_(zeros.T)

    def product(
        self, layer: LinearLayer, hidden: torch.Tensor, bias: torch.Tensor | None, **fused: Any
    ) -> torch.Tensor:
        scale, zeros = cast(torch.Tensor, layer.weight_scale), cast("torch.Tensor | None", layer.weight_zeros)
        zeros = None if zeros is None else zeros.T
        return int4_linear(hidden, layer.weight, scale.T, zeros, bias, group_size=self.group_size, **fused)


def make_int4(layer: LinearLayer, formats: Sequence[Format]) -> Int4Linear:
    """Returns the method of a layer whose unquantised weight becomes INT4: groups of 128, or what the inputs allow."""
    size = math.gcd(layer.inputs.size, _GROUP)
    return Int4Linear(formats, size if size >= MIN_GROUP else WHOLE_ROW, has_zeros=True)


def _nonzero(scale: torch.Tensor) -> torch.Tensor:
    return torch.where(scale == 0, 1.0, scale)
