"""INT8 weights: integers from −128 to 127 with a scale for each output."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch

from nanovllm.kernels.quantized_linear import int8_linear
from nanovllm.layers.linear_method import LinearLayer
from nanovllm.layers.parameter import empty_parameter
from nanovllm.quantization.linear import QuantizedLinear
from nanovllm.quantization.matrix import Format, QuantizedMatrix, nonzero

_LARGEST = 127


class Int8Linear(QuantizedLinear):
    """Parameters: `weight`, `weight_scale`. quantize_input: activations are INT8 too, with a scale for each token."""

    kept_as = "int8"

    def __init__(self, formats: Sequence[Format], *, quantize_input: bool = False) -> None:
        super().__init__(formats)
        self.quantize_input = quantize_input

    def create_weights(self, layer: LinearLayer) -> None:
        layer.weight = empty_parameter(layer.num_outputs, layer.inputs.size, dtype=torch.int8)
        layer.weight_scale = empty_parameter(layer.num_outputs, 1, dtype=torch.float32)

    def block(self, num_inputs: int) -> tuple[int, int]:
        return 1, num_inputs

    def quantize(self, weight: torch.Tensor) -> QuantizedMatrix:
        """Returns integers of which the largest of an output is 127."""
        weight = weight.float()
        scale = nonzero(weight.abs().amax(1, keepdim=True) / _LARGEST)  # [outputs, 1]
        return QuantizedMatrix((weight / scale).round_().to(torch.int8), scale, (1, weight.shape[1]))

    def fill(self, layer: LinearLayer, matrices: Sequence[QuantizedMatrix]) -> None:
        layer.weight.copy_(torch.cat([each.values for each in matrices]))
        cast(torch.Tensor, layer.weight_scale).copy_(torch.cat([each.scale for each in matrices]))

    def product(
        self, layer: LinearLayer, hidden: torch.Tensor, bias: torch.Tensor | None, **fused: Any
    ) -> torch.Tensor:
        weight_scale = cast(torch.Tensor, layer.weight_scale)
        return int8_linear(hidden, layer.weight, weight_scale, bias, quantize_input=self.quantize_input, **fused)
