"""GroupedFormat: 4-bit integers in int32 words, with scales for groups of inputs. Several formats derive from it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from nanovllm.errors import ModelLoadError
from nanovllm.layers.linear_method import LinearLayer, LinearMethod
from nanovllm.layers.parallel import Shard
from nanovllm.quantization.fields import Fields
from nanovllm.quantization.int4 import int4_method
from nanovllm.quantization.matrix import MatrixPart, QuantizedMatrix
from nanovllm.utils.loader import Source

INT32 = ("I32",)
NIBBLES = 8  # 4-bit integers of a word
SYMMETRIC_ZERO = 8
_GROUP_SIZES = (32, 64, 128)  # inputs


@dataclass(frozen=True)
class GroupedFormat(ABC):
    """INT4 values with a scale and a zero point for each group of inputs of an output.

    group_size: inputs; None: all. is_symmetric: all zero points are 8. has_order: a tensor of the checkpoint says which
    group each input belongs to; otherwise groups are neighbouring inputs.
    """

    group_size: int | None
    is_symmetric: bool = False
    has_order: bool = False

    @abstractmethod
    def sources(self, part: MatrixPart) -> list[Source]: ...

    @abstractmethod
    def read(self, part: MatrixPart, tensors: Mapping[str, torch.Tensor]) -> QuantizedMatrix: ...

    def size(self, part: MatrixPart) -> int:
        """Returns the inputs of a group. Raises ModelLoadError unless a matrix has whole groups."""
        inputs = part.inputs.total
        size = self.group_size or inputs
        if inputs % size:
            raise ModelLoadError(
                f"{part.name} has {inputs} inputs, which groups of {size} (group_size in config.json's "
                "quantization_config) do not divide."
            )
        return size

    def groups_part(self, part: MatrixPart) -> MatrixPart:
        """Returns the part whose scales and zero points are read: with an order, those of all inputs."""
        return MatrixPart(part.name, part.outputs, Shard.whole(part.inputs.total)) if self.has_order else part

    def index_source(self, part: MatrixPart, tensor: str) -> Source:
        """Returns the tensor with the group of each input."""
        inputs = part.inputs
        start, stop = (inputs.start, inputs.stop) if inputs.is_cut else (0, None)
        optional = not self.has_order
        return Source(f"{part.name}.{tensor}", ((inputs.total,),), INT32, start=start, stop=stop, optional=optional)

    def matrix(
        self,
        part: MatrixPart,
        values: torch.Tensor,
        scale: torch.Tensor,
        zeros: torch.Tensor | None,
        index: torch.Tensor | None,
    ) -> QuantizedMatrix:
        """Returns the matrix of values [outputs, inputs] with scale and zeros [outputs, groups] of `groups_part`.

        zeros None: 8. index [inputs]: the group of each input; not read without an order.
        """
        size, values = self.size(part), values.to(torch.int8)
        zeros = torch.full_like(scale, SYMMETRIC_ZERO) if zeros is None else zeros
        zeros = zeros.to(torch.uint8)
        if not self.has_order or index is None:
            scale, block = part.align(scale, (1, size))
            return QuantizedMatrix(values, scale, block, part.align(zeros, (1, size))[0])
        index = index.long()
        if int(index.min()) < 0 or int(index.max()) >= scale.shape[1]:
            raise ModelLoadError(f"{part.name}: its g_idx names other groups than 0 to {scale.shape[1] - 1}.")
        if part.inputs.is_cut:
            return QuantizedMatrix(values, scale[:, index], (1, 1), zeros[:, index])
        order = index.argsort(stable=True)
        columns = torch.arange(len(order), device=order.device)
        if not torch.equal(index[order], columns // size):
            raise ModelLoadError(f"{part.name}: the groups of its g_idx do not have group_size={size} inputs each.")
        is_sorted = torch.equal(order, columns)
        return QuantizedMatrix(values[:, order], scale, (1, size), zeros, order=None if is_sorted else order)

    def linear_method(self, layer: LinearLayer) -> LinearMethod | None:
        if self.has_order and layer.inputs.is_cut:
            return None  # the inputs of a group are on several ranks
        size = self.group_size or layer.inputs.total
        return int4_method(layer, [self] * len(layer.pieces), size, has_zeros=not self.is_symmetric)

    def expert_method(self, layer: LinearLayer) -> LinearMethod | None:
        if self.has_order:
            raise ModelLoadError(
                "config.json: quantization_config has desc_act=true or actorder='group', an order of inputs that is "
                "not supported for experts: take a checkpoint without it, or the unquantised one and "
                "quantization='int4'."
            )
        return self.linear_method(layer)


def unpack(words: torch.Tensor, dim: int, num_bits: int, order: Sequence[int] | None = None) -> torch.Tensor:
    """Returns the unsigned integers in int32 words, 32 / num_bits along `dim` for each word, as int32.

    order: the position in the word, from the lowest bits up, of each integer; None: one after another.
    """
    positions = range(32 // num_bits) if order is None else order
    shifts = torch.tensor([num_bits * position for position in positions], dtype=torch.int32, device=words.device)
    shape = [1] * (words.dim() + 1)
    shape[dim + 1] = -1
    return ((words.unsqueeze(dim + 1) >> shifts.view(shape)) & ((1 << num_bits) - 1)).flatten(dim, dim + 1)


def read_group_size(fields: Fields) -> int | None:
    """Returns the inputs that share a scale; None: all."""
    size: int = fields.choice("group_size", (*_GROUP_SIZES, -1))  # -1: one group
    return None if size == -1 else size
