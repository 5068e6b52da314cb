"""Scales and groups are cut with the weights. Where a rank's part begins within one, both ranks have it."""

from __future__ import annotations

import random
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from nanovllm.layers.linear_method import LinearLayer, UnquantizedLinear
from nanovllm.layers.parallel import Shard, TensorParallel
from nanovllm.models.model_config import ModelConfig
from nanovllm.quantization.linear import DequantizedLinear
from nanovllm.quantization.registry import read_quantization
from nanovllm.utils.loader import materialise
from tests.end_to_end.test_oracle import engine_tokens, random_prompts, reference_tokens
from tests.models.paged_model import CPU, PagedModel, load_model
from tests.models.ranks import logits_of_ranks
from tests.quantization.published import WIDE, gptq, make_quantized
from tests.quantization.test_published import FORMATS, GPTQ, NUM_TOKENS

PROBE = 1.28  # 64 times the scale of static activations: every format keeps it as it is
ODD = {"hidden_size": 192, "intermediate_size": 192, "head_dim": 48}  # parts of 96 inputs on two ranks
FOUR_HEADS = {**WIDE, "num_key_value_heads": 4}
# Parts of 24 inputs and 24 outputs on eight ranks: words of 8 integers, groups of 32 and blocks of 128 are cut.
EIGHT_HEADS = {"hidden_size": 192, "intermediate_size": 192, "head_dim": 24, "num_attention_heads": 8}


def matrix_of(layer: LinearLayer) -> torch.Tensor:
    """The matrix that a layer multiplies by."""
    identity = torch.eye(layer.inputs.size)
    return layer.method.multiply(layer, PROBE * identity).T / PROBE


@pytest.mark.parametrize(
    ("size", "shape"),
    [
        *((size, shape) for size in (2, 4) for shape in ({}, WIDE, FOUR_HEADS, ODD)),
        *((8, EIGHT_HEADS | {"num_key_value_heads": number}) for number in (8, 2)),
    ],
)
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


@pytest.mark.parametrize("seed", range(60))
def test_parts_of_random_matrices(seed: int) -> None:
    """One to three matrices of random sizes, side by side in a layer, cut by outputs or by inputs."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    name = rng.choice(
        ["fp8_blocks", "fp8_channels", "fp8_tensor", "awq", "gptq_zeros", "gptq_desc_act", "packed_actorder"]
    )
    published = FORMATS[name]
    num_ranks, by_outputs = rng.choice([1, 2, 3, 8]), rng.random() < 0.5
    inputs = 32 * num_ranks * rng.randint(1, 5)
    outputs = [8 * rng.randint(1, 40) for _ in range(rng.randint(1, 3) if by_outputs else 1)]
    matrices = {f"matrix_{index}": torch.randn(size, inputs) for index, size in enumerate(outputs)}
    stored = {key: published.quantize(matrix) for key, matrix in matrices.items()}
    tensors = {f"model.{key}.{end}": tensor for key, (ends, _) in stored.items() for end, tensor in ends.items()}
    form = read_quantization(None, published.config).groups[0].format
    for rank in range(num_ranks):
        shares = {
            key: Shard(size, rank * size // num_ranks, (rank + 1) * size // num_ranks)
            if by_outputs
            else Shard.whole(size)
            for key, size in zip(matrices, outputs, strict=True)
        }
        part = inputs // num_ranks
        cut = Shard.whole(inputs) if by_outputs else Shard(inputs, rank * part, rank * part + part)
        layer = LinearLayer(shares, cut, method=UnquantizedLinear(), dtype=torch.float32, bias=False)
        layer.method = form.linear_method(layer) or DequantizedLinear([form] * len(outputs))
        layer.method.create_weights(layer)
        materialise(nn.ModuleList([layer]), CPU)
        sources = [source for source in layer.method.sources(layer, "model.layer") if source.name in tensors]
        assert all(tuple(tensors[source.name].shape) in source.shapes for source in sources)
        read = {each.name: tensors[each.name][each.index if tensors[each.name].dim() else ...] for each in sources}
        layer.method.store(layer, "model.layer", read)
        exact = [
            dense[shares[key].start : shares[key].stop, cut.start : cut.stop] for key, (_, dense) in stored.items()
        ]
        torch.testing.assert_close(matrix_of(layer), torch.cat(exact), rtol=1e-5, atol=1e-6)


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
