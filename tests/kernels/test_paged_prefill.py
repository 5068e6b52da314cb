from __future__ import annotations

import pytest
import torch

from nanovllm.kernels.attention_inputs import PrefillMetadata
from nanovllm.kernels.paged_prefill import paged_prefill, paged_prefill_reference
from tests.kernels.inputs import DTYPES, attention_oracle, check_close, paged_sequences, quantized, relative_error

# (queries, context): whole prompts, chunks behind a cached prefix, single tokens, page borders.
SHAPES = [(1, 1), (1, 33), (17, 17), (16, 48), (5, 70), (70, 70)]


def prefill_case(
    device, generator, dtype, block_size, num_heads, num_kv_heads, head_dim, shapes=SHAPES, padding_heads=3, window=None
):
    """(arguments of paged_prefill, what float64 says)."""
    query_lens = [query_len for query_len, _ in shapes]
    contexts = [context_len for _, context_len in shapes]
    cache = paged_sequences(contexts, block_size, num_kv_heads, head_dim, dtype, device, generator)
    fused = torch.randn(sum(query_lens), num_heads + padding_heads, head_dim, generator=generator).to(dtype)
    scale = head_dim**-0.5
    queries = list(fused[:, :num_heads].split(query_lens))
    oracle = attention_oracle(queries, cache.keys, cache.values, scale, window)
    starts = torch.tensor([0, *query_lens]).cumsum(0).int().to(device)
    query = fused.to(device)[:, :num_heads]
    metadata = PrefillMetadata(starts, cache.context_lens, cache.block_tables, max(query_lens), max(contexts))
    return (query, cache.kv_cache, metadata, scale), oracle.to(device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block_size", [1, 4, 16, 256])
def test_page_sizes(device, generator, dtype, block_size):
    arguments, oracle = prefill_case(device, generator, dtype, block_size, 4, 2, 64)
    check_close(paged_prefill(*arguments, use_triton=True), oracle, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(2, 2), (2, 1), (4, 1), (8, 1), (5, 1)])
def test_group_sizes(device, generator, dtype, num_heads, num_kv_heads):
    arguments, oracle = prefill_case(device, generator, dtype, 16, num_heads, num_kv_heads, 32)
    check_close(paged_prefill(*arguments, use_triton=True), oracle, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [16, 40, 128, 256])
def test_head_dims(device, generator, dtype, head_dim):
    arguments, oracle = prefill_case(device, generator, dtype, 8, 2, 1, head_dim, [(1, 1), (20, 41), (3, 90)])
    check_close(paged_prefill(*arguments, use_triton=True), oracle, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_chunks_longer_than_a_tile_behind_a_prefix(device, generator, dtype):
    arguments, oracle = prefill_case(device, generator, dtype, 16, 2, 1, 16, [(150, 150), (131, 200)])
    check_close(paged_prefill(*arguments, use_triton=True), oracle, dtype)


def test_chunks_give_what_the_whole_prompt_gives(device, generator):
    arguments, _ = prefill_case(device, generator, torch.float32, 8, 4, 2, 16, [(90, 90)])
    query, kv_cache, metadata, scale = arguments
    whole = paged_prefill(*arguments, use_triton=True)
    start = 0
    for end in (1, 32, 41, 90):
        starts = torch.tensor([0, end - start], dtype=torch.int32, device=device)
        lens = torch.tensor([end], dtype=torch.int32, device=device)
        part = PrefillMetadata(starts, lens, metadata.block_tables, end - start, end)
        chunk = paged_prefill(query[start:end], kv_cache, part, scale, use_triton=True)
        check_close(chunk, whole[start:end], torch.float32)
        start = end


def test_reference_equals_the_oracle(device, generator):
    arguments, oracle = prefill_case(device, generator, torch.float32, 4, 6, 2, 20)
    check_close(paged_prefill_reference(*arguments), oracle, torch.float32)


# What rounding the scales to fp16 adds, for half precision.
FP8_TOLERANCES = {torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 6e-3}


def fp8_prefill_case(
    device, generator, dtype, block_size, num_heads, num_kv_heads, head_dim, shapes=SHAPES, window=None
):
    """The same with an FP8 cache: (arguments, what float64 says of the keys and values that are stored)."""
    query_lens = [query_len for query_len, _ in shapes]
    contexts = [context_len for _, context_len in shapes]
    pages = paged_sequences(contexts, block_size, num_kv_heads, head_dim, dtype, device, generator)
    cache = quantized(pages)
    query = torch.randn(sum(query_lens), num_heads, head_dim, generator=generator).to(dtype)
    scale = head_dim**-0.5
    oracle = attention_oracle(list(query.split(query_lens)), cache.keys, cache.values, scale, window).to(device)
    starts = torch.tensor([0, *query_lens]).cumsum(0).int().to(device)
    metadata = PrefillMetadata(starts, pages.context_lens, pages.block_tables, max(query_lens), max(contexts))
    return (query.to(device), cache.kv_cache, metadata, scale), oracle


@pytest.mark.parametrize("use_triton", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("block_size", "heads"), [(4, (4, 2, 64)), (16, (5, 1, 40)), (16, (8, 1, 128)), (256, (2, 2, 16))]
)
def test_an_fp8_cache(device, generator, dtype, block_size, heads, use_triton):
    arguments, oracle = fp8_prefill_case(device, generator, dtype, block_size, *heads)
    got = paged_prefill(*arguments, use_triton=use_triton)
    assert got.dtype == dtype
    assert relative_error(got, oracle) <= FP8_TOLERANCES[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_fp8_cache_and_chunks_longer_than_a_tile(device, generator, dtype):
    arguments, oracle = fp8_prefill_case(device, generator, dtype, 16, 2, 1, 16, [(150, 150), (131, 200)])
    assert relative_error(paged_prefill(*arguments, use_triton=True), oracle) <= FP8_TOLERANCES[dtype]
