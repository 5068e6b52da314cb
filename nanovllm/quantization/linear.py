"""QuantizedLinear: the linear method of every scheme. DequantizedLinear: for parts that no scheme can keep."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from nanovllm.kernels.quantized_linear import suits_fused
from nanovllm.layers.layernorm import RMSNorm, norm_arguments
from nanovllm.layers.linear_method import LinearLayer, UnquantizedLinear
from nanovllm.layers.parameter import WeightPart
from nanovllm.quantization.matrix import DenseMatrix, Format, Matrix, MatrixPart, QuantizedMatrix
from nanovllm.utils.loader import Source


class _FromFormats:
    """Reads the matrices of a layer, each in its format."""

    def __init__(self, formats: Sequence[Format]) -> None:
        """formats: of each piece of the layer."""
        self.formats = tuple(formats)

    def sources(self, layer: LinearLayer, prefix: str) -> list[Source]:
        parts = zip(self.formats, matrix_parts(layer, prefix), strict=True)
        sources = [source for form, part in parts for source in form.sources(part)]
        return [each for each in sources if layer.bias is None or not each.name.endswith(".bias")]

    def read(self, layer: LinearLayer, prefix: str, tensors: Mapping[str, torch.Tensor]) -> list[Matrix]:
        parts = zip(self.formats, matrix_parts(layer, prefix), strict=True)
        return [form.read(part, tensors) for form, part in parts]

    def empty_unquantized(self, layer: LinearLayer) -> torch.Tensor:
        shape = (layer.num_outputs, layer.inputs.size)
        return torch.empty(shape, dtype=layer.dtype, device=layer.weight.device)


def matrix_parts(layer: LinearLayer, prefix: str) -> list[MatrixPart]:
    """Returns this rank's part of each checkpoint matrix of a layer."""
    return [MatrixPart(piece.source(prefix), piece.outputs, layer.inputs) for piece in layer.pieces]


class QuantizedLinear(_FromFormats, ABC):
    """A linear method that keeps the weight quantised."""

    kept_as: str  # "fp8", "int8" or "int4"
    scale_dims = (0, 1)  # of weight_scale: those that count blocks of outputs, and blocks of inputs

    @abstractmethod
    def create_weights(self, layer: LinearLayer) -> None: ...

    @abstractmethod
    def block(self, num_inputs: int) -> tuple[int, int]:
        """Returns how many outputs and inputs share a scale, in rows of `num_inputs`."""

    @abstractmethod
    def quantize(self, weight: torch.Tensor) -> QuantizedMatrix:
        """Returns the values and scales of a weight [outputs, inputs]."""

    @abstractmethod
    def fill(self, layer: LinearLayer, matrices: Sequence[QuantizedMatrix]) -> None:
        """Copies the matrices of a layer's pieces, one after another, into its parameters."""

    @abstractmethod
    def product(
        self, layer: LinearLayer, hidden: torch.Tensor, bias: torch.Tensor | None, **fused: Any
    ) -> torch.Tensor:
        """Returns hidden · weightᵀ + bias. `fused` are the arguments of a kernel of `kernels.quantized_linear`."""

    def weight_parts(self, layer: LinearLayer, prefix: str) -> Mapping[str, Sequence[WeightPart]]:
        return {}  # no parameter is a copy of a checkpoint tensor

    def store(self, layer: LinearLayer, prefix: str, tensors: Mapping[str, torch.Tensor]) -> None:
        matrices = self.read(layer, prefix, tensors)
        self.fill(layer, [self.quantize(each.weight) if isinstance(each, DenseMatrix) else each for each in matrices])

    def store_unquantized(self, layer: LinearLayer, weight: torch.Tensor) -> None:
        sizes = [piece.outputs.size for piece in layer.pieces]
        self.fill(layer, [self.quantize(rows) for rows in weight.split(sizes)])

    def finish_loading(self, layer: LinearLayer) -> None:
        """The weights are in their final layout already."""

    def fuses(self, layer: LinearLayer, hidden: torch.Tensor, *, gated: bool = False, only_adds: bool = False) -> bool:
        return suits_fused(hidden, layer.weight)

    def multiply(self, layer: LinearLayer, hidden: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return self.product(layer, hidden, bias)

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
        return self.product(layer, hidden, bias, gated=gated, residual=residual, **norm_arguments(norm))


class DequantizedLinear(_FromFormats, UnquantizedLinear):
    """Keeps the weight in the model's dtype: for matrices of several formats in one layer, and for cuts between blocks.

    A rank's part may begin within a block of values that share a scale. Both ranks then read that scale, but the
    kernels need blocks that begin with the part.
    """

    def weight_parts(self, layer: LinearLayer, prefix: str) -> Mapping[str, Sequence[WeightPart]]:
        return {}

    def store(self, layer: LinearLayer, prefix: str, tensors: Mapping[str, torch.Tensor]) -> None:
        for piece, matrix in zip(layer.pieces, self.read(layer, prefix, tensors), strict=True):
            layer.weight[piece.row : piece.row + piece.outputs.size] = matrix.dequantized()

    def store_unquantized(self, layer: LinearLayer, weight: torch.Tensor) -> None:
        layer.weight.copy_(weight)
