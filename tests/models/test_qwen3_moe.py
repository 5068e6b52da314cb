"""What Qwen3-MoE has beside the other families: fields of experts, two forms of checkpoints, experts cut over ranks."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from nanovllm.config import EngineConfig
from nanovllm.errors import InvalidArgumentError, ModelLoadError
from nanovllm.layers.parallel import TensorParallel
from nanovllm.models.builtin_shapes import BUILTIN_SHAPES, PUBLISHED
from nanovllm.models.expert_fields import ExpertsConfig
from nanovllm.models.model_config import ModelConfig
from nanovllm.runner.model_plan import ModelPlan
from tests.models.checkpoints import make_checkpoint
from tests.models.paged_model import load_model

Tensors = dict[str, torch.Tensor]
CONFIG = PUBLISHED["qwen3-30b-a3b"]


def experts_of(**fields: Any) -> ExpertsConfig:
    experts = ModelConfig.from_dict(CONFIG | fields).experts
    assert experts is not None
    return experts


def test_the_published_shape() -> None:
    assert BUILTIN_SHAPES["qwen3-30b-a3b"].experts == ExpertsConfig(128, 8, 768, True, frozenset(range(48)))
    assert BUILTIN_SHAPES["qwen3-0.6b"].experts is None


def test_layers_with_a_dense_mlp() -> None:
    assert experts_of(num_hidden_layers=7, decoder_sparse_step=3, mlp_only_layers=[2]).sparse_layers == {5}
    assert experts_of(num_hidden_layers=2, mlp_only_layers=None).sparse_layers == {0, 1}
    assert experts_of(num_hidden_layers=2, mlp_only_layers=[0, 1]).sparse_layers == frozenset()


def test_fields_that_are_left_out() -> None:
    names = ("num_experts_per_tok", "norm_topk_prob", "decoder_sparse_step", "mlp_only_layers", "num_experts")
    left_out = {name: value for name, value in CONFIG.items() if name not in names}
    experts = ModelConfig.from_dict(left_out).experts
    assert experts == ExpertsConfig(128, 8, 768, False, frozenset(range(48)))


def test_the_name_that_transformers_5_writes() -> None:
    renamed = {name: value for name, value in CONFIG.items() if name != "num_experts"} | {"num_local_experts": 16}
    experts = ModelConfig.from_dict(renamed).experts
    assert experts is not None
    assert experts.num_experts == 16


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_experts": 0}, "num_experts=0 .*an integer from 1 to"),
        ({"num_experts": "many"}, "num_experts='many'.*an integer from 1 to"),
        ({"num_experts_per_tok": 0}, "num_experts_per_tok=0 .*an integer from 1 to"),
        ({"num_experts": 4}, "num_experts_per_tok=8 .*at most num_experts=4"),
        ({"num_local_experts": 4}, "num_local_experts=4 .*num_experts=128, or absent"),
        ({"moe_intermediate_size": -1}, "moe_intermediate_size=-1 .*an integer from 1 to"),
        ({"norm_topk_prob": 1}, "norm_topk_prob=1 .*true or false"),
        ({"decoder_sparse_step": 0}, "decoder_sparse_step=0 .*an integer from 1 to"),
        ({"mlp_only_layers": 3}, "mlp_only_layers=3 .*a list of layers' indices"),
        ({"mlp_only_layers": ["0"]}, r"mlp_only_layers=\['0'\] .*a list of layers' indices"),
        ({"hidden_act": "gelu_pytorch_tanh"}, "hidden_act='gelu_pytorch_tanh' .*'silu'"),
    ],
)
def test_what_is_not_supported_is_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelLoadError, match=message):
        ModelConfig.from_dict(CONFIG | fields)


def test_sizes_that_experts_can_be_cut_for(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, "qwen3_moe", "first_layer_dense", num_attention_heads=6, num_key_value_heads=6)
    named = r"intermediate_size=96 and moe_intermediate_size=50"
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"moe_intermediate_size": 50}))
    with pytest.raises(InvalidArgumentError, match=rf"tensor_parallel_size=3 .*one of 1, 2 for this model.*{named}"):
        ModelPlan.of(EngineConfig(model=str(folder), device="cpu", tensor_parallel_size=3))
    with pytest.raises(InvalidArgumentError, match="tensor_parallel_size=3 .*moe_intermediate_size=50"):
        load_model(folder, TensorParallel(0, 3))


@pytest.mark.parametrize("size", [1, 2, 4])
def test_both_forms_of_a_checkpoint_give_a_rank_the_same_weights(size: int, tmp_path: Path) -> None:
    """Stacked, as transformers holds them in memory, and one tensor for each matrix, as it saves them."""
    single = make_checkpoint(tmp_path / "single", "qwen3_moe")
    stacked = make_checkpoint(tmp_path / "stacked", "qwen3_moe", save_original_format=False)
    names = [{re.sub(r"\d+", "N", name) for name in load_file(f / "model.safetensors")} for f in (single, stacked)]
    assert "model.layers.N.mlp.experts.N.up_proj.weight" in names[0]
    assert "model.layers.N.mlp.experts.gate_up_proj" in names[1]
    whole = load_file(single / "model.safetensors")
    for rank in range(size):
        models = [load_model(folder, TensorParallel(rank, size)) for folder in (single, stacked)]
        for (name, one), other in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
            assert torch.equal(one, other), name
        experts = models[1].get_submodule("model.layers.1.mlp.experts")
        share = slice(rank * 48 // size, (rank + 1) * 48 // size)
        prefix = "model.layers.1.mlp.experts.5"
        gate_up, down = experts.gate_up_proj.view(8, 2, -1, 64)[5], experts.down_proj.view(8, 64, -1)[5]
        assert torch.equal(gate_up[0], whole[f"{prefix}.gate_proj.weight"][share])
        assert torch.equal(gate_up[1], whole[f"{prefix}.up_proj.weight"][share])
        assert torch.equal(down, whole[f"{prefix}.down_proj.weight"][:, share])


STACKED = "model.layers.0.mlp.experts.gate_up_proj"
SINGLE = "model.layers.0.mlp.experts.7.up_proj.weight"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            lambda tensors: tensors.update({STACKED: tensors[STACKED][:7]}),
            "missing.*experts.7.gate_proj.weight",
        ),
        (lambda tensors: tensors.update({STACKED: tensors[STACKED][:, :-1]}), f"unknown to the model: {STACKED}"),
        (lambda tensors: tensors.update({STACKED: tensors[STACKED][:, :-2]}), r"gate_up_proj has shape \[47, 64\]"),
        (lambda tensors: tensors.update({STACKED: tensors[STACKED][0]}), f"unknown to the model: {STACKED}"),
        (lambda tensors: tensors.update({SINGLE: torch.zeros(48, 64)}), f"{SINGLE} is in two"),
    ],
    ids=["too few experts", "odd", "too short", "one matrix", "both forms"],
)
def test_faults_of_stacked_tensors_are_named(edit: Callable[[Tensors], object], message: str, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, "qwen3_moe", save_original_format=False)
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    with pytest.raises(ModelLoadError, match=message):
        load_model(folder)
