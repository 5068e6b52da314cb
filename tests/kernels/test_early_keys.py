"""Decode attention of few rows reads keys before the kernel ahead has ended, but none that this stores."""

from __future__ import annotations

import pytest
import torch

from nanovllm.kernels import paged_decode, paged_decode_fp8
from tests.kernels import test_paged_decode, test_paged_decode_fp8
from tests.kernels.inputs import check_close, drafts_of_one_row, last_keys_and_values
from tests.kernels.kernel_ahead import put_a_kernel_ahead

# Of a cache in the model's dtype and of one in FP8: the kernel's module, the function, cases and how one is checked.
PLAIN = (paged_decode, paged_decode.paged_decode, test_paged_decode.decode_case, check_close)
FP8 = (
    paged_decode_fp8,
    paged_decode_fp8.paged_decode_fp8,
    test_paged_decode_fp8.decode_case,
    test_paged_decode_fp8.check,
)
CACHES = pytest.mark.parametrize("cache", [PLAIN, FP8], ids=["plain", "fp8"])


@CACHES
@pytest.mark.parametrize("num_drafts", [1, 3])
@pytest.mark.parametrize("num_known", [30, 31, 32, 62, 63, 64])
def test_drafts_are_read_when_the_kernel_ahead_has_stored_them(generator, monkeypatch, num_known, num_drafts, cache):
    module, attend, _, check = cache
    arguments, oracle = drafts_of_one_row(num_known, num_drafts, cache is FP8, generator)
    query, kv_cache, metadata, _ = arguments
    put_a_kernel_ahead(monkeypatch, module, [query, *last_keys_and_values(kv_cache, metadata)])
    check(attend(*arguments, num_splits=2, use_triton=True), oracle, torch.float32)


@CACHES
@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("block_size", [4, 256])
def test_the_query_and_the_last_key_are_read_when_the_kernel_ahead_has_ended(
    generator, monkeypatch, block_size, window, cache
):
    module, attend, decode_case, check = cache
    lengths = [1, module.BLOCK_KEYS, 65, 130]
    arguments, oracle = decode_case("cpu", generator, torch.float32, block_size, 4, 2, 64, lengths, window)
    query, kv_cache, metadata, _ = arguments
    put_a_kernel_ahead(monkeypatch, module, [query, *last_keys_and_values(kv_cache, metadata)])
    for num_splits in (2, 7):
        check(attend(*arguments, num_splits=num_splits, window=window, use_triton=True), oracle, torch.float32)
