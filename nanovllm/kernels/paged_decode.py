"""Decode attention over the paged cache: one query per sequence, its context split over several programs.

A decode step reads every key and value once and computes little, so the kernel exists to keep memory busy: all query
heads that share a KV head are one tile, and a sequence's context is split so that small batches fill the device too. Of
many rows, the keys of all are divided equally instead (balanced_decode.py).
Sources: Dao et al., "Flash-Decoding for long-context inference", 2023, https://pytorch.org/blog/flash-decoding/;
Kwon et al., "PagedAttention", 2023, https://arxiv.org/abs/2309.06180.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from nanovllm.kernels.attend_keys import BLOCK_KEYS, PROGRAMS_EACH, attend_keys, decode_arguments, store_heads
from nanovllm.kernels.attention_inputs import DecodeMetadata, LayerKVCache
from nanovllm.kernels.balanced_decode import balanced_decode, suits_balanced_decode
from nanovllm.kernels.partials import empty_partials, first_own_key, keys_per_split, merge_partials
from nanovllm.kernels.shared_prefix import choose_num_prefix_splits, prefix_attention
from nanovllm.kernels.triton_support import (
    jit_with_varying,
    let_next_kernel_start,
    multiprocessor_count,
    pdl_options,
    runs_triton,
    tl,
)

# A long context needs many parts. They delay a short one, most of whose parts have no keys. So 32 are always allowed,
# and more only while each part of the longest possible context has four blocks of keys.
_ALLOWED_SPLITS = 32
_MIN_BLOCKS_EACH = 4
_MAX_SPLITS = 128
# Programs that start while the kernel ahead still runs are placed wherever it leaves room. Many of them would be spread
# unevenly over the device, which costs more than the hidden launch.
MAX_DEPENDENT_SEQS = 4


@jit_with_varying("num_prefix_splits")
def _paged_decode_kernel(
    query_ptr: tl.tensor,
    key_ptr: tl.tensor,
    value_ptr: tl.tensor,
    block_tables_ptr: tl.tensor,
    context_lens_ptr: tl.tensor,
    shared_lens_ptr: tl.tensor,
    out_ptr: tl.tensor,
    partial_out_ptr: tl.tensor,
    partial_lse_ptr: tl.tensor,
    num_prefix_splits: tl.tensor,
    scale_log2: tl.tensor,
    query_seq_stride: tl.tensor,
    query_head_stride: tl.tensor,
    page_stride: tl.tensor,
    slot_stride: tl.tensor,
    kv_head_stride: tl.tensor,
    block_table_stride: tl.tensor,
    BLOCK_SIZE: tl.constexpr,
    HAS_SHARED: tl.constexpr,
    HAS_PARTIALS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    WINDOW: tl.constexpr,
    PRECISION: tl.constexpr,
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
    shared_len = tl.load(shared_lens_ptr + seq) if HAS_SHARED else context_len * 0
    first_key = first_own_key(context_len, shared_len, WINDOW, BLOCK_KEYS)
    split_len = keys_per_split(context_len - first_key, num_splits, BLOCK_KEYS)
    start = first_key + split * split_len
    end = tl.minimum(start + split_len, context_len)
    if start >= end:
        return  # without a wait, but the programs of each row's first keys wait, and no row is empty
    out, lse = attend_keys(
        query_ptr,
        key_ptr,
        value_ptr,
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
        block_table_stride,
        BLOCK_SIZE=BLOCK_SIZE,
        GROUP=GROUP,
        BLOCK_GROUP=BLOCK_GROUP,
        HEAD_DIM=HEAD_DIM,
        BLOCK_DIM=BLOCK_DIM,
        BLOCK_KEYS=BLOCK_KEYS,
        WINDOW=WINDOW,
        PRECISION=PRECISION,
        WAITS=PDL,
    )
    group = tl.arange(0, BLOCK_GROUP)
    row = seq * num_heads + kv_head * GROUP + group
    if HAS_PARTIALS:
        partial = row * (num_prefix_splits + num_splits) + num_prefix_splits + split
        store_heads(partial_out_ptr, partial, out, GROUP, HEAD_DIM)
        tl.store(partial_lse_ptr + partial, lse, mask=group < GROUP)
    else:
        store_heads(out_ptr, row, out, GROUP, HEAD_DIM)


def paged_decode_reference(
    query: torch.Tensor, kv_cache: LayerKVCache, metadata: DecodeMetadata, scale: float, window: int | None = None
) -> torch.Tensor:
    """Reference for `paged_decode`, sequence by sequence in plain torch (slow: for tests)."""
    _, block_size, num_kv_heads, _ = kv_cache.key.shape
    group = query.shape[1] // num_kv_heads
    out = torch.empty_like(query, memory_format=torch.contiguous_format)  # [num_seqs, num_heads, head_dim]
    for seq, context_len in enumerate(metadata.context_lens.tolist()):
        pages = metadata.block_tables[seq, : -(-context_len // block_size)].long()
        seen = slice(0 if window is None else max(context_len - window, 0), context_len)
        keys = kv_cache.key[pages].flatten(0, 1)[seen].float()  # [keys seen, num_kv_heads, head_dim]
        values = kv_cache.value[pages].flatten(0, 1)[seen].float()
        grouped = query[seq].float().unflatten(0, (num_kv_heads, group))
        weights = torch.einsum("hgd,khd->hgk", grouped, keys).mul(scale).softmax(dim=-1)
        out[seq] = torch.einsum("hgk,khd->hgd", weights, values).flatten(0, 1).to(query.dtype)
    return out


def keys_read(max_context_len: int, window: int | None, block_keys: int) -> int:
    """Returns how many keys a kernel reads for a row, at most: a window need not begin where a block does."""
    return max_context_len if window is None else min(max_context_len, window + block_keys)


def choose_num_splits(
    num_seqs: int,
    num_kv_heads: int,
    max_context_len: int,
    num_multiprocessors: int,
    programs_each: int = PROGRAMS_EACH,
    block_keys: int = BLOCK_KEYS,
) -> int:
    """Returns how many parts each context is split into. No tensor's values decide it: a captured graph fixes it.

    `programs_each` programs on each multiprocessor fill the device. With that many sequences, the longest first,
    splitting only adds cost. block_keys: how many keys a program reads at a time.
    """
    programs, filling = num_seqs * num_kv_heads, programs_each * num_multiprocessors
    if programs >= filling:
        return 1
    num_blocks = -(-max_context_len // block_keys)
    most = min(max(num_blocks // _MIN_BLOCKS_EACH, _ALLOWED_SPLITS), _MAX_SPLITS)
    return min(max(round(filling / programs), 2), num_blocks, most)


def paged_decode(
    query: torch.Tensor,
    kv_cache: LayerKVCache,
    metadata: DecodeMetadata,
    scale: float,
    out: torch.Tensor | None = None,
    *,
    window: int | None = None,
    num_splits: int | None = None,
    prefix_splits: int | None = None,
    use_triton: bool | None = None,
) -> torch.Tensor:
    """Returns softmax(scale · query · keysᵀ) · values for one query per sequence, read through block tables.

    query [num_seqs, num_heads, head_dim] → the same shape and dtype. The cache has query's dtype. Prefixes in
    `metadata.shared` are read once for many rows; the result differs by rounding alone. window: how many of the last
    keys are attended to, and shared prefixes are then not used; None: all. num_splits and prefix_splits override the
    choice; without num_splits, the keys of all rows may be divided equally. out: contiguous, where to write the result;
    None: a new tensor. No synchronisation: may be captured in a CUDA graph.
    """
    if not runs_triton(query, use_triton):
        attended = paged_decode_reference(query, kv_cache, metadata, scale, window)
        return attended if out is None else out.copy_(attended)
    if out is None:
        out = torch.empty(query.shape, dtype=query.dtype, device=query.device)  # [num_seqs, num_heads, head_dim]
    if window is not None:
        metadata = replace(metadata, shared=None)
    num_seqs, num_kv_heads, shared = query.shape[0], kv_cache.key.shape[2], metadata.shared
    if num_seqs == 0:
        return out
    if shared is None and num_splits is None and suits_balanced_decode(query, num_kv_heads):
        return balanced_decode(query, kv_cache, metadata, scale, out, window)
    processors = multiprocessor_count(query.device)
    if num_splits is None:
        most_keys = keys_read(metadata.max_context_len, window, BLOCK_KEYS)
        num_splits = choose_num_splits(num_seqs, num_kv_heads, most_keys, processors)
    if shared is None:
        prefix_splits = 0
    elif not prefix_splits:
        prefix_splits = choose_num_prefix_splits(num_seqs, shared.max_tile_rows, num_kv_heads, processors)
    partials = empty_partials(out, num_splits, prefix_splits)
    if shared is not None:
        prefix_attention(query, kv_cache, metadata.block_tables, shared, partials, scale)
    _paged_decode_kernel[(num_kv_heads, num_splits, num_seqs)](
        shared_lens_ptr=metadata.context_lens if shared is None else shared.lens,  # not read where nothing is shared
        out_ptr=out,
        partial_out_ptr=partials.out,
        partial_lse_ptr=partials.lse,
        num_prefix_splits=prefix_splits,
        HAS_SHARED=shared is not None,
        HAS_PARTIALS=partials.is_split,
        **decode_arguments(query, kv_cache, metadata, scale, window),
        **pdl_options(query.device, num_seqs <= MAX_DEPENDENT_SEQS),
    )
    merge_partials(partials, metadata, out, BLOCK_KEYS, window)
    return out
