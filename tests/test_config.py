"""Arguments are checked where they are made: field, value, what is allowed."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from nanovllm import InvalidArgumentError, SamplingParams, UnknownArgumentError
from nanovllm.config import EngineConfig

BAD_ENGINE_ARGUMENTS = {
    "max_num_seqs": [0, -1, 1.5, True, None],
    "max_num_batched_tokens": [0, "many"],
    "max_model_len": [0, -5],
    "kvcache_block_size": [0],
    "num_kvcache_blocks": [0, 2.0],
    "gpu_memory_utilization": [0, 1.1, float("nan"), "0.9"],
    "dtype": ["int8", "fp16"],
    "load_format": ["gguf"],
    "attention_backend": ["fa3"],
    "kv_cache_dtype": ["fp8"],
    "device": ["tpu", "mps"],
    "tensor_parallel_size": [0, 2],
    "seed": [-1, 2**63, "x"],
    "enforce_eager": [1, None],
    "enable_prefix_caching": ["yes"],
    "pipeline_depth": [0],
}
BAD_SAMPLING_ARGUMENTS = {
    "temperature": [-0.1, 2.1, float("nan"), float("inf"), "hot", None, True],
    "max_tokens": [0, -1, 2.0, "x", True],
    "ignore_eos": [1, None],
    "seed": [-1, 2**63, 1.0, True],
}


def cases(table: dict[str, list[object]]) -> list[object]:
    return [pytest.param(name, value, id=f"{name}={value!r}") for name, values in table.items() for value in values]


@pytest.mark.parametrize(("name", "value"), cases(BAD_ENGINE_ARGUMENTS))
def test_a_bad_engine_argument_names_itself(name: str, value: object) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        EngineConfig("tiny", **{name: value})
    assert str(caught.value).startswith(f"{name}={value!r} is not allowed: it must be ")
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize(("name", "value"), cases(BAD_SAMPLING_ARGUMENTS))
def test_a_bad_sampling_argument_names_itself(name: str, value: object) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        SamplingParams(**{name: value})
    assert str(caught.value).startswith(f"{name}={value!r} is not allowed: it must be ")


@pytest.mark.parametrize("temperature", [0, 0.0, 1e-4, 1, 2])
def test_good_sampling_arguments(temperature: float) -> None:
    params = SamplingParams(temperature=temperature, max_tokens=None, seed=2**63 - 1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.temperature = 1.0  # type: ignore[misc]


def test_fewer_tokens_than_sequences_a_step_says_what_to_do() -> None:
    with pytest.raises(InvalidArgumentError, match=r"max_num_batched_tokens=16.*max_num_seqs=32.*raise it, or lower"):
        EngineConfig("tiny", max_num_batched_tokens=16, max_num_seqs=32)


def test_vllm_spellings() -> None:
    config = EngineConfig.from_arguments("tiny", {"block_size": 32, "num_gpu_blocks_override": 7, "dtype": "half"})
    assert (config.kvcache_block_size, config.num_kvcache_blocks, config.dtype) == (32, 7, "float16")
    assert EngineConfig.from_arguments("tiny", {"dtype": torch.bfloat16}).dtype == "bfloat16"
    with pytest.raises(InvalidArgumentError, match="block_size=32.*another name of kvcache_block_size"):
        EngineConfig.from_arguments("tiny", {"kvcache_block_size": 16, "block_size": 32})


@pytest.mark.parametrize(
    ("typo", "meant"),
    [("max_num_seq", "max_num_seqs"), ("enforce_egaer", "enforce_eager"), ("blok_size", "block_size")],
)
def test_an_unknown_argument_names_the_nearest(typo: str, meant: str) -> None:
    with pytest.raises(UnknownArgumentError, match=f"LLM has no argument '{typo}'. Did you mean '{meant}'?"):
        EngineConfig.from_arguments("tiny", {typo: 1})
    with pytest.raises(TypeError):
        EngineConfig.from_arguments("tiny", {"xyzzy": 1})
