"""Decode attention over an FP8 cache, in stretches of equally many keys, however the lengths of the rows differ.

`paged_decode_fp8` splits every row into equally many parts, so the programs of long rows end last. Here the blocks of
all rows stand one after another, and are cut into as many stretches as there are programs at a time. A digit for each
block:

    row       0 0 0 0 0 0 0 1 1 1 1 2 2 2 2
    stretch   0 0 0 0 0 1 1 1 1 1 2 2 2 2 2
    piece     0 0 0 0 0 1 1 2 2 2 3 4 4 4 4

A row of one piece is finished by its program; the pieces of the others are merged. Each piece begins a stretch or a
row, so its number is the sum of both, and the pieces of a row are neighbours. Lengths are read on the device: a
captured graph fixes the number of programs alone.
"""

from __future__ import annotations

import torch

from nanovllm.kernels.attend_keys_fp8 import BLOCK_KEYS, PROGRAMS_EACH, attend_keys_fp8, fp8_arguments, store_pairs
from nanovllm.kernels.attention_inputs import DecodeMetadata, LayerKVCache
from nanovllm.kernels.online_softmax import softmax_weights
from nanovllm.kernels.partials import first_own_key
from nanovllm.kernels.triton_support import (
    constant,
    jit,
    jit_with_varying,
    let_next_kernel_start,
    multiprocessor_count,
    next_power_of_2,
    pdl_options,
    tl,
    wait_for_previous_kernel,
)

_BLOCK_ROWS = 512  # lengths that a program reads; where there are more rows, the kernels are compiled again
_BLOCK_MERGED = 4  # pieces that a program merges at a time
_MAX_REGISTERS = 65536 // (32 * PROGRAMS_EACH)  # of a thread: all programs then run at a time
_MIN_BLOCKS = constant(4)  # of a stretch: writing and reading a piece costs as much as a block or two


@jit
def _num_blocks(context_len: tl.tensor, WINDOW: tl.constexpr, BLOCK_KEYS: tl.constexpr) -> tl.tensor:
    """Returns how many blocks of keys a row has: 0 for one without keys."""
    return tl.cdiv(context_len - first_own_key(context_len, context_len * 0, WINDOW, BLOCK_KEYS), BLOCK_KEYS)


@jit
def _divide(
    context_lens_ptr: tl.tensor,
    num_seqs: tl.tensor,
    num_stretches: tl.tensor,
    WINDOW: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Returns (rows [BLOCK_ROWS], the blocks of each, the blocks of each stretch except the last)."""
    rows = tl.arange(0, BLOCK_ROWS)
    blocks = _num_blocks(tl.load(context_lens_ptr + rows, mask=rows < num_seqs, other=0), WINDOW, BLOCK_KEYS)
    return rows, blocks, tl.maximum(tl.cdiv(tl.sum(blocks, axis=0), num_stretches), _MIN_BLOCKS)


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
) -> None:
    """Program (kv head, stretch): the group's queries and the stretch's keys, one row after another."""
    kv_head = tl.program_id(0)
    stretch = tl.program_id(1)
    num_heads = tl.num_programs(0) * GROUP
    _, blocks, per_stretch = _divide(context_lens_ptr, num_seqs, tl.num_programs(1), WINDOW, BLOCK_KEYS, BLOCK_ROWS)
    ends = tl.cumsum(blocks, axis=0)
    start = stretch * per_stretch
    left = tl.minimum(per_stretch, tl.sum(blocks, axis=0) - start)  # blocks that the program has not attended to
    row = tl.sum((ends <= start).to(tl.int32), axis=0)
    skipped = start - tl.max(tl.where(ends <= start, ends, 0), axis=0)  # blocks of the row, in stretches before
    while left > 0:
        context_len = tl.load(context_lens_ptr + row)
        first_key = first_own_key(context_len, context_len * 0, WINDOW, BLOCK_KEYS) + skipped * BLOCK_KEYS
        num_blocks = _num_blocks(context_len, WINDOW, BLOCK_KEYS)
        taken = tl.minimum(num_blocks - skipped, left)
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
                first_key,
                tl.minimum(first_key + taken * BLOCK_KEYS, context_len),
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
            )
            group = tl.arange(0, BLOCK_GROUP)
            head = kv_head * GROUP + group
            if taken == num_blocks:
                store_pairs(out_ptr, row * num_heads + head, even, odd, GROUP, HEAD_DIM)
            else:
                piece = (stretch + row) * num_heads + head
                store_pairs(piece_out_ptr, piece, even, odd, GROUP, HEAD_DIM)
                tl.store(piece_lse_ptr + piece, lse, mask=group < GROUP)
        left -= taken
        skipped = 0
        row += 1


@jit_with_varying("num_seqs", "num_stretches")
def _merge_pieces_kernel(
    piece_out_ptr: tl.tensor,
    piece_lse_ptr: tl.tensor,
    context_lens_ptr: tl.tensor,
    out_ptr: tl.tensor,
    num_seqs: tl.tensor,
    num_stretches: tl.tensor,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_MERGED: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    WINDOW: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """Program (kv head, row): the pieces of a row that has several, weighted by their softmax's denominators."""
    let_next_kernel_start(PDL)
    row = tl.program_id(1)
    num_heads = tl.num_programs(0) * GROUP
    rows, blocks, per_stretch = _divide(context_lens_ptr, num_seqs, num_stretches, WINDOW, BLOCK_KEYS, BLOCK_ROWS)
    first = tl.sum(tl.where(rows < row, blocks, 0), axis=0) // per_stretch
    last = (tl.sum(tl.where(rows <= row, blocks, 0), axis=0) - 1) // per_stretch
    wait_for_previous_kernel(PDL)  # every program waits: the next kernel relies on it
    if first >= last:
        return
    group = tl.arange(0, BLOCK_GROUP)
    dim = tl.arange(0, BLOCK_DIM)
    head = tl.program_id(0) * GROUP + group
    mask = (group < GROUP)[:, None] & (dim < HEAD_DIM)[None, :]
    best = tl.full([BLOCK_GROUP], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_GROUP], tl.float32)
    out = tl.zeros([BLOCK_GROUP, BLOCK_DIM], tl.float32)
    for begin in range(first, last + 1, BLOCK_MERGED):
        stretch = begin + tl.arange(0, BLOCK_MERGED)
        piece = (stretch + row)[:, None] * num_heads + head[None, :]  # [BLOCK_MERGED, BLOCK_GROUP]
        used = (stretch <= last)[:, None]
        lse = tl.load(piece_lse_ptr + piece, mask=used & (group < GROUP)[None, :], other=0.0)
        lse = tl.where(used, lse, -float("inf"))
        weights, shrink, best = softmax_weights(lse, best, 1.0, AXIS=0)
        part = tl.load(
            piece_out_ptr + piece[:, :, None] * HEAD_DIM + dim[None, None, :],
            mask=used[:, :, None] & mask[None, :, :],
            other=0.0,
        )  # [BLOCK_MERGED, BLOCK_GROUP, BLOCK_DIM]
        total = total * shrink + tl.sum(weights, axis=0)
        out = out * shrink[:, None] + tl.sum(part * weights[:, :, None], axis=0)
    target = out_ptr + (row * num_heads + head)[:, None] * HEAD_DIM + dim[None, :]
    tl.store(target, (out / total[:, None]).to(out_ptr.dtype.element_ty), mask=mask)


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
    num_seqs, num_heads, head_dim = query.shape
    num_kv_heads = kv_cache.key.shape[2]
    if num_stretches is None:
        num_stretches = -(-PROGRAMS_EACH * multiprocessor_count(query.device) // num_kv_heads)
    num_pieces = num_stretches + num_seqs
    piece_out = query.new_empty(num_pieces, num_heads, head_dim, dtype=torch.float32)  # [num_pieces, num_heads, …]
    piece_lse = query.new_empty(num_pieces, num_heads, dtype=torch.float32)  # [num_pieces, num_heads]
    block_rows = max(next_power_of_2(num_seqs), _BLOCK_ROWS)
    _balanced_decode_fp8_kernel[(num_kv_heads, num_stretches)](
        out_ptr=out,
        piece_out_ptr=piece_out,
        piece_lse_ptr=piece_lse,
        num_seqs=num_seqs,
        BLOCK_ROWS=block_rows,
        maxnreg=None if query.dtype == torch.float32 else _MAX_REGISTERS,
        **fp8_arguments(query, kv_cache, metadata, scale, window),
    )
    _merge_pieces_kernel[(num_kv_heads, num_seqs)](
        piece_out_ptr=piece_out,
        piece_lse_ptr=piece_lse,
        context_lens_ptr=metadata.context_lens,
        out_ptr=out,
        num_seqs=num_seqs,
        num_stretches=num_stretches,
        BLOCK_ROWS=block_rows,
        BLOCK_MERGED=_BLOCK_MERGED,
        GROUP=num_heads // num_kv_heads,
        BLOCK_GROUP=next_power_of_2(num_heads // num_kv_heads),
        HEAD_DIM=head_dim,
        BLOCK_DIM=max(next_power_of_2(head_dim), 16),
        BLOCK_KEYS=BLOCK_KEYS,
        WINDOW=window or 0,
        num_warps=1,
        **pdl_options(out.device),
    )
    return out
