"""Decode attention over the paged cache: one query a sequence, its context split over several programs.

A decode step reads every key and value once and computes little, so the kernel exists to keep memory busy: all query
heads that share a KV head are one tile, and a sequence's context is split so that small batches fill the device too.
Sources: Dao et al., "Flash-Decoding for long-context inference", 2023, https://pytorch.org/blog/flash-decoding/;
Kwon et al., "PagedAttention", 2023, https://arxiv.org/abs/2309.06180.
"""

from __future__ import annotations

import torch

from nanovllm.kernels import shared_prefix
from nanovllm.kernels.page_slots import page_slots
from nanovllm.kernels.shared_prefix import (
    SharedPrefixes,
    choose_num_prefix_splits,
    prefix_attention,
    prefix_split_len,
)
from nanovllm.kernels.triton_support import (
    LOG2_E,
    jit,
    jit_with_varying,
    let_next_kernel_start,
    multiprocessor_count,
    next_power_of_2,
    pdl_options,
    runs_triton,
    tl,
    wait_for_previous_kernel,
)

_BLOCK_KEYS = 32  # keys a program reads at a time
_MAX_SPLITS = 32
_BLOCK_MERGED = 8  # partial outputs that a program merges at a time
# A program that starts while the kernel ahead still runs starts wherever that leaves room. Many of them are then spread
# unevenly over the device, which costs more than the launch that it hides.
_MAX_DEPENDENT_SEQS = 4


@jit_with_varying("num_prefix_partials")
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
    num_prefix_partials: tl.tensor,
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
    PRECISION: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """Program (kv head, split, sequence). Scores are kept in base 2: exp2 is what the hardware has."""
    let_next_kernel_start(PDL)
    kv_head = tl.program_id(0)
    split = tl.program_id(1)
    seq = tl.program_id(2).to(tl.int64)
    num_heads = tl.num_programs(0) * GROUP
    num_splits = tl.num_programs(1)
    context_len = tl.load(context_lens_ptr + seq)
    shared_len = tl.load(shared_lens_ptr + seq) if HAS_SHARED else context_len * 0
    split_len = tl.cdiv(tl.cdiv(context_len - shared_len, num_splits), BLOCK_KEYS) * BLOCK_KEYS
    start = shared_len + split * split_len
    end = tl.minimum(start + split_len, context_len)
    if start >= end:
        return
    wait_for_previous_kernel(PDL)

    group = tl.arange(0, BLOCK_GROUP)
    dim = tl.arange(0, BLOCK_DIM)
    head = kv_head * GROUP + group
    group_mask = group < GROUP
    dim_mask = dim < HEAD_DIM
    query = tl.load(
        query_ptr + seq * query_seq_stride + head[:, None] * query_head_stride + dim[None, :],
        mask=group_mask[:, None] & dim_mask[None, :],
        other=0.0,
    )  # [BLOCK_GROUP, BLOCK_DIM]
    key_base = key_ptr + kv_head * kv_head_stride
    value_base = value_ptr + kv_head * kv_head_stride
    table_ptr = block_tables_ptr + seq * block_table_stride

    best = tl.full([BLOCK_GROUP], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_GROUP], tl.float32)
    out = tl.zeros([BLOCK_GROUP, BLOCK_DIM], tl.float32)
    for first in range(start, end, BLOCK_KEYS):
        position = first + tl.arange(0, BLOCK_KEYS)
        valid = position < end
        slot = page_slots(table_ptr, first, end, page_stride, slot_stride, BLOCK_SIZE, BLOCK_KEYS)
        # Rows past the context are read as zeros: what lies there may be NaN.
        kv_mask = valid[:, None] & dim_mask[None, :]
        key = tl.load(key_base + slot[:, None] + dim[None, :], mask=kv_mask, other=0.0)  # [BLOCK_KEYS, BLOCK_DIM]
        value = tl.load(value_base + slot[:, None] + dim[None, :], mask=kv_mask, other=0.0)
        scores = tl.dot(query, tl.trans(key), input_precision=PRECISION)  # [BLOCK_GROUP, BLOCK_KEYS]
        scores = tl.where(valid[None, :], scores, -float("inf"))
        new_best = tl.maximum(best, tl.max(scores, axis=1) * scale_log2)
        weights = tl.exp2(scores * scale_log2 - new_best[:, None])
        shrink = tl.exp2(best - new_best)
        total = total * shrink + tl.sum(weights, axis=1)
        out = out * shrink[:, None] + tl.dot(weights.to(value.dtype), value, input_precision=PRECISION)
        best = new_best

    out = out / total[:, None]
    target = (seq * num_heads + head)[:, None] * HEAD_DIM + dim[None, :]
    mask = group_mask[:, None] & dim_mask[None, :]
    if HAS_PARTIALS:
        num_partials = num_prefix_partials + num_splits
        partial = (seq * num_heads + head) * num_partials + num_prefix_partials + split
        tl.store(partial_out_ptr + partial[:, None] * HEAD_DIM + dim[None, :], out, mask=mask)
        tl.store(partial_lse_ptr + partial, best + tl.log2(total), mask=group_mask)
    else:
        tl.store(out_ptr + target, out.to(out_ptr.dtype.element_ty), mask=mask)


@jit
def _load_lse(
    partial_lse_ptr: tl.tensor,
    index: tl.tensor,
    own_len: tl.tensor,
    split_len: tl.tensor,
    shared_len: tl.tensor,
    prefix_len: tl.tensor,
    num_prefix_partials: tl.tensor,
    num_splits: tl.tensor,
) -> tl.tensor:
    """A row's partial denominators; -inf for the partials that were never written."""
    split = index - num_prefix_partials
    used = (split >= 0) & (split < num_splits) & (split * split_len < own_len)
    used |= (split < 0) & (index * prefix_len < shared_len)
    return tl.load(partial_lse_ptr + index, mask=used, other=-float("inf"))


@jit_with_varying("num_prefix_partials", "num_splits")
def _merge_partials_kernel(
    partial_out_ptr: tl.tensor,
    partial_lse_ptr: tl.tensor,
    context_lens_ptr: tl.tensor,
    shared_lens_ptr: tl.tensor,
    out_ptr: tl.tensor,
    num_prefix_partials: tl.tensor,
    num_splits: tl.tensor,
    HAS_SHARED: tl.constexpr,
    BLOCK_PARTIALS: tl.constexpr,
    BLOCK_MERGED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    PREFIX_BLOCK_KEYS: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """Program (head, sequence): the partial outputs, weighed by their shares of the softmax's denominator."""
    let_next_kernel_start(PDL)
    head = tl.program_id(0)
    seq = tl.program_id(1).to(tl.int64)
    row = seq * tl.num_programs(0) + head
    context_len = tl.load(context_lens_ptr + seq)
    shared_len = tl.load(shared_lens_ptr + seq) if HAS_SHARED else context_len * 0
    own_len = context_len - shared_len
    split_len = tl.cdiv(tl.cdiv(own_len, num_splits), BLOCK_KEYS) * BLOCK_KEYS
    prefix_len = split_len
    if HAS_SHARED:
        prefix_len = prefix_split_len(shared_len, num_prefix_partials, PREFIX_BLOCK_KEYS)
    first_partial = row * (num_prefix_partials + num_splits)
    lse_ptr = partial_lse_ptr + first_partial
    dim = tl.arange(0, BLOCK_DIM)
    wait_for_previous_kernel(PDL)
    every = tl.arange(0, BLOCK_PARTIALS)
    lse = _load_lse(lse_ptr, every, own_len, split_len, shared_len, prefix_len, num_prefix_partials, num_splits)
    best = tl.max(lse, axis=0)
    out = tl.zeros([BLOCK_DIM], tl.float32)
    for first in range(0, num_prefix_partials + tl.cdiv(own_len, split_len), BLOCK_MERGED):
        index = first + tl.arange(0, BLOCK_MERGED)
        part_lse = _load_lse(
            lse_ptr, index, own_len, split_len, shared_len, prefix_len, num_prefix_partials, num_splits
        )
        mask = (part_lse > -float("inf"))[:, None] & (dim < HEAD_DIM)[None, :]
        part_ptrs = partial_out_ptr + (first_partial + index)[:, None] * HEAD_DIM + dim[None, :]
        part_out = tl.load(part_ptrs, mask=mask, other=0.0)  # [BLOCK_MERGED, BLOCK_DIM]
        out += tl.sum(part_out * tl.exp2(part_lse - best)[:, None], axis=0)
    out = out / tl.sum(tl.exp2(lse - best), axis=0)
    tl.store(out_ptr + row * HEAD_DIM + dim, out.to(out_ptr.dtype.element_ty), mask=dim < HEAD_DIM)


def paged_decode_reference(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_tables: torch.Tensor,
    context_lens: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """What `paged_decode` must equal, sequence by sequence in plain torch (slow: for tests)."""
    num_heads, num_kv_heads = query.shape[1], key_cache.shape[2]
    out = torch.empty_like(query, memory_format=torch.contiguous_format)  # [num_seqs, num_heads, head_dim]
    for seq, context_len in enumerate(context_lens.tolist()):
        pages = block_tables[seq, : -(-context_len // key_cache.shape[1])].long()
        keys = key_cache[pages].flatten(0, 1)[:context_len].float()  # [context_len, num_kv_heads, head_dim]
        values = value_cache[pages].flatten(0, 1)[:context_len].float()
        grouped = query[seq].float().unflatten(0, (num_kv_heads, num_heads // num_kv_heads))
        weights = torch.einsum("hgd,khd->hgk", grouped, keys).mul(scale).softmax(dim=-1)
        out[seq] = torch.einsum("hgk,khd->hgd", weights, values).flatten(0, 1).to(query.dtype)
    return out


def choose_num_splits(
    num_seqs: int, num_kv_heads: int, max_context_len: int, num_multiprocessors: int, programs_each: int = 4
) -> int:
    """Into how many parts each context is split; a constant of a captured graph, for it depends on no tensor's values.

    `programs_each` programs a multiprocessor fill the device; with that many sequences, the longest first, splitting
    only costs.
    """
    programs, filling = num_seqs * num_kv_heads, programs_each * num_multiprocessors
    if programs >= filling:
        return 1
    return min(max(round(filling / programs), 2), -(-max_context_len // _BLOCK_KEYS), _MAX_SPLITS)


def _num_stages(dtype: torch.dtype, block_dim: int) -> int:
    """Blocks of keys in flight, so that several programs share a multiprocessor's shared memory."""
    return max(2, min(5, 1280 // (dtype.itemsize * block_dim)))


def empty_partials(out: torch.Tensor, num_partials: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What the parts of each context give, to be merged into out [num_seqs, num_heads, head_dim].

    → outputs [num_seqs, num_heads, num_partials, head_dim] and base-2 logarithms of the softmax's denominators
    [num_seqs, num_heads, num_partials], float32; with one part `out` itself for both, and nothing to merge.
    """
    if num_partials == 1:
        return out, out
    shape = (*out.shape[:2], num_partials)
    partial_out = torch.empty((*shape, out.shape[2]), dtype=torch.float32, device=out.device)  # [*shape, head_dim]
    return partial_out, torch.empty(shape, dtype=torch.float32, device=out.device)  # [*shape]


def merge_partials(
    partial_out: torch.Tensor,
    partial_lse: torch.Tensor,
    context_lens: torch.Tensor,
    out: torch.Tensor,
    num_splits: int,
    block_keys: int,
    shared: SharedPrefixes | None = None,
) -> None:
    """Writes `out` from `empty_partials`' tensors: those of shared prefixes first, then `num_splits` of the row's own.

    block_keys: what splits are multiples of. Does nothing where there is one part.
    """
    if partial_out is out:
        return
    num_seqs, num_heads, head_dim = out.shape
    num_partials = partial_lse.shape[2]
    shared_lens = context_lens if shared is None else shared.lens  # not touched where nothing is shared
    _merge_partials_kernel[(num_heads, num_seqs)](
        *(partial_out, partial_lse, context_lens, shared_lens, out, num_partials - num_splits, num_splits),
        HAS_SHARED=shared is not None,
        BLOCK_PARTIALS=next_power_of_2(num_partials),
        BLOCK_MERGED=_BLOCK_MERGED,
        HEAD_DIM=head_dim,
        BLOCK_DIM=max(next_power_of_2(head_dim), 16),
        BLOCK_KEYS=block_keys,
        PREFIX_BLOCK_KEYS=shared_prefix.BLOCK_KEYS,
        num_warps=1,  # each lane adds up its own dimensions: no warp waits for another
        **pdl_options(out.device),
    )


def paged_decode(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_tables: torch.Tensor,
    context_lens: torch.Tensor,
    max_context_len: int,
    scale: float,
    shared: SharedPrefixes | None = None,
    *,
    num_splits: int | None = None,
    prefix_splits: int | None = None,
    use_triton: bool | None = None,
) -> torch.Tensor:
    """softmax(scale · query · keysᵀ) · values for one query a sequence, keys and values read through block tables.

    query [num_seqs, num_heads, head_dim]; key_cache, value_cache [num_blocks, block_size, num_kv_heads, head_dim],
    alike in strides; block_tables [num_seqs, max_blocks] int32; context_lens [num_seqs] int32, ≥ 1 and
    ≤ max_context_len; shared: prefixes to be read once for many rows (the result is the same but for rounding);
    num_splits and prefix_splits override the choice. → [num_seqs, num_heads, head_dim] of query's dtype.
    No synchronisation: may be captured in a CUDA graph.
    """
    if not runs_triton(query, use_triton):
        return paged_decode_reference(query, key_cache, value_cache, block_tables, context_lens, scale)
    num_seqs, num_heads, head_dim = query.shape
    _, block_size, num_kv_heads, _ = key_cache.shape
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)  # [num_seqs, num_heads, head_dim]
    if num_seqs == 0:
        return out
    processors = multiprocessor_count(query.device)
    if num_splits is None:
        num_splits = choose_num_splits(num_seqs, num_kv_heads, max_context_len, processors)
    prefix_partials, shared_lens = 0, context_lens  # the lengths are not touched where nothing is shared
    if shared is not None:
        choice = choose_num_prefix_splits(num_seqs, shared.max_tile_rows, num_kv_heads, processors)
        prefix_partials, shared_lens = prefix_splits or choice, shared.lens
    partial_out, partial_lse = empty_partials(out, prefix_partials + num_splits)
    group = num_heads // num_kv_heads
    block_dim = max(next_power_of_2(head_dim), 16)
    if shared is not None:
        prefix_attention(
            *(query, key_cache, value_cache, block_tables, shared, partial_out, partial_lse),
            *(prefix_partials, scale * LOG2_E),
        )
    _paged_decode_kernel[(num_kv_heads, num_splits, num_seqs)](
        *(query, key_cache, value_cache, block_tables, context_lens, shared_lens, out, partial_out, partial_lse),
        *(prefix_partials, scale * LOG2_E),
        *(*query.stride()[:2], *key_cache.stride()[:3], block_tables.stride(0)),
        BLOCK_SIZE=block_size,
        HAS_SHARED=shared is not None,
        HAS_PARTIALS=partial_out is not out,
        GROUP=group,
        BLOCK_GROUP=max(next_power_of_2(group), 16),  # 16 is the smallest tile of a matrix product
        HEAD_DIM=head_dim,
        BLOCK_DIM=block_dim,
        BLOCK_KEYS=_BLOCK_KEYS,
        PRECISION="ieee" if query.dtype == torch.float32 else "tf32",
        num_warps=2,
        num_stages=_num_stages(query.dtype, block_dim),
        **pdl_options(query.device, num_seqs <= _MAX_DEPENDENT_SEQS),
    )
    merge_partials(partial_out, partial_lse, context_lens, out, num_splits, _BLOCK_KEYS, shared)
    return out
