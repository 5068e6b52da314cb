"""UnquantizedFormat: matrices in a float dtype, of modules that a checkpoint does not quantise, or to be quantised."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from nanovllm.layers.linear_method import LinearLayer
from nanovllm.quantization.linear import QuantizedLinear
from nanovllm.quantization.matrix import DenseMatrix, Format, MatrixPart
from nanovllm.utils.loader import Source


@dataclass(frozen=True)
class UnquantizedFormat:
    """A tensor `weight`. make: returns the method of a layer that is quantised when it is loaded."""

    make: Callable[[LinearLayer, Sequence[Format]], QuantizedLinear] | None = None

    def sources(self, part: MatrixPart) -> list[Source]:
        return [part.source("weight")]

    def read(self, part: MatrixPart, tensors: Mapping[str, torch.Tensor]) -> DenseMatrix:
        return DenseMatrix(tensors[f"{part.name}.weight"])

    def linear_method(self, layer: LinearLayer) -> QuantizedLinear | None:
        return None if self.make is None else self.make(layer, [self] * len(layer.pieces))

    def expert_method(self, layer: LinearLayer) -> QuantizedLinear | None:
        return self.linear_method(layer)


UNQUANTIZED = UnquantizedFormat()
