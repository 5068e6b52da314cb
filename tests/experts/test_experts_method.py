"""The seam for quantised experts: a scheme with scales fits into the layer, on one rank and on several."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from nanovllm.experts.experts_method import Experts, UnquantizedExperts, finish_loading_experts
from nanovllm.kernels.expert_routing import Routing
from nanovllm.kernels.experts import experts_mlp
from nanovllm.layers.layernorm import RMSNorm
from nanovllm.layers.parallel import TensorParallel
from nanovllm.layers.parameter import WeightPart, empty_parameter
from nanovllm.models.causal_lm import CausalLM
from nanovllm.models.model_config import ModelConfig
from nanovllm.models.qwen3_moe import Qwen3MoeForCausalLM
from nanovllm.utils.loader import load_weights
from tests.models.checkpoints import make_checkpoint
from tests.models.paged_model import CPU, PagedModel, fp32_context, load_model
from tests.models.test_qwen3 import fold_in

PROMPTS = {0: [3, 1, 4, 1, 5], 1: [9, 2]}
SCALES = ".weight_scale"  # of a matrix: one number for each output


class RowScaled(UnquantizedExperts):
    """Integers from −127 to 127, and a scale for each output. finish_loading turns the integers into int8."""

    def __init__(self, folds: bool) -> None:
        self.folds = folds

    def create_weights(self, layer: Experts) -> None:
        super().create_weights(layer)
        layer.gate_up_scale = empty_parameter(layer.gate_up_proj.shape[0], dtype=torch.float32)
        layer.down_scale = empty_parameter(layer.down_proj.shape[0], dtype=torch.float32)

    def weight_parts(self, layer: Experts, prefix: str) -> Mapping[str, Sequence[WeightPart]]:
        parts = super().weight_parts(layer, prefix)
        scales = {}
        for name in ("gate_up", "down"):
            scales[f"{prefix}.{name}_scale"] = [
                WeightPart(
                    f"{part.name}_scale",
                    part.shape[:1],
                    start=0 if part.dim else part.start,
                    stop=None if part.dim else part.stop,
                    row=part.row,
                )
                for part in parts[f"{prefix}.{name}_proj"]
            ]
        return {**parts, **scales}

    def finish_loading(self, layer: Experts) -> None:
        layer.gate_up_int8 = nn.Parameter(layer.gate_up_proj.to(torch.int8), requires_grad=False)
        layer.down_int8 = nn.Parameter(layer.down_proj.to(torch.int8), requires_grad=False)
        del layer.gate_up_proj, layer.down_proj

    def weights(self, layer: Experts) -> tuple[torch.Tensor, torch.Tensor]:
        num_experts, hidden_size, inner_size = layer.num_experts, layer.hidden_size, layer.inner.size
        gate_up = (layer.gate_up_int8 * layer.gate_up_scale.unsqueeze(1)).view(num_experts, -1, hidden_size)
        return gate_up, (layer.down_int8 * layer.down_scale.unsqueeze(1)).view(num_experts, hidden_size, inner_size)

    def fuses(self, layer: Experts, hidden: torch.Tensor) -> bool:
        return self.folds and hidden.shape[0] <= 4

    def multiply(
        self,
        layer: Experts,
        hidden: torch.Tensor,
        routing: Routing,
        *,
        residual: torch.Tensor | None = None,
        norm: RMSNorm | None = None,
    ) -> torch.Tensor:
        normed = hidden if norm is None else norm(hidden)[0]
        return experts_mlp(normed, *self.weights(layer), routing, residual)


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """A checkpoint whose experts are integers with scales, and one of the weights that these stand for."""
    plain, quantized = tmp_path / "plain", tmp_path / "quantized"
    quantized.mkdir()
    make_checkpoint(plain, "qwen3_moe")
    content = load_file(plain / "model.safetensors")
    stored = dict(content)
    for name, tensor in content.items():
        if ".experts." in name:
            scale = tensor.abs().amax(-1) / 127
            stored[name] = (tensor / scale.unsqueeze(-1)).round()
            stored[f"{name}_scale"] = scale
            content[name] = stored[name] * scale.unsqueeze(-1)
    save_file(content, plain / "model.safetensors")
    save_file(stored, quantized / "model.safetensors")
    return plain, quantized


def load_quantized(
    plain: Path, quantized: Path, parallel: TensorParallel | None = None, folds: bool = False
) -> CausalLM:
    context = fp32_context(ModelConfig.from_folder(plain), parallel, experts_method=RowScaled(folds))
    model = Qwen3MoeForCausalLM(context)
    load_weights(model, quantized, CPU)
    finish_loading_experts(model)
    return model


@pytest.mark.parametrize("folds", [False, True], ids=["separate", "folded"])
def test_a_scheme_with_scales_gives_the_logits_of_the_weights_it_stands_for(
    folds: bool, folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    if folds:
        fold_in(monkeypatch)
    plain, quantized = folders
    config = ModelConfig.from_folder(plain)
    model = load_quantized(plain, quantized, folds=folds)
    kept = {name: parameter.dtype for name, parameter in model.get_submodule("model.layers.0.mlp").named_parameters()}
    assert kept == {
        "gate.weight": torch.float32,
        "experts.gate_up_int8": torch.int8,
        "experts.gate_up_scale": torch.float32,
        "experts.down_int8": torch.int8,
        "experts.down_scale": torch.float32,
    }
    ours, expected = PagedModel(model, config), PagedModel(load_model(plain), config)
    for work in (PROMPTS, {0: [9], 1: [7]}):  # prefill, then few rows
        for seq, logits in expected.step(work).items():
            torch.testing.assert_close(ours.step({seq: work[seq]})[seq], logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("size", [2, 4])
def test_scales_are_cut_with_their_weights(size: int, folders: tuple[Path, Path]) -> None:
    plain, quantized = folders
    for rank in range(size):
        parallel = TensorParallel(rank, size)
        model, exact = load_quantized(plain, quantized, parallel), load_model(plain, parallel)
        layers = [each.get_submodule("model.layers.1.mlp.experts") for each in (model, exact)]
        assert isinstance(layers[0], Experts)
        gate_up, down = layers[0].method.weights(layers[0])
        torch.testing.assert_close(gate_up.flatten(0, 1), layers[1].gate_up_proj)
        torch.testing.assert_close(down.flatten(0, 1), layers[1].down_proj)
