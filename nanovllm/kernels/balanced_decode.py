"""Decode attention over a cache in the model's dtype, in stretches of equally many keys (stretches.py)."""

from __future__ import annotations

import torch

from nanovllm.kernels.attention_inputs import DecodeMetadata, LayerKVCache
from nanovllm.kernels.online_softmax import attend
from nanovllm.kernels.partials import first_own_key
from nanovllm.kernels.stretches import divide, empty_pieces, first_piece, merge_pieces, num_blocks, suits_stretches
from nanovllm.kernels.triton_support import LOG2_E, jit_with_varying, multiprocessor_count, next_power_of_2, tl

_BLOCK_KEYS = 32  # keys a program reads at a time
_MIN_DOT_SIZE = 16  # the smallest tile of a matrix product
# As measured on an H200.
_PROGRAMS_EACH = 4  # of a multiprocessor
_NUM_STAGES = 5
_ROW_BYTES = 256  # of a head's key, for which both were measured
_MAX_ROWS = 256


@jit_with_varying("num_seqs")
def _balanced_decode_kernel(
    query_ptr: tl.tensor,
    key_ptr: tl.tensor,
    value_ptr: tl.tensor,
    block_tables_ptr: tl.tensor,
    context_lens_ptr: tl.tensor,
    out_ptr: tl.tensor,
    piece_out_ptr: tl.tensor,
    piece_lse_ptr: tl.tensor,
    num_seqs: tl.tensor,
    scale_log2: tl.tensor,
    query_seq_stride: tl.tensor,
    query_head_stride: tl.tensor,
    page_stride: tl.tensor,
    slot_stride: tl.tensor,
    kv_head_stride: tl.tensor,
    block_table_stride: tl.tensor,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    WINDOW: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """Program (kv head, stretch): the group's queries and the stretch's keys, one row after another."""
    kv_head = tl.program_id(0)
    stretch = tl.program_id(1)
    num_heads = tl.num_programs(0) * GROUP
    group = tl.arange(0, BLOCK_GROUP)
    dim = tl.arange(0, BLOCK_DIM)
    head = kv_head * GROUP + group
    mask = (group < GROUP)[:, None] & (dim < HEAD_DIM)[None, :]
    _, blocks, per_stretch = divide(context_lens_ptr, num_seqs, tl.num_programs(1), WINDOW, BLOCK_KEYS, BLOCK_ROWS)
    row, skipped, left = first_piece(blocks, per_stretch, stretch)
    while left > 0:  # blocks
        context_len = tl.load(context_lens_ptr + row)
        first_key = first_own_key(context_len, context_len * 0, WINDOW, BLOCK_KEYS) + skipped * BLOCK_KEYS
        row_blocks = num_blocks(context_len, WINDOW, BLOCK_KEYS)
        taken = tl.minimum(row_blocks - skipped, left)
        if taken > 0:
            seq = row.to(tl.int64)
            query = tl.load(
                query_ptr + seq * query_seq_stride + head[:, None] * query_head_stride + dim[None, :],
                mask=mask,
                other=0.0,
            )  # [BLOCK_GROUP, BLOCK_DIM]
            best, total, out = attend(
                query,
                key_ptr + kv_head * kv_head_stride,
                value_ptr + kv_head * kv_head_stride,
                block_tables_ptr + seq * block_table_stride,
                first_key,
                tl.minimum(first_key + taken * BLOCK_KEYS, context_len),
                context_len - WINDOW,
                scale_log2,
                page_stride,
                slot_stride,
                BLOCK_SIZE=BLOCK_SIZE,
                HEAD_DIM=HEAD_DIM,
                BLOCK_KEYS=BLOCK_KEYS,
                HAS_WINDOW=WINDOW > 0,
                PRECISION=PRECISION,
            )
            out = out / total[:, None]
            if taken == row_blocks:
                target = (seq * num_heads + head)[:, None] * HEAD_DIM + dim[None, :]
                tl.store(out_ptr + target, out.to(out_ptr.dtype.element_ty), mask=mask)
            else:
                piece = (stretch + seq) * num_heads + head
                tl.store(piece_out_ptr + piece[:, None] * HEAD_DIM + dim[None, :], out, mask=mask)
                tl.store(piece_lse_ptr + piece, best + tl.log2(total), mask=group < GROUP)
        left -= taken
        skipped = 0
        row += 1


def suits_balanced_decode(query: torch.Tensor, num_kv_heads: int) -> bool:
    """Returns whether to divide the keys of all rows equally. Only shapes decide it: a captured graph fixes it."""
    is_measured = query.shape[2] * query.itemsize == _ROW_BYTES
    return is_measured and suits_stretches(query, num_kv_heads, _MAX_ROWS)


def balanced_decode(
    query: torch.Tensor,
    kv_cache: LayerKVCache,
    metadata: DecodeMetadata,
    scale: float,
    out: torch.Tensor,
    window: int | None = None,
    num_stretches: int | None = None,
) -> torch.Tensor:
    """Writes what `paged_decode` returns into `out` [num_seqs, num_heads, head_dim], contiguous, and returns it.

    A row's result depends on the lengths of the others by rounding alone: they decide where it is cut. Rows of length 0
    are left as they are. `metadata.shared` is not used. num_stretches overrides the choice.
    """
    num_heads, head_dim = query.shape[1:]
    _, block_size, num_kv_heads, _ = kv_cache.key.shape
    group = num_heads // num_kv_heads
    if num_stretches is None:
        num_stretches = -(-_PROGRAMS_EACH * multiprocessor_count(query.device) // num_kv_heads)
    pieces = empty_pieces(out, num_stretches)
    _balanced_decode_kernel[(num_kv_heads, num_stretches)](
        query_ptr=query,
        key_ptr=kv_cache.key,
        value_ptr=kv_cache.value,
        block_tables_ptr=metadata.block_tables,
        context_lens_ptr=metadata.context_lens,
        out_ptr=out,
        piece_out_ptr=pieces.out,
        piece_lse_ptr=pieces.lse,
        num_seqs=len(query),
        scale_log2=scale * LOG2_E,
        query_seq_stride=query.stride(0),
        query_head_stride=query.stride(1),
        page_stride=kv_cache.key.stride(0),
        slot_stride=kv_cache.key.stride(1),
        kv_head_stride=kv_cache.key.stride(2),
        block_table_stride=metadata.block_tables.stride(0),
        BLOCK_SIZE=block_size,
        BLOCK_ROWS=pieces.block_rows,
        GROUP=group,
        BLOCK_GROUP=max(next_power_of_2(group), _MIN_DOT_SIZE),
        HEAD_DIM=head_dim,
        BLOCK_DIM=max(next_power_of_2(head_dim), _MIN_DOT_SIZE),
        BLOCK_KEYS=_BLOCK_KEYS,
        WINDOW=window or 0,
        PRECISION="ieee" if query.dtype == torch.float32 else "tf32",
        num_warps=2,
        num_stages=_NUM_STAGES,
    )
    merge_pieces(pieces, metadata, out, num_kv_heads, _BLOCK_KEYS, window)
    return out
