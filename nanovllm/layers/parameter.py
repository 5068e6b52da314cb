"""How every layer declares its parameters, and which parts of a checkpoint fill them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import nn


def empty_parameter(*shape: int, dtype: torch.dtype) -> nn.Parameter:
    """Returns a parameter without memory; the weight loader allocates it on the device."""
    return nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"), requires_grad=False)


@dataclass(frozen=True)
class WeightPart:
    """Rows `row`, `row + 1`, … of a parameter come from indices `start` … `stop` along `dim` of a checkpoint tensor.

    `name` None: padding rows, which no checkpoint has and which are filled with zeros (`shape` is then their shape).
    """

    name: str | None
    shape: tuple[int, ...]  # of the whole tensor in the checkpoint
    dim: int = 0
    start: int = 0
    stop: int | None = None  # None: to the end
    row: int = 0
    plus: float = 0.0  # added to what is read

    @property
    def source(self) -> tuple[slice, ...]:
        """Index of this part in the checkpoint tensor."""
        return (*(slice(None),) * self.dim, slice(self.start, self.stop))

    @property
    def num_rows(self) -> int:
        """Number of rows of the parameter that this part fills."""
        return len(range(self.shape[0])[self.source[0]])

    @property
    def shape_read(self) -> tuple[int, ...]:
        """Shape of what is read from the checkpoint tensor."""
        cut = len(range(self.shape[self.dim])[self.start : self.stop])
        return (*self.shape[: self.dim], cut, *self.shape[self.dim + 1 :])


@runtime_checkable
class HasWeightParts(Protocol):
    """A module that says which checkpoint tensors fill its own parameters."""

    def weight_parts(self, prefix: str) -> Mapping[str, Sequence[WeightPart]]:
        """Returns the parts of each of its own parameters, by name, ordered by row.

        `prefix` is the module's name in the model.
        """
        ...
