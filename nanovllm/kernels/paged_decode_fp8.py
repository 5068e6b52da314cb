"""Decode attention over an FP8 cache: `paged_decode` with half the bytes to read, and a kernel of its own.

Every row is split into equally many parts, or the keys of all rows into equal stretches (balanced_decode_fp8.py). It
does not read shared prefixes separately. What a program does with its keys, and why in this shape: attend_keys_fp8.py.
"""

from __future__ import annotations

import torch

from nanovllm.kernels.attend_keys_fp8 import BLOCK_KEYS, PROGRAMS_EACH, attend_keys_fp8, fp8_arguments, store_pairs
from nanovllm.kernels.attention_inputs import DecodeMetadata, LayerKVCache
from nanovllm.kernels.balanced_decode_fp8 import balanced_decode_fp8, suits_balanced_decode_fp8
from nanovllm.kernels.dequantize_pages import dequantized
from nanovllm.kernels.paged_decode import MAX_DEPENDENT_SEQS, choose_num_splits, keys_read, paged_decode_reference
from nanovllm.kernels.partials import empty_partials, first_own_key, keys_per_split, merge_partials
from nanovllm.kernels.triton_support import (
    jit,
    let_next_kernel_start,
    multiprocessor_count,
    pdl_options,
    runs_triton,
    tl,
)


@jit
def _paged_decode_fp8_kernel(
    query_ptr: tl.tensor,
    key_ptr: tl.tensor,
    value_words_ptr: tl.tensor,
    key_scale_ptr: tl.tensor,
    value_scale_ptr: tl.tensor,
    block_tables_ptr: tl.tensor,
    context_lens_ptr: tl.tensor,
    out_ptr: tl.tensor,
    partial_out_ptr: tl.tensor,
    partial_lse_ptr: tl.tensor,
    scale_log2: tl.tensor,
    query_seq_stride: tl.tensor,
    query_head_stride: tl.tensor,
    page_stride: tl.tensor,
    slot_stride: tl.tensor,
    kv_head_stride: tl.tensor,
    scale_page_stride: tl.tensor,
    block_table_stride: tl.tensor,
    BLOCK_SIZE: tl.constexpr,
    IS_SPLIT: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    WINDOW: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """Program (kv head, split, sequence): the group's queries and a part of the context."""
    let_next_kernel_start(PDL)
    kv_head = tl.program_id(0)
    split = tl.program_id(1)
    seq = tl.program_id(2).to(tl.int64)
    num_heads = tl.num_programs(0) * GROUP
    num_splits = tl.num_programs(1)
    context_len = tl.load(context_lens_ptr + seq)
    first_key = first_own_key(context_len, context_len * 0, WINDOW, BLOCK_KEYS)
    split_len = keys_per_split(context_len - first_key, num_splits, BLOCK_KEYS)
    start = first_key + split * split_len
    end = tl.minimum(start + split_len, context_len)
    if start >= end:
        return  # without a wait, but the programs of each row's first keys wait, and no row is empty
    even, odd, lse = attend_keys_fp8(
        query_ptr,
        key_ptr,
        value_words_ptr,
        key_scale_ptr,
        value_scale_ptr,
        block_tables_ptr,
        kv_head,
        seq,
        start,
        end,
        context_len,
        scale_log2,
        query_seq_stride,
        query_head_stride,
        page_stride,
        slot_stride,
        kv_head_stride,
        scale_page_stride,
        block_table_stride,
        BLOCK_SIZE=BLOCK_SIZE,
        GROUP=GROUP,
        BLOCK_GROUP=BLOCK_GROUP,
        HEAD_DIM=HEAD_DIM,
        BLOCK_DIM=BLOCK_DIM,
        BLOCK_KEYS=BLOCK_KEYS,
        WINDOW=WINDOW,
        COMPUTE=COMPUTE,
        PRECISION=PRECISION,
        INTERPRETED=INTERPRETED,
        WAITS=PDL,
    )
    group = tl.arange(0, BLOCK_GROUP)
    row = seq * num_heads + kv_head * GROUP + group
    if IS_SPLIT:
        partial = row * num_splits + split
        store_pairs(partial_out_ptr, partial, even, odd, GROUP, HEAD_DIM)
        tl.store(partial_lse_ptr + partial, lse, mask=group < GROUP)
    else:
        store_pairs(out_ptr, row, even, odd, GROUP, HEAD_DIM)


def paged_decode_fp8_reference(
    query: torch.Tensor, kv_cache: LayerKVCache, metadata: DecodeMetadata, scale: float, window: int | None = None
) -> torch.Tensor:
    """Reference for `paged_decode_fp8`: attention over the restored cache (slow: for tests)."""
    return paged_decode_reference(query, dequantized(kv_cache), metadata, scale, window)


def paged_decode_fp8(
    query: torch.Tensor,
    kv_cache: LayerKVCache,
    metadata: DecodeMetadata,
    scale: float,
    out: torch.Tensor | None = None,
    *,
    window: int | None = None,
    num_splits: int | None = None,
    use_triton: bool | None = None,
) -> torch.Tensor:
    """Returns the result of `paged_decode` for an FP8 cache, where each head of a token has a scale.

    query [num_seqs, num_heads, head_dim], head_dim even → the same shape and dtype. `metadata.shared` is not used.
    num_splits: parts of each row; None: chosen, or the keys of all rows are divided equally. out: contiguous, where to
    write the result; None: a new tensor. No synchronisation: may be captured in a CUDA graph.
    """
    if not runs_triton(query, use_triton):
        attended = paged_decode_fp8_reference(query, kv_cache, metadata, scale, window)
        return attended if out is None else out.copy_(attended)
    num_seqs, num_kv_heads = query.shape[0], kv_cache.key.shape[2]
    if out is None:
        out = torch.empty(query.shape, dtype=query.dtype, device=query.device)  # [num_seqs, num_heads, head_dim]
    if num_seqs == 0:
        return out
    if num_splits is None and suits_balanced_decode_fp8(query, num_kv_heads):
        return balanced_decode_fp8(query, kv_cache, metadata, scale, out, window)
    if num_splits is None:
        processors = multiprocessor_count(query.device)
        most_keys = keys_read(metadata.max_context_len, window, BLOCK_KEYS)
        num_splits = choose_num_splits(num_seqs, num_kv_heads, most_keys, processors, PROGRAMS_EACH, BLOCK_KEYS)
    partials = empty_partials(out, num_splits)
    _paged_decode_fp8_kernel[(num_kv_heads, num_splits, num_seqs)](
        out_ptr=out,
        partial_out_ptr=partials.out,
        partial_lse_ptr=partials.lse,
        IS_SPLIT=partials.is_split,
        **fp8_arguments(query, kv_cache, metadata, scale, window),
        **pdl_options(query.device, num_seqs <= MAX_DEPENDENT_SEQS),
    )
    merge_partials(partials, metadata, out, BLOCK_KEYS, window)
    return out
