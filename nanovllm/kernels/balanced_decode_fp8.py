"""Decode attention over an FP8 cache, in stretches of equally many keys (stretches.py)."""

from __future__ import annotations

import torch

from nanovllm.kernels.attend_keys_fp8 import PROGRAMS_EACH, attend_keys_fp8, fp8_arguments, store_pairs
from nanovllm.kernels.attention_inputs import DecodeMetadata, LayerKVCache
from nanovllm.kernels.stretches import attend_stretches, find_piece, find_stretch, suits_stretches
from nanovllm.kernels.triton_support import (
    jit_with_varying,
    let_next_kernel_start,
    multiprocessor_count,
    tl,
    wait_for_previous_kernel,
)

_MAX_ROWS = 384  # as measured on an H200
_MAX_HEAD_DIM = 128
_MAX_REGISTERS = 65536 // (32 * PROGRAMS_EACH)  # of a thread: all programs then run at a time


@jit_with_varying("num_seqs")
def _balanced_decode_fp8_kernel(
    query_ptr: tl.tensor,
    key_ptr: tl.tensor,
    value_words_ptr: tl.tensor,
    key_scale_ptr: tl.tensor,
    value_scale_ptr: tl.tensor,
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
    scale_page_stride: tl.tensor,
    block_table_stride: tl.tensor,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
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
    """Program (kv head, stretch): the group's queries and the stretch's keys, one row after another."""
    let_next_kernel_start(PDL)
    kv_head = tl.program_id(0)
    stretch = tl.program_id(1)
    num_heads = tl.num_programs(0) * GROUP
    row, skipped, left, _ = find_stretch(
        context_lens_ptr, num_seqs, stretch, tl.num_programs(1), WINDOW, BLOCK_KEYS, BLOCK_ROWS
    )
    wait_for_previous_kernel(PDL)  # every program waits: the next kernel relies on it
    while left > 0:  # blocks
        context_len, start, end, taken, is_whole = find_piece(context_lens_ptr, row, skipped, left, WINDOW, BLOCK_KEYS)
        if taken > 0:
            even, odd, lse = attend_keys_fp8(
                query_ptr,
                key_ptr,
                value_words_ptr,
                key_scale_ptr,
                value_scale_ptr,
                block_tables_ptr,
                kv_head,
                row.to(tl.int64),
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
                WAITS=False,
            )
            group = tl.arange(0, BLOCK_GROUP)
            head = kv_head * GROUP + group
            if is_whole:
                store_pairs(out_ptr, row * num_heads + head, even, odd, GROUP, HEAD_DIM)
            else:
                piece = (stretch + row) * num_heads + head
                store_pairs(piece_out_ptr, piece, even, odd, GROUP, HEAD_DIM)
                tl.store(piece_lse_ptr + piece, lse, mask=group < GROUP)
        left -= taken
        skipped = 0
        row += 1


def suits_balanced_decode_fp8(query: torch.Tensor, num_kv_heads: int) -> bool:
    """Returns whether to divide the keys of all rows equally. Only shapes decide it: a captured graph fixes it."""
    return query.shape[2] <= _MAX_HEAD_DIM and suits_stretches(query, num_kv_heads, _MAX_ROWS)


def balanced_decode_fp8(
    query: torch.Tensor,
    kv_cache: LayerKVCache,
    metadata: DecodeMetadata,
    scale: float,
    out: torch.Tensor,
    window: int | None = None,
    num_stretches: int | None = None,
) -> torch.Tensor:
    """Writes what `paged_decode_fp8` returns into `out` [num_seqs, num_heads, head_dim], contiguous, and returns it.

    A row's result depends on the lengths of the others by rounding alone: they decide where it is cut. Rows of length 0
    are left as they are. num_stretches overrides the choice.
    """
    num_kv_heads = kv_cache.key.shape[2]
    if num_stretches is None:
        num_stretches = -(-PROGRAMS_EACH * multiprocessor_count(query.device) // num_kv_heads)
    maxnreg = None if query.dtype == torch.float32 else _MAX_REGISTERS
    arguments = fp8_arguments(query, kv_cache, metadata, scale, window) | {"maxnreg": maxnreg}
    attend_stretches(_balanced_decode_fp8_kernel, arguments, out, num_kv_heads, num_stretches)
    return out
