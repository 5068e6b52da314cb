"""How many blocks the cache gets, by worked numbers, and what is said when there is no room."""

from __future__ import annotations

import logging
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nanovllm import LLM, OutOfMemoryError
from nanovllm.models.builtin_shapes import BUILTIN_SHAPES
from nanovllm.runner import kv_cache
from nanovllm.runner.kv_cache import GB, GPUMemory, KVCacheShape, num_cpu_blocks
from tests.models.qwen3_checkpoints import make_qwen3_checkpoint

SHAPE = KVCacheShape.of(BUILTIN_SHAPES["qwen3-0.6b"], 16, torch.bfloat16)
# An H200 that is otherwise empty: 141 GB, nine tenths ours, 1.2 GB of weights and 5 GB of activations.
MEMORY = GPUMemory(total=141 * GB, utilization=0.9, weights=1_200_000_000, activations=5 * GB, free=138 * GB)


def test_a_block_holds_keys_and_values_of_every_layer() -> None:
    assert SHAPE.block_bytes == 16 * 2 * 28 * 8 * 128 * 2 == 1_835_008
    assert replace(SHAPE, dtype=torch.float32).block_bytes == 2 * 1_835_008
    assert replace(SHAPE, block_size=256).block_bytes == 16 * 1_835_008


def test_the_example_of_the_documentation() -> None:
    text = (Path(__file__).parents[2] / "docs" / "kv-cache.md").read_text(encoding="utf-8")
    assert f"16 × 2 × 28 × 8 × 128 × 2 = {SHAPE.block_bytes:,} bytes" in text


def test_our_share_less_what_we_need_ourselves() -> None:
    assert MEMORY.available == 126_900_000_000 - 6_200_000_000
    # 120.7 GB hold 65 776 blocks and a bit; one of them is the null block.
    assert MEMORY.num_blocks(SHAPE) == 65_776 - 1


def test_memory_of_other_processes_is_not_ours() -> None:
    crowded = replace(MEMORY, free=20 * GB)
    assert crowded.available == 15 * GB
    assert crowded.num_blocks(SHAPE) == 15 * GB // 1_835_008 - 1


def test_one_block_beside_the_null_block_is_the_least() -> None:
    needed = MEMORY.weights + MEMORY.activations + 2 * SHAPE.block_bytes
    assert replace(MEMORY, total=needed, utilization=1.0).num_blocks(SHAPE) == 1
    with pytest.raises(OutOfMemoryError):
        replace(MEMORY, total=needed - 1, utilization=1.0).num_blocks(SHAPE)


def test_without_room_the_error_has_the_numbers_and_the_settings() -> None:
    with pytest.raises(OutOfMemoryError) as caught:
        replace(MEMORY, utilization=0.03).num_blocks(SHAPE)
    for part in ("141.00 GB", "gpu_memory_utilization=0.03 allows 4.23 GB", "weights take 1.20 GB"):
        assert part in str(caught.value)
    for part in ("activations 5.00 GB", "138.00 GB are free", "a block needs 0.0018 GB"):
        assert part in str(caught.value)
    for setting in ("Raise gpu_memory_utilization", "max_num_batched_tokens", "max_num_seqs", "other processes"):
        assert setting in str(caught.value)


def test_the_way_out_has_figures_that_work() -> None:
    """The share that the error names is enough; what other processes hold is named where no share is."""
    tight = replace(MEMORY, utilization=0.03)
    with pytest.raises(OutOfMemoryError) as caught:
        tight.num_blocks(SHAPE)
    share = re.search(r"Raise gpu_memory_utilization to (0\.\d+) or more", str(caught.value))
    assert share is not None
    assert replace(tight, utilization=float(share[1])).num_blocks(SHAPE) >= 1
    with pytest.raises(OutOfMemoryError) as caught:
        replace(MEMORY, free=4 * GB).num_blocks(SHAPE)
    assert "End the other processes on this GPU, which hold 135.80 GB" in str(caught.value)
    assert "Raise gpu_memory_utilization" not in str(caught.value)


def test_allocation_is_zeroed_and_has_the_null_block() -> None:
    shape = KVCacheShape(num_layers=3, num_kv_heads=2, head_dim=8, block_size=4, dtype=torch.float16)
    caches = shape.allocate(5, torch.device("cpu"))
    assert len(caches) == 3
    pages = [page for cache in caches for page in (cache.key, cache.value)]
    for page in pages:
        assert page.shape == (6, 4, 2, 8)
        assert page.dtype is torch.float16
        assert page.is_contiguous()
        assert not page.any()
    assert len({page.data_ptr() for page in pages}) == 6
    assert sum(page.nbytes for page in pages) == 6 * shape.block_bytes


def test_a_draft_models_cache_has_blocks_of_the_same_numbers() -> None:
    draft = KVCacheShape(num_layers=2, num_kv_heads=1, head_dim=16, block_size=4, dtype=torch.float16)
    shape = KVCacheShape(num_layers=3, num_kv_heads=2, head_dim=8, block_size=4, dtype=torch.float16, draft=draft)
    caches = shape.allocate(5, torch.device("cpu"))
    assert [cache.key.shape for cache in caches] == [(6, 4, 2, 8)] * 3 + [(6, 4, 1, 16)] * 2
    assert sum(page.nbytes for cache in caches for page in (cache.key, cache.value)) == 6 * shape.block_bytes
    assert shape.block_bytes == replace(shape, draft=None).block_bytes + draft.block_bytes


def test_an_fp8_cache_has_half_the_bytes_and_a_scale_for_each_head() -> None:
    fp8 = replace(SHAPE, dtype=torch.float8_e4m3fn)
    assert fp8.block_bytes == 16 * 2 * 28 * 8 * (128 + 4) == 1_835_008 // 2 + 16 * 2 * 28 * 8 * 4
    small = KVCacheShape(num_layers=3, num_kv_heads=2, head_dim=8, block_size=4, dtype=torch.float8_e4m3fn)
    caches = small.allocate(5, torch.device("cpu"))
    tensors = [t for cache in caches for t in (cache.key, cache.value, cache.key_scale, cache.value_scale)]
    assert [t.shape for t in tensors[:4]] == [(6, 4, 2, 8), (6, 4, 2, 8), (6, 2, 4), (6, 2, 4)]
    assert [t.dtype for t in tensors[:4]] == [torch.float8_e4m3fn] * 2 + [torch.float32] * 2
    assert all(t.is_contiguous() and not t.float().any() for t in tensors)
    assert len({t.data_ptr() for t in tensors}) == 12
    assert sum(t.nbytes for t in tensors) == 6 * small.block_bytes


# ---- on a CPU


def test_the_variable_decides_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NANOVLLM_CPU_KVCACHE_GB", "0.5")
    assert num_cpu_blocks(SHAPE, max_num_seqs=1, max_model_len=16) == 500_000_000 // 1_835_008


def test_a_quarter_of_the_free_memory_or_what_all_rows_can_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NANOVLLM_CPU_KVCACHE_GB", raising=False)
    monkeypatch.setattr(kv_cache, "free_cpu_memory", lambda: 8 * GB)
    assert num_cpu_blocks(SHAPE, max_num_seqs=512, max_model_len=40_960) == 2 * GB // 1_835_008
    assert num_cpu_blocks(SHAPE, max_num_seqs=3, max_model_len=100) == 3 * 7


def test_ranks_share_the_memory_of_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NANOVLLM_CPU_KVCACHE_GB", raising=False)
    monkeypatch.setattr(kv_cache, "free_cpu_memory", lambda: 8 * GB)
    rows = {"max_num_seqs": 512, "max_model_len": 40_960}
    assert num_cpu_blocks(SHAPE, **rows, num_ranks=8) == 2 * GB // (8 * 1_835_008)
    assert num_cpu_blocks(SHAPE, max_num_seqs=3, max_model_len=100, num_ranks=8) == 3 * 7
    monkeypatch.setenv("NANOVLLM_CPU_KVCACHE_GB", "0.5")
    assert num_cpu_blocks(SHAPE, **rows, num_ranks=8) == 500_000_000 // (8 * 1_835_008)
    monkeypatch.setenv("NANOVLLM_CPU_KVCACHE_GB", "0.001")
    with pytest.raises(OutOfMemoryError, match="Raise NANOVLLM_CPU_KVCACHE_GB to 0.0147"):
        num_cpu_blocks(SHAPE, **rows, num_ranks=8)


def test_free_memory_is_measured() -> None:
    assert 10**7 < kv_cache.free_cpu_memory() < 10**14


def test_too_little_on_a_cpu_says_how_much_and_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NANOVLLM_CPU_KVCACHE_GB", "0.001")
    with pytest.raises(OutOfMemoryError) as caught:
        num_cpu_blocks(SHAPE, max_num_seqs=1, max_model_len=16)
    for part in ("0.0018 GB", "0.0010 GB", "Raise NANOVLLM_CPU_KVCACHE_GB to 0.0019", "kvcache_block_size=16"):
        assert part in str(caught.value)
    monkeypatch.setenv("NANOVLLM_CPU_KVCACHE_GB", "0.0019")
    assert num_cpu_blocks(SHAPE, max_num_seqs=1, max_model_len=16) == 1


# ---- the engine with it


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_qwen3_checkpoint(tmp_path_factory.mktemp("qwen3"), max_position_embeddings=256)


def load(folder: Path, **settings: object) -> LLM:
    return LLM(str(folder), device="cpu", skip_tokenizer_init=True, max_num_seqs=4, **settings)


def test_the_engine_takes_what_the_variable_says(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    block_bytes = 16 * 2 * 2 * 2 * 32 * 4  # tokens, key and value, layers, KV heads, head_dim, fp32
    monkeypatch.setenv("NANOVLLM_CPU_KVCACHE_GB", str(20.5 * block_bytes / GB))
    with load(folder) as llm:
        assert llm.llm_engine.resolved.num_blocks == 20


@pytest.mark.parametrize(("asked", "level"), [(None, "INFO"), (200, "WARNING")])
def test_a_cache_smaller_than_the_longest_request_lowers_its_length(
    folder: Path, caplog: pytest.LogCaptureFixture, asked: int | None, level: str
) -> None:
    caplog.set_level(logging.INFO, logger="nanovllm.runner.model_plan")
    with load(folder, num_kvcache_blocks=5, kvcache_block_size=8, max_model_len=asked) as llm:
        assert llm.llm_engine.resolved.max_model_len == 40
    (record,) = [record for record in caplog.records if record.event == "engine.max_model_len"]
    assert record.levelname == level
    assert re.match(rf"max_model_len lowered from {asked or 256} to 40: ", record.getMessage())


def test_a_cache_that_holds_no_request_is_refused(folder: Path) -> None:
    with pytest.raises(OutOfMemoryError, match="num_kvcache_blocks=1"):
        load(folder, num_kvcache_blocks=1, kvcache_block_size=1)


def test_an_fp8_cache_holds_more_tokens_and_says_what_it_is(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="nanovllm.engine.model_runner")
    monkeypatch.setenv("NANOVLLM_CPU_KVCACHE_GB", "0.001")
    with load(folder, kv_cache_dtype="fp8") as llm:
        resolved = llm.llm_engine.resolved
        assert resolved.num_blocks == 1_000_000 // (16 * 2 * 2 * 2 * (32 + 4))
        assert (resolved.kv_cache_dtype, resolved.dtype) == ("fp8_e4m3", "float32")
    assert "KV cache configuration: num_kv_heads=2, head_dim=32, block_size=16, dtype=fp8_e4m3" in caplog.messages


def test_cache_lines(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="nanovllm.engine.model_runner")
    with load(folder, num_kvcache_blocks=100_000, kvcache_block_size=1):
        pass
    assert "KV cache configuration: num_kv_heads=2, head_dim=32, block_size=1, dtype=float32" in caplog.messages
    assert "Allocating 100000 KV cache blocks, total_size=0.10GB" in caplog.messages
