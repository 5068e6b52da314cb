"""EngineConfig: vLLM's and nano-vllm's names, what is allowed, and errors that name the field."""

from __future__ import annotations

import dataclasses
import inspect
import math
from typing import Any

import pytest

from nanovllm import LLM, AsyncLLM, InvalidArgumentError, UnknownArgumentError
from nanovllm.config import EngineConfig
from nanovllm.utils.arguments import arguments_of
from tests.engine.simulated_executor import make_config

# The interface that scripts rely on.
DEFAULTS = {
    "tokenizer": None,
    "dtype": "auto",
    "max_model_len": None,
    "max_num_seqs": 512,
    "max_num_batched_tokens": 16384,
    "gpu_memory_utilization": 0.9,
    "kvcache_block_size": None,
    "num_kvcache_blocks": None,
    "enable_prefix_caching": True,
    "tensor_parallel_size": 1,
    "startup_timeout": 600.0,
    "enforce_eager": False,
    "device": "auto",
    "attention_backend": "auto",
    "kv_cache_dtype": "auto",
    "quantization": None,
    "load_format": "auto",
    "skip_tokenizer_init": False,
    "seed": 0,
    "trust_remote_code": False,
    "revision": None,
    "hf_overrides": None,
    "speculative_config": None,
}


def config_of(**arguments: Any) -> EngineConfig:
    return EngineConfig("m", **arguments)


def test_names_and_defaults() -> None:
    config = dataclasses.asdict(EngineConfig("m"))
    assert {name: config[name] for name in DEFAULTS} == DEFAULTS


@pytest.mark.parametrize(
    ("alias", "name"), [("block_size", "kvcache_block_size"), ("num_gpu_blocks_override", "num_kvcache_blocks")]
)
def test_vllm_s_spellings(alias: str, name: str) -> None:
    assert getattr(config_of(**{alias: 32}), name) == 32
    with pytest.raises(InvalidArgumentError, match=f"{alias}=32 is .*another name of {name}"):
        config_of(**{alias: 32, name: 32})


@pytest.mark.parametrize(
    ("given", "dtype"),
    [("half", "float16"), ("float", "float32"), ("torch.bfloat16", "bfloat16"), ("auto", "auto")],
)
def test_spellings_of_dtypes(given: str, dtype: str) -> None:
    assert EngineConfig("m", dtype=given).dtype == dtype


@pytest.mark.parametrize(("given", "dtype"), [("fp8", "fp8_e4m3"), ("fp8_e4m3", "fp8_e4m3"), ("auto", "auto")])
def test_spellings_of_the_cache_s_dtype(given: str, dtype: str) -> None:
    assert EngineConfig("m", kv_cache_dtype=given).kv_cache_dtype == dtype


def test_torch_s_dtypes_are_taken() -> None:
    import torch

    assert EngineConfig("m", dtype=torch.float16).dtype == "float16"


@pytest.mark.parametrize(
    ("given", "nearest"),
    [
        ("max_modle_len", "max_model_len"),
        ("gpu_memory_utilisation", "gpu_memory_utilization"),
        ("tensor_parallel", "tensor_parallel_size"),
        ("num_gpu_blocks", "num_gpu_blocks_override"),
    ],
)
@pytest.mark.parametrize("make", [LLM, AsyncLLM])
def test_a_typo_is_answered_with_the_nearest_name(make: Any, given: str, nearest: str) -> None:
    with pytest.raises(UnknownArgumentError) as caught:
        make("/no/such/model", **{given: 1})
    assert isinstance(caught.value, TypeError)
    assert str(caught.value) == f"{make.__name__} has no argument {given!r}. Did you mean {nearest!r}?"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *[
            (name, value)
            for name in ("max_num_seqs", "max_num_batched_tokens", "pipeline_depth", "kvcache_block_size")
            for value in (0, -1, 1.5, "8", True)
        ],
        *[
            (name, value)
            for name in ("max_model_len", "num_kvcache_blocks", "max_prefill_tokens_beside_decode")
            for value in (0, "8")
        ],
        *[(name, None) for name in ("max_num_seqs", "max_num_batched_tokens")],
        *[("gpu_memory_utilization", value) for value in (0, -0.5, 1.01, math.nan, math.inf, "0.9")],
        *[("seed", value) for value in (-1, 2**63, "0")],
        *[(name, 1) for name in ("enable_prefix_caching", "enforce_eager", "skip_tokenizer_init", "trust_remote_code")],
        ("dtype", "int8"),
        ("load_format", "gguf"),
        ("attention_backend", "flashinfer"),
        ("kv_cache_dtype", "int4"),
        ("quantization", "bitsandbytes"),
        ("tensor_parallel_size", 0),
        ("startup_timeout", 0),
        ("device", "tpu"),
    ],
)
def test_refused_with_field_value_and_what_is_allowed(field: str, value: object) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        config_of(**{field: value})
    assert caught.value.field == field
    assert f"{field}={value!r} is not allowed: it must be " in str(caught.value)


@pytest.mark.parametrize("make", [LLM, AsyncLLM])
def test_help_lists_every_argument_with_its_default_and_meaning(make: type) -> None:
    arguments = list(arguments_of(EngineConfig))
    assert [argument.name for argument in arguments] == list(inspect.signature(EngineConfig).parameters)
    assert inspect.signature(make).parameters.keys() == inspect.signature(EngineConfig).parameters.keys()
    text = inspect.getdoc(make.__init__) or ""  # type: ignore[misc]  # the class itself is meant, not a subclass
    words = " ".join(text.split())
    for argument in arguments:
        assert f"{argument.help} Allowed: {argument.rule.allowed}." in words
        assert argument.name == "model" or f"\n{argument.name} = {argument.default!r}\n" in text


def test_an_argument_is_not_positional() -> None:
    with pytest.raises(TypeError, match="takes 2 positional arguments but 3"):
        LLM("/no/such/model", "tokenizer")  # type: ignore[misc]  # that it is refused is the point


def test_gguf_is_refused_by_name() -> None:
    for arguments in ({"model": "/models/qwen3.gguf"}, {"model": "m", "load_format": "gguf"}):
        with pytest.raises(InvalidArgumentError, match="gguf' is not allowed: .*Not supported: GGUF.*docs/api.md"):
            EngineConfig(**arguments)


def test_choices_are_listed() -> None:
    with pytest.raises(InvalidArgumentError, match="'auto', 'flash_attn', 'triton', 'torch'"):
        EngineConfig("m", attention_backend="xformers")


def test_a_step_must_hold_a_token_of_each_running_sequence() -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        EngineConfig("m", max_num_seqs=65, max_num_batched_tokens=64)
    assert "max_num_seqs=65" in str(caught.value)
    assert EngineConfig("m", max_num_seqs=64, max_num_batched_tokens=64).max_num_seqs == 64


@pytest.mark.parametrize("config", [EngineConfig("m"), make_config()])
def test_nothing_changes_after(config: object) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.seed = 1  # type: ignore[attr-defined]  # that it is refused is the point
