"""config.json in its published forms, and the ones that are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from nanovllm.errors import ModelLoadError, UnknownArgumentError
from nanovllm.layers.rope_parameters import RopeParameters
from nanovllm.models.model_config import BUILTIN_SHAPES, ModelConfig
from tests.models.qwen3_checkpoints import VARIANTS, make_qwen3_checkpoint
from tests.processes import run_python

# Qwen/Qwen3-0.6B as published.
QWEN3_06B: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 1024,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "max_position_embeddings": 40960,
    "max_window_layers": 28,
    "model_type": "qwen3",
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
GENERATION_06B = {"bos_token_id": 151643, "do_sample": True, "eos_token_id": [151645, 151643], "pad_token_id": 151643}


def changed(**fields: Any) -> dict[str, Any]:
    return QWEN3_06B | fields


def without(*names: str) -> dict[str, Any]:
    return {name: value for name, value in QWEN3_06B.items() if name not in names}


def test_the_published_file_is_the_builtin_shape() -> None:
    assert ModelConfig.from_dict(QWEN3_06B, GENERATION_06B) == BUILTIN_SHAPES["qwen3-0.6b"]


@pytest.mark.parametrize("variant", VARIANTS)
def test_read_as_transformers_reads_it(variant: str, tmp_path: Path) -> None:
    folder = make_qwen3_checkpoint(tmp_path, **VARIANTS[variant])
    ours, theirs = ModelConfig.from_folder(folder), AutoConfig.from_pretrained(folder)
    assert ours.architecture == theirs.architectures[0]
    assert (ours.num_heads, ours.num_kv_heads) == (theirs.num_attention_heads, theirs.num_key_value_heads)
    assert (ours.num_layers, ours.dtype) == (theirs.num_hidden_layers, "float32")
    for name in ("vocab_size", "hidden_size", "intermediate_size", "head_dim", "rms_norm_eps", "attention_bias"):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert ours.tie_word_embeddings == theirs.tie_word_embeddings
    assert (ours.rope.theta, ours.rope.rope_type) == (
        theirs.rope_parameters["rope_theta"],
        theirs.rope_parameters["rope_type"],
    )
    assert ours.rope.factor == theirs.rope_parameters.get("factor", 1.0)
    assert ours.eos_token_ids == (1, 2)


def test_fields_that_may_be_absent() -> None:
    config = ModelConfig.from_dict(
        without("num_key_value_heads", "head_dim", "rope_theta", "torch_dtype", "tie_word_embeddings", "eos_token_id")
    )
    assert (config.num_kv_heads, config.head_dim, config.dtype) == (16, 64, "float32")
    assert (config.rope.theta, config.tie_word_embeddings, config.eos_token_ids) == (10_000.0, False, ())


@pytest.mark.parametrize(
    ("in_config", "in_generation", "expected"),
    [
        (1, [2, 1], (2, 1)),
        ([1, 3], 2, (2, 1, 3)),
        (None, [4], (4,)),
        (7, None, (7,)),
    ],
)
def test_eos_is_the_union(in_config: Any, in_generation: Any, expected: tuple[int, ...]) -> None:
    config = ModelConfig.from_dict(changed(eos_token_id=in_config), {"eos_token_id": in_generation})
    assert config.eos_token_ids == expected


def test_both_dtype_names() -> None:
    assert ModelConfig.from_dict(without("torch_dtype") | {"dtype": "float16"}).dtype == "float16"
    assert ModelConfig.from_dict(changed(torch_dtype="torch.float16")).dtype == "float16"


YARN = {"factor": 4.0, "original_max_position_embeddings": 32768}
YARN_ROPE = RopeParameters(1e6, "yarn", 4.0, 32768)


@pytest.mark.parametrize(
    "fields",
    [
        changed(rope_scaling={"type": "yarn", **YARN}),
        changed(rope_scaling={"rope_type": "yarn", **YARN}),
        changed(rope_scaling={"rope_type": "yarn", "type": "yarn", "attention_factor": None, **YARN}),
        without("rope_theta", "rope_scaling") | {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6, **YARN}},
        without("rope_scaling") | {"rope_parameters": {"rope_type": "yarn", **YARN}},
    ],
)
def test_every_form_of_rope_scaling(fields: dict[str, Any]) -> None:
    config = ModelConfig.from_dict(fields)
    assert config.rope == YARN_ROPE
    assert config.max_context_len == 131_072


@pytest.mark.parametrize("form", ["rope_scaling", "rope_parameters"])
def test_overrides_win_whatever_form_the_file_has(form: str) -> None:
    new_form = without("rope_theta", "rope_scaling") | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}
    for file in (QWEN3_06B, new_form):
        assert ModelConfig.from_dict(file, overrides={form: {"rope_type": "yarn", **YARN}}).rope == YARN_ROPE
        assert ModelConfig.from_dict(file, overrides={"rope_theta": 5e6}).rope == RopeParameters(5e6)
    config = ModelConfig.from_dict(
        QWEN3_06B, GENERATION_06B, {"num_hidden_layers": 2, "eos_token_id": 5, "max_position_embeddings": 128}
    )
    assert (config.num_layers, config.eos_token_ids, config.max_context_len) == (2, (5,), 128)


def test_a_mistyped_override_is_answered_with_the_nearest_name() -> None:
    with pytest.raises(UnknownArgumentError, match=r"'num_hiden_layers'. Did you mean 'num_hidden_layers'"):
        ModelConfig.from_dict(QWEN3_06B, overrides={"num_hiden_layers": 2})


def test_longest_contexts() -> None:
    assert RopeParameters(1e4).max_context_len(100) == 100
    assert RopeParameters(1e4, "linear", 2.5).max_context_len(100) == 250
    assert RopeParameters(1e4, "dynamic", 2.0).max_context_len(100) == 100
    assert RopeParameters(1e4, "llama3", 8.0, 50).max_context_len(100) == 100
    assert RopeParameters(1e4, "yarn", 4.0, 100).max_context_len(120) == 400


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (without("architectures"), "architectures is missing: it must be a list of one name"),
        (changed(architectures=["Qwen3MoeForCausalLM"]), "'Qwen3MoeForCausalLM'.*Supported: Qwen3ForCausalLM"),
        (without("hidden_size"), "hidden_size is missing: it must be an integer ≥ 1"),
        (changed(num_hidden_layers=0), "num_hidden_layers=0 is not supported: it must be an integer ≥ 1"),
        (changed(vocab_size="151936"), "vocab_size='151936'"),
        (changed(num_attention_heads=True), "num_attention_heads=True"),
        (changed(num_key_value_heads=3), "num_key_value_heads=3.*a divisor of num_attention_heads=16"),
        (changed(head_dim=65), "head_dim=65.*even"),
        (changed(rms_norm_eps=0), "rms_norm_eps=0.*a number > 0"),
        (changed(tie_word_embeddings="yes"), "tie_word_embeddings='yes'.*true or false"),
        (changed(hidden_act="gelu"), "hidden_act='gelu'.*'silu'"),
        (changed(torch_dtype="float8_e4m3fn"), "torch_dtype='float8_e4m3fn'.*bfloat16, float16, float32"),
        (changed(eos_token_id=["</s>"]), "eos_token_id"),
        (changed(quantization_config={"quant_method": "fp8"}), "quantization_config=.*fp8"),
        (changed(num_experts=128), "num_experts=128.*dense"),
        (changed(use_sliding_window=True, sliding_window=4096, max_window_layers=20), "use_sliding_window=True"),
        (changed(layer_types=["full_attention", "sliding_attention"]), "layer_types=.*sliding_attention"),
        (changed(rope_scaling={"rope_type": "longrope"}), "rope_type='longrope'.*Supported: default, linear"),
        (changed(rope_scaling={"type": "linear"}), r"'linear' needs \['factor'\].*missing: \['factor'\]"),
        (changed(rope_scaling={"type": "yarn", "short_factor": 1.0}), r"not supported: \['short_factor'\]"),
        (changed(rope_scaling={"type": "linear", "factor": "2"}), "factor='2'"),
        (changed(rope_scaling={"full_attention": {"rope_type": "default"}}), "one flat object"),
        (changed(partial_rotary_factor=0.5), "partial_rotary_factor"),
    ],
)
def test_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelLoadError, match=message):
        ModelConfig.from_dict(fields)


def test_a_sliding_window_that_no_layer_uses_is_fine() -> None:
    expected = ModelConfig.from_dict(QWEN3_06B)
    assert ModelConfig.from_dict(changed(use_sliding_window=False, sliding_window=4096)) == expected
    assert ModelConfig.from_dict(changed(use_sliding_window=True, sliding_window=4096)) == expected  # from layer 28 on
    assert ModelConfig.from_dict(changed(use_sliding_window=True, layer_types=["full_attention"] * 28)) == expected


def test_files_that_are_missing_or_broken(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"config\.json is missing"):
        ModelConfig.from_folder(tmp_path)
    path = tmp_path / "config.json"
    path.write_text("{")
    with pytest.raises(ModelLoadError, match=r"config\.json cannot be read as JSON"):
        ModelConfig.from_folder(tmp_path)
    path.write_text("[]")
    with pytest.raises(ModelLoadError, match="must hold a JSON object, it holds list"):
        ModelConfig.from_folder(tmp_path)
    path.write_text(json.dumps(QWEN3_06B))
    assert ModelConfig.from_folder(tmp_path).eos_token_ids == (151645,)
    (tmp_path / "generation_config.json").write_text("nonsense")
    with pytest.raises(ModelLoadError, match=r"generation_config\.json cannot be read"):
        ModelConfig.from_folder(tmp_path)


def test_reading_a_config_imports_neither_torch_nor_transformers() -> None:
    code = (
        "import sys; from nanovllm.models.model_config import ModelConfig; "
        "print([name for name in ('torch', 'transformers') if name in sys.modules])"
    )
    result = run_python("-c", code)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[]"
