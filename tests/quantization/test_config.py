"""What a quantization_config may say, what the argument `quantization` may say beside it, and what files must hold."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from nanovllm import LLM, InvalidArgumentError, ModelLoadError, SamplingParams
from nanovllm.layers.linear_method import LinearLayer
from nanovllm.layers.parallel import TensorParallel
from nanovllm.quantization.head import DequantizedHead
from nanovllm.quantization.module_names import matches
from nanovllm.quantization.registry import read_quantization
from tests.models.paged_model import load_model
from tests.quantization.published import (
    WIDE,
    Tensors,
    awq,
    change_config,
    fp8_blocks,
    fp8_tensor,
    gptq,
    int8_channels,
    make_quantized,
    save,
)
from tests.quantization.test_published import AWQ, FP8, FP8_BLOCKS, GPTQ

WEIGHTS = {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True}
INT8_INPUTS = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True}


def compressed(layout: str = "int-quantized", weights: object = WEIGHTS, inputs: object = None, **config: Any) -> Any:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    return {"quant_method": "compressed-tensors", "format": layout, "config_groups": {"group_0": group}, **config}


INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": True}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "quant_method=missing .*'fp8' or 'compressed-tensors' or 'awq' or 'gptq'.*quantization='fp8' or 'int8'"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "quant_method='bitsandbytes' is not supported"),
        ({"quant_method": ["fp8"]}, r"quant_method=\['fp8'\] is not supported"),
        (FP8 | {"fmt": "e5m2"}, "fmt='e5m2' is not supported: it must be 'e4m3'"),
        (FP8 | {"activation_scheme": "none"}, "activation_scheme='none'.*'dynamic' or 'static'"),
        (FP8 | {"weight_block_size": [64, 64]}, r"weight_block_size=\[64, 64\].*\[128, 128\] or null"),
        (
            FP8_BLOCKS | {"activation_scheme": "static"},
            "activation_scheme='static'.*'dynamic' beside weight_block_size",
        ),
        (FP8 | {"modules_to_not_convert": "lm_head"}, "modules_to_not_convert='lm_head'.*a list of names"),
        (AWQ | {"group_size": 32, "bits": 3}, "bits=3 is not supported: it must be 4"),
        (AWQ | {"group_size": 32, "bits": True}, "bits=True"),
        (AWQ | {"group_size": 32, "version": "gemv"}, "version='gemv'.*'gemm'"),
        (AWQ | {"group_size": 32, "zero_point": False}, "zero_point=False"),
        (AWQ, "group_size=missing .*32 or 64 or 128 or -1"),
        (AWQ | {"group_size": 256}, "group_size=256 .*32 or 64 or 128 or -1"),
        (AWQ | {"group_size": 10**400}, "group_size=10{50,}"),
        (GPTQ | {"bits": 8}, "bits=8 is not supported"),
        (GPTQ | {"checkpoint_format": "marlin"}, "checkpoint_format='marlin'.*'gptq' or 'gptq_v2'"),
        (GPTQ | {"is_marlin_format": True}, "is_marlin_format=True"),
        (GPTQ | {"lm_head": "yes"}, "lm_head='yes'"),
        (GPTQ | {"desc_act": "yes"}, "desc_act='yes'.*True or False"),
        (GPTQ | {"dynamic": {"-:.*": {}}}, "dynamic=.*absent"),
        (GPTQ | {"modules_in_block_to_quantize": ["q_proj"]}, "modules_in_block_to_quantize=.*list of lists"),
        (compressed("nvfp4-pack-quantized"), "format='nvfp4-pack-quantized'.*4-bit floats"),
        (compressed("marlin-24"), "format='marlin-24'.*Sparse"),
        (compressed(quantization_status="calibration"), "quantization_status='calibration'"),
        (compressed(sparsity_config={"format": "sparse-24-bitmask"}), "sparsity_config.format='sparse-24-bitmask'"),
        (compressed(transform_config={"config_groups": {}}), "transform_config=.*absent"),
        (compressed(config_groups={"group_0": "W8A8"}), "config_groups.'group_0'='W8A8'.*an object"),
        (compressed(config_groups=None), "config_groups=None .*an object"),
        (compressed(ignore=[5]), r"ignore=\[5\].*a list of names"),
        (compressed(weights=None), "weights=None"),
        (compressed(weights=WEIGHTS | {"symmetric": False}), "weights.symmetric=False"),
        (compressed(weights=WEIGHTS | {"num_bits": 4}), "weights.num_bits=4 .*: it must be 8"),
        (compressed(weights=WEIGHTS | {"type": "float"}), "weights.type='float'.*'int'"),
        (compressed("float-quantized"), "weights.type='int'.*'float'"),
        (compressed(inputs=INT8_INPUTS | {"type": "float"}), "input_activations.type='float'.*'int'"),
        (compressed("pack-quantized", INT4, INT8_INPUTS), "input_activations is not supported with weights of 4 bits"),
        (compressed("pack-quantized", INT4 | {"group_size": None}), "group_size=None"),
        (compressed("pack-quantized", INT4 | {"num_bits": 2}), "num_bits=2 .*4 or 8"),
        (compressed("pack-quantized", INT4 | {"actorder": "other"}), "actorder='other'"),
        (compressed("pack-quantized", WEIGHTS | {"strategy": "group"}), "strategy='group'.*'tensor' or 'channel'"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(config: Any, message: str) -> None:
    with pytest.raises(ModelLoadError, match=message) as caught:
        read_quantization(None, config)
    assert str(caught.value).startswith("config.json: quantization_config")
    assert len(str(caught.value)) < 500


def test_a_regular_expression_that_is_none() -> None:
    quantization = read_quantization(None, compressed(ignore=["re:(" + "x" * 1000]))
    assert quantization is not None
    with pytest.raises(ModelLoadError, match=r"the name 're:\(xx.*no regular expression") as caught:
        quantization.format_of(["model.layers.0.mlp.down_proj"])
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("regex", ["(a+)+", r"(\w+.)*x", ".*.*.*.*.*.*.*x", "(a|b){30}"])
def test_a_regular_expression_that_could_take_for_ever(regex: str) -> None:
    with pytest.raises(ModelLoadError, match="may take for ever to match: at most 6 repetitions"):
        matches("model.layers.0.self_attn.q_proj", [f"re:{regex}"])


@pytest.mark.parametrize(
    ("quantize", "config"),
    [
        (fp8_blocks, FP8_BLOCKS),
        (partial(fp8_tensor, input_scale=True), FP8 | {"activation_scheme": "static"}),
        (gptq, GPTQ | {"desc_act": True}),
        (int8_channels, compressed(ignore=["lm_head"])),
    ],
)
def test_random_weights_in_the_form_of_a_checkpoint(quantize: Any, config: Any, tmp_path: Path) -> None:
    _, folder = make_quantized(tmp_path, quantize, config, **WIDE)
    (folder / "model.safetensors").unlink()
    with LLM(str(folder), device="cpu", load_format="dummy", skip_tokenizer_init=True, num_kvcache_blocks=8) as llm:
        assert llm.llm_engine.resolved.quantization == config["quant_method"]
        output = llm.generate([[5, 6, 7]], SamplingParams(max_tokens=4, ignore_eos=True), use_tqdm=False)[0]
        assert output.error is None
        assert len(output["token_ids"]) == 4


@pytest.mark.parametrize("config", [FP8_BLOCKS, AWQ | {"group_size": 128}, GPTQ, compressed()])
def test_the_argument_must_not_contradict_the_checkpoint(config: dict[str, Any]) -> None:
    method = config["quant_method"]
    assert read_quantization(method, config) == read_quantization(None, config)
    for other in {"fp8", "int8", "int4", "awq", "gptq", "compressed-tensors"} - {method}:
        with pytest.raises(InvalidArgumentError, match=f"quantization='{other}'.*'{method}' or None for this check.*"):
            read_quantization(other, config)


@pytest.mark.parametrize("asked", ["awq", "gptq", "compressed-tensors"])
def test_what_is_not_made_at_load_time(asked: str) -> None:
    with pytest.raises(InvalidArgumentError, match=f"quantization='{asked}'.*'fp8' or 'int8' or 'int4' for this check"):
        LLM("tiny", device="cpu", quantization=asked)


def test_the_engine_refuses_before_it_loads(tmp_path: Path) -> None:
    _, quantized = make_quantized(tmp_path, fp8_tensor, FP8 | {"fmt": "e5m2"})
    with pytest.raises(ModelLoadError, match="fmt='e5m2'"):
        LLM(str(quantized), device="cpu", skip_tokenizer_init=True)


# ---- names


@pytest.mark.parametrize(
    ("pattern", "matched"),
    [
        ("model.layers.1.mlp.down_proj", True),
        ("model.layers.1", True),
        ("model.layers", True),
        ("layers.1.mlp", True),
        ("down_proj", True),
        ("mlp.down_proj", True),
        ("model.layers.11", False),
        ("layers.1.ml", False),
        ("own_proj", False),
        ("lm_head", False),
        ("", False),
        ("re:.*down_proj", True),
        ("re:model.layers.1.*", True),
        ("re:down_proj", False),
        (r"re:.*\.up_proj$", False),
    ],
)
def test_names_of_modules(pattern: str, matched: bool) -> None:
    assert matches("model.layers.1.mlp.down_proj", [pattern]) == matched


@pytest.mark.parametrize(
    "ignore",
    [
        ["lm_head", "model.layers.0"],
        [
            "lm_head",
            "model.layers.1.self_attn.k_proj",
            "re:.*up_proj",
        ],  # beside matrices of the same layer that are quantised
    ],
)
@pytest.mark.parametrize(
    ("quantize", "config", "field"),
    [
        (fp8_tensor, FP8, "modules_to_not_convert"),
        (fp8_blocks, FP8_BLOCKS, "ignored_layers"),
        (awq, AWQ | {"group_size": 32}, "modules_to_not_convert"),
        (gptq, GPTQ, "modules_to_not_convert"),
        (int8_channels, compressed(ignore=["lm_head"]), "ignore"),
    ],
)
def test_modules_that_are_not_quantised(
    quantize: Any, config: dict[str, Any], field: str, ignore: list[str], tmp_path: Path
) -> None:
    plain, quantized = make_quantized(
        tmp_path,
        quantize,
        config | {field: ignore},
        keep=lambda name: matches(name.removesuffix(".weight"), ignore),
        **WIDE,
    )
    exact = dict(load_model(plain).named_modules())
    for prefix, layer in load_model(quantized).named_modules():
        if isinstance(layer, LinearLayer):
            identity = torch.eye(layer.inputs.size)
            torch.testing.assert_close(layer.method.multiply(layer, identity).T, exact[prefix].weight)


def test_targets_and_several_groups(tmp_path: Path) -> None:
    """A group that names a module goes before one of all linear layers; of no group, a module is not quantised."""

    def group(targets: list[str], **fields: Any) -> dict[str, Any]:
        return {"targets": targets, "weights": WEIGHTS, "input_activations": None, **fields}

    groups = {"all": group(["Linear"]), "some": group(["re:.*down_proj"], input_activations=INT8_INPUTS)}
    quantization = read_quantization(None, compressed(config_groups=groups))
    assert quantization is not None
    assert quantization.format_of(["model.layers.0.mlp.down_proj"]).quantize_input
    assert not quantization.format_of(["model.layers.0.mlp.up_proj"]).quantize_input
    few = read_quantization(None, compressed(config_groups={"few": group(["model.layers.0"])}))
    assert few is not None
    _, folder = make_quantized(
        tmp_path, int8_channels, compressed(config_groups={"few": group(["layers.0"])}), keep=lambda name: ".1." in name
    )
    kept = [
        getattr(layer.method, "kept_as", None) for layer in load_model(folder).modules() if hasattr(layer, "pieces")
    ]
    assert kept == ["int8"] * 4 + [None] * 4


@pytest.mark.parametrize(("size", "vocab_size"), [(1, 320), (2, 320), (2, 328)])
@pytest.mark.parametrize(
    ("quantize", "config"), [(gptq, GPTQ | {"lm_head": True}), (int8_channels, compressed()), (awq, None)]
)
def test_a_quantised_head(quantize: Any, config: Any, size: int, vocab_size: int, tmp_path: Path) -> None:
    """It is kept in the model's dtype. `ignore`, and formats that never quantise it, leave it as it is."""
    has_head = config is not None
    plain, quantized = make_quantized(
        tmp_path, quantize, config or AWQ | {"group_size": 32}, with_head=has_head, vocab_size=vocab_size
    )
    for rank in range(size):
        parallel = TensorParallel(rank, size)
        head = load_model(quantized, parallel).lm_head
        assert isinstance(head.method, DequantizedHead) == has_head
        torch.testing.assert_close(head.weight, load_model(plain, parallel).lm_head.weight)


# ---- files


def without(end: str) -> Any:
    def change(tensors: Tensors) -> None:
        del tensors[next(name for name in sorted(tensors) if name.endswith(end))]

    return change


def with_tensor(name: str, tensor: torch.Tensor) -> Any:
    return lambda tensors: tensors.update({f"model.layers.0.{name}": tensor})


def changed(end: str, change: Any) -> Any:
    def change_first(tensors: Tensors) -> None:
        name = next(name for name in sorted(tensors) if name.endswith(end))
        tensors[name] = change(tensors[name]).contiguous()

    return change_first


ZEROS = torch.zeros(64)
CASES = [
    (fp8_blocks, FP8_BLOCKS, without("scale_inv"), "missing .*layers.0.mlp.down_proj.weight_scale_inv"),
    (fp8_blocks, FP8, lambda tensors: None, "missing .*weight_scale and .*unknown to the model: .*weight_scale_inv"),
    (fp8_tensor, FP8, with_tensor("mlp.up_proj.input_scale", ZEROS[0]), "unknown to the model: .*up_proj.input_scale"),
    (fp8_tensor, FP8 | {"activation_scheme": "static"}, lambda tensors: None, "missing .*input_scale"),
    (fp8_tensor, FP8, changed("down_proj.weight", torch.Tensor.float), "dtype F32 and needs one of .*F8_E4M3"),
    (fp8_blocks, FP8_BLOCKS, changed("scale_inv", lambda scale: scale.repeat(2, 1)), "weight_scale_inv has shape"),
    (awq, AWQ | {"group_size": 32}, without("qzeros"), "missing .*qzeros"),
    (awq, AWQ | {"group_size": -1}, lambda tensors: None, "of another form: .*qzeros has shape"),
    (awq, AWQ | {"group_size": 128}, lambda tensors: None, "has .* inputs, which groups of 128 .* do not divide"),
    (gptq, GPTQ, with_tensor("mlp.up_proj.qmeta", ZEROS), "unknown to the model: .*qmeta"),
    (gptq, GPTQ | {"desc_act": True}, without("g_idx"), "missing .*g_idx"),
    (gptq, GPTQ, changed("g_idx", lambda index: index.flip(0)), "g_idx has groups .* not neighbours.*desc_act=false"),
    (gptq, GPTQ | {"desc_act": True}, changed("g_idx", lambda index: index + 1), "g_idx names other groups than 0 to"),
    (gptq, GPTQ | {"desc_act": True}, changed("g_idx", lambda index: index * 0), "do not have group_size=32 inputs"),
    (
        gptq,
        GPTQ | {"desc_act": True},
        changed("self_attn.v_proj.g_idx", lambda index: index.flip(0)),
        "g_idx of v_proj is not that of q_proj",
    ),
    (gptq, GPTQ | {"checkpoint_format": "gptq_v2"}, lambda tensors: None, "qzeros has other zero points than the 8"),
    (gptq, GPTQ, with_tensor("mlp.up_proj.bias", torch.ones(96)), "up_proj.bias is not zero"),
    (
        int8_channels,
        compressed(ignore=["lm_head"]),
        changed("weight_scale", lambda scale: scale.half().T),
        "weight_scale has shape",
    ),
]


@pytest.mark.parametrize(("quantize", "config", "change", "message"), CASES)
def test_files_that_do_not_fit(quantize: Any, config: Any, change: Any, message: str, tmp_path: Path) -> None:
    _, folder = make_quantized(tmp_path, quantize, config)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save(folder, tensors)
    with pytest.raises(ModelLoadError, match=message):
        load_model(folder)


def test_what_a_file_may_have_besides(tmp_path: Path) -> None:
    """Scales of a KV cache, and biases of zeros that AutoGPTQ writes."""
    _, folder = make_quantized(tmp_path, gptq, GPTQ)
    tensors = load_file(folder / "model.safetensors")
    with_tensor("mlp.up_proj.bias", torch.zeros(96))(tensors)
    with_tensor("self_attn.k_scale", torch.tensor(0.5))(tensors)
    with_tensor("self_attn.v_scale", torch.tensor([0.5]))(tensors)
    save(folder, tensors)
    load_model(folder)


def test_a_quantised_file_without_a_quantization_config(tmp_path: Path) -> None:
    _, folder = make_quantized(tmp_path, fp8_blocks, FP8_BLOCKS)
    change_config(folder, quantization_config=None)
    with pytest.raises(ModelLoadError, match="weight has dtype F8_E4M3.*config.json needs a quantization_config"):
        load_model(folder)
