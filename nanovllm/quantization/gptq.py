"""The format "gptq" (Frantar et al., 2022, arXiv:2210.17323): `qweight`, `qzeros`, `scales` and `g_idx`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from nanovllm.errors import ModelLoadError
from nanovllm.quantization.fields import Fields
from nanovllm.quantization.matrix import MatrixPart, QuantizedMatrix
from nanovllm.quantization.packed import (
    INT32,
    NIBBLES,
    SYMMETRIC_ZERO,
    GroupedFormat,
    read_group_size,
    unpack,
)
from nanovllm.quantization.scheme import EVERY_LINEAR_LAYER, Group, Quantization
from nanovllm.utils.loader import Source


@dataclass(frozen=True)
class GptqFormat(GroupedFormat):
    """`qweight` [inputs / 8, outputs], `qzeros` [groups, outputs / 8], `scales` [groups, outputs], `g_idx` [inputs].

    zero_offset: what is subtracted from zero points when they are stored: 1 in the first version of the format, 0 in
    the second.
    """

    zero_offset: int = 1

    def sources(self, part: MatrixPart) -> list[Source]:
        size, groups = self.size(part), self.groups_part(part)
        return [
            part.source("qweight", (1, NIBBLES), INT32, transposed=True),
            groups.source("qzeros", (NIBBLES, size), INT32, transposed=True),
            groups.source("scales", (1, size), transposed=True),
            self.index_source(part, "g_idx"),
            Source(f"{part.name}.bias", ((part.outputs.total,),), optional=True),  # zeros, without a bias in the model
        ]

    def read(self, part: MatrixPart, tensors: Mapping[str, torch.Tensor]) -> QuantizedMatrix:
        bias, index = (tensors.get(f"{part.name}.{name}") for name in ("bias", "g_idx"))
        if bias is not None and bool(bias.any()):
            raise ModelLoadError(f"{part.name}.bias is not zero, and the model has no bias there.")
        if index is not None and not self.has_order:
            _check_in_order(part, index, self.size(part))
        values = part.trim(unpack(tensors[f"{part.name}.qweight"], 0, 4).T, 1, NIBBLES)
        zeros = part.trim((unpack(tensors[f"{part.name}.qzeros"], 1, 4).T + self.zero_offset) & 15, 0, NIBBLES)
        if self.is_symmetric and not bool((zeros == SYMMETRIC_ZERO).all()):
            raise ModelLoadError(
                f"{part.name}.qzeros has other zero points than the 8 of quantization_config.sym=true."
            )
        return self.matrix(part, values, tensors[f"{part.name}.scales"].T, zeros, index)


def _check_in_order(part: MatrixPart, index: torch.Tensor, group_size: int) -> None:
    first, stop = part.inputs.start, part.inputs.stop
    if not torch.equal(index, torch.arange(first, stop, device=index.device) // group_size):
        raise ModelLoadError(
            f"{part.name}.g_idx has groups of inputs that are not neighbours, but quantization_config in config.json "
            "has desc_act=false: change it to true."
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
        has_order=fields.choice("desc_act", (True, False), False),
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
    are_lists = isinstance(lists, list) and all(isinstance(inner, list) for inner in lists)
    names = [name for inner in lists for name in inner] if are_lists else []
    if not names or not all(isinstance(name, str) for name in names):
        raise fields.unsupported("modules_in_block_to_quantize", "a list of lists of names of modules")
    return tuple(names)
