"""Checkpoints in published formats give the tokens of a transformers model with the weights that they stand for.

Where activations are rounded too, a last bit decides now and then which of two neighbours a value becomes, and with it
a few tokens of the 64 prompts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.end_to_end.test_oracle import engine_tokens, random_prompts, reference_tokens
from tests.quantization.published import (
    WIDE,
    Quantize,
    awq,
    fp8_blocks,
    fp8_channels,
    fp8_groups,
    fp8_rows,
    fp8_static,
    fp8_tensor,
    gptq,
    make_quantized,
    packed_groups,
    rounded_inputs,
)

NUM_TOKENS = 24
# Of 64 prompts, where activations are rounded; without the rounding 63 are. A sum's last bit, by which a value falls to
# one side or the other, is the CPU's own: 0 to 5 were seen.
MOST_DIFFERENT = 8


@dataclass(frozen=True)
class Published:
    """A format: how matrices are stored, what config.json says, and how activations are rounded."""

    quantize: Quantize
    config: dict[str, Any]
    rounding: Callable[[torch.Tensor], torch.Tensor] | None = None
    shape: dict[str, Any] = field(default_factory=lambda: WIDE)
    sharded: bool = False


FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic"}
FP8_STATIC = FP8 | {"activation_scheme": "static"}
FP8_BLOCKS = FP8 | {"weight_block_size": [128, 128]}
AWQ = {"quant_method": "awq", "bits": 4, "version": "gemm", "zero_point": True}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False}
PACKED_GROUPS = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": False}
PACKED = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "config_groups": {"group_0": {"targets": ["Linear"], "weights": PACKED_GROUPS | {"actorder": "group"}}},
    "ignore": ["lm_head"],
}
FORMATS = {
    "fp8_blocks": Published(fp8_blocks, FP8_BLOCKS, fp8_groups),
    "fp8_blocks_sharded": Published(fp8_blocks, FP8_BLOCKS, fp8_groups, sharded=True),
    "fp8_blocks_partial": Published(fp8_blocks, FP8_BLOCKS, fp8_groups, WIDE | {"hidden_size": 192}),
    "fp8_tensor": Published(fp8_tensor, FP8, fp8_rows),
    "fp8_tensor_of_one_dimension": Published(partial(fp8_tensor, shape=(1,)), FP8, fp8_rows),
    "fp8_static": Published(partial(fp8_tensor, input_scale=True), FP8_STATIC, fp8_static),
    "fp8_channels": Published(fp8_channels, FP8, fp8_rows, {"attention_bias": True}),
    "awq": Published(awq, AWQ | {"group_size": 32}, shape={}),
    "awq_one_group": Published(partial(awq, size=-1), AWQ | {"group_size": -1, "version": "GEMM"}, shape={}),
    "awq_groups_of_64": Published(partial(awq, size=64), AWQ | {"group_size": 64}, sharded=True),
    "gptq": Published(gptq, GPTQ, shape={"attention_bias": True}),
    "gptq_one_group": Published(partial(gptq, size=-1), GPTQ | {"group_size": -1}, shape={}),
    "gptq_zeros": Published(partial(gptq, symmetric=False), GPTQ | {"sym": False}, shape={}),
    "gptq_v2": Published(
        partial(gptq, symmetric=False, version=2), GPTQ | {"sym": False, "checkpoint_format": "gptq_v2"}, shape={}
    ),
    "packed_actorder": Published(packed_groups, PACKED, shape={}),
    "gptq_desc_act": Published(
        partial(gptq, symmetric=False, desc_act=True), GPTQ | {"sym": False, "desc_act": True}, shape={}
    ),
}


@pytest.mark.parametrize("name", FORMATS)
def test_greedy_tokens_equal_transformers(name: str, tmp_path: Path) -> None:
    published = FORMATS[name]
    plain, quantized = make_quantized(
        tmp_path, published.quantize, published.config, sharded=published.sharded, **published.shape
    )
    prompts = random_prompts(320)
    with rounded_inputs(published.rounding):
        expected = reference_tokens(plain, prompts, NUM_TOKENS)
    tokens = engine_tokens(quantized, prompts, NUM_TOKENS)
    num_different = sum(one != other for one, other in zip(tokens, expected, strict=True))
    assert num_different <= (0 if published.rounding is None else MOST_DIFFERENT)
