"""Attention of decode rows to a prefix that they share: its keys are read once for a tile of rows, not once a row.

Rows share a prefix where their block tables begin with the same pages. Tiles are of adjacent rows; what each attends
to beyond the shared part, and the merging of both, is `paged_decode`'s.
Sources: Ye et al., "Cascade Inference", 2024, https://flashinfer.ai/2024/02/02/cascade-inference.html; Juravsky et
al., "Hydragen: High-Throughput LLM Inference with Shared Prefixes", 2024, https://arxiv.org/abs/2402.05099.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nanovllm.config import MIN_SHARED_PREFIX
from nanovllm.kernels.page_slots import page_slots
from nanovllm.kernels.triton_support import jit, multiprocessor_count, next_power_of_2, runs_triton, tl

_TILE_QUERIES = 128  # queries of one KV head in a tile: a full tile of the matrix units
_BLOCK_COLUMNS = 64  # columns of the block tables compared at a time
BLOCK_KEYS = 64  # keys of a prefix a program reads at a time; shared lengths are multiples of it
_MAX_SPLITS = 16


@dataclass(frozen=True)
class SharedPrefixes:
    """For each tile of `tile_rows` rows: how many tokens its rows share (0: none), and a row whose table has them.

    Rows of one token (padding's, and new ones) take no part. The others are longer than what their tile shares.
    """

    lens: torch.Tensor  # [num_tiles] int32, multiples of BLOCK_KEYS
    rows: torch.Tensor  # [num_tiles] int32, index in the batch
    tile_rows: int


@jit
def _find_shared_prefixes_kernel(
    block_tables_ptr: tl.tensor,
    context_lens_ptr: tl.tensor,
    lens_ptr: tl.tensor,
    rows_ptr: tl.tensor,
    num_seqs: tl.tensor,
    block_table_stride: tl.tensor,
    block_size: tl.tensor,
    min_tokens: tl.tensor,
    TILE_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
) -> None:
    """One program a tile."""
    tile = tl.program_id(0)
    row = tile * TILE_ROWS + tl.arange(0, TILE_ROWS)
    context_len = tl.load(context_lens_ptr + row, mask=row < num_seqs, other=1)
    real = context_len > 1
    # A row's own last token is left to it, so that nobody's part is empty.
    shared = tl.min(tl.where(real, (context_len - 1) // block_size, 0x7FFFFFFF), axis=0)
    shared = tl.where(shared == 0x7FFFFFFF, 0, shared)
    first = shared * 0
    while first < shared:
        column = first + tl.arange(0, BLOCK_COLUMNS)
        table_ptrs = block_tables_ptr + row[:, None].to(tl.int64) * block_table_stride + column[None, :]
        mask = real[:, None] & (column < shared)[None, :]
        lowest = tl.min(tl.load(table_ptrs, mask=mask, other=0x7FFFFFFF), axis=0)
        highest = tl.max(tl.load(table_ptrs, mask=mask, other=-1), axis=0)
        differs = (lowest != highest) & (column < shared)
        shared = tl.minimum(shared, tl.min(tl.where(differs, column, 0x7FFFFFFF), axis=0))
        first += BLOCK_COLUMNS
    tokens = shared * block_size // BLOCK_KEYS * BLOCK_KEYS
    tl.store(lens_ptr + tile, tl.where(tokens >= min_tokens, tokens, 0))
    tl.store(rows_ptr + tile, tl.min(tl.where(real, row, 0x7FFFFFFF), axis=0))


def find_shared_prefixes_reference(
    block_tables: torch.Tensor, context_lens: torch.Tensor, block_size: int, tile_rows: int, min_tokens: int
) -> SharedPrefixes:
    """What `find_shared_prefixes` must equal, row by row in plain Python (slow: for tests)."""
    lens, rows = [], []
    lengths, tables = context_lens.tolist(), block_tables.tolist()
    for first in range(0, len(lengths), tile_rows):
        real = [row for row in range(first, min(first + tile_rows, len(lengths))) if lengths[row] > 1]
        shared = min(((lengths[row] - 1) // block_size for row in real), default=0)
        while any(tables[row][:shared] != tables[real[0]][:shared] for row in real):
            shared -= 1
        tokens = shared * block_size // BLOCK_KEYS * BLOCK_KEYS
        lens.append(tokens if tokens >= min_tokens else 0)
        rows.append(real[0] if real else 0x7FFFFFFF)
    as_tensor = {"dtype": torch.int32, "device": context_lens.device}
    return SharedPrefixes(torch.tensor(lens, **as_tensor), torch.tensor(rows, **as_tensor), tile_rows)  # type: ignore[arg-type]


def find_shared_prefixes(
    block_tables: torch.Tensor,
    context_lens: torch.Tensor,
    block_size: int,
    group: int,
    *,
    min_tokens: int = MIN_SHARED_PREFIX,
    use_triton: bool | None = None,
) -> SharedPrefixes:
    """Once a step, for all its layers. block_tables [num_seqs, max_blocks] int32; context_lens [num_seqs] int32, ≥ 1.

    group: query heads that share a KV head. No synchronisation: may be captured in a CUDA graph.
    """
    tile_rows = max(_TILE_QUERIES // next_power_of_2(group), 1)
    if not runs_triton(block_tables, use_triton):
        return find_shared_prefixes_reference(block_tables, context_lens, block_size, tile_rows, min_tokens)
    num_tiles = -(-len(context_lens) // tile_rows)
    lens = torch.empty(num_tiles, dtype=torch.int32, device=block_tables.device)  # [num_tiles]
    rows = torch.empty_like(lens)  # [num_tiles]
    if num_tiles:
        _find_shared_prefixes_kernel[(num_tiles,)](
            *(block_tables, context_lens, lens, rows, len(context_lens)),
            block_tables.stride(0),
            *(block_size, min_tokens),
            TILE_ROWS=tile_rows,
            BLOCK_COLUMNS=_BLOCK_COLUMNS,
            BLOCK_KEYS=BLOCK_KEYS,
            num_warps=4,
        )
    return SharedPrefixes(lens, rows, tile_rows)


@jit
def shared_len_of(
    shared_lens_ptr: tl.tensor, seq: tl.tensor, context_len: tl.tensor, TILE_ROWS: tl.constexpr
) -> tl.tensor:
    """Tokens of a row's context that `prefix_attention` sees to; TILE_ROWS 0: nothing is shared."""
    shared_len = context_len * 0
    if TILE_ROWS > 0:
        shared_len = tl.load(shared_lens_ptr + seq // TILE_ROWS)
        shared_len = tl.where(shared_len < context_len, shared_len, 0)  # rows of one token take no part
    return shared_len


@jit
def prefix_split_len(shared_len: tl.tensor, num_splits: tl.tensor, BLOCK_KEYS: tl.constexpr) -> tl.tensor:
    """Keys of each split of a shared prefix but the last."""
    return tl.cdiv(tl.cdiv(shared_len, num_splits), BLOCK_KEYS) * BLOCK_KEYS


@jit
def _prefix_attention_kernel(
    query_ptr: tl.tensor,
    key_ptr: tl.tensor,
    value_ptr: tl.tensor,
    block_tables_ptr: tl.tensor,
    context_lens_ptr: tl.tensor,
    shared_lens_ptr: tl.tensor,
    shared_rows_ptr: tl.tensor,
    partial_out_ptr: tl.tensor,
    partial_lse_ptr: tl.tensor,
    scale_log2: tl.tensor,
    num_seqs: tl.tensor,
    num_partials: tl.tensor,
    query_seq_stride: tl.tensor,
    query_head_stride: tl.tensor,
    page_stride: tl.tensor,
    slot_stride: tl.tensor,
    kv_head_stride: tl.tensor,
    block_table_stride: tl.tensor,
    BLOCK_SIZE: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """Program (kv head, split, tile): TILE_ROWS rows of BLOCK_GROUP query heads against a part of the prefix."""
    kv_head = tl.program_id(0)
    split = tl.program_id(1)
    tile = tl.program_id(2)
    num_heads = tl.num_programs(0) * GROUP
    shared_len = tl.load(shared_lens_ptr + tile)
    split_len = prefix_split_len(shared_len, tl.num_programs(1), BLOCK_KEYS)
    start = split * split_len
    end = tl.minimum(start + split_len, shared_len)
    if start >= end:
        return

    index = tl.arange(0, TILE_ROWS * BLOCK_GROUP)
    seq = (tile * TILE_ROWS + index // BLOCK_GROUP).to(tl.int64)
    head = kv_head * GROUP + index % BLOCK_GROUP
    dim = tl.arange(0, BLOCK_DIM)
    dim_mask = dim < HEAD_DIM
    takes_part = (seq < num_seqs) & (index % BLOCK_GROUP < GROUP)
    takes_part &= tl.load(context_lens_ptr + seq, mask=takes_part, other=0) > shared_len
    mask = takes_part[:, None] & dim_mask[None, :]
    source = query_ptr + seq[:, None] * query_seq_stride + head[:, None] * query_head_stride + dim[None, :]
    query = tl.load(source, mask=mask, other=0.0)  # [TILE_ROWS · BLOCK_GROUP, BLOCK_DIM]
    table_ptr = block_tables_ptr + tl.load(shared_rows_ptr + tile).to(tl.int64) * block_table_stride
    key_base = key_ptr + kv_head * kv_head_stride
    value_base = value_ptr + kv_head * kv_head_stride

    best = tl.full([TILE_ROWS * BLOCK_GROUP], -float("inf"), tl.float32)
    total = tl.zeros([TILE_ROWS * BLOCK_GROUP], tl.float32)
    out = tl.zeros([TILE_ROWS * BLOCK_GROUP, BLOCK_DIM], tl.float32)
    for first in range(start, end, BLOCK_KEYS):
        valid = first + tl.arange(0, BLOCK_KEYS) < end
        slot = page_slots(table_ptr, first, end, page_stride, slot_stride, BLOCK_SIZE, BLOCK_KEYS)
        kv_mask = valid[:, None] & dim_mask[None, :]
        key = tl.load(key_base + slot[:, None] + dim[None, :], mask=kv_mask, other=0.0)  # [BLOCK_KEYS, BLOCK_DIM]
        value = tl.load(value_base + slot[:, None] + dim[None, :], mask=kv_mask, other=0.0)
        scores = tl.dot(query, tl.trans(key), input_precision=PRECISION)  # [TILE_ROWS · BLOCK_GROUP, BLOCK_KEYS]
        scores = tl.where(valid[None, :], scores, -float("inf"))
        new_best = tl.maximum(best, tl.max(scores, axis=1) * scale_log2)
        weights = tl.exp2(scores * scale_log2 - new_best[:, None])
        shrink = tl.exp2(best - new_best)
        total = total * shrink + tl.sum(weights, axis=1)
        out = out * shrink[:, None] + tl.dot(weights.to(value.dtype), value, input_precision=PRECISION)
        best = new_best

    partial = (seq * num_heads + head) * num_partials + split
    tl.store(partial_out_ptr + partial[:, None] * HEAD_DIM + dim[None, :], out / total[:, None], mask=mask)
    tl.store(partial_lse_ptr + partial, best + tl.log2(total), mask=takes_part)


def choose_num_prefix_splits(num_tiles: int, num_kv_heads: int, num_multiprocessors: int) -> int:
    """Parts of a shared prefix, so that its programs fill the device about once."""
    return max(1, min(num_multiprocessors // (num_tiles * num_kv_heads), _MAX_SPLITS))


def num_prefix_splits(shared: SharedPrefixes, num_kv_heads: int) -> int:
    return choose_num_prefix_splits(len(shared.lens), num_kv_heads, multiprocessor_count(shared.lens.device))


def prefix_attention(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_tables: torch.Tensor,
    context_lens: torch.Tensor,
    shared: SharedPrefixes,
    partial_out: torch.Tensor,
    partial_lse: torch.Tensor,
    num_splits: int,
    scale_log2: float,
) -> None:
    """Writes each row's attention to its tile's shared prefix as partials 0 … num_splits - 1; see `paged_decode`.

    partial_out [num_seqs, num_heads, num_partials, head_dim] and partial_lse [num_seqs, num_heads, num_partials], both
    float32: the softmax-weighed values, and the base-2 logarithm of the softmax's denominator.
    """
    num_seqs, num_heads, head_dim = query.shape
    _, block_size, num_kv_heads, _ = key_cache.shape
    group = num_heads // num_kv_heads
    _prefix_attention_kernel[(num_kv_heads, num_splits, len(shared.lens))](
        *(query, key_cache, value_cache, block_tables, context_lens, shared.lens, shared.rows, partial_out),
        *(partial_lse, scale_log2, num_seqs, partial_lse.shape[2]),
        *(*query.stride()[:2], *key_cache.stride()[:3], block_tables.stride(0)),
        BLOCK_SIZE=block_size,
        TILE_ROWS=shared.tile_rows,
        GROUP=group,
        BLOCK_GROUP=next_power_of_2(group),
        HEAD_DIM=head_dim,
        BLOCK_DIM=max(next_power_of_2(head_dim), 16),
        BLOCK_KEYS=BLOCK_KEYS,
        PRECISION="ieee" if query.dtype == torch.float32 else "tf32",
        num_warps=8,
        num_stages=2 if query.dtype == torch.float32 else 3,
    )
