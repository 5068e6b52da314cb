"""Reads how a model is quantised: from config.json's `quantization_config`, or from the argument `quantization`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from nanovllm.errors import InvalidArgumentError
from nanovllm.layers.linear_method import LinearLayer
from nanovllm.quantization.awq import read_awq
from nanovllm.quantization.checkpoint_fp8 import read_fp8
from nanovllm.quantization.compressed_tensors import read_compressed_tensors
from nanovllm.quantization.fields import Fields
from nanovllm.quantization.fp8 import Fp8Linear
from nanovllm.quantization.gptq import read_gptq
from nanovllm.quantization.int4 import make_int4
from nanovllm.quantization.int8 import Int8Linear
from nanovllm.quantization.linear import QuantizedLinear
from nanovllm.quantization.matrix import Format
from nanovllm.quantization.scheme import EVERY_LINEAR_LAYER, Group, Quantization
from nanovllm.quantization.unquantized import UnquantizedFormat


def _fp8(layer: LinearLayer, formats: Sequence[Format]) -> QuantizedLinear:
    return Fp8Linear(formats)


def _int8(layer: LinearLayer, formats: Sequence[Format]) -> QuantizedLinear:
    return Int8Linear(formats)


# `quant_method` → what reads such a quantization_config.
CHECKPOINTS: Mapping[str, Callable[[Fields], Quantization]] = {
    "fp8": read_fp8,
    "compressed-tensors": read_compressed_tensors,
    "awq": read_awq,
    "gptq": read_gptq,
}
# `quantization` → what makes the method of a layer from unquantised weights.
MADE: Mapping[str, Callable[[LinearLayer, Sequence[Format]], QuantizedLinear]] = {
    "fp8": _fp8,
    "int8": _int8,
    "int4": make_int4,
}


def read_quantization(asked: str | None, found: Mapping[str, Any] | None) -> Quantization | None:
    """Returns how a model is quantised; None if it is not.

    asked: the argument `quantization`. found: the checkpoint's `quantization_config`. Raises ModelLoadError for one
    that is not supported, InvalidArgumentError if the two contradict each other.
    """
    if found is None:
        return None if asked is None else _made(asked)
    fields = Fields(found)
    method = fields.get("quant_method")
    if not isinstance(method, str) or method not in CHECKPOINTS:
        raise fields.unsupported("quant_method", " or ".join(map(repr, CHECKPOINTS)), _WAY_OUT)
    if asked not in (None, method):
        raise InvalidArgumentError(
            "quantization",
            asked,
            f"{method!r} or None for this checkpoint",
            f"Its weights are quantised already: config.json has quant_method={method!r}.",
        )
    return CHECKPOINTS[method](fields)


_WAY_OUT = (
    "Take the model's unquantised checkpoint and make its weights smaller when they are loaded: "
    f"quantization={' or '.join(map(repr, MADE))}."
)


def _made(asked: str) -> Quantization:
    if asked not in MADE:
        raise InvalidArgumentError(
            "quantization",
            asked,
            f"{' or '.join(map(repr, MADE))} for this checkpoint",
            f"Its weights are not quantised, and {asked!r} is not made when they are loaded.",
        )
    return Quantization(asked, (Group(EVERY_LINEAR_LAYER, UnquantizedFormat(MADE[asked])),), is_made=True)
