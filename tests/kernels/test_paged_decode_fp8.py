from __future__ import annotations

from unittest.mock import Mock

import pytest
import torch

from nanovllm.kernels import paged_decode_fp8 as module
from nanovllm.kernels.attention_inputs import DecodeMetadata
from nanovllm.kernels.paged_decode_fp8 import paged_decode_fp8
from tests.kernels.inputs import (
    DTYPES,
    attention_oracle,
    paged_sequences,
    quantized,
    relative_error,
)

LENGTHS = [1, 15, 16, 17, 64, 65, 130]
# Queries and weights are rounded to fp16 on their way, whatever is finer than that.
TOLERANCES = {torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 6e-3}


def decode_case(device, generator, dtype, block_size, num_heads, num_kv_heads, head_dim, lengths=LENGTHS, window=None):
    """(arguments of paged_decode_fp8, what float64 says of the keys and values that are stored)."""
    pages = paged_sequences(lengths, block_size, num_kv_heads, head_dim, dtype, device, generator)
    cache = quantized(pages)
    fused = torch.randn(len(lengths), num_heads + 3, head_dim, generator=generator).to(dtype)
    scale = head_dim**-0.5
    queries = [row[:num_heads].unsqueeze(0) for row in fused]
    oracle = attention_oracle(queries, cache.keys, cache.values, scale, window).to(device)
    query = fused.to(device)[:, :num_heads]
    metadata = DecodeMetadata(pages.context_lens, pages.block_tables, max(lengths))
    return (query, cache.kv_cache, metadata, scale), oracle


def check(got, oracle, dtype):
    assert got.shape == oracle.shape
    assert got.dtype == dtype
    assert relative_error(got, oracle) <= TOLERANCES[dtype]


@pytest.mark.parametrize("use_triton", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block_size", [1, 4, 16, 256])
def test_page_sizes(device, generator, dtype, block_size, use_triton):
    arguments, oracle = decode_case(device, generator, dtype, block_size, 4, 2, 64)
    check(paged_decode_fp8(*arguments, use_triton=use_triton), oracle, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(2, 2), (2, 1), (8, 1), (5, 1), (20, 1), (16, 8)])
def test_group_sizes(device, generator, dtype, num_heads, num_kv_heads):
    arguments, oracle = decode_case(device, generator, dtype, 16, num_heads, num_kv_heads, 32)
    check(paged_decode_fp8(*arguments, use_triton=True), oracle, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [16, 40, 128, 256])
def test_head_dims(device, generator, dtype, head_dim):
    arguments, oracle = decode_case(device, generator, dtype, 8, 2, 1, head_dim, [1, 33, 70])
    check(paged_decode_fp8(*arguments, use_triton=True), oracle, dtype)


@pytest.mark.parametrize("num_splits", [1, 2, 3, 7])
def test_any_number_of_splits_merges_to_the_same(device, generator, num_splits):
    arguments, oracle = decode_case(device, generator, torch.float32, 16, 4, 2, 64, [1, 64, 65, 300])
    check(paged_decode_fp8(*arguments, num_splits=num_splits, use_triton=True), oracle, torch.float32)


def test_many_small_weights_of_small_values_count(device, generator):
    """One key has most of the weight a key can have, 2,000 others a thousandth of it each; values are of hundredths."""
    length, head_dim = 2001, 16
    pages = paged_sequences([length], 16, 1, head_dim, torch.float32, device, generator)
    pages.key_cache.fill_(0.001)
    pages.value_cache.fill_(0.01)
    first_page = int(pages.block_tables[0, 0])
    pages.key_cache[first_page, 0] = 1.0
    pages.value_cache[first_page, 0] = -0.01
    cache = quantized(pages)
    query = torch.full((1, 1, head_dim), 0.43).half()  # exp(16 * 0.43) is 973
    oracle = attention_oracle([query], cache.keys, cache.values, 1.0).to(device)
    metadata = DecodeMetadata(pages.context_lens, pages.block_tables, length)
    got = paged_decode_fp8(query.to(device), cache.kv_cache, metadata, 1.0, num_splits=1, use_triton=True)
    assert relative_error(got, oracle) <= 5e-3


@pytest.mark.parametrize(
    ("num_seqs", "num_heads", "num_kv_heads", "head_dim", "balanced"),
    [
        (383, 1, 1, 16, False),
        (384, 1, 1, 16, True),
        (385, 1, 1, 16, False),
        (47, 8, 8, 16, False),
        (48, 8, 8, 16, True),
        (48, 64, 8, 128, True),
        (48, 72, 8, 16, False),
        (48, 8, 8, 136, False),
        (385, 8, 8, 16, False),
    ],
)
def test_the_shape_decides_how_keys_are_divided(
    device, generator, monkeypatch, num_seqs, num_heads, num_kv_heads, head_dim, balanced
):
    chosen = {"balanced_decode_fp8": True, "choose_num_splits": False}
    for name in chosen:
        monkeypatch.setattr(module, name, Mock(side_effect=RuntimeError(name)))
    arguments, _ = decode_case(device, generator, torch.float32, 16, num_heads, num_kv_heads, head_dim, [1] * num_seqs)
    with pytest.raises(RuntimeError) as reached:
        paged_decode_fp8(*arguments, use_triton=True)
    assert chosen[str(reached.value)] == balanced


def test_many_rows(device, generator):
    arguments, oracle = decode_case(device, generator, torch.float32, 16, 8, 8, 16, [200, *[1] * 47])
    check(paged_decode_fp8(*arguments, use_triton=True), oracle, torch.float32)


@pytest.mark.gpu
def test_a_captured_graph_follows_the_lengths_it_is_given(device, generator):
    arguments, _ = decode_case(device, generator, torch.bfloat16, 16, 16, 8, 128, [40, 200, 129])
    context_lens = arguments[2].context_lens
    paged_decode_fp8(*arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = paged_decode_fp8(*arguments)
    for new_lengths in ([40, 200, 129], [1, 64, 65], [17, 130, 1]):
        context_lens.copy_(torch.tensor(new_lengths))
        captured.fill_(torch.nan)
        graph.replay()
        assert torch.equal(captured, paged_decode_fp8(*arguments))
