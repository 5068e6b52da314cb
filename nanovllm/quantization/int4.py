"""INT4 weights: integers from 0 to 15 with a scale, and a zero point where there is one, for each group of inputs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import torch

from nanovllm.errors import ModelLoadError
from nanovllm.kernels.quantized_linear import int4_linear, pack_int4
from nanovllm.layers.linear_method import LinearLayer
from nanovllm.layers.parameter import empty_parameter
from nanovllm.quantization.linear import QuantizedLinear
from nanovllm.quantization.matrix import Format, QuantizedMatrix, nonzero

MIN_GROUP = 32  # inputs
WHOLE_ROW = -1  # one group of all inputs
_GROUP = 128  # of weights that are made here
_LARGEST = 15


class Int4Linear(QuantizedLinear):
    """Parameters: `weight` from `pack_int4`, `weight_scale` [groups, outputs], and `weight_zeros` unless all are 8.

    group_size: inputs that share a scale, or WHOLE_ROW. Where groups are not neighbouring inputs, the buffer
    `input_order` says which input each column of the weight belongs to. Scales and zero points are in float16, which
    holds those of checkpoints, and their bfloat16 from 8e-6 on; in a float32 model they are in float32.
    """

    kept_as = "int4"
    scale_dims = (1, 0)

    def __init__(self, layer: LinearLayer, formats: Sequence[Format], group_size: int, *, has_zeros: bool) -> None:
        super().__init__(formats)
        self.scale_dtype = torch.float32 if layer.dtype is torch.float32 else torch.float16
        self.group_size = group_size
        self.has_zeros = has_zeros

    def create_weights(self, layer: LinearLayer) -> None:
        outputs, inputs = layer.num_outputs, layer.inputs.size
        row = pack_int4(torch.zeros(1, inputs, dtype=torch.int8))  # on a meta tensor it would import much of torch
        layer.weight = empty_parameter(outputs, row.shape[1], dtype=row.dtype)
        shape = (1 if self.group_size == WHOLE_ROW else inputs // self.group_size, outputs)
        layer.weight_scale = empty_parameter(*shape, dtype=self.scale_dtype)
        zeros = empty_parameter(*shape, dtype=self.scale_dtype) if self.has_zeros else None
        layer.register_parameter("weight_zeros", zeros)
        layer.register_buffer("input_order", None, persistent=False)

    def block(self, num_inputs: int) -> tuple[int, int]:
        return 1, num_inputs if self.group_size == WHOLE_ROW else self.group_size

    def quantize(self, weight: torch.Tensor) -> QuantizedMatrix:
        """Returns integers of which 0 and 15 are the smallest and the largest value of a group."""
        weight = weight.float()
        outputs, inputs = weight.shape
        size = self.block(inputs)[1]
        groups = weight.view(outputs, -1, size)
        if self.has_zeros:
            low, high = groups.amin(-1).clamp_(max=0), groups.amax(-1).clamp_(min=0)  # [outputs, groups]
            scale = nonzero(self._kept((high - low) / _LARGEST))
            zeros = (-low / scale).round_().clamp_(max=_LARGEST)  # a scale near the smallest is rounded
        else:
            scale = nonzero(self._kept(groups.abs().amax(-1) / 7))
            zeros = torch.full_like(scale, 8.0)
        values = ((groups / scale.unsqueeze(-1)).round_() + zeros.unsqueeze(-1)).clamp_(0, _LARGEST)
        return QuantizedMatrix(values.flatten(1).to(torch.int8), scale, (1, size), zeros.to(torch.uint8))

    def _kept(self, scale: torch.Tensor) -> torch.Tensor:
        """Returns the scale as it is kept, in float32."""
        kept = scale.to(self.scale_dtype).float()
        if bool((kept.isinf() & scale.isfinite()).any()):
            raise ModelLoadError(
                f"INT4 weights have a scale of {scale.max().item():.6g}, and float16, in which it is kept, ends at "
                '65504. Load the model with dtype="float32", or without quantization.'
            )
        return kept

    def fill(self, layer: LinearLayer, matrices: Sequence[QuantizedMatrix]) -> None:
        layer.weight.copy_(pack_int4(torch.cat([each.values for each in matrices])))
        cast(torch.Tensor, layer.weight_scale).copy_(self._kept(torch.cat([each.scale for each in matrices])).T)
        if self.has_zeros:
            zeros = torch.cat([cast(torch.Tensor, each.zeros) for each in matrices])
            cast(torch.Tensor, layer.weight_zeros).copy_(zeros.T)
        order = matrices[0].order
        for piece, matrix in zip(layer.pieces, matrices, strict=True):
            if not _same_order(matrix.order, order):
                raise ModelLoadError(
                    f"g_idx of {piece.name} is not that of {layer.pieces[0].name}. The two are multiplied together, "
                    "which needs the same order of inputs: take a checkpoint without activation order (desc_act)."
                )
        layer.register_buffer("input_order", order, persistent=False)

    def fuses(self, layer: LinearLayer, hidden: torch.Tensor, *, gated: bool = False, only_adds: bool = False) -> bool:
        return _order(layer) is None and super().fuses(layer, hidden, gated=gated, only_adds=only_adds)

    def product(
        self, layer: LinearLayer, hidden: torch.Tensor, bias: torch.Tensor | None, **fused: Any
    ) -> torch.Tensor:
        if (order := _order(layer)) is not None:
            hidden = hidden.index_select(1, order)
        scale, zeros = cast(torch.Tensor, layer.weight_scale), cast("torch.Tensor | None", layer.weight_zeros)
        zeros = None if zeros is None else zeros.T
        return int4_linear(hidden, layer.weight, scale.T, zeros, bias, group_size=self.group_size, **fused)


def make_int4(layer: LinearLayer, formats: Sequence[Format]) -> Int4Linear:
    """Returns the method of a layer whose unquantised weight becomes INT4: groups of 128, or what the inputs allow."""
    return int4_method(layer, formats, _GROUP, has_zeros=True) or Int4Linear(layer, formats, WHOLE_ROW, has_zeros=True)


def int4_method(
    layer: LinearLayer, formats: Sequence[Format], group_size: int, *, has_zeros: bool
) -> Int4Linear | None:
    """Returns the method of a layer with groups of `group_size` inputs; None if this rank's part has too small ones.

    Where a part begins or ends within a group, groups are smaller, and several have the same scale.
    """
    inputs = layer.inputs
    size = math.gcd(group_size, inputs.start, inputs.size)
    if size == inputs.size:
        return Int4Linear(layer, formats, WHOLE_ROW, has_zeros=has_zeros)
    return Int4Linear(layer, formats, size, has_zeros=has_zeros) if size >= MIN_GROUP else None


def _order(layer: LinearLayer) -> torch.Tensor | None:
    return cast("torch.Tensor | None", layer.input_order)


def _same_order(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return torch.equal(one, other)
