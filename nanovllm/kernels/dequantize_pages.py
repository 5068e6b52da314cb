"""An FP8 cache's keys and values in the model's dtype, page by page: for kernels that read no scales."""

from __future__ import annotations

import torch

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
    """Program (block of tokens, KV head, sequence)."""
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


def dequantize_pages(
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    key_scale: torch.Tensor,
    value_scale: torch.Tensor,
    block_tables: torch.Tensor,
    context_lens: torch.Tensor,
    max_context_len: int,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The contexts of some sequences as `dtype`, in pages of their own.

    Caches [num_blocks, block_size, num_kv_heads, head_dim] e4m3, scales [num_blocks, num_kv_heads, block_size] fp32,
    block_tables [num_seqs, max_blocks] and context_lens [num_seqs] int32, max_context_len ≥ each of them.
    → keys, values [num_seqs · pages, block_size, num_kv_heads, head_dim] of `dtype` (past a context's end: anything)
    and the block tables [num_seqs, pages] int32 to read them through.
    """
    num_seqs, device = len(context_lens), key_cache.device
    _, block_size, num_kv_heads, head_dim = key_cache.shape
    pages = -(-max_context_len // block_size)
    shape = (num_seqs * pages, block_size, num_kv_heads, head_dim)
    keys, values = (torch.empty(shape, dtype=dtype, device=device) for _ in range(2))  # [*shape]
    _dequantize_pages_kernel[(-(-max_context_len // _BLOCK_KEYS), num_kv_heads, num_seqs)](
        *(key_cache, value_cache, key_scale, value_scale, block_tables, context_lens, keys, values),
        *(pages * block_size, *key_cache.stride()[:3], key_scale.stride(0), block_tables.stride(0)),
        BLOCK_SIZE=block_size,
        HEAD_DIM=head_dim,
        BLOCK_DIM=next_power_of_2(head_dim),
        BLOCK_KEYS=_BLOCK_KEYS,
        num_warps=4,
    )
    tables = torch.arange(num_seqs * pages, dtype=torch.int32, device=device).view(num_seqs, pages)
    return keys, values, tables  # [*shape] twice, [num_seqs, pages]
