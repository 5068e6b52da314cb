"""Experts with quantised weights: a small Qwen3-MoE gives the logits and tokens of the weights that they stand for."""

from __future__ import annotations

import logging
import random
import re
import weakref
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from nanovllm import LLM, SamplingParams
from nanovllm.config import EngineConfig
from nanovllm.errors import ModelLoadError
from nanovllm.experts.experts_method import Experts
from nanovllm.kernels.expert_matrices import ExpertMatrices
from nanovllm.layers.linear_method import LinearLayer
from nanovllm.layers.parallel import TensorParallel
from nanovllm.models.builtin_shapes import BUILTIN_SHAPES
from nanovllm.models.model_config import ModelConfig
from nanovllm.models.qwen3_moe import Qwen3MoeForCausalLM
from nanovllm.quantization.experts import QuantizedExperts
from nanovllm.quantization.linear import QuantizedLinear
from nanovllm.quantization.registry import MADE, read_quantization
from nanovllm.runner.model_plan import ModelPlan
from tests.end_to_end.test_families import prompts_that_share, random_schedule
from tests.end_to_end.test_oracle import engine_tokens, random_prompts, reference_tokens
from tests.models.checkpoints import make_checkpoint
from tests.models.paged_model import CPU, PagedModel, fp32_context, load_model
from tests.models.ranks import logits_of_ranks
from tests.quantization.published import (
    Quantize,
    awq,
    change_config,
    fp8_blocks,
    fp8_channels,
    fp8_rows,
    fp8_tensor,
    gptq,
    int8_channels,
    make_quantized,
    packed_groups,
    rounded_inputs,
    save,
)
from tests.quantization.test_published import (
    AWQ,
    FP8,
    FP8_BLOCKS,
    FP8_STATIC,
    GPTQ,
    MOST_DIFFERENT,
    NUM_TOKENS,
    PACKED,
)

make_moe = partial(make_checkpoint, family="qwen3_moe")
INT8 = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 8, "type": "int", "strategy": "channel"},
            "input_activations": {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True},
        }
    },
    "ignore": ["lm_head", "re:.*mlp.gate$"],
}
ZEROS = {"sym": False}
FORMATS: dict[str, tuple[Quantize, dict[str, Any]]] = {
    "fp8_blocks": (fp8_blocks, FP8_BLOCKS),
    "fp8_tensor": (fp8_tensor, FP8),
    "fp8_static": (partial(fp8_tensor, input_scale=True), FP8_STATIC),
    "fp8_channels": (fp8_channels, FP8),
    "int8": (int8_channels, INT8),
    "awq": (awq, AWQ | {"group_size": 32}),
    "gptq": (gptq, GPTQ),
    "gptq_zeros": (partial(gptq, symmetric=False), GPTQ | ZEROS),
    "gptq_one_group": (partial(gptq, size=-1), GPTQ | {"group_size": -1}),
}
SMALL = {"moe_intermediate_size": 64}
WIDE = {"hidden_size": 160, "moe_intermediate_size": 192}  # more than a block; 96 or 48 of a rank are no whole one
TOKENS = {0: [3, 1, 4, 1, 5], 1: [9, 2]}


def make(folder: Path, name: str, *, experts_only: bool = False, **shape: Any) -> tuple[Path, Path]:
    """Returns a quantised checkpoint, and one with the weights that it stands for."""
    quantize, config = FORMATS[name]
    if experts_only:  # since the activations of linear layers may be rounded
        ignore = "ignore" if "ignore" in config else "modules_to_not_convert"
        config = config | {ignore: [*config.get(ignore, []), "self_attn"]}
    keep = (lambda name: "self_attn" in name) if experts_only else (lambda name: False)
    return make_quantized(folder, quantize, config, make=make_moe, keep=keep, **{**SMALL, **shape})


def experts_of(model: nn.Module) -> list[Experts]:
    return [module for module in model.modules() if isinstance(module, Experts)]


def kept_as(model: nn.Module) -> list[str | None]:
    return [getattr(experts.method, "kept_as", None) for experts in experts_of(model)]


@pytest.mark.parametrize("shape", [SMALL, WIDE], ids=["small", "wide"])
@pytest.mark.parametrize("name", FORMATS)
def test_logits_are_those_of_the_dequantised_weights(name: str, shape: dict[str, Any], tmp_path: Path) -> None:
    plain, quantized = make(tmp_path, name, experts_only=True, **shape)
    config, model = ModelConfig.from_folder(plain), load_model(quantized)
    assert set(kept_as(model)) == {{"fp8": "fp8", "int": "int8"}.get(name[:3], "int4")}
    ours, exact = PagedModel(model, config), PagedModel(load_model(plain), config)
    for work in (TOKENS, {0: [9], 1: [7]}):  # prefill, then few rows
        got = ours.step(work)
        for seq, logits in exact.step(work).items():
            torch.testing.assert_close(got[seq], logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["fp8_channels", "awq"])
def test_greedy_tokens_equal_transformers(name: str, tmp_path: Path) -> None:
    plain, quantized = make(tmp_path, name, mlp_only_layers=[0])
    prompts = random_prompts(320)
    with rounded_inputs(fp8_rows if name == "fp8_channels" else None):
        expected = reference_tokens(plain, prompts, NUM_TOKENS)
    tokens = engine_tokens(quantized, prompts, NUM_TOKENS)
    num_different = sum(one != other for one, other in zip(tokens, expected, strict=True))
    assert num_different <= (MOST_DIFFERENT if name == "fp8_channels" else 0)


@pytest.mark.parametrize("name", ["fp8_blocks", "gptq_zeros"])
def test_the_same_tokens_under_any_schedule(name: str, tmp_path: Path) -> None:
    rng = random.Random(name)
    _, quantized = make(tmp_path, name, experts_only=True)
    prompts = prompts_that_share(rng)
    expected = engine_tokens(quantized, prompts, NUM_TOKENS)
    for _ in range(2):
        schedule = random_schedule(rng)
        assert engine_tokens(quantized, prompts, NUM_TOKENS, **schedule) == expected, schedule


# ---- ranks


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("shape", [SMALL, WIDE], ids=["small", "wide"])
@pytest.mark.parametrize("name", ["fp8_blocks", "fp8_channels", "int8", "awq", "gptq_zeros", "gptq_one_group"])
def test_ranks_have_their_parts(name: str, shape: dict[str, Any], size: int, tmp_path: Path) -> None:
    """A cut may lie within a block or a group: both ranks have its scale."""
    plain, quantized = make(tmp_path, name, **shape, num_key_value_heads=4)
    for rank in range(size):
        parallel = TensorParallel(rank, size)
        for ours, exact in zip(
            experts_of(load_model(quantized, parallel)), experts_of(load_model(plain, parallel)), strict=True
        ):
            for stack in ("gate_up", "down"):
                dense = getattr(exact, f"{stack}_proj").unflatten(0, (exact.num_experts, -1))
                torch.testing.assert_close(matrices_of(ours, stack), dense, rtol=1e-5, atol=1e-6)


def matrices_of(experts: Experts, stack: str) -> torch.Tensor:
    """The matrices that a stack of all experts stands for."""
    if hasattr(experts, f"{stack}_proj"):
        return experts.get_parameter(f"{stack}_proj").unflatten(0, (experts.num_experts, -1))
    assert isinstance(experts.method, QuantizedExperts)
    matrices = experts.method.matrices(experts, stack)
    return torch.stack([matrices[expert] for expert in range(experts.num_experts)])


@pytest.mark.parametrize(
    ("name", "inner_size", "kept"),
    [
        ("fp8_blocks", 192, "fp8"),
        ("fp8_blocks", 96, None),
        ("awq", 64, "int4"),
        ("awq", 96, None),
        ("int8", 96, "int8"),
    ],
)
def test_parts_that_no_scheme_can_keep_are_dequantised(
    name: str, inner_size: int, kept: str | None, tmp_path: Path
) -> None:
    """Parts of 48 inputs begin within a third of a block of 128: they are kept in the model's dtype, on every rank."""
    _, quantized = make(tmp_path, name, moe_intermediate_size=inner_size)
    for rank in range(2):
        assert kept_as(load_model(quantized, TensorParallel(rank, 2))) == [kept, kept]


@pytest.mark.parametrize("name", ["fp8_blocks", "int8", "awq"])
def test_logits_of_two_ranks(name: str, tmp_path: Path) -> None:
    plain, quantized = make(tmp_path, name, experts_only=True, **WIDE)
    expected = PagedModel(load_model(plain), ModelConfig.from_folder(plain)).step(TOKENS)
    for rank in logits_of_ranks(quantized, 2, TOKENS):
        for seq, logits in expected.items():
            torch.testing.assert_close(rank[seq], logits, rtol=0, atol=1e-4)


# ---- which modules are quantised


def test_a_list_of_modules_as_qwen_publishes_it(tmp_path: Path) -> None:
    """Qwen3-30B-A3B-FP8 lists the routers and the head; GPTQ checkpoints do not list routers, and have them plain."""
    listed = ["lm_head", *(f"model.layers.{layer}.mlp.gate" for layer in range(2))]
    for name, (quantize, config) in {"fp8": FORMATS["fp8_blocks"], "gptq": FORMATS["gptq"]}.items():
        config = config | ({"modules_to_not_convert": listed} if name == "fp8" else {})
        _, quantized = make_quantized(tmp_path / name, quantize, config, make=make_moe, **SMALL)
        model = load_model(quantized)
        assert model.get_parameter("model.layers.1.mlp.gate.weight").dtype is torch.float32
        assert kept_as(model) == [name if name == "fp8" else "int4"] * 2


@pytest.mark.parametrize(
    ("ignored", "kept"),
    [("model.layers.0.mlp", [None, "int8"]), ("model.layers.1.mlp.experts.5", ["int8", None]), ("experts", [None] * 2)],
)
def test_experts_that_are_not_quantised(ignored: str, kept: list[str | None], tmp_path: Path) -> None:
    """A layer, or one expert of a layer: then the others of the layer are kept in the model's dtype too."""
    quantize, config = FORMATS["int8"]
    config = config | {"ignore": [*config["ignore"], ignored, "self_attn"]}
    plain, quantized = make_quantized(
        tmp_path,
        quantize,
        config,
        make=make_moe,
        keep=lambda name: f".{ignored}." in f".{name}" or "self_attn" in name,
        **SMALL,
    )
    model = load_model(quantized)
    assert kept_as(model) == kept
    expected = PagedModel(load_model(plain), ModelConfig.from_folder(plain)).step(TOKENS)
    for seq, logits in PagedModel(model, ModelConfig.from_folder(plain)).step(TOKENS).items():
        torch.testing.assert_close(logits, expected[seq], rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("quantize", "config"),
    [(partial(gptq, desc_act=True), GPTQ | {"desc_act": True}), (packed_groups, PACKED)],
    ids=["gptq", "compressed-tensors"],
)
def test_an_order_of_inputs_is_refused(quantize: Quantize, config: dict[str, Any], tmp_path: Path) -> None:
    _, quantized = make_quantized(tmp_path, quantize, config, make=make_moe, **SMALL)
    with pytest.raises(ModelLoadError, match=r"desc_act=true or actorder='group', .* not supported for experts"):
        load_model(quantized)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors, name: tensors.pop(f"{name}.weight_scale"), r"missing.*experts\.3\.up_proj\.weight_scale"),
        (
            lambda tensors, name: tensors.update({f"{name}.weight_scale": torch.ones(63, 1)}),
            r"experts\.3\.up_proj\.weight_scale has shape \[63, 1\] and needs \[64, 1\]",
        ),
        (
            lambda tensors, name: tensors.update({f"{name}.weight": tensors[f"{name}.weight"].float()}),
            r"experts\.3\.up_proj\.weight has dtype F32 and needs",
        ),
        (
            lambda tensors, name: tensors.update({f"{name}.qzeros": torch.ones(1)}),
            r"unknown to the model: .*experts\.3\.up_proj\.qzeros",
        ),
    ],
    ids=["missing", "shape", "dtype", "left over"],
)
def test_files_that_do_not_fit_are_named(change: Any, message: str, tmp_path: Path) -> None:
    _, quantized = make(tmp_path, "int8")
    tensors = load_file(quantized / "model.safetensors")
    change(tensors, "model.layers.1.mlp.experts.3.up_proj")
    save(quantized, tensors)
    with pytest.raises(ModelLoadError, match=message):
        load_model(quantized)


def test_quantised_experts_without_a_quantization_config(tmp_path: Path) -> None:
    _, quantized = make(tmp_path, "fp8_blocks", experts_only=True)
    change_config(quantized, quantization_config=None)
    with pytest.raises(ModelLoadError, match="config.json needs a quantization_config"):
        load_model(quantized)


# ---- made at load time


@pytest.mark.parametrize("stacked", [False, True], ids=["single", "stacked"])
@pytest.mark.parametrize("quantization", MADE)
def test_weights_that_are_made_when_they_are_loaded(quantization: str, stacked: bool, tmp_path: Path) -> None:
    """They are the checkpoint's, rounded, whichever way it stores them."""
    folder = make_moe(tmp_path, save_original_format=not stacked)
    for ours, exact in zip(
        experts_of(load_model(folder, quantization=quantization)), experts_of(load_model(folder)), strict=True
    ):
        assert getattr(ours.method, "kept_as", None) == quantization
        for stack in ("gate_up", "down"):
            matrices, dense = matrices_of(ours, stack), matrices_of(exact, stack)
            bound = {"fp8": 1 / 28, "int8": 1 / 250, "int4": 1 / 14}[quantization]  # of the range: half a step
            largest = dense.abs().amax(-1, keepdim=True)
            assert bool(((matrices - dense).abs() <= bound * largest).all())
            assert not torch.equal(matrices, dense)


@pytest.mark.parametrize("quantization", MADE)
def test_an_expert_at_a_time(quantization: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unquantised, no more than one expert's gate and up are in memory, and nothing of them stays."""
    folder = make_moe(tmp_path)
    alive: list[weakref.ref[torch.Tensor]] = []
    store = QuantizedLinear.store

    def watched(self: Any, layer: LinearLayer, prefix: str, tensors: Mapping[str, torch.Tensor]) -> None:
        assert not any(each() is not None for each in alive), "the matrices before are still in memory"
        assert len(tensors) <= 3
        alive.extend(map(weakref.ref, tensors.values()))
        store(self, layer, prefix, tensors)

    monkeypatch.setattr(QuantizedLinear, "store", watched)
    model = load_model(folder, quantization=quantization)
    assert len(alive) == 2 * (4 + 8 * 3)  # matrices
    for experts in experts_of(model):
        held = [each for each in vars(experts).values() if isinstance(each, torch.Tensor)]
        kept = sum(each.nbytes for each in (*experts.parameters(), *experts.buffers(), *held))
        unquantized = 4 * 8 * 3 * experts.hidden_size * experts.inner.size
        assert kept < unquantized * (0.4 if quantization == "int4" else 0.31)  # INT4 pads rows to 128 inputs


def test_a_product_converts_the_chosen_experts_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_model(make_moe(tmp_path), quantization="int8")
    converted: list[int] = []
    convert = ExpertMatrices.__getitem__

    def watched(self: ExpertMatrices, expert: int) -> torch.Tensor:
        converted.append(expert)
        return convert(self, expert)

    monkeypatch.setattr(ExpertMatrices, "__getitem__", watched)
    PagedModel(model, ModelConfig.from_folder(tmp_path)).step({0: [5]})
    assert len(converted) == 2 * 2 * 2  # layers, chosen experts, stacks


def test_the_log_counts_layers_with_experts(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = make_moe(tmp_path, mlp_only_layers=[0])
    with caplog.at_level(logging.INFO, logger="nanovllm"):
        load_model(folder, quantization="int8")
    (record,) = (record for record in caplog.records if getattr(record, "event", "") == "quantization.chosen")
    assert re.search("linear layers: 6 int8; layers with experts: 1 int8$", record.getMessage())


# ---- the published shape


def test_the_shape_of_30b_a3b_in_fp8() -> None:
    plan = ModelPlan.of(
        EngineConfig(model="qwen3-30b-a3b", load_format="dummy", quantization="fp8", device="cpu", dtype="bfloat16")
    )
    config = BUILTIN_SHAPES["qwen3-30b-a3b"]
    model = Qwen3MoeForCausalLM(fp32_context(config))
    assert plan.quantization is not None
    plan.quantization.apply(model, CPU)
    assert kept_as(model) == ["fp8"] * 48
    weights = [each for each in model.parameters() if each.dtype is torch.float8_e4m3fn]
    assert sum(each.numel() for each in weights) == 48 * (128 * 3 * 2048 * 768 + 2048 * 128 * (2 * 32 + 2 * 4))


def test_a_cut_down_30b_a3b_with_random_weights(tmp_path: Path) -> None:
    make_moe(tmp_path, hidden_size=2048, moe_intermediate_size=768, num_hidden_layers=1, num_experts=4)
    (tmp_path / "model.safetensors").unlink()
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    arguments = {"device": "cpu", "load_format": "dummy", "skip_tokenizer_init": True, "num_kvcache_blocks": 16}
    with LLM(str(tmp_path), quantization="fp8", **arguments) as llm:
        (output,) = llm.generate([[5, 6, 7]], params, use_tqdm=False)
    assert len(output["token_ids"]) == 4


def test_read_quantization_of_a_published_config() -> None:
    """The fields of Qwen3-30B-A3B-FP8's config.json."""
    listed = [f"model.layers.{layer}.{name}" for layer in range(48) for name in ("input_layernorm", "mlp.gate")]
    published = FP8_BLOCKS | {"modules_to_not_convert": ["lm_head", *listed]}
    quantization = read_quantization(None, published)
    model = Qwen3MoeForCausalLM(fp32_context(BUILTIN_SHAPES["qwen3-30b-a3b"]))
    assert quantization is not None
    quantization.apply(model, CPU)
    experts = experts_of(model)[0]
    shapes = {name: tuple(each.shape) for name, each in experts.named_parameters()}
    assert shapes == {
        "gate_up_weight": (128, 1536, 2048),
        "gate_up_weight_scale": (128, 12, 16),
        "down_weight": (128, 2048, 768),
        "down_weight_scale": (128, 16, 6),
    }
