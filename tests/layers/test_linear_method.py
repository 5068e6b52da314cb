"""The seam for quantised weights: a scheme with scales fits into every layer, on one rank and on several."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from nanovllm.kernels.silu_and_mul import silu_and_mul
from nanovllm.layers.context import LayerContext
from nanovllm.layers.layernorm import RMSNorm
from nanovllm.layers.linear import RowParallelLinear
from nanovllm.layers.linear_method import LinearLayer, UnquantizedLinear, finish_loading
from nanovllm.layers.parallel import TensorParallel
from nanovllm.layers.parameter import WeightPart, empty_parameter
from nanovllm.models.model_config import ModelConfig
from nanovllm.models.qwen3 import Qwen3ForCausalLM
from nanovllm.utils.loader import load_weights
from tests.models.paged_model import CPU, PagedModel, fp32_context, load_model
from tests.models.qwen3_checkpoints import make_qwen3_checkpoint

GROUP = 8  # inputs that share a scale
PROMPTS = {0: [3, 1, 4, 1, 5], 1: [9, 2]}


class GroupScaled(UnquantizedLinear):
    """Integers from −127 to 127, and a scale for each output and group of inputs: "weight" and "weight_scale".

    finish_loading turns the integers into int8 and the names into others, as a scheme that repacks does.
    """

    def __init__(self, folds: bool) -> None:
        self.folds = folds

    def create_weights(self, layer: LinearLayer) -> None:
        super().create_weights(layer)
        layer.weight_scale = empty_parameter(layer.num_outputs, layer.inputs.size // GROUP, dtype=torch.float32)

    def weight_parts(self, layer: LinearLayer, prefix: str) -> Mapping[str, Sequence[WeightPart]]:
        scales = []
        for piece in layer.pieces:
            shape = (piece.outputs.total, layer.inputs.total // GROUP)
            name = f"{piece.source(prefix)}.weight_scale"
            if layer.inputs.is_cut:
                start, stop = layer.inputs.start // GROUP, layer.inputs.stop // GROUP
                scales.append(WeightPart(name, shape, 1, start, stop, piece.row))
            else:
                scales.append(WeightPart(name, shape, 0, piece.outputs.start, piece.outputs.stop, piece.row))
        return {**super().weight_parts(layer, prefix), f"{prefix}.weight_scale": scales}

    def finish_loading(self, layer: LinearLayer) -> None:
        layer.quantized = nn.Parameter(layer.weight.to(torch.int8), requires_grad=False)
        del layer.weight

    def fuses(self, layer: LinearLayer, hidden: torch.Tensor, *, gated: bool = False, only_adds: bool = False) -> bool:
        return self.folds and hidden.shape[0] <= 4

    def multiply(self, layer: LinearLayer, hidden: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        scale = layer.weight_scale.repeat_interleave(GROUP, dim=1)
        return torch.nn.functional.linear(hidden, layer.quantized * scale, bias)

    def multiply_fused(
        self,
        layer: LinearLayer,
        hidden: torch.Tensor,
        bias: torch.Tensor | None = None,
        *,
        norm: RMSNorm | None = None,
        gated: bool = False,
        residual: torch.Tensor | None = None,
    ) -> torch.Tensor:
        output = self.multiply(layer, hidden if norm is None else norm(hidden)[0], bias)
        output = silu_and_mul(output) if gated else output
        return output if residual is None else output + residual


def quantize(folder: Path, target: Path) -> None:
    """Writes to `target` the layers' matrices as integers and scales, and to `folder` what these stand for."""
    content = load_file(folder / "model.safetensors")
    quantized = dict(content)
    for name, tensor in content.items():
        if name.endswith("_proj.weight"):
            groups = tensor.unflatten(1, (-1, GROUP))  # [outputs, inputs / GROUP, GROUP]
            scale = groups.abs().amax(-1) / 127  # [outputs, inputs / GROUP]
            integers = (groups / scale.unsqueeze(-1)).round()
            quantized[name] = integers.flatten(1)
            quantized[f"{name}_scale"] = scale
            content[name] = (integers * scale.unsqueeze(-1)).flatten(1)
    save_file(content, folder / "model.safetensors")
    save_file(quantized, target / "model.safetensors")


@pytest.mark.parametrize("folds", [False, True], ids=["separate", "folded"])
def test_a_scheme_with_scales_gives_the_logits_of_the_weights_it_stands_for(folds: bool, tmp_path: Path) -> None:
    plain, quantized = tmp_path / "plain", tmp_path / "quantized"
    plain.mkdir()
    quantized.mkdir()
    make_qwen3_checkpoint(plain, attention_bias=True)
    quantize(plain, quantized)
    config = ModelConfig.from_folder(plain)
    model = Qwen3ForCausalLM(fp32_context(config, linear_method=GroupScaled(folds)))
    load_weights(model, quantized, CPU)
    finish_loading(model)
    kept = {name.rpartition(".")[2]: parameter.dtype for name, parameter in model.model.layers.named_parameters()}
    assert kept == dict.fromkeys(("weight", "bias", "weight_scale"), torch.float32) | {"quantized": torch.int8}
    ours, expected = PagedModel(model, config), PagedModel(load_model(plain), config)
    for work in (PROMPTS, {0: [9], 1: [7]}):  # prefill, then few rows
        for seq, logits in expected.step(work).items():
            torch.testing.assert_close(ours.step({seq: work[seq]})[seq], logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("size", "bias", "has_residual", "only_adds"),
    [(1, False, True, True), (1, True, True, False), (1, False, False, False), (2, False, True, False)],
)
def test_a_product_adds_the_stream_where_nothing_comes_between(
    size: int, bias: bool, has_residual: bool, only_adds: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sum over the ranks, or a bias, would."""
    asked: list[bool] = []

    def fuses(
        method: object, layer: object, hidden: torch.Tensor, *, gated: bool = False, only_adds: bool = False
    ) -> bool:
        asked.append(only_adds)
        return False

    monkeypatch.setattr(UnquantizedLinear, "fuses", fuses)
    monkeypatch.setattr(TensorParallel, "all_reduce", lambda parallel, tensor: tensor)
    context = LayerContext(parallel=TensorParallel(0, size), dtype=torch.float32)
    layer = RowParallelLinear(context, 8, 4, bias=bias)
    layer.to_empty(device=CPU)
    layer(torch.ones(2, 8 // size), torch.ones(2, 4) if has_residual else None)
    assert asked == [only_adds]


@pytest.mark.parametrize("size", [2, 4])
def test_scales_are_cut_with_their_weights(size: int, tmp_path: Path) -> None:
    plain, quantized = tmp_path / "plain", tmp_path / "quantized"
    plain.mkdir()
    quantized.mkdir()
    make_qwen3_checkpoint(plain)
    quantize(plain, quantized)
    config = ModelConfig.from_folder(plain)
    for rank in range(size):
        parallel = TensorParallel(rank, size)
        model = Qwen3ForCausalLM(fp32_context(config, parallel, GroupScaled(folds=False)))
        load_weights(model, quantized, CPU)
        finish_loading(model)
        exact = dict(load_model(plain, parallel).named_modules())
        for name, layer in model.named_modules():
            if isinstance(layer, LinearLayer):
                identity = torch.eye(layer.inputs.size)
                torch.testing.assert_close(layer.method.multiply(layer, identity).T, exact[name].weight)
