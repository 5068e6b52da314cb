"""Weights that are quantised when they are loaded: `quantization="fp8"`, "int8" or "int4"."""

from __future__ import annotations

import logging
import random
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from nanovllm import LLM, SamplingParams
from nanovllm.errors import ModelLoadError
from nanovllm.kernels.int4_packing import unpack_int4
from nanovllm.layers.layernorm import RMSNorm
from nanovllm.layers.linear_method import LinearLayer, UnquantizedLinear
from nanovllm.layers.parallel import Shard
from nanovllm.models.checkpoint import TINY_MODEL_FOLDER
from nanovllm.quantization.registry import MADE
from nanovllm.utils.loader import materialise
from tests.end_to_end.test_families import prompts_that_share, random_schedule
from tests.end_to_end.test_oracle import engine_tokens, random_prompts, reference_tokens
from tests.models.checkpoints import FAMILIES, make_checkpoint
from tests.models.paged_model import CPU, load_model
from tests.models.qwen3_checkpoints import make_qwen3_checkpoint
from tests.models.test_families import WITH_MOST_PARTS
from tests.quantization.published import fp8_rows, int8_channels
from tests.quantization.test_published import NUM_TOKENS


def quantized_layer(
    outputs: int, weight: torch.Tensor, quantization: str, dtype: torch.dtype = torch.float32
) -> tuple[LinearLayer, torch.Tensor]:
    """A layer of two matrices with a bias, and the weight that its parameters stand for."""
    inputs = weight.shape[1]
    pieces = {"one": Shard.whole(outputs), "two": Shard.whole(len(weight) - outputs)}
    layer = LinearLayer(pieces, Shard.whole(inputs), method=UnquantizedLinear(), dtype=dtype, bias=True)
    layer.method = method = MADE[quantization](layer, [])
    method.create_weights(layer)
    materialise(nn.ModuleList([layer]), CPU)
    layer.bias.copy_(torch.randn(len(weight)))
    method.store_unquantized(layer, weight)
    return layer, torch.cat(
        [method.quantize(rows).dequantized() for rows in weight.split([outputs, len(weight) - outputs])]
    )


@pytest.mark.parametrize("quantization", MADE)
@pytest.mark.parametrize(("outputs", "inputs"), [(3, 16), (128, 128), (7, 96), (64, 200), (30, 384), (1, 64)])
def test_the_product_is_that_of_the_dequantised_weight(quantization: str, outputs: int, inputs: int) -> None:
    torch.manual_seed(outputs)
    weight = torch.randn(2 * outputs, inputs) * torch.rand(2 * outputs, 1)
    weight[0] = 0.0
    layer, dense = quantized_layer(outputs, weight, quantization)
    hidden, residual = torch.randn(5, inputs), torch.randn(5, outputs)
    norm = RMSNorm(inputs, 1e-6, torch.float32)
    norm.weight = nn.Parameter(torch.rand(inputs), requires_grad=False)
    rounded = fp8_rows if quantization == "fp8" else lambda activations: activations

    def product(activations: torch.Tensor) -> torch.Tensor:
        return rounded(activations).double() @ dense.double().T + layer.bias

    method = layer.method
    torch.testing.assert_close(
        method.multiply(layer, hidden, layer.bias).double(), product(hidden), rtol=1e-5, atol=1e-4
    )
    gate, up = product(norm(hidden)[0]).chunk(2, dim=1)
    expected = torch.nn.functional.silu(gate) * up + residual
    fused = method.multiply_fused(layer, hidden, layer.bias, norm=norm, gated=True, residual=residual)
    torch.testing.assert_close(fused.double(), expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("seed", range(20))
def test_weights_are_rounded_to_the_nearest_value(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    inputs = [32, 64, 96, 128, 256][seed % 5]
    weight = torch.randn(12, inputs, generator=generator) * 10.0 ** torch.randint(-4, 4, (12, 1), generator=generator)
    weight += 3 * weight.mean(1, keepdim=True)
    for quantization in MADE:
        matrix = quantized_layer(6, weight, quantization)[0].method.quantize(weight)
        step = matrix.scale.repeat_interleave(matrix.block[1], 1)
        if quantization == "fp8":  # three bits after the leading one; the smallest numbers are 2⁻⁹ apart
            step = torch.maximum(weight.abs() / 8, step / 512)
        assert bool(((matrix.dequantized() - weight).abs() <= step * 0.5001).all()), quantization


def test_int4_scales_of_a_model_of_16_bits_have_16_bits() -> None:
    """Values are rounded to steps of the scale that is kept."""
    weight = torch.randn(16, 384, generator=torch.Generator().manual_seed(5)) * 0.03
    weight[0], weight[1, 7] = -1e-6, 3.0  # the first has a scale of one or two units of the smallest number
    layer, dense = quantized_layer(6, weight, "int4", torch.bfloat16)
    scale, zeros = layer.weight_scale, layer.weight_zeros
    assert scale.dtype is zeros.dtype is torch.float16
    assert int(zeros.max()) <= 15
    values = unpack_int4(layer.weight, 384)
    differences = values - zeros.T.float().repeat_interleave(128, 1)
    assert torch.equal(differences * scale.T.float().repeat_interleave(128, 1), dense)
    step, offset = (entries.T.float().repeat_interleave(128, 1) for entries in (scale, zeros))
    assert torch.equal(values.float(), ((weight / step).round() + offset).clamp(0, 15))


def test_an_int4_scale_that_float16_cannot_hold_is_an_error() -> None:
    weight = torch.full((4, 64), 1e6)
    with pytest.raises(ModelLoadError, match=r"a scale of 66666\.7, and float16, in which it is kept, ends at 65504"):
        quantized_layer(2, weight, "int4", torch.bfloat16)
    assert torch.allclose(quantized_layer(2, weight, "int4")[1], weight)


def test_zeros_and_single_values_stay() -> None:
    for quantization in MADE:
        weight = torch.zeros(4, 64)
        weight[1, 3], weight[2, 5], weight[3, 0] = 0.75, -1e-3, 1e-44
        assert torch.allclose(quantized_layer(2, weight, quantization)[1], weight, rtol=1e-6), quantization


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_values_that_are_not_finite_stay_seen(value: float) -> None:
    for quantization in MADE:
        weight = torch.ones(4, 64)
        weight[1, 3] = value
        rows = quantized_layer(2, weight, quantization)[1].isfinite().all(1)
        assert rows.tolist() == [True, False, True, True], quantization


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_of_every_family(family: str, tmp_path: Path) -> None:
    """With INT8 weights, whose rounding is simple: those of transformers with the rounded weights."""
    folder = make_checkpoint(tmp_path, family, WITH_MOST_PARTS[family])
    prompts = random_prompts(320)
    tokens = engine_tokens(folder, prompts, NUM_TOKENS, quantization="int8")
    for path in folder.glob("*.safetensors"):
        rounded = {
            name: int8_channels(tensor)[1]
            if tensor.dim() == 2 and not any(kept in name for kept in ("embed", "lm_head", "mlp.gate."))
            else tensor
            for name, tensor in load_file(path).items()
        }
        save_file(rounded, path, {"format": "pt"})
    assert tokens == reference_tokens(folder, prompts, NUM_TOKENS)


@pytest.mark.parametrize("quantization", ["int8", "int4"])  # activations are not rounded
def test_the_same_tokens_under_any_schedule(quantization: str, tmp_path: Path) -> None:
    rng = random.Random(quantization)
    folder = make_qwen3_checkpoint(tmp_path, attention_bias=True, num_key_value_heads=4)
    prompts = prompts_that_share(rng)
    expected = engine_tokens(folder, prompts, NUM_TOKENS, quantization=quantization)
    for _ in range(2):
        schedule = random_schedule(rng)
        assert engine_tokens(folder, prompts, NUM_TOKENS, quantization=quantization, **schedule) == expected, schedule


@pytest.mark.parametrize("quantization", MADE)
def test_a_layer_at_a_time(quantization: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No more than one layer's unquantised weights are in memory."""
    folder = make_qwen3_checkpoint(tmp_path)
    alive: list[weakref.ref[torch.Tensor]] = []
    load_model(folder, quantization=quantization)
    method_class = type(MADE[quantization](quantized_layer(1, torch.ones(2, 32), quantization)[0], []))
    store = method_class.store

    def watched(self: Any, layer: LinearLayer, prefix: str, tensors: Mapping[str, torch.Tensor]) -> None:
        assert not any(each() is not None for each in alive), "the layer before is still in memory"
        alive.extend(map(weakref.ref, tensors.values()))
        store(self, layer, prefix, tensors)

    monkeypatch.setattr(method_class, "store", watched)
    model = load_model(folder, quantization=quantization)
    assert len(alive) == 2 * 7  # matrices
    layers = [layer for layer in model.modules() if isinstance(layer, LinearLayer)]
    unquantized = sum(4 * layer.num_outputs * layer.inputs.size for layer in layers)
    kept = sum(parameter.nbytes for layer in layers for parameter in layer.parameters())
    assert kept < unquantized * (0.29 if quantization != "int4" else 0.25)


def test_the_log_says_what_runs_and_how_large_it_is(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="nanovllm"):
        load_model(TINY_MODEL_FOLDER, quantization="int4")
    (record,) = (record for record in caplog.records if getattr(record, "event", "") == "quantization.chosen")
    size = record.fields["gigabytes"]
    expected = f"Quantization int4, made from unquantised weights: {size:.2f}GB of weights, linear layers: 16 int4"
    assert record.getMessage() == expected
    assert 4 * 512 * 256 < size * 1e9 < 4 * 512 * 256 + 0.6 * 4 * 256 * (512 + 256 + 3 * 512)  # the table is float32


@pytest.mark.parametrize("quantization", MADE)
def test_random_weights_are_quantised_too(quantization: str) -> None:
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    tokens = []
    for _ in range(2):
        with LLM("tiny", device="cpu", load_format="dummy", quantization=quantization, num_kvcache_blocks=16) as llm:
            assert llm.llm_engine.resolved.quantization == quantization
            tokens.append(llm.generate([[5, 6, 7]], params, use_tqdm=False)[0]["token_ids"])
    assert tokens[0] == tokens[1]
