"""What a format reads and a linear method keeps: the part of one checkpoint matrix that is on this rank."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import torch

from nanovllm.layers.linear_method import LinearLayer, LinearMethod
from nanovllm.layers.parallel import Shard
from nanovllm.utils.loader import FLOATS, Source


@dataclass(frozen=True)
class MatrixPart:
    """The part of a checkpoint matrix [outputs, inputs] that is on this rank. It is cut along one of the two."""

    name: str  # of the matrix's module in the checkpoint
    outputs: Shard
    inputs: Shard

    @property
    def cut(self) -> tuple[int, Shard]:
        """The dimension of the matrix that is cut, and this rank's part of it."""
        return (1, self.inputs) if self.inputs.is_cut else (0, self.outputs)

    def source(
        self,
        tensor: str,
        block: tuple[int, int] = (1, 1),
        dtypes: tuple[str, ...] = FLOATS,
        *,
        transposed: bool = False,
    ) -> Source:
        """Returns what is read of a tensor that has an entry for each block of (outputs, inputs) of the matrix.

        Blocks that are only partly on this rank are included. transposed: the tensor's dimensions are inputs, outputs.
        """
        shape = (-(-self.outputs.total // block[0]), -(-self.inputs.total // block[1]))
        dim, shard = self.cut
        start, stop = shard.start // block[dim], -(-shard.stop // block[dim])
        name = f"{self.name}.{tensor}"
        if transposed:
            return Source(name, (shape[::-1],), dtypes, 1 - dim, start, stop)
        return Source(name, (shape,), dtypes, dim, start, stop)

    def scalar_source(self, tensor: str) -> Source:
        """Returns a tensor with one number."""
        return Source(f"{self.name}.{tensor}", ((), (1,)))

    def row_scale_source(self) -> Source:
        """Returns the tensor `weight_scale` with a number for each output of the whole matrix, or one for all."""
        outputs = self.outputs.total
        return Source(f"{self.name}.weight_scale", ((outputs, 1), (outputs,), (1,), ()))

    def row_scale(self, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Returns the scale of each output of this part, [outputs, 1] float32."""
        scale = tensors[f"{self.name}.weight_scale"].float().reshape(-1, 1)
        return scale.expand(self.outputs.total, 1)[self.outputs.start : self.outputs.stop]

    def trim(self, entries: torch.Tensor, dim: int, per_word: int) -> torch.Tensor:
        """Returns the entries of this part, of those that were unpacked along `dim` from words of `per_word` each."""
        cut, shard = self.cut
        if dim == cut:
            return entries.narrow(dim, shard.start % per_word, shard.size)
        return entries.narrow(dim, 0, self.inputs.total if dim == 1 else self.outputs.total)

    def align(self, entries: torch.Tensor, block: tuple[int, int]) -> tuple[torch.Tensor, tuple[int, int]]:
        """Returns entries for blocks that begin and end with this part, and the size of these blocks.

        `entries` is what `source` read for blocks of the size `block`. Where the part begins or ends within a block,
        blocks become smaller, and several have the same entry.
        """
        dim, shard = self.cut
        aligned = self.aligned_block(block)
        if aligned == block:
            return entries, block
        size = aligned[dim]
        first = shard.start % block[dim] // size
        return entries.repeat_interleave(block[dim] // size, dim).narrow(dim, first, shard.size // size), aligned

    def aligned_block(self, block: tuple[int, int]) -> tuple[int, int]:
        """Returns the size of the blocks of `align`; the same on every rank."""
        dim, shard = self.cut
        size = math.gcd(block[dim], shard.start, shard.size) if shard.is_cut else block[dim]
        return (size, block[1]) if dim == 0 else (block[0], size)


@dataclass(frozen=True)
class DenseMatrix:
    """Unquantised values."""

    weight: torch.Tensor  # [outputs, inputs]

    def dequantized(self) -> torch.Tensor:
        return self.weight.float()


@dataclass(frozen=True)
class QuantizedMatrix:
    """Values and their scales: (values − zeros) · scale, with one scale for each block of values."""

    values: torch.Tensor  # [outputs, inputs] float8_e4m3fn or int8
    scale: torch.Tensor  # [ceil(outputs / block[0]), ceil(inputs / block[1])] of a float dtype
    block: tuple[int, int]
    zeros: torch.Tensor | None = None  # as scale, uint8
    input_scale: torch.Tensor | None = None  # [1] float32, of all activations
    order: torch.Tensor | None = None  # [inputs] int64: the input that each column belongs to; None: its own

    def dequantized(self) -> torch.Tensor:
        """Returns the weight [outputs, inputs] in float32."""
        weight = self.values.float()
        if self.zeros is not None:
            weight = weight - self._spread(self.zeros)
        weight = weight * self._spread(self.scale)
        if self.order is None:
            return weight
        return torch.empty_like(weight).index_copy_(1, self.order, weight)

    def _spread(self, entries: torch.Tensor) -> torch.Tensor:
        """Returns an entry for each value."""
        outputs, inputs = self.values.shape
        rows = entries.float().repeat_interleave(self.block[0], 0)[:outputs]
        return rows.repeat_interleave(self.block[1], 1)[:, :inputs]


def nonzero(scale: torch.Tensor) -> torch.Tensor:
    """Returns the scale, with 1 instead of 0: where all values are 0, any scale is right."""
    return torch.where(scale == 0, 1.0, scale)


Matrix: TypeAlias = DenseMatrix | QuantizedMatrix


class Format(Protocol):
    """How a checkpoint stores the matrices of linear layers. Equal formats store them alike."""

    def sources(self, part: MatrixPart) -> list[Source]:
        """Returns what is read of the checkpoint for a part of a matrix."""
        ...

    def read(self, part: MatrixPart, tensors: Mapping[str, torch.Tensor]) -> Matrix:
        """Returns the part, from what was read of each source by its name."""
        ...

    def linear_method(self, layer: LinearLayer) -> LinearMethod | None:
        """Returns the method that keeps matrices of this format; None if it cannot keep this rank's part of them."""
        ...

    def expert_method(self, layer: LinearLayer) -> LinearMethod | None:
        """Returns the method that keeps an expert's matrices, which are the layer's; None as from `linear_method`."""
        ...
