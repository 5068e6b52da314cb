"""The format "compressed-tensors", which llm-compressor writes: groups of modules with weights in FP8, INT8 or INT4."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from nanovllm.errors import ModelLoadError
from nanovllm.kernels.quantized_linear import FP8_BLOCK
from nanovllm.layers.linear_method import LinearLayer, LinearMethod
from nanovllm.logs import events
from nanovllm.quantization.checkpoint_fp8 import Fp8Format
from nanovllm.quantization.fields import Fields
from nanovllm.quantization.int8 import Int8Linear
from nanovllm.quantization.matrix import Format, MatrixPart, QuantizedMatrix
from nanovllm.quantization.packed import (
    INT32,
    NIBBLES,
    GroupedFormat,
    read_group_size,
    unpack,
)
from nanovllm.quantization.scheme import Group, Quantization
from nanovllm.utils.loader import Source
from nanovllm.utils.logger import setup_logger

logger = setup_logger(__name__)

_ZERO_OF_8_BITS = 128  # what is added to integers of 8 bits when they are packed
_PER_WORD_OF_8_BITS = 4


@dataclass(frozen=True)
class Int8Format:
    """Integers of 8 bits with a scale for each output: `weight` int8, or `weight_packed` in int32 words."""

    is_packed: bool
    quantize_input: bool
    has_input_scale: bool = False  # of static activations; activations are scaled by token all the same

    def sources(self, part: MatrixPart) -> list[Source]:
        if self.is_packed:
            weight = [part.source("weight_packed", (1, _PER_WORD_OF_8_BITS), INT32), _shape_source(part)]
        else:
            weight = [part.source("weight", dtypes=("I8",))]
        scales = [part.scalar_source("input_scale")] if self.has_input_scale else []
        zero = Source(f"{part.name}.input_zero_point", ((), (1,)), ("I8", *INT32), optional=True)
        return [*weight, part.row_scale_source(), *scales, zero]

    def read(self, part: MatrixPart, tensors: Mapping[str, torch.Tensor]) -> QuantizedMatrix:
        if self.is_packed:
            _check_shape(part, tensors)
            values = unpack(tensors[f"{part.name}.weight_packed"], 1, 8) - _ZERO_OF_8_BITS
            values = part.trim(values, 1, _PER_WORD_OF_8_BITS).to(torch.int8)
        else:
            values = tensors[f"{part.name}.weight"]
        return QuantizedMatrix(values, part.row_scale(tensors), (1, values.shape[1]))

    def linear_method(self, layer: LinearLayer) -> LinearMethod:
        return Int8Linear([self] * len(layer.pieces), quantize_input=self.quantize_input)

    def expert_method(self, layer: LinearLayer) -> LinearMethod:
        return Int8Linear([self] * len(layer.pieces))


@dataclass(frozen=True)
class PackedInt4Format(GroupedFormat):
    """`weight_packed` [outputs, inputs / 8] in int32 words, `weight_scale` [outputs, groups], `weight_shape`.

    Unless it is symmetric, `weight_zero_point` [outputs / 8, groups]; with an order, `weight_g_idx` [inputs].
    """

    def sources(self, part: MatrixPart) -> list[Source]:
        size, groups = self.size(part), self.groups_part(part)
        sources = [
            part.source("weight_packed", (1, NIBBLES), INT32),
            groups.source("weight_scale", (1, size)),
            _shape_source(part),
        ]
        if not self.is_symmetric:
            sources.append(groups.source("weight_zero_point", (NIBBLES, size), INT32))
        if self.has_order:
            sources.append(self.index_source(part, "weight_g_idx"))
        return sources

    def read(self, part: MatrixPart, tensors: Mapping[str, torch.Tensor]) -> QuantizedMatrix:
        _check_shape(part, tensors)
        values = part.trim(unpack(tensors[f"{part.name}.weight_packed"], 1, 4), 1, NIBBLES)
        zeros = tensors.get(f"{part.name}.weight_zero_point")
        if zeros is not None:
            zeros = part.trim(unpack(zeros, 0, 4), 0, NIBBLES)
        scale, index = tensors[f"{part.name}.weight_scale"], tensors.get(f"{part.name}.weight_g_idx")
        return self.matrix(part, values, scale, zeros, index)


def _shape_source(part: MatrixPart) -> Source:
    return Source(f"{part.name}.weight_shape", ((2,),), ("I64", "I32"))


def _check_shape(part: MatrixPart, tensors: Mapping[str, torch.Tensor]) -> None:
    shape = tensors[f"{part.name}.weight_shape"].tolist()
    if shape != [part.outputs.total, part.inputs.total]:
        needed = [part.outputs.total, part.inputs.total]
        raise ModelLoadError(f"{part.name}.weight_shape is {shape}, and the model needs {needed}.")


def read_compressed_tensors(fields: Fields) -> Quantization:
    """Returns what a quantization_config with quant_method "compressed-tensors" describes."""
    fields.choice("quantization_status", ("compressed", "frozen"), "compressed")
    sparsity = fields.inner("sparsity_config")
    if sparsity is not None and sparsity.values:
        sparsity.choice("format", ("dense",), "dense")
    for name in ("transform_config", "moe_sparsity_config"):
        if fields.get(name):
            raise fields.unsupported(name, "absent")
    if fields.get("kv_cache_scheme") is not None:
        why = "kv_cache_dtype='fp8' measures a scale for each token and head"
        events.model_ignored.log(logger, ignored="quantization_config.kv_cache_scheme", why=why)
    groups = tuple(_read_group(group, fields) for group in fields.objects("config_groups"))
    return Quantization("compressed-tensors", groups, fields.names("ignore"), has_head=True)


def _read_group(group: Fields, config: Fields) -> Group:
    targets = group.names("targets")
    if group.get("output_activations") is not None:
        raise group.unsupported("output_activations", "null")
    weights, activations = group.inner("weights"), group.inner("input_activations")
    if weights is None:
        raise group.unsupported("weights", "an object")
    holder = config if group.get("format") is None else group
    layout = holder.choice("format", tuple(_READERS), hint="Sparse weights and 4-bit floats are not supported.")
    return Group(targets, _READERS[layout](weights, activations))


def _read_quantized(weights: Fields, activations: Fields | None) -> Format:
    return _read_float(weights, activations) if weights.get("type") == "float" else _read_int(weights, activations)


def _read_float(weights: Fields, activations: Fields | None) -> Fp8Format:
    weights.choice("type", ("float",))
    weights.choice("num_bits", (8,))
    weights.choice("symmetric", (True,), True)
    is_static = False
    if activations is not None:
        activations.choice("type", ("float",))
        activations.choice("num_bits", (8,))
        is_static = not activations.choice("dynamic", (True, False), False)
        if is_static:
            activations.choice("strategy", ("tensor",))
    if weights.choice("strategy", ("tensor", "channel", "block")) != "block":
        return Fp8Format(is_static=is_static)
    if weights.get("block_structure") not in ([FP8_BLOCK, FP8_BLOCK], f"{FP8_BLOCK}x{FP8_BLOCK}"):
        raise weights.unsupported("block_structure", f"[{FP8_BLOCK}, {FP8_BLOCK}]")
    if activations is not None and is_static:
        raise activations.unsupported("dynamic", "true with blocks")
    return Fp8Format("weight_scale")


def _read_int(weights: Fields, activations: Fields | None, is_packed: bool = False) -> Int8Format:
    weights.choice("type", ("int",))
    weights.choice("num_bits", (8,))
    weights.choice("symmetric", (True,), True)
    weights.choice("strategy", ("tensor", "channel"))
    if activations is None:
        return Int8Format(is_packed, quantize_input=False)
    activations.choice("type", ("int",))
    activations.choice("num_bits", (8,))
    is_static = not activations.choice("dynamic", (True, False), False)
    if is_static:
        activations.choice("strategy", ("tensor",))
        events.model_ignored.log(
            logger, ignored=f"{activations.path}.dynamic=false", why="INT8 activations have a scale for each token"
        )
    return Int8Format(is_packed, quantize_input=True, has_input_scale=is_static)


def _read_packed(weights: Fields, activations: Fields | None) -> Format:
    weights.choice("type", ("int",))
    if weights.choice("num_bits", (4, 8)) == 8:
        return _read_int(weights, activations, is_packed=True)
    if activations is not None:
        raise ModelLoadError(
            f"config.json: {activations.path} is not supported with weights of 4 bits: it must be null."
        )
    strategy = weights.choice("strategy", ("group", "channel"))
    order = weights.get("actorder")
    if order not in (None, False, "weight", "static", "group", "dynamic"):
        raise weights.unsupported("actorder", "null, 'weight' or 'group'")
    return PackedInt4Format(
        group_size=read_group_size(weights) if strategy == "group" else None,
        is_symmetric=weights.choice("symmetric", (True, False), True),
        has_order=order in ("group", "dynamic"),
    )


_READERS: Mapping[str, Callable[[Fields, Fields | None], Format]] = {
    "float-quantized": _read_float,
    "int-quantized": _read_int,
    "naive-quantized": _read_quantized,
    "pack-quantized": _read_packed,
}
