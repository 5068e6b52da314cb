"""Decode attention over an FP8 cache: `paged_decode` with half the bytes to read, and so a shape of its own.

What a bf16 cache leaves idle, the instructions of a program, is what runs out here: with the other kernel's shape an
H200 takes 180 µs for 256 x 850 tokens, whose bytes take 107. So the products are transposed, keys and dimensions as
their rows: a tile of 8 query heads instead of 16 wastes half as much, and fewer registers leave room for more programs.
A program is one warp, which waits for no other, and takes 16 keys at a time. It reads no shared prefix apart.

Keys and values become fp16, which holds every e4m3 number, is one instruction for two of them (bf16 is five), and
rounds queries and weights less than bf16 does. A value tile is read as 16-bit words of two neighbouring dimensions:
the transposition that a matrix product needs exists for such words and not for bytes. Even and odd dimensions of the
output are then two products. Scales are factors of scores and weights: no tile is scaled.
"""

from __future__ import annotations

import torch

from nanovllm.kernels.page_slots import page_slots
from nanovllm.kernels.paged_decode import choose_num_splits, empty_partials, merge_partials, paged_decode_reference
from nanovllm.kernels.triton_support import (
    INTERPRETED,
    LOG2_E,
    jit,
    multiprocessor_count,
    next_power_of_2,
    runs_triton,
    tl,
)

_BLOCK_KEYS = 16  # keys a program reads at a time
_NUM_STAGES = 4
# What weights times value scales are raised by, so that they are no small numbers in fp16: with it a weight of 1e-6
# still counts where values reach 0.01 (and values of 28,000 would be too many).
_RAISE = 1024.0
_PROGRAMS_EACH = 16  # of one warp each, that keep a multiprocessor busy


@jit
def _unpack(words: tl.tensor, INTERPRETED: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """int16 words of two e4m3 numbers each → the first of each word and the second of each, in fp16."""
    if INTERPRETED:
        first = words.to(tl.uint8).to(tl.float8e4nv, bitcast=True).to(tl.float16)
        second = (words >> 8).to(tl.uint8).to(tl.float8e4nv, bitcast=True).to(tl.float16)
    else:
        # Two words at a time: their four bytes change places, then each pair is converted by one instruction.
        first, second = tl.inline_asm_elementwise(
            """{
            .reg .b32 sorted;
            .reg .b16 firsts, seconds;
            prmt.b32 sorted, $2, $2, 0x3120;
            mov.b32 {firsts, seconds}, sorted;
            cvt.rn.f16x2.e4m3x2 $0, firsts;
            cvt.rn.f16x2.e4m3x2 $1, seconds;
            }""",
            "=r,=r,r",
            [words],
            dtype=(tl.float16, tl.float16),
            is_pure=True,
            pack=2,
        )
    return first, second


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
    RAISE: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
) -> None:
    """Program (kv head, split, sequence). Scores are kept in base 2: exp2 is what the hardware has."""
    kv_head = tl.program_id(0)
    split = tl.program_id(1)
    seq = tl.program_id(2).to(tl.int64)
    num_heads = tl.num_programs(0) * GROUP
    num_splits = tl.num_programs(1)
    context_len = tl.load(context_lens_ptr + seq)
    split_len = tl.cdiv(tl.cdiv(context_len, num_splits), BLOCK_KEYS) * BLOCK_KEYS
    start = split * split_len
    end = tl.minimum(start + split_len, context_len)
    if start >= end:
        return

    group = tl.arange(0, BLOCK_GROUP)
    dim = tl.arange(0, BLOCK_DIM)
    pair = tl.arange(0, BLOCK_DIM // 2)  # of dimensions 2 · pair and 2 · pair + 1
    head = kv_head * GROUP + group
    group_mask = group < GROUP
    dim_mask = dim < HEAD_DIM
    pair_mask = pair < HEAD_DIM // 2
    query = tl.load(
        query_ptr + seq * query_seq_stride + head[None, :] * query_head_stride + dim[:, None],
        mask=dim_mask[:, None] & group_mask[None, :],
        other=0.0,
    ).to(COMPUTE)  # [BLOCK_DIM, BLOCK_GROUP]
    key_base = key_ptr + kv_head * kv_head_stride
    value_base = value_words_ptr + kv_head * (kv_head_stride // 2)
    table_ptr = block_tables_ptr + seq * block_table_stride

    best = tl.full([BLOCK_GROUP], -float("inf"), tl.float32)
    totals = tl.zeros([BLOCK_KEYS, BLOCK_GROUP], tl.float32)  # added up behind the loop
    even = tl.zeros([BLOCK_DIM // 2, BLOCK_GROUP], tl.float32)
    odd = tl.zeros([BLOCK_DIM // 2, BLOCK_GROUP], tl.float32)
    for first in range(start, end, BLOCK_KEYS):
        valid = first + tl.arange(0, BLOCK_KEYS) < end
        slot = page_slots(table_ptr, first, end, page_stride, slot_stride, BLOCK_SIZE, BLOCK_KEYS)
        # Rows past the context are read as zeros: what lies there may be NaN.
        key = tl.load(
            key_base + slot[:, None] + dim[None, :], mask=valid[:, None] & dim_mask[None, :], other=0.0
        )  # [BLOCK_KEYS, BLOCK_DIM]
        value_words = tl.load(
            value_base + (slot >> 1)[None, :] + pair[:, None], mask=pair_mask[:, None] & valid[None, :], other=0
        )  # [BLOCK_DIM / 2, BLOCK_KEYS]
        scale_at = page_slots(table_ptr, first, end, scale_page_stride, 1, BLOCK_SIZE, BLOCK_KEYS)
        scale_at += kv_head * BLOCK_SIZE
        key_scale = tl.load(key_scale_ptr + scale_at, mask=valid, other=0.0)
        value_scale = tl.load(value_scale_ptr + scale_at, mask=valid, other=0.0)
        scores = tl.dot(key.to(tl.float16).to(COMPUTE), query, input_precision=PRECISION)  # [BLOCK_KEYS, BLOCK_GROUP]
        scores = tl.where(valid[:, None], scores * (key_scale * scale_log2)[:, None], -float("inf"))
        new_best = tl.maximum(best, tl.max(scores, axis=0))
        weights = tl.exp2(scores - new_best[None, :])
        shrink = tl.exp2(best - new_best)
        totals = totals * shrink[None, :] + weights
        weights = (weights * (value_scale * RAISE)[:, None]).to(COMPUTE)
        even_values, odd_values = _unpack(value_words, INTERPRETED)
        even = tl.dot(even_values.to(COMPUTE), weights, even * shrink[None, :], input_precision=PRECISION)
        odd = tl.dot(odd_values.to(COMPUTE), weights, odd * shrink[None, :], input_precision=PRECISION)
        best = new_best

    total = tl.sum(totals, axis=0)
    even = even / (total * RAISE)[None, :]
    odd = odd / (total * RAISE)[None, :]
    mask = pair_mask[:, None] & group_mask[None, :]
    if IS_SPLIT:
        partial = (seq * num_heads + head) * num_splits + split
        partial_ptrs = partial_out_ptr + partial[None, :] * HEAD_DIM + 2 * pair[:, None]
        tl.store(partial_ptrs, even, mask=mask)
        tl.store(partial_ptrs + 1, odd, mask=mask)
        tl.store(partial_lse_ptr + partial, best + tl.log2(total), mask=group_mask)
    else:
        out_ptrs = out_ptr + (seq * num_heads + head)[None, :] * HEAD_DIM + 2 * pair[:, None]
        tl.store(out_ptrs, even.to(out_ptr.dtype.element_ty), mask=mask)
        tl.store(out_ptrs + 1, odd.to(out_ptr.dtype.element_ty), mask=mask)


def dequantized(cache: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """An e4m3 cache [num_blocks, block_size, num_kv_heads, head_dim] times its scales, in fp32 (slow: for tests)."""
    return cache.float() * scale.transpose(1, 2).unsqueeze(-1)


def paged_decode_fp8_reference(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    key_scale: torch.Tensor,
    value_scale: torch.Tensor,
    block_tables: torch.Tensor,
    context_lens: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """What `paged_decode_fp8` must equal: attention over the cache that the scales restore (slow: for tests)."""
    keys, values = dequantized(key_cache, key_scale), dequantized(value_cache, value_scale)
    return paged_decode_reference(query, keys, values, block_tables, context_lens, scale)


def paged_decode_fp8(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    key_scale: torch.Tensor,
    value_scale: torch.Tensor,
    block_tables: torch.Tensor,
    context_lens: torch.Tensor,
    max_context_len: int,
    scale: float,
    *,
    num_splits: int | None = None,
    use_triton: bool | None = None,
) -> torch.Tensor:
    """`paged_decode` for key_cache, value_cache of float8_e4m3fn, each head of which has a scale for each token.

    query [num_seqs, num_heads, head_dim], head_dim even; key_scale, value_scale [num_blocks, num_kv_heads, block_size]
    fp32, contiguous; the rest as there. → [num_seqs, num_heads, head_dim] of query's dtype. No synchronisation.
    """
    if not runs_triton(query, use_triton):
        return paged_decode_fp8_reference(
            query, key_cache, value_cache, key_scale, value_scale, block_tables, context_lens, scale
        )
    num_seqs, num_heads, head_dim = query.shape
    _, block_size, num_kv_heads, _ = key_cache.shape
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)  # [num_seqs, num_heads, head_dim]
    if num_seqs == 0:
        return out
    if num_splits is None:
        processors = multiprocessor_count(query.device)
        num_splits = choose_num_splits(num_seqs, num_kv_heads, max_context_len, processors, _PROGRAMS_EACH)
    partial_out, partial_lse = empty_partials(out, num_splits)
    group = num_heads // num_kv_heads
    block_dim = max(next_power_of_2(head_dim), 32)
    is_float32 = query.dtype == torch.float32
    _paged_decode_fp8_kernel[(num_kv_heads, num_splits, num_seqs)](
        *(query, key_cache, value_cache.view(torch.int16), key_scale, value_scale, block_tables, context_lens, out),
        *(partial_out, partial_lse, scale * LOG2_E),
        *(*query.stride()[:2], *key_cache.stride()[:3], key_scale.stride(0), block_tables.stride(0)),
        BLOCK_SIZE=block_size,
        IS_SPLIT=num_splits > 1,
        GROUP=group,
        BLOCK_GROUP=max(next_power_of_2(group), 8),  # 8 is the narrowest tile of a matrix product
        HEAD_DIM=head_dim,
        BLOCK_DIM=block_dim,
        BLOCK_KEYS=_BLOCK_KEYS,
        RAISE=_RAISE,
        COMPUTE=tl.float32 if is_float32 else tl.float16,
        PRECISION="ieee" if is_float32 else "tf32",
        INTERPRETED=INTERPRETED,
        num_warps=1,
        num_stages=_NUM_STAGES,
    )
    merge_partials(partial_out, partial_lse, context_lens, out, num_splits, _BLOCK_KEYS)
    return out
