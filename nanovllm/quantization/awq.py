"""The format "awq" in its version "gemm" (Lin et al., 2023, arXiv:2306.00978): `qweight`, `qzeros` and `scales`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from nanovllm.quantization.fields import Fields
from nanovllm.quantization.matrix import MatrixPart, QuantizedMatrix
from nanovllm.quantization.packed import INT32, NIBBLES, GroupedFormat, read_group_size, unpack
from nanovllm.quantization.scheme import EVERY_LINEAR_LAYER, Group, Quantization
from nanovllm.utils.loader import Source

_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # the position in a word of each of eight neighbouring outputs


@dataclass(frozen=True)
class AwqFormat(GroupedFormat):
    """`qweight` [inputs, outputs / 8], `qzeros` [groups, outputs / 8], `scales` [groups, outputs]."""

    def sources(self, part: MatrixPart) -> list[Source]:
        size = self.size(part)
        return [
            part.source("qweight", (NIBBLES, 1), INT32, transposed=True),
            part.source("qzeros", (NIBBLES, size), INT32, transposed=True),
            part.source("scales", (1, size), transposed=True),
        ]

    def read(self, part: MatrixPart, tensors: Mapping[str, torch.Tensor]) -> QuantizedMatrix:
        values, zeros = (
            part.trim(unpack(tensors[f"{part.name}.{name}"], 1, 4, _ORDER).T, 0, NIBBLES)
            for name in ("qweight", "qzeros")
        )
        return self.matrix(part, values, tensors[f"{part.name}.scales"].T, zeros, None)


def read_awq(fields: Fields) -> Quantization:
    """Returns what a quantization_config with quant_method "awq" describes."""
    fields.choice("bits", (4,))
    version = fields.get("version")
    if not isinstance(version, str) or version.lower() != "gemm":
        raise fields.unsupported("version", "'gemm'")
    fields.choice("zero_point", (True,), True)
    group = Group(EVERY_LINEAR_LAYER, AwqFormat(read_group_size(fields)))
    return Quantization("awq", (group,), fields.names("modules_to_not_convert"))
