"""Causal attention of prompt chunks over the paged cache.

Each program walks the keys once with an online softmax; the query heads that share a KV head are rows of one tile, so
that each key is read once for all of them. On Hopper GPUs the kernel of paged_prefill_hopper.py, which divides the work
among its warps, takes the place of this one wherever it can.
Sources: Dao, "FlashAttention-2", 2023, https://arxiv.org/abs/2307.08691; Kwon et al., "PagedAttention", 2023,
https://arxiv.org/abs/2309.06180.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nanovllm.kernels.page_slots import page_slots
from nanovllm.kernels.paged_decode_fp8 import dequantized
from nanovllm.kernels.paged_prefill_hopper import can_run_on_hopper, paged_prefill_hopper
from nanovllm.kernels.triton_support import LOG2_E, jit, next_power_of_2, runs_triton, tl


@jit
def _attend(
    query: tl.tensor,
    key_base: tl.tensor,
    value_base: tl.tensor,
    key_scale_base: tl.tensor,
    value_scale_base: tl.tensor,
    table_ptr: tl.tensor,
    best: tl.tensor,
    total: tl.tensor,
    out: tl.tensor,
    query_position: tl.tensor,
    start: tl.tensor,
    end: tl.tensor,
    scale_log2: tl.tensor,
    page_stride: tl.tensor,
    slot_stride: tl.tensor,
    scale_page_stride: tl.tensor,
    IS_QUANTIZED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Online softmax over the keys at positions start … end; MASKED where some query may not see some key."""
    dim = tl.arange(0, BLOCK_DIM)
    for first in range(start, end, BLOCK_KEYS):
        position = first + tl.arange(0, BLOCK_KEYS)
        if MASKED:
            valid = position < end
            kv_mask = valid[:, None] & (dim < HEAD_DIM)[None, :]
        else:
            valid = position >= 0
            kv_mask = (dim < HEAD_DIM)[None, :]
        slot = page_slots(table_ptr, first, end, page_stride, slot_stride, BLOCK_SIZE, BLOCK_KEYS)
        # Rows past the context are read as zeros: what lies there may be NaN.
        key = tl.load(key_base + slot[:, None] + dim[None, :], mask=kv_mask, other=0.0)  # [BLOCK_KEYS, BLOCK_DIM]
        value = tl.load(value_base + slot[:, None] + dim[None, :], mask=kv_mask, other=0.0)
        if IS_QUANTIZED:
            # Rows are as many as keys here, so scaling two halves of a tile at a time costs less than scaling scores.
            scale_at = page_slots(table_ptr, first, end, scale_page_stride, 1, BLOCK_SIZE, BLOCK_KEYS)
            key_scale = tl.load(key_scale_base + scale_at, mask=valid, other=0.0)
            value_scale = tl.load(value_scale_base + scale_at, mask=valid, other=0.0)
            key = key.to(tl.float16).to(query.dtype) * key_scale.to(query.dtype)[:, None]
            value = value.to(tl.float16).to(query.dtype) * value_scale.to(query.dtype)[:, None]
        scores = tl.dot(query, tl.trans(key), input_precision=PRECISION)  # [BLOCK_ROWS, BLOCK_KEYS]
        if MASKED:
            scores = tl.where(position[None, :] <= query_position[:, None], scores, -float("inf"))
        new_best = tl.maximum(best, tl.max(scores, axis=1) * scale_log2)
        weights = tl.exp2(scores * scale_log2 - new_best[:, None])
        shrink = tl.exp2(best - new_best)
        total = total * shrink + tl.sum(weights, axis=1)
        out = out * shrink[:, None]
        out = tl.dot(weights.to(value.dtype), value, out, input_precision=PRECISION)
        best = new_best
    return best, total, out


@jit
def _paged_prefill_kernel(
    query_ptr: tl.tensor,
    key_ptr: tl.tensor,
    value_ptr: tl.tensor,
    key_scale_ptr: tl.tensor,
    value_scale_ptr: tl.tensor,
    block_tables_ptr: tl.tensor,
    cu_seqlens_q_ptr: tl.tensor,
    context_lens_ptr: tl.tensor,
    out_ptr: tl.tensor,
    scale_log2: tl.tensor,
    query_token_stride: tl.tensor,
    query_head_stride: tl.tensor,
    page_stride: tl.tensor,
    slot_stride: tl.tensor,
    kv_head_stride: tl.tensor,
    scale_page_stride: tl.tensor,
    block_table_stride: tl.tensor,
    IS_QUANTIZED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    GROUP: tl.constexpr,
    TILE_TOKENS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """Program (kv head, tile, sequence): row r of the tile is its query r // GROUP, head r % GROUP of the group."""
    kv_head = tl.program_id(0)
    seq = tl.program_id(2).to(tl.int64)
    num_heads = tl.num_programs(0) * GROUP
    query_start = tl.load(cu_seqlens_q_ptr + seq)
    query_len = tl.load(cu_seqlens_q_ptr + seq + 1) - query_start
    # The last tiles see the most keys: they go first, so that no long one is left alone at the end.
    tile = tl.num_programs(1) - 1 - tl.program_id(1)
    first_token = tile * TILE_TOKENS
    if first_token >= query_len:
        return

    context_len = tl.load(context_lens_ptr + seq)
    cached_len = context_len - query_len
    row = tl.arange(0, BLOCK_ROWS)
    dim = tl.arange(0, BLOCK_DIM)
    token = first_token + row // GROUP
    head = kv_head * GROUP + row % GROUP
    row_mask = (row < TILE_TOKENS * GROUP) & (token < query_len)
    mask = row_mask[:, None] & (dim < HEAD_DIM)[None, :]
    global_token = (query_start + token).to(tl.int64)
    query = tl.load(
        query_ptr + (global_token * query_token_stride + head * query_head_stride)[:, None] + dim[None, :],
        mask=mask,
        other=0.0,
    )  # [BLOCK_ROWS, BLOCK_DIM]
    if IS_QUANTIZED and query.dtype == tl.bfloat16:
        query = query.to(tl.float16)  # see paged_decode_fp8
    key_base = key_ptr + kv_head * kv_head_stride
    value_base = value_ptr + kv_head * kv_head_stride
    key_scale_base = key_scale_ptr + kv_head * BLOCK_SIZE
    value_scale_base = value_scale_ptr + kv_head * BLOCK_SIZE
    table_ptr = block_tables_ptr + seq * block_table_stride

    best = tl.full([BLOCK_ROWS], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_ROWS], tl.float32)
    out = tl.zeros([BLOCK_ROWS, BLOCK_DIM], tl.float32)
    query_position = cached_len + token
    end = tl.minimum(cached_len + first_token + TILE_TOKENS, context_len)
    # Keys up to the first query's position are seen by all rows: whole blocks of them need no mask.
    diagonal = (cached_len + first_token + 1) // BLOCK_KEYS * BLOCK_KEYS
    best, total, out = _attend(
        query,
        key_base,
        value_base,
        key_scale_base,
        value_scale_base,
        table_ptr,
        best,
        total,
        out,
        query_position,
        0,
        diagonal,
        scale_log2,
        page_stride,
        slot_stride,
        scale_page_stride,
        IS_QUANTIZED,
        BLOCK_SIZE,
        HEAD_DIM,
        BLOCK_DIM,
        BLOCK_KEYS,
        False,
        PRECISION,
    )
    best, total, out = _attend(
        query,
        key_base,
        value_base,
        key_scale_base,
        value_scale_base,
        table_ptr,
        best,
        total,
        out,
        query_position,
        diagonal,
        end,
        scale_log2,
        page_stride,
        slot_stride,
        scale_page_stride,
        IS_QUANTIZED,
        BLOCK_SIZE,
        HEAD_DIM,
        BLOCK_DIM,
        BLOCK_KEYS,
        True,
        PRECISION,
    )
    target = (global_token * num_heads + head)[:, None] * HEAD_DIM + dim[None, :]
    tl.store(out_ptr + target, (out / total[:, None]).to(out_ptr.dtype.element_ty), mask=mask)


def paged_prefill_reference(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_tables: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    context_lens: torch.Tensor,
    scale: float,
    key_scale: torch.Tensor | None = None,
    value_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """What `paged_prefill` must equal, sequence by sequence in plain torch (slow: for tests)."""
    if key_scale is not None and value_scale is not None:
        key_cache, value_cache = dequantized(key_cache, key_scale), dequantized(value_cache, value_scale)
    num_heads, num_kv_heads = query.shape[1], key_cache.shape[2]
    out = torch.empty_like(query, memory_format=torch.contiguous_format)  # [num_tokens, num_heads, head_dim]
    starts = cu_seqlens_q.tolist()
    for seq, context_len in enumerate(context_lens.tolist()):
        chunk = slice(starts[seq], starts[seq + 1])
        query_len = starts[seq + 1] - starts[seq]
        pages = block_tables[seq, : -(-context_len // key_cache.shape[1])].long()
        keys = key_cache[pages].flatten(0, 1)[:context_len].float()  # [context_len, num_kv_heads, head_dim]
        values = value_cache[pages].flatten(0, 1)[:context_len].float()
        grouped = query[chunk].float().unflatten(1, (num_kv_heads, num_heads // num_kv_heads))
        scores = torch.einsum("qhgd,khd->hgqk", grouped, keys) * scale
        hidden = torch.ones(query_len, context_len, dtype=torch.bool, device=query.device).triu(
            context_len - query_len + 1
        )
        weights = scores.masked_fill(hidden, -torch.inf).softmax(dim=-1)
        out[chunk] = torch.einsum("hgqk,khd->qhgd", weights, values).flatten(1, 2).to(query.dtype)
    return out


@dataclass(frozen=True)
class _Tile:
    rows: int  # queries × heads of a program
    keys: int  # keys it reads at a time
    num_warps: int
    num_stages: int  # blocks of keys in flight


def _choose_tile(dtype: torch.dtype, block_dim: int, is_quantized: bool) -> _Tile:
    """What fits a multiprocessor's registers and shared memory."""
    if dtype == torch.float32 or block_dim > 128:
        return _Tile(rows=32, keys=32, num_warps=4, num_stages=2)
    if is_quantized:
        return _Tile(rows=128, keys=64, num_warps=4, num_stages=4)
    return _Tile(rows=128, keys=128, num_warps=8, num_stages=3)


def paged_prefill(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_tables: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    context_lens: torch.Tensor,
    max_seqlen_q: int,
    scale: float,
    key_scale: torch.Tensor | None = None,
    value_scale: torch.Tensor | None = None,
    *,
    use_triton: bool | None = None,
) -> torch.Tensor:
    """Causal softmax(scale · query · keysᵀ) · values; a sequence's queries are the last ones of its context.

    query [num_tokens, num_heads, head_dim], sequence i's rows cu_seqlens_q[i] … cu_seqlens_q[i + 1]; key_cache,
    value_cache [num_blocks, block_size, num_kv_heads, head_dim], alike in strides, with the chunk's own keys in them;
    block_tables [num_seqs, max_blocks] int32; cu_seqlens_q [num_seqs + 1] int32; context_lens [num_seqs] int32;
    max_seqlen_q ≥ the longest chunk. → [num_tokens, num_heads, head_dim] of query's dtype.
    With key_scale, value_scale [num_blocks, num_kv_heads, block_size] fp32, contiguous, the caches are float8_e4m3fn.
    """
    if not runs_triton(query, use_triton):
        return paged_prefill_reference(
            query, key_cache, value_cache, block_tables, cu_seqlens_q, context_lens, scale, key_scale, value_scale
        )
    _, num_heads, head_dim = query.shape
    _, block_size, num_kv_heads, _ = key_cache.shape
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)  # [num_tokens, num_heads, head_dim]
    if query.shape[0] == 0:
        return out
    if can_run_on_hopper(query, key_cache):
        tables = (block_tables, cu_seqlens_q, context_lens)
        paged_prefill_hopper(query, key_cache, value_cache, *tables, scale * LOG2_E, out)
        return out
    group = num_heads // num_kv_heads
    block_dim = max(next_power_of_2(head_dim), 16)
    is_quantized = key_scale is not None and value_scale is not None
    tile = _choose_tile(query.dtype, block_dim, is_quantized)
    block_rows = max(tile.rows, next_power_of_2(group))
    tile_tokens = block_rows // group
    grid = (num_kv_heads, -(-max_seqlen_q // tile_tokens), cu_seqlens_q.shape[0] - 1)
    _paged_prefill_kernel[grid](
        query,
        key_cache,
        value_cache,
        key_scale if is_quantized else key_cache,  # not read without scales
        value_scale if is_quantized else value_cache,
        block_tables,
        cu_seqlens_q,
        context_lens,
        out,
        scale * LOG2_E,
        query.stride(0),
        query.stride(1),
        key_cache.stride(0),
        key_cache.stride(1),
        key_cache.stride(2),
        key_scale.stride(0) if key_scale is not None else 0,
        block_tables.stride(0),
        IS_QUANTIZED=is_quantized,
        BLOCK_SIZE=block_size,
        GROUP=group,
        TILE_TOKENS=tile_tokens,
        BLOCK_ROWS=block_rows,
        HEAD_DIM=head_dim,
        BLOCK_DIM=block_dim,
        BLOCK_KEYS=tile.keys,
        PRECISION="ieee" if query.dtype == torch.float32 else "tf32",
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return out
