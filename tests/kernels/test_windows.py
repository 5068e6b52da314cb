"""Sliding windows: every attention kernel sees the last keys alone, and reads no block before them."""

from __future__ import annotations

import pytest
import torch

from nanovllm.kernels.attention_inputs import SharedPrefixes
from nanovllm.kernels.paged_decode import paged_decode
from nanovllm.kernels.paged_decode_fp8 import paged_decode_fp8
from nanovllm.kernels.paged_prefill import paged_prefill
from tests.kernels import test_paged_decode, test_paged_decode_fp8, test_paged_prefill
from tests.kernels.inputs import check_close, relative_error

WINDOWS = [1, 16, 31, 50, 1000]
HEADS = (4, 2, 32)
FP32 = torch.float32


@pytest.mark.parametrize("use_triton", [True, False])
@pytest.mark.parametrize("window", WINDOWS)
def test_prefill(device, generator, window, use_triton):
    """Chunks shorter and longer than a tile and than the window, behind a cached prefix and without."""
    shapes = [(1, 1), (1, 140), (20, 20), (33, 65), (70, 150)]
    arguments, oracle = test_paged_prefill.prefill_case(device, generator, FP32, 16, *HEADS, shapes, window=window)
    check_close(paged_prefill(*arguments, window=window, use_triton=use_triton), oracle, FP32)
    arguments, oracle = test_paged_prefill.fp8_prefill_case(device, generator, FP32, 16, *HEADS, shapes, window)
    got = paged_prefill(*arguments, window=window, use_triton=use_triton)
    assert relative_error(got, oracle) <= test_paged_prefill.FP8_TOLERANCES[FP32]


@pytest.mark.parametrize("use_triton", [True, False])
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("num_splits", [1, 3])
def test_decode(device, generator, window, num_splits, use_triton):
    lengths = [1, 16, 17, 33, 130, 300]
    settings = {"window": window, "num_splits": num_splits, "use_triton": use_triton}
    arguments, oracle = test_paged_decode.decode_case(device, generator, FP32, 16, *HEADS, lengths, window)
    check_close(paged_decode(*arguments, **settings), oracle, FP32)
    arguments, oracle = test_paged_decode_fp8.decode_case(device, generator, FP32, 16, *HEADS, lengths, window)
    test_paged_decode_fp8.check(paged_decode_fp8(*arguments, **settings), oracle, FP32)


def test_blocks_before_the_window_are_not_read(device, generator):
    """NaN in them would show."""
    arguments, oracle = test_paged_decode.decode_case(device, generator, FP32, 16, *HEADS, [300], window=40)
    _, kv_cache, metadata, _ = arguments
    kv_cache.key[metadata.block_tables[0, :16].long()] = torch.nan  # keys 0 … 255; the window begins at 260
    kv_cache.value[metadata.block_tables[0, :16].long()] = torch.nan
    check_close(paged_decode(*arguments, window=40, use_triton=True), oracle, FP32)
    arguments, oracle = test_paged_prefill.prefill_case(device, generator, FP32, 16, *HEADS, [(50, 300)], window=40)
    _, kv_cache, metadata, _ = arguments
    kv_cache.key[metadata.block_tables[0, :12].long()] = torch.nan  # keys 0 … 191; the first window begins at 211
    kv_cache.value[metadata.block_tables[0, :12].long()] = torch.nan
    check_close(paged_prefill(*arguments, window=40, use_triton=True), oracle, FP32)


def test_a_shared_prefix_is_not_used_with_a_window(device, generator):
    arguments, oracle = test_paged_decode.decode_case(device, generator, FP32, 16, *HEADS, [300] * 4, window=40)
    query, kv_cache, metadata, scale = arguments
    shared = SharedPrefixes(metadata.context_lens * 0 + 256, metadata.context_lens * 0 + 4, 16)
    metadata = type(metadata)(metadata.context_lens, metadata.block_tables, metadata.max_context_len, shared)
    check_close(paged_decode(query, kv_cache, metadata, scale, window=40, use_triton=True), oracle, FP32)
