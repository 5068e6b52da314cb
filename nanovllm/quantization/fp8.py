"""FP8 weights: float8_e4m3fn with a scale for each output, or for each block of 128 outputs and 128 inputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch

from nanovllm.kernels.quantized_linear import FP8_BLOCK, FP8_MAX, fp8_linear
from nanovllm.layers.linear_method import LinearLayer
from nanovllm.layers.parameter import empty_parameter
from nanovllm.quantization.linear import QuantizedLinear
from nanovllm.quantization.matrix import Format, QuantizedMatrix, nonzero


class Fp8Linear(QuantizedLinear):
    """Parameters: `weight`, `weight_scale` and, with static activations, `input_scale` [1].

    Activations are FP8 too: static, by `input_scale`, or with a scale for each token, which block scales divide into
    groups of 128 inputs.
    """

    kept_as = "fp8"

    def __init__(
        self, formats: Sequence[Format], *, blocks: tuple[int, int] | None = None, is_static: bool = False
    ) -> None:
        """blocks: outputs and inputs that share a scale; `product` takes 128 of each. None: a scale for each output."""
        super().__init__(formats)
        self.blocks = blocks
        self.is_static = is_static

    def create_weights(self, layer: LinearLayer) -> None:
        outputs, inputs = layer.num_outputs, layer.inputs.size
        layer.weight = empty_parameter(outputs, inputs, dtype=torch.float8_e4m3fn)
        rows, columns = self.block(inputs)
        num_rows = sum(-(-piece.outputs.size // rows) for piece in layer.pieces)
        layer.weight_scale = empty_parameter(num_rows, -(-inputs // columns), dtype=torch.float32)
        layer.register_parameter("input_scale", empty_parameter(1, dtype=torch.float32) if self.is_static else None)

    def block(self, num_inputs: int) -> tuple[int, int]:
        return self.blocks or (1, num_inputs)

    def quantize(self, weight: torch.Tensor) -> QuantizedMatrix:
        return quantize_fp8(weight, self.block(weight.shape[1]))

    def fill(self, layer: LinearLayer, matrices: Sequence[QuantizedMatrix]) -> None:
        weight_scale, first = cast(torch.Tensor, layer.weight_scale), 0
        for piece, matrix in zip(layer.pieces, matrices, strict=True):
            layer.weight[piece.row : piece.row + len(matrix.values)] = matrix.values
            weight_scale[first : first + len(matrix.scale)] = matrix.scale
            first += len(matrix.scale)
        if self.is_static:
            # One scale for the inputs that the pieces share: the largest, which cuts off none of them.
            scales = [torch.ones(1) if each.input_scale is None else each.input_scale.cpu() for each in matrices]
            cast(torch.Tensor, layer.input_scale).copy_(torch.stack(scales).amax(0))

    def product(
        self, layer: LinearLayer, hidden: torch.Tensor, bias: torch.Tensor | None, **fused: Any
    ) -> torch.Tensor:
        weight_scale = cast(torch.Tensor, layer.weight_scale)
        input_scale = cast("torch.Tensor | None", layer.input_scale)
        return fp8_linear(hidden, layer.weight, weight_scale, bias, input_scale=input_scale, **fused)


def quantize_fp8(weight: torch.Tensor, block: tuple[int, int]) -> QuantizedMatrix:
    """Returns the weight [outputs, inputs] in FP8. The largest value of a block becomes the largest FP8 number."""
    outputs, inputs = weight.shape
    rows, columns = block
    padded = torch.nn.functional.pad(weight.float(), (0, -inputs % columns, 0, -outputs % rows))
    blocks = padded.view(-(-outputs // rows), rows, -(-inputs // columns), columns)
    scale = nonzero(blocks.abs().amax((1, 3), keepdim=True) / FP8_MAX)
    values = (blocks / scale).clamp_(-FP8_MAX, FP8_MAX).view(padded.shape)[:outputs, :inputs]
    return QuantizedMatrix(values.to(torch.float8_e4m3fn), scale[:, 0, :, 0], block)


def blocks_fit(layer: LinearLayer) -> bool:
    """Returns whether blocks of each rank's weight are blocks of the checkpoint's matrices; the same on every rank.

    The pieces are stacked, and each must begin where a block does, in the checkpoint and in the stack.
    """
    cuts = [layer.inputs] if layer.inputs.is_cut else [piece.outputs for piece in layer.pieces]
    return all(not cut.is_cut or cut.size % FP8_BLOCK == 0 for cut in cuts) and all(
        piece.row % FP8_BLOCK == 0 for piece in layer.pieces
    )
