"""Scales and groups are cut with the weights. Where a rank's part begins within one, both ranks have it."""

from __future__ import annotations

from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from nanovllm.layers.linear_method import LinearLayer
from nanovllm.layers.parallel import TensorParallel
from nanovllm.models.model_config import ModelConfig
from tests.end_to_end.test_oracle import engine_tokens, random_prompts, reference_tokens
from tests.models.paged_model import PagedModel, load_model
from tests.models.ranks import logits_of_ranks
from tests.quantization.published import WIDE, gptq, make_quantized
from tests.quantization.test_published import FORMATS, GPTQ, NUM_TOKENS

PROBE = 1.28  # 64 times the scale of static activations: every format keeps it as it is
ODD = {"hidden_size": 192, "intermediate_size": 192, "head_dim": 48}  # parts of 96 inputs on two ranks
FOUR_HEADS = {**WIDE, "num_key_value_heads": 4}


def matrix_of(layer: LinearLayer) -> torch.Tensor:
    """The matrix that a layer multiplies by."""
    identity = torch.eye(layer.inputs.size)
    return layer.method.multiply(layer, PROBE * identity).T / PROBE


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("shape", [{}, WIDE, FOUR_HEADS, ODD], ids=["small", "wide", "four_heads", "odd"])
@pytest.mark.parametrize(
    "name", ["fp8_blocks", "fp8_static", "fp8_channels", "awq", "gptq_zeros", "gptq_desc_act", "packed_actorder"]
)
def test_ranks_have_their_parts(name: str, shape: dict[str, Any], size: int, tmp_path: Path) -> None:
    published = FORMATS[name]
    plain, quantized = make_quantized(tmp_path, published.quantize, published.config, **shape)
    for rank in range(size):
        exact = dict(load_model(plain, TensorParallel(rank, size)).named_modules())
        for prefix, layer in load_model(quantized, TensorParallel(rank, size)).named_modules():
            if isinstance(layer, LinearLayer):
                torch.testing.assert_close(matrix_of(layer), exact[prefix].weight, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("kept", "shape", "size"), [("fp8", FOUR_HEADS, 1), ("fp8", FOUR_HEADS, 2), (None, ODD, 2)])
def test_blocks_stay_fp8_where_they_can(kept: str | None, shape: dict[str, Any], size: int, tmp_path: Path) -> None:
    """Parts that begin within a block are kept in the model's dtype, on every rank."""
    published = FORMATS["fp8_blocks"]
    _, quantized = make_quantized(tmp_path, published.quantize, published.config, **shape)
    for rank in range(size):
        model = load_model(quantized, TensorParallel(rank, size))
        layers = [layer for layer in model.modules() if isinstance(layer, LinearLayer)]
        assert Counter(getattr(layer.method, "kept_as", None) for layer in layers) == {kept: len(layers)}


@pytest.mark.parametrize("name", ["awq", "gptq_desc_act"])
def test_logits_of_two_ranks(name: str, tmp_path: Path) -> None:
    published = FORMATS[name]
    plain, quantized = make_quantized(tmp_path, published.quantize, published.config, **ODD)
    tokens = {0: [3, 1, 4, 1, 5], 1: [9, 2]}
    expected = PagedModel(load_model(plain), ModelConfig.from_folder(plain)).step(tokens)
    for rank in logits_of_ranks(quantized, 2, tokens):
        for seq, logits in expected.items():
            torch.testing.assert_close(rank[seq], logits, rtol=0, atol=1e-4)


@pytest.mark.heavy("starts two processes")
def test_tokens_of_two_processes(tmp_path: Path) -> None:
    plain, quantized = make_quantized(tmp_path, partial(gptq, symmetric=False), GPTQ | {"sym": False}, **ODD)
    prompts = random_prompts(320)
    expected = reference_tokens(plain, prompts, NUM_TOKENS)
    assert engine_tokens(quantized, prompts, NUM_TOKENS, tensor_parallel_size=2) == expected
