from __future__ import annotations

import pytest
import torch

from nanovllm.kernels.kv_cache_store import store_kv_cache

BLOCK_SIZES = [1, 3, 16]


def stored(device, generator, dtype, block_size, num_kv_heads, head_dim, slots, use_triton):
    """Keys and values stored from a fused projection into caches of ones: (key cache, value cache, keys, values)."""
    size = num_kv_heads * head_dim
    fused = torch.randn(len(slots), 5 + 2 * size, generator=generator).to(device, dtype)
    key = fused[:, 5 : 5 + size].unflatten(1, (num_kv_heads, head_dim))
    value = fused[:, 5 + size :].unflatten(1, (num_kv_heads, head_dim))
    caches = torch.ones(2, -(-50 // block_size), block_size, num_kv_heads, head_dim, dtype=dtype, device=device)
    store_kv_cache(key, value, caches[0], caches[1], torch.tensor(slots, device=device), use_triton=use_triton)
    return caches[0], caches[1], key, value


@pytest.mark.parametrize("use_triton", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize(("num_kv_heads", "head_dim"), [(1, 16), (3, 20), (8, 128)])
def test_each_token_lands_in_its_slot_and_nowhere_else(
    device, generator, dtype, block_size, num_kv_heads, head_dim, use_triton
):
    slots = [49, 0, 17, 16, 15, 31]
    cache_shape = (num_kv_heads, head_dim, slots, use_triton)
    key_cache, value_cache, key, value = stored(device, generator, dtype, block_size, *cache_shape)
    for cache, rows in ((key_cache, key), (value_cache, value)):
        flat = cache.flatten(0, 1)
        assert torch.equal(flat[slots], rows)
        untouched = [slot for slot in range(flat.shape[0]) if slot not in slots]
        assert bool((flat[untouched] == 1).all())


@pytest.mark.parametrize("use_triton", [True, False])
def test_of_tokens_with_one_slot_one_is_stored_and_nothing_else(device, generator, use_triton):
    """As padding does, whose rows all point at one slot of the null block."""
    key_cache, value_cache, key, value = stored(device, generator, torch.float32, 4, 2, 8, [9, 6, 9], use_triton)
    for cache, rows in ((key_cache, key), (value_cache, value)):
        flat = cache.flatten(0, 1)
        assert torch.equal(flat[6], rows[1])
        assert torch.equal(flat[9], rows[0]) or torch.equal(flat[9], rows[2])
        assert int((flat != 1).any(dim=-1).any(dim=-1).sum()) == 2
