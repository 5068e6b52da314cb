"""Copies keys and values of an FP8 cache to the model's dtype, page by page, for kernels that read no scales."""

from __future__ import annotations

from dataclasses import replace

import torch

from nanovllm.kernels.attention_inputs import LayerKVCache, PrefillMetadata
from nanovllm.kernels.page_slots import page_slots
from nanovllm.kernels.triton_support import jit, next_power_of_2, tl

_BLOCK_KEYS = 32  # tokens of one head that a program copies


@jit
def _dequantize_pages_kernel(
    key_ptr: tl.tensor,
    value_ptr: tl.tensor,
    key_scale_ptr: tl.tensor,
    value_scale_ptr: tl.tensor,
    block_tables_ptr: tl.tensor,
    context_lens_ptr: tl.tensor,
    key_out_ptr: tl.tensor,
    value_out_ptr: tl.tensor,
    tokens_each: tl.tensor,
    page_stride: tl.tensor,
    slot_stride: tl.tensor,
    kv_head_stride: tl.tensor,
    scale_page_stride: tl.tensor,
    block_table_stride: tl.tensor,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
) -> None:
    """Program (block of tokens, KV head, sequence): keys and values times their scales."""
    first = tl.program_id(0) * BLOCK_KEYS
    head = tl.program_id(1)
    seq = tl.program_id(2).to(tl.int64)
    end = tl.load(context_lens_ptr + seq)
    if first >= end:
        return
    position = first + tl.arange(0, BLOCK_KEYS)
    valid = position < end
    dim = tl.arange(0, BLOCK_DIM)
    mask = valid[:, None] & (dim < HEAD_DIM)[None, :]
    table_ptr = block_tables_ptr + seq * block_table_stride
    slot = page_slots(table_ptr, first, end, page_stride, slot_stride, BLOCK_SIZE, BLOCK_KEYS)
    scale_at = page_slots(table_ptr, first, end, scale_page_stride, 1, BLOCK_SIZE, BLOCK_KEYS) + head * BLOCK_SIZE
    source = head * kv_head_stride + slot[:, None] + dim[None, :]
    target = ((seq * tokens_each + position) * tl.num_programs(1) + head)[:, None] * HEAD_DIM + dim[None, :]
    key_scale = tl.load(key_scale_ptr + scale_at, mask=valid, other=0.0)[:, None]
    key = tl.load(key_ptr + source, mask=mask, other=0.0).to(tl.float32) * key_scale
    tl.store(key_out_ptr + target, key.to(key_out_ptr.dtype.element_ty), mask=mask)
    value_scale = tl.load(value_scale_ptr + scale_at, mask=valid, other=0.0)[:, None]
    value = tl.load(value_ptr + source, mask=mask, other=0.0).to(tl.float32) * value_scale
    tl.store(value_out_ptr + target, value.to(value_out_ptr.dtype.element_ty), mask=mask)


def dequantized(kv_cache: LayerKVCache) -> LayerKVCache:
    """Returns an FP8 cache as a float32 cache with the same pages (slow: for tests)."""
    assert kv_cache.key_scale is not None
    assert kv_cache.value_scale is not None

    def restore(pages: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return pages.float() * scale.transpose(1, 2).unsqueeze(-1)

    return LayerKVCache(restore(kv_cache.key, kv_cache.key_scale), restore(kv_cache.value, kv_cache.value_scale))


def dequantize_pages(
    kv_cache: LayerKVCache, metadata: PrefillMetadata, dtype: torch.dtype
) -> tuple[LayerKVCache, PrefillMetadata]:
    """Returns copies of the contexts in an FP8 cache: (pages of `dtype`, metadata whose block tables refer to them).

    Each sequence gets pages of its own, of the same size. Slots past a context's end are undefined.
    """
    block_tables, num_seqs = metadata.block_tables, len(metadata.context_lens)
    _, block_size, num_kv_heads, head_dim = kv_cache.key.shape
    pages = -(-metadata.max_seqlen_k // block_size)
    shape = (num_seqs * pages, block_size, num_kv_heads, head_dim)
    device = kv_cache.key.device
    keys, values = (torch.empty(shape, dtype=dtype, device=device) for _ in range(2))  # [*shape]
    _dequantize_pages_kernel[(-(-metadata.max_seqlen_k // _BLOCK_KEYS), num_kv_heads, num_seqs)](
        key_ptr=kv_cache.key,
        value_ptr=kv_cache.value,
        key_scale_ptr=kv_cache.key_scale,
        value_scale_ptr=kv_cache.value_scale,
        block_tables_ptr=block_tables,
        context_lens_ptr=metadata.context_lens,
        key_out_ptr=keys,
        value_out_ptr=values,
        tokens_each=pages * block_size,
        page_stride=kv_cache.key.stride(0),
        slot_stride=kv_cache.key.stride(1),
        kv_head_stride=kv_cache.key.stride(2),
        scale_page_stride=kv_cache.scale_page_stride,
        block_table_stride=block_tables.stride(0),
        BLOCK_SIZE=block_size,
        HEAD_DIM=head_dim,
        BLOCK_DIM=next_power_of_2(head_dim),
        BLOCK_KEYS=_BLOCK_KEYS,
        num_warps=4,
    )
    copied_tables = torch.arange(num_seqs * pages, dtype=torch.int32, device=device).view(num_seqs, pages)
    return LayerKVCache(keys, values), replace(metadata, block_tables=copied_tables)
