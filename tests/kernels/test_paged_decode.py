from __future__ import annotations

from unittest.mock import Mock

import pytest
import torch

from nanovllm.kernels import paged_decode as module
from nanovllm.kernels.attention_inputs import DecodeMetadata
from nanovllm.kernels.paged_decode import choose_num_splits, paged_decode, paged_decode_reference
from tests.kernels.inputs import (
    DTYPES,
    attention_oracle,
    check_close,
    paged_sequences,
)

LENGTHS = [1, 15, 16, 17, 64, 65, 130]


def decode_case(device, generator, dtype, block_size, num_heads, num_kv_heads, head_dim, lengths=LENGTHS, window=None):
    """(arguments of paged_decode, what float64 says)."""
    cache = paged_sequences(lengths, block_size, num_kv_heads, head_dim, dtype, device, generator)
    fused = torch.randn(len(lengths), num_heads + 3, head_dim, generator=generator).to(dtype)
    query = fused[:, :num_heads]
    scale = head_dim**-0.5
    oracle = attention_oracle([row.unsqueeze(0) for row in query], cache.keys, cache.values, scale, window)
    query = fused.to(device)[:, :num_heads]
    metadata = DecodeMetadata(cache.context_lens, cache.block_tables, max(lengths))
    return (query, cache.kv_cache, metadata, scale), oracle.to(device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block_size", [1, 4, 16, 256])
def test_page_sizes(device, generator, dtype, block_size):
    arguments, oracle = decode_case(device, generator, dtype, block_size, 4, 2, 64)
    check_close(paged_decode(*arguments, use_triton=True), oracle, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(2, 2), (2, 1), (4, 1), (8, 1), (5, 1), (20, 1)])
def test_group_sizes(device, generator, dtype, num_heads, num_kv_heads):
    arguments, oracle = decode_case(device, generator, dtype, 16, num_heads, num_kv_heads, 32)
    check_close(paged_decode(*arguments, use_triton=True), oracle, dtype)


@pytest.mark.parametrize("head_dim", [16, 40, 128, 256])
@pytest.mark.parametrize("dtype", DTYPES)
def test_head_dims(device, generator, dtype, head_dim):
    arguments, oracle = decode_case(device, generator, dtype, 8, 2, 1, head_dim, [1, 33, 70])
    check_close(paged_decode(*arguments, use_triton=True), oracle, dtype)


@pytest.mark.parametrize("num_splits", [1, 2, 3, 7])
def test_any_number_of_splits_merges_to_the_same(device, generator, num_splits):
    arguments, oracle = decode_case(device, generator, torch.float32, 16, 4, 2, 64, [1, 64, 65, 300])
    check_close(paged_decode(*arguments, num_splits=num_splits, use_triton=True), oracle, torch.float32)


def test_reference_equals_the_oracle(device, generator):
    arguments, oracle = decode_case(device, generator, torch.float32, 4, 6, 2, 20)
    check_close(paged_decode_reference(*arguments), oracle, torch.float32)


def test_large_scores_do_not_overflow(device, generator):
    arguments, _ = decode_case(device, generator, torch.float32, 16, 2, 1, 16, [100])
    query, kv_cache, metadata, _ = arguments
    got = paged_decode(query * 1e4, kv_cache, metadata, 1.0, use_triton=True)
    assert bool(got.isfinite().all())


def test_number_of_splits():
    assert choose_num_splits(256, 8, 40960, 132) == 1  # enough programs already
    assert choose_num_splits(1, 8, 32, 132) == 1  # one block of keys is never split
    assert choose_num_splits(1, 8, 400, 132) == 13  # no more parts than blocks of keys
    assert choose_num_splits(1, 8, 4096, 132) == 32  # more would delay short contexts
    assert choose_num_splits(1, 8, 6400, 132) == 50  # four blocks of keys in each part
    assert choose_num_splits(1, 8, 40960, 132) == 66  # four programs a multiprocessor
    assert choose_num_splits(1, 2, 40960, 132) == 128  # more cost more to merge than they gain
    assert choose_num_splits(32, 8, 8100, 132) == 2
    assert choose_num_splits(64, 8, 8100, 132) == 2  # nearly enough is not enough
    assert choose_num_splits(16, 8, 8100, 132, programs_each=16) == 16  # smaller programs: more of them
    assert choose_num_splits(1, 8, 4096, 132, programs_each=16, block_keys=16) == 64
    assert choose_num_splits(1, 8, 400, 132, programs_each=16, block_keys=16) == 25


@pytest.mark.parametrize(
    ("num_seqs", "num_heads", "num_kv_heads", "dtype", "head_dim", "balanced"),
    [
        (47, 8, 8, torch.float16, 128, False),
        (48, 8, 8, torch.float16, 128, True),
        (48, 64, 8, torch.float16, 128, True),
        (48, 72, 8, torch.float16, 128, False),
        (48, 8, 8, torch.float16, 64, False),
        (256, 2, 2, torch.float32, 64, True),
        (257, 2, 2, torch.float32, 64, False),
    ],
)
def test_the_shape_decides_how_keys_are_divided(
    device, generator, monkeypatch, num_seqs, num_heads, num_kv_heads, dtype, head_dim, balanced
):
    chosen = {"balanced_decode": True, "choose_num_splits": False}
    for name in chosen:
        monkeypatch.setattr(module, name, Mock(side_effect=RuntimeError(name)))
    arguments, _ = decode_case(device, generator, dtype, 16, num_heads, num_kv_heads, head_dim, [1] * num_seqs)
    with pytest.raises(RuntimeError) as reached:
        paged_decode(*arguments, use_triton=True)
    assert chosen[str(reached.value)] == balanced


def test_many_rows(device, generator):
    arguments, oracle = decode_case(device, generator, torch.float32, 16, 8, 8, 64, [200, *[1] * 47])
    check_close(paged_decode(*arguments, use_triton=True), oracle, torch.float32)


@pytest.mark.gpu
def test_a_captured_graph_follows_the_lengths_it_is_given(device, generator):
    lengths = [40, 200, 129]
    arguments, _ = decode_case(device, generator, torch.bfloat16, 16, 16, 8, 128, lengths)
    context_lens = arguments[2].context_lens
    paged_decode(*arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = paged_decode(*arguments)
    for new_lengths in ([40, 200, 129], [1, 64, 65], [17, 130, 1]):
        context_lens.copy_(torch.tensor(new_lengths))
        captured.fill_(torch.nan)
        graph.replay()
        assert torch.equal(captured, paged_decode(*arguments))
