"""Causal attention of prompt chunks over the paged cache.

Each program walks the keys once with an online softmax. The query heads that share a KV head are rows of one tile, so
that each key is read once for all of them. On Hopper GPUs the kernel of paged_prefill_hopper.py, which divides the work
among its warps, replaces this one wherever it can run.
Sources: Dao, "FlashAttention-2", 2023, https://arxiv.org/abs/2307.08691; Kwon et al., "PagedAttention", 2023,
https://arxiv.org/abs/2309.06180.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nanovllm.kernels.attention_inputs import LayerKVCache, PrefillMetadata
from nanovllm.kernels.dequantize_pages import dequantized
from nanovllm.kernels.online_softmax import accumulate, no_keys
from nanovllm.kernels.page_slots import page_slots
from nanovllm.kernels.paged_prefill_hopper import can_run_on_hopper, paged_prefill_hopper
from nanovllm.kernels.triton_support import LOG2_E, constant, jit, next_power_of_2, runs_triton, tl

_MIN_DOT_SIZE = 16  # the smallest tile of a matrix product
# The score of a key that a query does not see. With a window a query may see none of the first block's keys, and the
# softmax of infinities alone would be NaN. The sums of such a block are multiplied by 0 when the first seen key comes.
# A power of two: its product with the scale is exact, so that a fused multiply-add leaves no rest of 1e22 for exp2.
UNSEEN = constant(-(2.0**100))


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
    WINDOW: tl.constexpr,
    PRECISION: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Returns (best, total, out) after keys start … end; MASKED if some query may not see some key."""
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
        # Rows past the context are read as zeros: the cache may hold NaN there.
        key = tl.load(key_base + slot[:, None] + dim[None, :], mask=kv_mask, other=0.0)  # [BLOCK_KEYS, BLOCK_DIM]
        value = tl.load(value_base + slot[:, None] + dim[None, :], mask=kv_mask, other=0.0)
        if IS_QUANTIZED:
            # A tile has as many rows as keys: scaling keys and values costs less than scaling scores and weights.
            scale_at = page_slots(table_ptr, first, end, scale_page_stride, 1, BLOCK_SIZE, BLOCK_KEYS)
            key_scale = tl.load(key_scale_base + scale_at, mask=valid, other=0.0)
            value_scale = tl.load(value_scale_base + scale_at, mask=valid, other=0.0)
            key = key.to(tl.float16).to(query.dtype) * key_scale.to(query.dtype)[:, None]
            value = value.to(tl.float16).to(query.dtype) * value_scale.to(query.dtype)[:, None]
        scores = tl.dot(query, tl.trans(key), input_precision=PRECISION)  # [BLOCK_ROWS, BLOCK_KEYS]
        if MASKED:
            seen = position[None, :] <= query_position[:, None]
            if WINDOW:
                seen &= position[None, :] > query_position[:, None] - WINDOW
            scores = tl.where(seen, scores, UNSEEN)
        best, total, out = accumulate(scores, value, scale_log2, best, total, out, PRECISION)
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
    WINDOW: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """Program (kv head, tile, sequence): row r of the tile is its query r // GROUP, head r % GROUP of the group."""
    kv_head = tl.program_id(0)
    seq = tl.program_id(2).to(tl.int64)
    num_heads = tl.num_programs(0) * GROUP
    query_start = tl.load(cu_seqlens_q_ptr + seq)
    query_len = tl.load(cu_seqlens_q_ptr + seq + 1) - query_start
    # The last tiles see the most keys: they go first, so that no long tile runs alone at the end.
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

    best, total, out = no_keys(BLOCK_ROWS, BLOCK_DIM)
    query_position = cached_len + token
    end = tl.minimum(cached_len + first_token + TILE_TOKENS, context_len)
    # Keys up to the first query's position are seen by all rows: whole blocks of them need no mask.
    diagonal = (cached_len + first_token + 1) // BLOCK_KEYS * BLOCK_KEYS
    start = diagonal * 0
    if WINDOW:  # from the first block that the first query sees on, all blocks are masked
        start = tl.maximum(cached_len + first_token + 1 - WINDOW, 0) // BLOCK_KEYS * BLOCK_KEYS
        diagonal = start
    best, total, out = _attend(
        query=query,
        key_base=key_base,
        value_base=value_base,
        key_scale_base=key_scale_base,
        value_scale_base=value_scale_base,
        table_ptr=table_ptr,
        best=best,
        total=total,
        out=out,
        query_position=query_position,
        start=start,
        end=diagonal,
        scale_log2=scale_log2,
        page_stride=page_stride,
        slot_stride=slot_stride,
        scale_page_stride=scale_page_stride,
        IS_QUANTIZED=IS_QUANTIZED,
        BLOCK_SIZE=BLOCK_SIZE,
        HEAD_DIM=HEAD_DIM,
        BLOCK_DIM=BLOCK_DIM,
        BLOCK_KEYS=BLOCK_KEYS,
        MASKED=False,
        WINDOW=WINDOW,
        PRECISION=PRECISION,
    )
    best, total, out = _attend(
        query=query,
        key_base=key_base,
        value_base=value_base,
        key_scale_base=key_scale_base,
        value_scale_base=value_scale_base,
        table_ptr=table_ptr,
        best=best,
        total=total,
        out=out,
        query_position=query_position,
        start=diagonal,
        end=end,
        scale_log2=scale_log2,
        page_stride=page_stride,
        slot_stride=slot_stride,
        scale_page_stride=scale_page_stride,
        IS_QUANTIZED=IS_QUANTIZED,
        BLOCK_SIZE=BLOCK_SIZE,
        HEAD_DIM=HEAD_DIM,
        BLOCK_DIM=BLOCK_DIM,
        BLOCK_KEYS=BLOCK_KEYS,
        MASKED=True,
        WINDOW=WINDOW,
        PRECISION=PRECISION,
    )
    target = (global_token * num_heads + head)[:, None] * HEAD_DIM + dim[None, :]
    tl.store(out_ptr + target, (out / total[:, None]).to(out_ptr.dtype.element_ty), mask=mask)


def paged_prefill_reference(
    query: torch.Tensor, kv_cache: LayerKVCache, metadata: PrefillMetadata, scale: float, window: int | None = None
) -> torch.Tensor:
    """Reference for `paged_prefill`, sequence by sequence in plain torch (slow: for tests)."""
    if kv_cache.is_quantized:
        kv_cache = dequantized(kv_cache)
    _, block_size, num_kv_heads, _ = kv_cache.key.shape
    group = query.shape[1] // num_kv_heads
    out = torch.empty_like(query, memory_format=torch.contiguous_format)  # [num_tokens, num_heads, head_dim]
    starts = metadata.cu_seqlens_q.tolist()
    for seq, context_len in enumerate(metadata.context_lens.tolist()):
        chunk = slice(starts[seq], starts[seq + 1])
        query_len = starts[seq + 1] - starts[seq]
        pages = metadata.block_tables[seq, : -(-context_len // block_size)].long()
        keys = kv_cache.key[pages].flatten(0, 1)[:context_len].float()  # [context_len, num_kv_heads, head_dim]
        values = kv_cache.value[pages].flatten(0, 1)[:context_len].float()
        grouped = query[chunk].float().unflatten(1, (num_kv_heads, group))
        scores = torch.einsum("qhgd,khd->hgqk", grouped, keys) * scale
        cached_len = context_len - query_len
        hidden = torch.ones(query_len, context_len, dtype=torch.bool, device=query.device).triu(cached_len + 1)
        if window is not None:
            hidden |= torch.ones_like(hidden).tril(cached_len - window)
        weights = scores.masked_fill(hidden, -torch.inf).softmax(dim=-1)
        out[chunk] = torch.einsum("hgqk,khd->qhgd", weights, values).flatten(1, 2).to(query.dtype)
    return out


@dataclass(frozen=True)
class _Tile:
    """The shape of a program."""

    rows: int  # queries × heads
    keys: int  # keys it reads at a time
    num_warps: int
    num_stages: int  # blocks of keys in flight


def _choose_tile(dtype: torch.dtype, block_dim: int, is_quantized: bool) -> _Tile:
    """Returns a tile that fits a multiprocessor's registers and shared memory."""
    if dtype == torch.float32 or block_dim > 128:
        return _Tile(rows=32, keys=32, num_warps=4, num_stages=2)
    if is_quantized:
        return _Tile(rows=128, keys=64, num_warps=4, num_stages=4)
    return _Tile(rows=128, keys=128, num_warps=8, num_stages=3)


def paged_prefill(
    query: torch.Tensor,
    kv_cache: LayerKVCache,
    metadata: PrefillMetadata,
    scale: float,
    out: torch.Tensor | None = None,
    *,
    window: int | None = None,
    use_triton: bool | None = None,
) -> torch.Tensor:
    """Returns causal softmax(scale · query · keysᵀ) · values; a sequence's queries are the last ones of its context.

    query [num_tokens, num_heads, head_dim] → the same shape and dtype. The cache has query's dtype or is an FP8 cache,
    and holds the chunk's own keys and values. out: contiguous, where to write the result; None: a new tensor. Tokens of
    no chunk keep their value in it. window: how many keys a query attends to, the last ones up to its own; None: all.
    No synchronisation: may be captured in a CUDA graph, with upper bounds for lengths.
    """
    if not runs_triton(query, use_triton):
        attended = paged_prefill_reference(query, kv_cache, metadata, scale, window)
        return attended if out is None else out.copy_(attended)
    if out is None:
        out = torch.empty(query.shape, dtype=query.dtype, device=query.device)  # [num_tokens, num_heads, head_dim]
    if query.shape[0] == 0:
        return out
    if can_run_on_hopper(query, kv_cache.key):
        paged_prefill_hopper(query, kv_cache, metadata, scale, out, window)
    else:
        _launch(query, kv_cache, metadata, scale, out, window)
    return out


def _launch(
    query: torch.Tensor,
    kv_cache: LayerKVCache,
    metadata: PrefillMetadata,
    scale: float,
    out: torch.Tensor,
    window: int | None,
) -> None:
    _, num_heads, head_dim = query.shape
    _, block_size, num_kv_heads, _ = kv_cache.key.shape
    group = num_heads // num_kv_heads
    block_dim = max(next_power_of_2(head_dim), _MIN_DOT_SIZE)
    is_quantized = kv_cache.is_quantized
    tile = _choose_tile(query.dtype, block_dim, is_quantized)
    block_rows = max(tile.rows, next_power_of_2(group))
    tile_tokens = block_rows // group
    grid = (num_kv_heads, -(-metadata.max_seqlen_q // tile_tokens), metadata.cu_seqlens_q.shape[0] - 1)
    _paged_prefill_kernel[grid](
        query_ptr=query,
        key_ptr=kv_cache.key,
        value_ptr=kv_cache.value,
        key_scale_ptr=kv_cache.key_scale if is_quantized else kv_cache.key,  # not read without scales
        value_scale_ptr=kv_cache.value_scale if is_quantized else kv_cache.value,
        block_tables_ptr=metadata.block_tables,
        cu_seqlens_q_ptr=metadata.cu_seqlens_q,
        context_lens_ptr=metadata.context_lens,
        out_ptr=out,
        scale_log2=scale * LOG2_E,
        query_token_stride=query.stride(0),
        query_head_stride=query.stride(1),
        page_stride=kv_cache.key.stride(0),
        slot_stride=kv_cache.key.stride(1),
        kv_head_stride=kv_cache.key.stride(2),
        scale_page_stride=kv_cache.scale_page_stride,
        block_table_stride=metadata.block_tables.stride(0),
        IS_QUANTIZED=is_quantized,
        BLOCK_SIZE=block_size,
        GROUP=group,
        TILE_TOKENS=tile_tokens,
        BLOCK_ROWS=block_rows,
        HEAD_DIM=head_dim,
        BLOCK_DIM=block_dim,
        BLOCK_KEYS=tile.keys,
        WINDOW=window or 0,
        PRECISION="ieee" if query.dtype == torch.float32 else "tf32",
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
