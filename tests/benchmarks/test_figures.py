"""What the benchmark counts, against figures worked out by hand: requests, traffic, peers, spread."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file

from nanovllm.benchmarks.peers import peers_of
from nanovllm.benchmarks.report import spread_of
from nanovllm.benchmarks.traffic import kv_bytes_per_token, quantized_weight_bytes, traffic, weights_per_step
from nanovllm.benchmarks.workloads import WORKLOADS, Requests
from nanovllm.models.builtin_shapes import BUILTIN_SHAPES
from nanovllm.models.checkpoint import TINY_MODEL_FOLDER
from nanovllm.models.model_config import ModelConfig
from tests.models.checkpoints import make_checkpoint
from tests.models.qwen3_checkpoints import VARIANTS, make_qwen3_checkpoint


def test_classic_is_nano_vllms_benchmark() -> None:
    config = BUILTIN_SHAPES["qwen3-0.6b"]
    requests = WORKLOADS["classic"].draw(256, config.vocab_size, seed=0)
    assert requests.num_prompt_tokens == 142_827
    assert requests.num_output_tokens == 133_966
    assert max(map(max, requests.prompts)) == 10_000
    needed = traffic(config, 2, requests)
    assert 13.6e12 <= needed.kv_bytes <= 13.9e12
    assert needed.weight_bytes == pytest.approx(1.19e9, rel=0.005)
    assert kv_bytes_per_token(config, 2) == 114_688
    # One byte a component, and four for each head of 128 of them.
    assert kv_bytes_per_token(config, 2, fp8_cache=True) == 28 * 2 * 8 * (128 + 4)
    assert traffic(config, 2, requests, fp8_cache=True).kv_bytes * 256 == needed.kv_bytes * 132


def test_traffic_by_hand() -> None:
    """Prompts of 5 and 3 tokens that share 2, outputs of 4 and 2: contexts 6, 7, 8 and 4 are read."""
    config = BUILTIN_SHAPES["qwen3-0.6b"]
    prompts = [[0] * 5, [0] * 3]
    apart = traffic(config, 2, Requests(prompts, [4, 2], shared_len=0))
    assert apart.kv_bytes == (6 + 7 + 8 + 4) * 114_688
    shared = traffic(config, 2, Requests(prompts, [4, 2], shared_len=2))
    assert shared.kv_bytes == (4 + 5 + 6 + 2 + 3 * 2) * 114_688  # the shared tokens once in each of three steps
    assert shared.total(num_steps=4) == 4 * shared.weight_bytes + shared.kv_bytes


def test_a_layer_with_a_window_reads_no_more_than_that() -> None:
    config = BUILTIN_SHAPES["qwen3-0.6b"]
    half = replace(config, windows=(7, None) * 14)
    needed = traffic(half, 2, Requests([[0] * 5, [0] * 3], [4, 2], shared_len=2))
    assert needed.kv_bytes == ((6 + 7 + 7 + 4) + (4 + 5 + 6 + 2 + 3 * 2)) * 114_688 // 2


def count_weights(folder: Path) -> int:
    return sum(tensor.numel() for tensor in load_file(folder / "model.safetensors").values())


def test_every_weight_of_the_tiny_checkpoint_is_read() -> None:
    num_weights = count_weights(TINY_MODEL_FOLDER)
    assert weights_per_step(ModelConfig.from_folder(TINY_MODEL_FOLDER)) == num_weights


@pytest.mark.parametrize("variant", ["untied", "bias"])
def test_the_embedding_of_an_untied_model_is_not_read(tmp_path: Path, variant: str) -> None:
    config = ModelConfig.from_folder(make_qwen3_checkpoint(tmp_path, **VARIANTS[variant]))
    assert weights_per_step(config) == count_weights(tmp_path) - config.vocab_size * config.hidden_size


def test_of_the_experts_those_that_the_rows_choose_are_read(tmp_path: Path) -> None:
    config = ModelConfig.from_folder(make_checkpoint(tmp_path, "qwen3_moe", "first_layer_dense"))
    whole = count_weights(tmp_path) - config.vocab_size * config.hidden_size
    expert = 3 * 64 * 48
    assert weights_per_step(config) == whole - 6 * expert
    assert weights_per_step(config, 2) == whole - round(8 * 0.75**2 * expert)
    assert weights_per_step(config, 1000) == whole


def test_of_quantised_experts_the_bytes_of_the_chosen_ones_are_read(tmp_path: Path) -> None:
    config = ModelConfig.from_folder(make_checkpoint(tmp_path, "qwen3_moe", "first_layer_dense"))  # 2 of 8 experts
    sizes = {"stored": 1000, "experts": 800, "unread": 50}
    one, two, many = (Requests([[0] * 5] * rows, [9] * rows, shared_len=0) for rows in (1, 2, 1000))
    assert quantized_weight_bytes(config, one, **sizes) == 150 + 200
    assert quantized_weight_bytes(config, two, **sizes) == 150 + 350
    assert quantized_weight_bytes(config, many, **sizes) == 150 + 800
    dense = BUILTIN_SHAPES["qwen3-0.6b"]
    assert quantized_weight_bytes(dense, one, **sizes | {"experts": 0}) == 950


def test_workloads_draw_ids_that_the_model_has() -> None:
    requests = WORKLOADS["shared"].draw(4, vocab_size=512, seed=1)
    assert max(map(max, requests.prompts)) < 512
    assert len({tuple(prompt[:2048]) for prompt in requests.prompts}) == 1
    assert len({tuple(prompt[2048:]) for prompt in requests.prompts}) == 4
    assert all(len(prompt) + 64 == WORKLOADS["shared"].longest for prompt in requests.prompts)


def test_peers_stand_beside_the_same_work_only() -> None:
    assert peers_of("qwen3-0.6b", "classic", 256)["nano-vllm"] == 6.74
    assert peers_of("Qwen/Qwen3-0.6B", "wide", 2048)["vLLM"] == 4.27
    assert peers_of("qwen3-0.6b", "classic", 255) == {}
    assert peers_of("qwen3-8b", "classic", 256) == {}
    assert peers_of("qwen3-0.6b", "long", 32, fp8_cache=True) == {"vLLM": 2.75}
    assert peers_of("qwen3-0.6b", "wide", 2048, fp8_cache=True) == {}
    assert peers_of("qwen3-0.6b", "mixed", 64) == {}


def test_the_spread_of_runs() -> None:
    assert spread_of([2.0, 1.0, 4.0]) == {
        "run_seconds": [2.0, 1.0, 4.0],
        "best_seconds": 1.0,
        "median_seconds": 2.0,
        "spread": 1.5,
    }
