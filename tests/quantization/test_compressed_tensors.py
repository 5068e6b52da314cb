"""Checkpoints that the library compressed-tensors compresses give the tokens of the weights that it decompresses."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.end_to_end.test_oracle import engine_tokens, random_prompts, reference_tokens
from tests.models.checkpoints import make_checkpoint
from tests.quantization.published import (
    WIDE,
    Tensors,
    fp8_groups,
    fp8_rows,
    fp8_static,
    int8_rows,
    make_quantized,
    rounded_inputs,
)
from tests.quantization.test_published import MOST_DIFFERENT, NUM_TOKENS

compressors = pytest.importorskip("compressed_tensors.compressors")
quantization = pytest.importorskip("compressed_tensors.quantization")
helpers = pytest.importorskip("compressed_tensors.quantization.utils.helpers")

INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}
INT8 = {"num_bits": 8, "type": "int", "strategy": "channel"}
FP8 = {"num_bits": 8, "type": "float", "strategy": "channel"}
BLOCKS = {**FP8, "strategy": "block", "block_structure": [128, 128]}
TOKENS = {"strategy": "token", "dynamic": True}
STATIC = {"num_bits": 8, "type": "float", "strategy": "tensor"}
GROUPS = {"num_bits": 8, "type": "float", "strategy": "group", "group_size": 128, "dynamic": True}
# format, arguments of the weights, arguments of the activations, how the latter are rounded
SCHEMES: dict[str, tuple[str, dict[str, Any], dict[str, Any] | None, Callable[..., torch.Tensor] | None]] = {
    "W4A16": ("pack-quantized", INT4, None, None),
    "W4A16_groups_of_128": ("pack-quantized", INT4 | {"group_size": 128}, None, None),
    "W4A16_channel": ("pack-quantized", {"num_bits": 4, "type": "int", "strategy": "channel"}, None, None),
    "W4A16_ASYM": ("pack-quantized", INT4 | {"symmetric": False}, None, None),
    "W8A16": ("pack-quantized", INT8, None, None),
    "W8A8": ("int-quantized", INT8, {"num_bits": 8, "type": "int"} | TOKENS, int8_rows),
    "FP8_DYNAMIC": ("float-quantized", FP8, {"num_bits": 8, "type": "float"} | TOKENS, fp8_rows),
    "FP8": ("float-quantized", FP8 | {"strategy": "tensor"}, STATIC, fp8_static),
    "FP8_BLOCK": ("float-quantized", BLOCKS, GROUPS, fp8_groups),
}


def compress(weight: torch.Tensor, scheme: Any, layout: str) -> tuple[Tensors, torch.Tensor]:
    """Returns the library's tensors for a matrix, and the matrix that it makes of them."""
    args = scheme.weights
    size = {"group": args.group_size, "tensor": None}.get(args.strategy, weight.shape[1])
    if args.strategy == "block":
        blocks = weight.unflatten(0, (-1, 128)).unflatten(2, (-1, 128))
        low, high = blocks.amin((1, 3)), blocks.amax((1, 3))
    elif size is None:
        low, high = weight.min(), weight.max()
    else:
        low, high = (getattr(weight.unflatten(1, (-1, size)), end)(-1) for end in ("amin", "amax"))
    scale, zeros = helpers.calculate_qparams(low, high, args)
    compressor = compressors.BaseCompressor.get_value_from_registry(layout)
    tensors = compressor.compress(
        {"weight": weight, "weight_scale": scale, "weight_zero_point": zeros.to(torch.int8)}, scheme
    )
    if scheme.input_activations is not None and not scheme.input_activations.dynamic:
        tensors["input_scale"] = torch.tensor([0.02])
    return tensors, compressor.decompress(dict(tensors), scheme)["weight"]


MOE = {"make": partial(make_checkpoint, family="qwen3_moe"), "hidden_size": 128, "moe_intermediate_size": 128}


@pytest.mark.parametrize(
    ("name", "shape"),
    [*((name, WIDE) for name in SCHEMES), *((name, MOE) for name in ("W4A16", "W4A16_ASYM", "W8A16", "W8A8", "FP8"))],
    ids=lambda value: value if isinstance(value, str) else "experts" if value is MOE else "dense",
)
def test_greedy_tokens_equal_transformers(name: str, shape: dict[str, Any], tmp_path: Path) -> None:
    layout, weights, activations, rounding = SCHEMES[name]
    scheme = quantization.QuantizationScheme(targets=["Linear"], weights=weights, input_activations=activations)
    config = quantization.QuantizationConfig(
        config_groups={"group_0": scheme},
        format=layout,
        quantization_status="compressed",
        ignore=["lm_head", "re:.*mlp.gate$"],
    )
    plain, quantized = make_quantized(
        tmp_path,
        lambda weight: compress(weight, scheme, layout),
        config.model_dump(mode="json"),
        sharded=name == "W4A16_ASYM",
        **shape,
    )
    prompts = random_prompts(320)
    with rounded_inputs(rounding):
        expected = reference_tokens(plain, prompts, NUM_TOKENS)
    tokens = engine_tokens(quantized, prompts, NUM_TOKENS)
    num_different = sum(one != other for one, other in zip(tokens, expected, strict=True))
    assert num_different <= (0 if rounding is None else MOST_DIFFERENT)
