"""The format "fp8", as in Qwen3-…-FP8: tensors `weight`, `weight_scale_inv` or `weight_scale`, and `input_scale`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from nanovllm.kernels.quantized_linear import FP8_BLOCK
from nanovllm.layers.linear_method import LinearLayer
from nanovllm.quantization.fields import Fields
from nanovllm.quantization.fp8 import Fp8Linear, blocks_fit
from nanovllm.quantization.int4 import MIN_GROUP
from nanovllm.quantization.linear import matrix_parts
from nanovllm.quantization.matrix import MatrixPart, QuantizedMatrix
from nanovllm.quantization.scheme import EVERY_LINEAR_LAYER, Group, Quantization
from nanovllm.utils.loader import Source

_E4M3 = ("F8_E4M3",)
_BLOCK = (FP8_BLOCK, FP8_BLOCK)


@dataclass(frozen=True)
class Fp8Format:
    """FP8 values with scales for blocks of 128 × 128, for each output, or for the whole matrix.

    block_scale: the tensor of block scales; None: `weight_scale` has one for each output or one for all.
    is_static: a tensor `input_scale` scales the activations.
    """

    block_scale: str | None = None
    is_static: bool = False

    def sources(self, part: MatrixPart) -> list[Source]:
        weight = part.source("weight", dtypes=_E4M3)
        scale = part.row_scale_source() if self.block_scale is None else part.source(self.block_scale, _BLOCK)
        return [weight, scale, *([part.scalar_source("input_scale")] if self.is_static else [])]

    def read(self, part: MatrixPart, tensors: Mapping[str, torch.Tensor]) -> QuantizedMatrix:
        values = tensors[f"{part.name}.weight"]
        if self.block_scale is None:
            scale, block = part.row_scale(tensors), (1, values.shape[1])
        else:
            scale, block = part.align(tensors[f"{part.name}.{self.block_scale}"].float(), _BLOCK)
        input_scale = tensors[f"{part.name}.input_scale"].float().reshape(1) if self.is_static else None
        return QuantizedMatrix(values, scale, block, input_scale=input_scale)

    def linear_method(self, layer: LinearLayer) -> Fp8Linear | None:
        has_blocks = self.block_scale is not None
        if has_blocks and not blocks_fit(layer):
            return None
        blocks = _BLOCK if has_blocks else None
        return Fp8Linear([self] * len(layer.pieces), blocks=blocks, is_static=self.is_static)

    def expert_method(self, layer: LinearLayer) -> Fp8Linear | None:
        formats = [self] * len(layer.pieces)
        if self.block_scale is None:
            return Fp8Linear(formats)
        blocks = matrix_parts(layer, "")[0].aligned_block(_BLOCK)
        return Fp8Linear(formats, blocks=blocks) if blocks[1] >= min(MIN_GROUP, layer.inputs.size) else None


def read_fp8(fields: Fields) -> Quantization:
    """Returns what a quantization_config with quant_method "fp8" describes."""
    fields.choice("fmt", ("e4m3", "float8_e4m3fn"), "e4m3")
    is_static = fields.choice("activation_scheme", ("dynamic", "static"), "dynamic") == "static"
    block = fields.get("weight_block_size")
    if block is not None and block != list(_BLOCK):
        raise fields.unsupported("weight_block_size", f"{list(_BLOCK)} or null")
    if block is not None and is_static:
        raise fields.unsupported("activation_scheme", "'dynamic' beside weight_block_size")
    form = Fp8Format(None if block is None else "weight_scale_inv", is_static)
    return Quantization(
        "fp8", (Group(EVERY_LINEAR_LAYER, form),), fields.names("modules_to_not_convert", "ignored_layers")
    )
