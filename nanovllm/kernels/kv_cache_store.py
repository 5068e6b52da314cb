"""Writes the keys and values of a step's tokens into their slots of the paged cache."""

from __future__ import annotations

import torch

from nanovllm.kernels.triton_support import jit, next_power_of_2, runs_triton, tl


@jit
def _store_kv_cache_kernel(
    key_ptr: tl.tensor,
    value_ptr: tl.tensor,
    key_cache_ptr: tl.tensor,
    value_cache_ptr: tl.tensor,
    slot_mapping_ptr: tl.tensor,
    key_token_stride: tl.tensor,
    key_head_stride: tl.tensor,
    value_token_stride: tl.tensor,
    value_head_stride: tl.tensor,
    page_stride: tl.tensor,
    slot_stride: tl.tensor,
    head_stride: tl.tensor,
    block_size: tl.tensor,
    head_dim: tl.tensor,
    row_size: tl.tensor,
    BLOCK_SIZE: tl.constexpr,
) -> None:
    """One program copies one token: its row is all KV heads, one after another."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_mapping_ptr + token)
    column = tl.arange(0, BLOCK_SIZE)
    mask = column < row_size
    head = column // head_dim
    dim = column % head_dim
    destination = (slot // block_size) * page_stride + (slot % block_size) * slot_stride + head * head_stride + dim
    key = tl.load(key_ptr + token * key_token_stride + head * key_head_stride + dim, mask=mask)
    value = tl.load(value_ptr + token * value_token_stride + head * value_head_stride + dim, mask=mask)
    tl.store(key_cache_ptr + destination, key, mask=mask)
    tl.store(value_cache_ptr + destination, value, mask=mask)


def store_kv_cache_reference(
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> None:
    """What `store_kv_cache` must equal, in plain torch; also what runs on a CPU."""
    key_cache.view(-1, *key.shape[1:]).index_copy_(0, slot_mapping, key)
    value_cache.view(-1, *value.shape[1:]).index_copy_(0, slot_mapping, value)


def store_kv_cache(
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    *,
    use_triton: bool | None = None,
) -> None:
    """Stores each token's key and value at its slot: block slot // block_size, offset slot % block_size.

    key, value [num_tokens, num_kv_heads, head_dim], may be strided views of a fused projection;
    key_cache, value_cache [num_blocks, block_size, num_kv_heads, head_dim], written in place, alike in strides;
    slot_mapping [num_tokens] int64, ≥ 0; of tokens with the same slot (padding's) any one is stored.
    """
    if not runs_triton(key, use_triton):
        store_kv_cache_reference(key, value, key_cache, value_cache, slot_mapping)
        return
    num_tokens, num_kv_heads, head_dim = key.shape
    if num_tokens == 0:
        return
    row_size = num_kv_heads * head_dim
    block = next_power_of_2(row_size)
    _store_kv_cache_kernel[(num_tokens,)](
        key,
        value,
        key_cache,
        value_cache,
        slot_mapping,
        key.stride(0),
        key.stride(1),
        value.stride(0),
        value.stride(1),
        key_cache.stride(0),
        key_cache.stride(1),
        key_cache.stride(2),
        key_cache.shape[1],
        head_dim,
        row_size,
        BLOCK_SIZE=block,
        num_warps=min(max(block // 256, 1), 8),
    )
