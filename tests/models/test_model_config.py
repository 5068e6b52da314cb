"""config.json in its published forms, and the ones that are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoConfig

from nanovllm.errors import ModelLoadError, NanoVLLMError, UnknownArgumentError
from nanovllm.layers.rope_parameters import RopeParameters
from nanovllm.layers.rotary_embedding import rope_frequencies
from nanovllm.models.builtin_shapes import BUILTIN_SHAPES
from nanovllm.models.model_config import _KNOWN_FIELDS, ModelConfig
from nanovllm.models.rope_fields import _FIELDS, MAX_POSITIONS, ROPE_TYPES
from tests.models.qwen3_checkpoints import VARIANTS, make_qwen3_checkpoint
from tests.processes import run_python
from tests.properties import examples

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
    assert (config.num_kv_heads, config.head_dim, config.dtype) == (16, 128, "float32")
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
        (without("architectures", "model_type"), "architectures is missing: it must be a list of names"),
        (changed(architectures=None, model_type="gpt2"), "architectures=None.*a list of names"),
        (changed(architectures="Qwen3ForCausalLM"), "architectures='Qwen3ForCausalLM'.*a list of names"),
        (changed(architectures=["a", 5]), "architectures=.*a list of names"),
        (changed(architectures=["Qwen2MoeForCausalLM"]), "'Qwen2MoeForCausalLM'.*Supported: .*Qwen3ForCausalLM"),
        (without("hidden_size"), "hidden_size is missing: it must be an integer from 1 to"),
        (changed(num_hidden_layers=0), "num_hidden_layers=0 is not supported: it must be an integer from 1 to"),
        (changed(vocab_size="151936"), "vocab_size='151936'"),
        (changed(num_attention_heads=True), "num_attention_heads=True"),
        (changed(num_key_value_heads=3), "num_key_value_heads=3.*a divisor of num_attention_heads=16"),
        (changed(head_dim=65), "head_dim=65.*even"),
        (changed(rms_norm_eps=0), "rms_norm_eps=0.*a number > 0, at most 1"),
        (changed(num_hidden_layers=10**7), "num_hidden_layers=10000000.*from 1 to 1024"),
        (changed(head_dim=10**9), "head_dim=1000000000.*from 1 to 1024"),
        (changed(max_position_embeddings=10**12), "max_position_embeddings=10{12}.*from 2 to 16777216"),
        (changed(max_position_embeddings=1), "max_position_embeddings=1 .*from 2 to"),
        (changed(use_sliding_window=True, sliding_window=0, max_window_layers=0), "sliding_window=0 .*from 1 to"),
        (changed(vocab_size=2**31), "vocab_size=2147483648.*from 1 to 16777216"),
        (changed(hidden_size=-1), "hidden_size=-1.*from 1 to"),
        (changed(intermediate_size=3072.0), "intermediate_size=3072.0.*an integer from 1 to"),
        (changed(hidden_size=10**400), "hidden_size=10{50,}.*an integer from 1 to"),
        (changed(tie_word_embeddings="yes"), "tie_word_embeddings='yes'.*true or false"),
        (changed(hidden_act="gelu"), "hidden_act='gelu'.*'silu'"),
        (changed(torch_dtype="float8_e4m3fn"), "torch_dtype='float8_e4m3fn'.*bfloat16, float16, float32"),
        (changed(eos_token_id=["</s>"]), "eos_token_id"),
        (changed(quantization_config="fp8"), "quantization_config='fp8'.*an object"),
        (changed(num_experts=128), "num_experts=128.*dense"),
        (changed(use_sliding_window=True, sliding_window=4096, max_window_layers=None), "max_window_layers=None"),
        (changed(layer_types=["full_attention", "sliding_attention"]), "layer_types=.*sliding_attention"),
        (changed(layer_types=5), "layer_types=5.*full_attention"),
        (changed(layer_types=[["full_attention"]]), "layer_types=.*full_attention"),
        (
            changed(rope_scaling={"rope_type": "longrope", "short_factor": [1.0], "long_factor": [2.0]}),
            "rope_type='longrope'.*Supported: default, linear",
        ),
        (changed(rope_scaling={"rope_type": ["yarn"]}), r"rope_type=\['yarn'\].*Supported: default, linear"),
        (changed(rope_scaling={"rope_type": "linear", "factor": 10**400}), "factor=10{50,}.*from 1 to 10000"),
        (changed(rope_scaling={"rope_type": "yarn", "factor": float("inf")}), "factor=inf.*from 1 to 10000"),
        (changed(rope_scaling={"rope_type": "yarn", "truncate": 1}), "truncate=1.*true or false"),
        (changed(rope_scaling={"rope_type": "linear", "factor": 10_000}), "factor=10000.*at most 16777216 tokens long"),
        (
            changed(rope_scaling={"type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 4}),
            "high_freq_factor=4.*larger than low_freq_factor=4",
        ),
        (changed(rope_theta=0), "rope_theta=0 .*from 2 to"),
        (changed(rope_scaling="yarn"), "rope parameters 'yarn' are not supported"),
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
    assert ModelConfig.from_dict(changed(use_sliding_window=True, max_window_layers=0)) == expected  # no window


def test_the_layers_with_a_sliding_window() -> None:
    from_26_on = changed(use_sliding_window=True, sliding_window=4096, max_window_layers=26)
    assert ModelConfig.from_dict(from_26_on).windows == (None,) * 26 + (4096,) * 2
    types = ["sliding_attention", "full_attention"] * 14
    assert ModelConfig.from_dict(changed(sliding_window=7, layer_types=types)).windows == (7, None) * 14


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
    path.write_text('{"a": ' * 100_000)
    with pytest.raises(ModelLoadError, match=r"config\.json cannot be read as JSON: it is nested too deep\."):
        ModelConfig.from_folder(tmp_path)
    path.write_bytes(b"\xff\xfe{}")
    with pytest.raises(ModelLoadError, match=r"config\.json cannot be read as JSON"):
        ModelConfig.from_folder(tmp_path)


@pytest.mark.parametrize("content", ["nonsense", "[]", "", '{"a": ' * 100_000])
def test_a_broken_generation_config_counts_as_absent(
    content: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(QWEN3_06B))
    (tmp_path / "generation_config.json").write_text(content)
    with caplog.at_level("WARNING", logger="nanovllm"):
        assert ModelConfig.from_folder(tmp_path).eos_token_ids == (151645,)
    assert "generation_config.json is ignored: generation_config.json " in caplog.text


@pytest.mark.parametrize("odd", [[None, 7], [-1, 7], [7, 151936], [None, -1, 7, 2**70]])
def test_ids_that_no_token_has_are_left_out_of_the_eos_ids(odd: list[Any], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("WARNING", logger="nanovllm"):
        assert ModelConfig.from_dict(QWEN3_06B, {"eos_token_id": odd}).eos_token_ids == (7, 151645)
        assert ModelConfig.from_dict(changed(eos_token_id=odd)).eos_token_ids == (7,)
    line = f"What eos_token_id={odd} has outside the vocabulary is ignored: token ids go from 0 to 151935"
    assert [record.message for record in caplog.records] == [line] * 2 * (len({-1, 151_936} & {*odd}) > 0)


def test_what_is_left_out_means_what_it_means_to_transformers(tmp_path: Path) -> None:
    names = ("head_dim", "max_position_embeddings", "rope_theta", "tie_word_embeddings", "rms_norm_eps")
    fields = without(*names) | {"architectures": None}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    ours, theirs = ModelConfig.from_folder(tmp_path), AutoConfig.from_pretrained(tmp_path)
    assert (ours.architecture, ours.rope.theta) == ("Qwen3ForCausalLM", theirs.rope_parameters["rope_theta"])
    for name in ("head_dim", "max_position_embeddings", "tie_word_embeddings", "rms_norm_eps"):
        assert getattr(ours, name) == getattr(theirs, name), name


def test_null_is_a_head_dim_of_hidden_size_over_heads() -> None:
    assert ModelConfig.from_dict(changed(head_dim=None)).head_dim == 64


def test_the_first_supported_architecture_counts() -> None:
    assert ModelConfig.from_dict(changed(architectures=["X", "Qwen3ForCausalLM"])).architecture == "Qwen3ForCausalLM"


ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(min_value=-(10**400), max_value=10**400),
    st.sampled_from([0, 1, 2, 3, 10**7, 10**9, 10**12, 2**31, 2**63, 2**64, -1]),
    st.floats(),
    st.text(max_size=200),
    st.sampled_from(["full_attention", "yarn", "longrope", "bfloat16", "torch.bfloat16", "NaN"]),
    st.lists(st.one_of(st.none(), st.integers(), st.text(max_size=3), st.lists(st.integers())), max_size=3),
    st.dictionaries(st.sampled_from(["rope_type", "type", "factor", "x"]), st.integers(), max_size=3),
    st.just([[[[]]] * 3] * 50),
)
ROPE_NAMES = sorted({name for fields in _FIELDS.values() for names in fields for name in names})


def check_resolves_or_is_refused(config: dict[str, Any], *others: dict[str, Any]) -> None:
    try:
        resolved = ModelConfig.from_dict(config, *others)
    except NanoVLLMError as error:
        text = str(error)
    else:
        text = ""
        assert 2 <= resolved.max_context_len <= MAX_POSITIONS
        inv_freq, scaling = rope_frequencies(resolved.head_dim, resolved.rope)
        assert inv_freq.isfinite().all()
        assert 0 < scaling < float("inf")
        assert all(0 <= token_id < resolved.vocab_size for token_id in resolved.eos_token_ids)
    assert not text or (text.endswith(".") and len(text) < 1000), text


@settings(max_examples=examples(2000), deadline=None)
@given(st.dictionaries(st.sampled_from(sorted({*_KNOWN_FIELDS, *QWEN3_06B})), ODD, min_size=1, max_size=3))
def test_any_value_of_a_field_is_understood_or_refused(fields: dict[str, Any]) -> None:
    check_resolves_or_is_refused(changed(**fields))
    check_resolves_or_is_refused(QWEN3_06B, {}, {name: fields[name] for name in fields if name in _KNOWN_FIELDS})


@settings(max_examples=examples(2000), deadline=None)
@given(
    st.sampled_from(ROPE_TYPES),
    st.dictionaries(
        st.sampled_from([*ROPE_NAMES, "rope_theta", "attn_factor", "partial_rotary_factor"]),
        st.one_of(ODD, st.floats(min_value=0, max_value=1e7), st.integers(min_value=0, max_value=10**8)),
    ),
)
def test_any_rope_scaling_is_understood_or_refused(rope_type: str, fields: dict[str, Any]) -> None:
    check_resolves_or_is_refused(changed(rope_scaling={"rope_type": rope_type, **fields}))


@settings(max_examples=examples(800), deadline=None)
@given(ODD)
def test_any_generation_config_is_understood_or_refused(value: Any) -> None:
    check_resolves_or_is_refused(QWEN3_06B, {"eos_token_id": value})


@settings(max_examples=examples(800), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.one_of(st.binary(max_size=50), st.recursive(ODD, st.lists, max_leaves=5).map(lambda v: json.dumps(v).encode()))
)
def test_any_bytes_of_a_file_are_understood_or_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ModelLoadError):
        ModelConfig.from_folder(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(QWEN3_06B))
    (tmp_path / "generation_config.json").write_bytes(content)
    assert ModelConfig.from_folder(tmp_path).vocab_size == 151_936


def test_reading_a_config_imports_neither_torch_nor_transformers() -> None:
    code = (
        "import sys; from nanovllm.models.model_config import ModelConfig; "
        "print([name for name in ('torch', 'transformers') if name in sys.modules])"
    )
    result = run_python("-c", code)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[]"
