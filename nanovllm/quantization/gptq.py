"""The format "gptq" (Frantar et al., 2022, arXiv:2210.17323): `qweight`, `qzeros`, `scales` and `g_idx`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from nanovllm.errors import ModelLoadError
from nanovllm.layers.linear_method import LinearLayer, LinearMethod
from nanovllm.layers.parallel import Shard
from nanovllm.quantization.fields import Fields
from nanovllm.quantization.int4 import int4_method
from nanovllm.quantization.matrix import MatrixPart, QuantizedMatrix
from nanovllm.quantization.packed import (
    INT32,
    NIBBLES,
    SYMMETRIC_ZERO,
    check_divides,
    grouped,
    read_group_size,
    unpack,
)
from nanovllm.quantization.scheme import EVERY_LINEAR_LAYER, Group, Quantization
from nanovllm.utils.loader import Source


@dataclass(frozen=True)
class GptqFormat:
    """INT4 values. `qweight` [inputs / 8, outputs], `qzeros` [groups, outputs / 8], `scales` [groups, outputs].

    group_size: inputs; None: all. desc_act: `g_idx` says which group each input belongs to. zero_offset: what is
    subtracted from zero points when they are stored: 1 in the first version of the format, 0 in the second.
    """

    group_size: int | None
    is_symmetric: bool
    desc_act: bool
    zero_offset: int

    def sources(self, part: MatrixPart) -> list[Source]:
        size = self.group_size or part.inputs.total
        check_divides(part, size)
        groups, (outputs, inputs) = self._groups_part(part), (part.outputs, part.inputs)
        start, stop = (inputs.start, inputs.stop) if inputs.is_cut else (0, None)
        index, bias = f"{part.name}.g_idx", f"{part.name}.bias"
        return [
            part.source("qweight", (1, NIBBLES), INT32, transposed=True),
            groups.source("qzeros", (NIBBLES, size), INT32, transposed=True),
            groups.source("scales", (1, size), transposed=True),
            Source(index, ((inputs.total,),), INT32, start=start, stop=stop, optional=not self.desc_act),
            Source(bias, ((outputs.total,),), optional=True),  # written for layers without a bias too
        ]

    def read(self, part: MatrixPart, tensors: Mapping[str, torch.Tensor]) -> QuantizedMatrix:
        bias = tensors.get(f"{part.name}.bias")
        if bias is not None and bool(bias.any()):
            raise ModelLoadError(f"{part.name}.bias is not zero, and the model has no bias there.")
        size = self.group_size or part.inputs.total
        values = part.trim(unpack(tensors[f"{part.name}.qweight"], 0, 4).T, 1, NIBBLES)
        zeros = part.trim((unpack(tensors[f"{part.name}.qzeros"], 1, 4).T + self.zero_offset) & 15, 0, NIBBLES)
        if self.is_symmetric and not bool((zeros == SYMMETRIC_ZERO).all()):
            raise ModelLoadError(
                f"{part.name}.qzeros has other zero points than the 8 of quantization_config.sym=true."
            )
        index = tensors.get(f"{part.name}.g_idx")
        if not self.desc_act:
            _check_in_order(part, index, size)
        scale = tensors[f"{part.name}.scales"].T
        return grouped(
            part,
            values,
            scale,
            torch.full_like(zeros, SYMMETRIC_ZERO) if self.is_symmetric else zeros,
            size,
            index.long() if self.desc_act and index is not None else None,
        )

    def linear_method(self, layer: LinearLayer) -> LinearMethod | None:
        if self.desc_act and layer.inputs.is_cut:
            return None  # the inputs of a group are on several ranks
        size = self.group_size or layer.inputs.total
        return int4_method(layer, [self] * len(layer.pieces), size, has_zeros=not self.is_symmetric)

    def _groups_part(self, part: MatrixPart) -> MatrixPart:
        """Returns the part for which scales and zeros are read: with `desc_act`, those of all inputs."""
        return MatrixPart(part.name, part.outputs, Shard.whole(part.inputs.total)) if self.desc_act else part


def _check_in_order(part: MatrixPart, index: torch.Tensor | None, group_size: int) -> None:
    first, stop = part.inputs.start, part.inputs.stop
    if index is not None and not torch.equal(index, torch.arange(first, stop, device=index.device) // group_size):
        raise ModelLoadError(
            f"{part.name}.g_idx has groups of inputs that are not neighbours, and config.json says "
            "quantization_config.desc_act=false. hf_overrides can replace quantization_config."
        )


def read_gptq(fields: Fields) -> Quantization:
    """Returns what a quantization_config with quant_method "gptq" describes."""
    fields.choice("bits", (4,))
    version = fields.choice("checkpoint_format", ("gptq", "gptq_v2"), "gptq")
    fields.choice("is_marlin_format", (False,), False)
    if fields.get("dynamic"):
        raise fields.unsupported("dynamic", "absent: the same settings for all modules")
    form = GptqFormat(
        group_size=read_group_size(fields),
        is_symmetric=fields.choice("sym", (True, False), True),
        desc_act=fields.choice("desc_act", (True, False), False),
        zero_offset=1 if version == "gptq" else 0,
    )
    return Quantization(
        "gptq",
        (Group(_targets(fields), form),),
        fields.names("modules_to_not_convert"),
        has_head=fields.choice("lm_head", (True, False), False),
    )


def _targets(fields: Fields) -> tuple[str, ...]:
    """Returns the modules that are quantised: all, or those of transformers' lists of lists."""
    lists = fields.get("modules_in_block_to_quantize")
    if lists is None:
        return EVERY_LINEAR_LAYER
    if not isinstance(lists, list) or not all(isinstance(inner, list) for inner in lists):
        raise fields.unsupported("modules_in_block_to_quantize", "a list of lists of names of modules")
    names = [name for inner in lists for name in inner]
    if not all(isinstance(name, str) for name in names):
        raise fields.unsupported("modules_in_block_to_quantize", "a list of lists of names of modules")
    return tuple(names)
