from __future__ import annotations

import pytest
import torch

from nanovllm.attention import triton_backend
from nanovllm.kernels.attention_inputs import PrefillMetadata
from nanovllm.kernels.dequantize_pages import dequantize_pages
from nanovllm.kernels.paged_prefill import paged_prefill
from nanovllm.kernels.paged_prefill_hopper import can_run_on_hopper
from tests.kernels.inputs import check_close, relative_error
from tests.kernels.test_paged_prefill import FP8_TOLERANCES, fp8_prefill_case, prefill_case

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU"
    ),
]

# (queries, context): one token, borders of pages (16), of a warpgroup's rows, of tiles and of blocks of keys (128).
RAGGED = [(1, 1), (1, 33), (17, 48), (63, 64), (64, 64), (65, 65), (33, 128), (5, 129), (70, 200), (1, 257), (130, 383)]


def check(device, generator, dtype, block_size, num_heads, num_kv_heads, head_dim, shapes, window=None):
    heads = (num_heads, num_kv_heads, head_dim)
    arguments, oracle = prefill_case(
        device, generator, dtype, block_size, *heads, shapes, padding_heads=8, window=window
    )
    assert can_run_on_hopper(arguments[0], arguments[1].key)
    check_close(paged_prefill(*arguments, window=window), oracle, dtype)


@pytest.mark.parametrize("window", [1, 7, 64, 128, 129, 300, 2000])
@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_dim"), [(4, 2, 64), (8, 1, 128), (2, 2, 128)])
def test_windows(device, generator, num_heads, num_kv_heads, head_dim, window):
    shapes = [*RAGGED, (300, 300), (300, 1100)]
    check(device, generator, torch.bfloat16, 16, num_heads, num_kv_heads, head_dim, shapes, window)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("block_size", [8, 16, 64, 128, 256])
def test_page_sizes(device, generator, dtype, head_dim, block_size):
    check(device, generator, dtype, block_size, 4, 2, head_dim, RAGGED)


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(2, 2), (4, 1), (8, 1), (16, 1)])
def test_group_sizes(device, generator, num_heads, num_kv_heads):
    check(device, generator, torch.bfloat16, 16, num_heads, num_kv_heads, 128, RAGGED)


def test_more_sequences_and_tiles_than_programs_and_lanes(device, generator):
    check(device, generator, torch.bfloat16, 16, 8, 4, 64, [(1 + i % 70, 1 + i % 70 + i % 40) for i in range(100)])


def test_one_chunk_of_many_tiles_behind_a_prefix(device, generator):
    check(device, generator, torch.bfloat16, 16, 2, 1, 128, [(300, 1100)])


def test_a_sequence_without_tokens_is_passed_over(device, generator):
    arguments, oracle = prefill_case(device, generator, torch.bfloat16, 16, 4, 2, 64, [(40, 40), (30, 50)], 8)
    query, kv_cache, metadata, scale = arguments
    starts = torch.tensor([0, 0, 40, 40, 70, 70], dtype=torch.int32, device=device)
    lens = torch.tensor([0, 40, 9, 50, 0], dtype=torch.int32, device=device)
    tables = metadata.block_tables[[0, 0, 0, 1, 1]]
    spread = PrefillMetadata(starts, lens, tables, metadata.max_seqlen_q, metadata.max_seqlen_k)
    out = paged_prefill(query, kv_cache, spread, scale)
    check_close(out, oracle, torch.bfloat16)


@pytest.mark.parametrize(
    ("dtype", "block_size", "num_heads", "num_kv_heads", "head_dim"),
    [
        (torch.float32, 16, 2, 1, 64),  # a type of 4 bytes
        (torch.bfloat16, 16, 5, 1, 64),  # a group that is no power of two
        (torch.bfloat16, 16, 2, 1, 80),
        (torch.bfloat16, 16, 2, 1, 256),
        (torch.bfloat16, 4, 2, 1, 64),  # pages of fewer rows than the swizzle has
    ],
)
def test_what_it_does_not_take(device, generator, dtype, block_size, num_heads, num_kv_heads, head_dim):
    arguments, oracle = prefill_case(
        device, generator, dtype, block_size, num_heads, num_kv_heads, head_dim, [(70, 90)], 8
    )
    assert not can_run_on_hopper(arguments[0], arguments[1].key)
    check_close(paged_prefill(*arguments), oracle, dtype)


@pytest.mark.parametrize(
    ("shapes", "copies"), [([(1200, 1700), (130, 130)], True), ([(300, 700)], False), ([(4, 700), (1, 1)], False)]
)
def test_an_fp8_cache_is_copied_where_many_queries_read_it(device, generator, monkeypatch, shapes, copies):
    arguments, oracle = fp8_prefill_case(device, generator, torch.bfloat16, 16, 4, 2, 128, shapes)
    copied = []
    monkeypatch.setattr(
        triton_backend, "dequantize_pages", lambda *given: copied.append(True) or dequantize_pages(*given)
    )
    out = triton_backend.TritonBackend().prefill(*arguments)
    assert bool(copied) is copies
    assert relative_error(out, oracle) <= FP8_TOLERANCES[torch.bfloat16]
