"""Attention of decode rows to a prefix that they share: its keys are read once for a tile of rows, not once per row.

Rows share a prefix where their block tables begin with the same pages. Tiles are runs of adjacent rows. `paged_decode`
attends to what each row has beyond the shared part, and merges both.
Sources: Ye et al., "Cascade Inference", 2024, https://flashinfer.ai/2024/02/02/cascade-inference.html; Juravsky et
al., "Hydragen: High-Throughput LLM Inference with Shared Prefixes", 2024, https://arxiv.org/abs/2402.05099.
"""

from __future__ import annotations

import torch

from nanovllm.config import MIN_SHARED_PREFIX
from nanovllm.kernels.attention_inputs import LayerKVCache, SharedPrefixes
from nanovllm.kernels.online_softmax import attend, no_keys
from nanovllm.kernels.partials import PREFIX_BLOCK_KEYS, Partials, keys_per_split
from nanovllm.kernels.triton_support import (
    LOG2_E,
    jit,
    jit_with_varying,
    multiprocessor_count,
    next_power_of_2,
    runs_triton,
    tl,
)

_TILE_QUERIES = 64  # queries of one KV head in a tile: two programs then share a multiprocessor
_MIN_TILE_ROWS = 4  # fewer rows read their prefix as fast one by one, through the cache
_BLOCK_COLUMNS = 256  # columns of the block tables compared at a time
_NUM_WARPS = 4
_NUM_STAGES = 3  # blocks of keys in flight
_PROGRAMS_EACH = 2  # on a multiprocessor
_MAX_SPLITS = 16
_INT32_MAX = 0x7FFFFFFF  # in a minimum, where there is no value
SHARED_MULTIPLE = 32  # of tokens: `paged_decode` reads aligned blocks, and begins after the shared part


@jit
def _common_with_previous_kernel(
    block_tables_ptr: tl.tensor,
    context_lens_ptr: tl.tensor,
    common_ptr: tl.tensor,
    block_table_stride: tl.tensor,
    block_size: tl.tensor,
    min_tokens: tl.tensor,
    MULTIPLE: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    INT32_MAX: tl.constexpr,
) -> None:
    """One program per row: how many leading tokens it shares with the row before it, 0 below `min_tokens`."""
    row = tl.program_id(0)
    previous = tl.maximum(row - 1, 0)
    # A row's last token stays its own, so that no row's part is empty.
    shortest = tl.minimum(tl.load(context_lens_ptr + row), tl.load(context_lens_ptr + previous))
    shared = tl.where(row == 0, 0, (shortest - 1) // block_size)  # blocks
    table_ptr = block_tables_ptr + row.to(tl.int64) * block_table_stride
    previous_ptr = block_tables_ptr + previous.to(tl.int64) * block_table_stride
    first = shared * 0
    while first < shared:
        column = first + tl.arange(0, BLOCK_COLUMNS)
        mask = column < shared
        differs = tl.load(table_ptr + column, mask=mask) != tl.load(previous_ptr + column, mask=mask)
        shared = tl.minimum(shared, tl.min(tl.where(differs & mask, column, INT32_MAX), axis=0))
        first += BLOCK_COLUMNS
    tokens = shared * block_size // MULTIPLE * MULTIPLE
    tl.store(common_ptr + row, tl.where(tokens >= min_tokens, tokens, 0))


@jit_with_varying("num_seqs", "max_tile_rows")
def _make_tiles_kernel(
    common_ptr: tl.tensor,
    lens_ptr: tl.tensor,
    tile_rows_ptr: tl.tensor,
    num_seqs: tl.tensor,
    max_tile_rows: tl.tensor,
    MIN_TILE_ROWS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    INT32_MAX: tl.constexpr,
) -> None:
    """One program per row, which looks at all rows. A tile shares what all its neighbouring rows have in common."""
    row = tl.program_id(0)
    other = tl.arange(0, BLOCK_ROWS)
    common = tl.load(common_ptr + other, mask=other < num_seqs, other=0)
    begins_run = common == 0
    run_first = tl.max(tl.where(begins_run & (other <= row), other, 0), axis=0)
    run_end = tl.min(tl.where(begins_run & (other > row), other, num_seqs), axis=0)
    run_len = run_end - run_first
    tile_rows = tl.cdiv(run_len, tl.cdiv(run_len, max_tile_rows))  # the run in equal parts
    first = run_first + (row - run_first) // tile_rows * tile_rows
    end = tl.minimum(first + tile_rows, run_end)
    shared = tl.min(tl.where((other > first) & (other < end), common, INT32_MAX), axis=0)
    counts = end - first >= MIN_TILE_ROWS
    tl.store(lens_ptr + row, tl.where(counts, shared, 0))
    tl.store(tile_rows_ptr + row, tl.where(counts & (first == row), end - first, 0))


def find_shared_prefixes_reference(
    block_tables: torch.Tensor, context_lens: torch.Tensor, block_size: int, max_tile_rows: int, min_tokens: int
) -> SharedPrefixes:
    """Reference for `find_shared_prefixes`, row by row in plain Python (slow: for tests)."""
    lengths, tables = context_lens.tolist(), block_tables.tolist()

    def common(row: int) -> int:
        blocks = (min(lengths[row - 1 : row + 1]) - 1) // block_size
        while tables[row - 1][:blocks] != tables[row][:blocks]:
            blocks -= 1
        tokens = blocks * block_size // SHARED_MULTIPLE * SHARED_MULTIPLE
        return tokens if tokens >= min_tokens else 0

    num_seqs = len(lengths)
    lens, tile_rows = [0] * num_seqs, [0] * num_seqs
    starts = [row for row in range(num_seqs) if row == 0 or not common(row)]
    for start, end in zip(starts, [*starts[1:], num_seqs], strict=False):
        equal = -(-(end - start) // -(-(end - start) // max_tile_rows))
        for first in range(start, end, equal):
            count = min(equal, end - first)
            if count >= _MIN_TILE_ROWS:
                tile_rows[first] = count
                lens[first : first + count] = [min(map(common, range(first + 1, first + count)))] * count
    return SharedPrefixes(context_lens.new_tensor(lens), context_lens.new_tensor(tile_rows), max_tile_rows)


def find_shared_prefixes(
    block_tables: torch.Tensor,
    context_lens: torch.Tensor,
    block_size: int,
    group: int,
    *,
    min_tokens: int = MIN_SHARED_PREFIX,
    use_triton: bool | None = None,
) -> SharedPrefixes:
    """Finds the prefixes that adjacent rows share: once per step, for all its layers.

    block_tables [num_seqs, max_blocks] int32; context_lens [num_seqs] int32, ≥ 1; group: query heads that share a KV
    head; min_tokens ≥ 1: what two rows must share to be in one tile. No synchronisation: may be captured in a CUDA
    graph.
    """
    max_tile_rows = max(_TILE_QUERIES // next_power_of_2(group), 2 * _MIN_TILE_ROWS)  # half a run is a tile too
    if not runs_triton(block_tables, use_triton):
        return find_shared_prefixes_reference(block_tables, context_lens, block_size, max_tile_rows, min_tokens)
    num_seqs = len(context_lens)
    common, lens, tile_rows = (torch.empty_like(context_lens) for _ in range(3))  # [num_seqs]
    if num_seqs:
        _common_with_previous_kernel[(num_seqs,)](
            block_tables_ptr=block_tables,
            context_lens_ptr=context_lens,
            common_ptr=common,
            block_table_stride=block_tables.stride(0),
            block_size=block_size,
            min_tokens=min_tokens,
            MULTIPLE=SHARED_MULTIPLE,
            BLOCK_COLUMNS=_BLOCK_COLUMNS,
            INT32_MAX=_INT32_MAX,
            num_warps=2,
        )
        _make_tiles_kernel[(num_seqs,)](
            common_ptr=common,
            lens_ptr=lens,
            tile_rows_ptr=tile_rows,
            num_seqs=num_seqs,
            max_tile_rows=max_tile_rows,
            MIN_TILE_ROWS=_MIN_TILE_ROWS,
            BLOCK_ROWS=_block_rows(num_seqs),
            INT32_MAX=_INT32_MAX,
            num_warps=2,
        )
    return SharedPrefixes(lens, tile_rows, max_tile_rows)


@jit_with_varying("num_seqs", "num_splits", "num_partials")
def _prefix_attention_kernel(
    query_ptr: tl.tensor,
    key_ptr: tl.tensor,
    value_ptr: tl.tensor,
    block_tables_ptr: tl.tensor,
    shared_lens_ptr: tl.tensor,
    tile_rows_ptr: tl.tensor,
    partial_out_ptr: tl.tensor,
    partial_lse_ptr: tl.tensor,
    scale_log2: tl.tensor,
    num_seqs: tl.tensor,
    num_splits: tl.tensor,
    num_partials: tl.tensor,
    query_seq_stride: tl.tensor,
    query_head_stride: tl.tensor,
    page_stride: tl.tensor,
    slot_stride: tl.tensor,
    kv_head_stride: tl.tensor,
    block_table_stride: tl.tensor,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_SEQS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """Programs (kv head, …) take items (tile, split) in turns: only the device knows how many tiles there are.

    An item is TILE_ROWS rows of BLOCK_GROUP query heads against a part of the tile's prefix.
    """
    kv_head = tl.program_id(0)
    num_heads = tl.num_programs(0) * GROUP
    row = tl.arange(0, BLOCK_SEQS)
    begins = tl.load(tile_rows_ptr + row, mask=row < num_seqs, other=0) > 0
    rank = tl.cumsum(begins.to(tl.int32), axis=0)  # 1 where the first tile begins, and so on
    for item in range(tl.program_id(1), tl.max(rank, axis=0) * num_splits, tl.num_programs(1)):
        split = item % num_splits
        first_row = tl.sum(tl.where(begins & (rank == item // num_splits + 1), row, 0), axis=0)
        num_rows = tl.load(tile_rows_ptr + first_row)
        shared_len = tl.load(shared_lens_ptr + first_row)
        split_len = keys_per_split(shared_len, num_splits, BLOCK_KEYS)
        start = split * split_len
        end = tl.minimum(start + split_len, shared_len)

        index = tl.arange(0, TILE_ROWS * BLOCK_GROUP)
        seq = (first_row + index // BLOCK_GROUP).to(tl.int64)
        head = kv_head * GROUP + index % BLOCK_GROUP
        dim = tl.arange(0, BLOCK_DIM)
        dim_mask = dim < HEAD_DIM
        takes_part = (index // BLOCK_GROUP < num_rows) & (index % BLOCK_GROUP < GROUP) & (start < end)
        mask = takes_part[:, None] & dim_mask[None, :]
        source = query_ptr + seq[:, None] * query_seq_stride + head[:, None] * query_head_stride + dim[None, :]
        query = tl.load(source, mask=mask, other=0.0)  # [TILE_ROWS · BLOCK_GROUP, BLOCK_DIM]
        table_ptr = block_tables_ptr + first_row.to(tl.int64) * block_table_stride
        key_base = key_ptr + kv_head * kv_head_stride
        value_base = value_ptr + kv_head * kv_head_stride

        best, total, out = no_keys(TILE_ROWS * BLOCK_GROUP, BLOCK_DIM)
        best, total, out = attend(
            query,
            key_base,
            value_base,
            table_ptr,
            start,
            end,
            start,
            scale_log2,
            page_stride,
            slot_stride,
            best,
            total,
            out,
            BLOCK_SIZE=BLOCK_SIZE,
            HEAD_DIM=HEAD_DIM,
            BLOCK_KEYS=BLOCK_KEYS,
            HAS_WINDOW=False,
            PRECISION=PRECISION,
        )
        total = tl.where(total > 0, total, 1.0)  # no keys: nothing is stored
        partial = (seq * num_heads + head) * num_partials + split
        tl.store(partial_out_ptr + partial[:, None] * HEAD_DIM + dim[None, :], out / total[:, None], mask=mask)
        tl.store(partial_lse_ptr + partial, best + tl.log2(total), mask=takes_part)


def _block_rows(num_seqs: int) -> int:
    """Returns a block that holds all rows: one of a few sizes, since each is compiled."""
    return max(next_power_of_2(num_seqs), 64 if num_seqs <= 64 else 512)


def choose_num_prefix_splits(num_seqs: int, max_tile_rows: int, num_kv_heads: int, num_multiprocessors: int) -> int:
    """Returns how many parts to split a shared prefix into: the programs of full tiles then fill the device once."""
    num_tiles = -(-num_seqs // max_tile_rows)
    return max(1, min(_PROGRAMS_EACH * num_multiprocessors // (num_tiles * num_kv_heads), _MAX_SPLITS))


def prefix_attention(
    query: torch.Tensor,
    kv_cache: LayerKVCache,
    block_tables: torch.Tensor,
    shared: SharedPrefixes,
    partials: Partials,
    scale: float,
) -> None:
    """Writes each row's attention to its tile's shared prefix into the first `num_prefix_splits` of `partials`.

    query [num_seqs, num_heads, head_dim]; block_tables [num_seqs, max_blocks] int32.
    """
    num_seqs, num_heads, head_dim = query.shape
    _, block_size, num_kv_heads, _ = kv_cache.key.shape
    group = num_heads // num_kv_heads
    programs = -(-_PROGRAMS_EACH * multiprocessor_count(query.device) // num_kv_heads)
    is_float32 = query.dtype == torch.float32
    _prefix_attention_kernel[(num_kv_heads, programs)](
        query_ptr=query,
        key_ptr=kv_cache.key,
        value_ptr=kv_cache.value,
        block_tables_ptr=block_tables,
        shared_lens_ptr=shared.lens,
        tile_rows_ptr=shared.tile_rows,
        partial_out_ptr=partials.out,
        partial_lse_ptr=partials.lse,
        scale_log2=scale * LOG2_E,
        num_seqs=num_seqs,
        num_splits=partials.num_prefix_splits,
        num_partials=partials.lse.shape[2],
        query_seq_stride=query.stride(0),
        query_head_stride=query.stride(1),
        page_stride=kv_cache.key.stride(0),
        slot_stride=kv_cache.key.stride(1),
        kv_head_stride=kv_cache.key.stride(2),
        block_table_stride=block_tables.stride(0),
        BLOCK_SIZE=block_size,
        BLOCK_SEQS=_block_rows(num_seqs),
        TILE_ROWS=next_power_of_2(shared.max_tile_rows),
        GROUP=group,
        BLOCK_GROUP=next_power_of_2(group),
        HEAD_DIM=head_dim,
        BLOCK_DIM=max(next_power_of_2(head_dim), 16),
        BLOCK_KEYS=PREFIX_BLOCK_KEYS,
        PRECISION="ieee" if is_float32 else "tf32",
        num_warps=_NUM_WARPS,
        num_stages=2 if is_float32 else _NUM_STAGES,
    )
