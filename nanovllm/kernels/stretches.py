"""The keys of all rows, cut into stretches of equally many, however the lengths of the rows differ.

Rows that are split into equally many parts end at different times: the programs of long rows last. Here the blocks of
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

from collections.abc import Mapping
from typing import Any

import torch

from nanovllm.kernels.online_softmax import no_keys, softmax_weights
from nanovllm.kernels.partials import first_own_key
from nanovllm.kernels.triton_support import (
    constant,
    jit,
    jit_with_varying,
    let_next_kernel_start,
    next_power_of_2,
    pdl_options,
    tl,
    wait_for_previous_kernel,
)

_BLOCK_ROWS = 512  # lengths that a program reads; where there are more rows, the kernels are compiled again
_BLOCK_MERGED = 4  # pieces that a program merges at a time
# As measured on an H200: fewer rows have many pieces each to merge; of more rows, whose number each kernel bounds, a
# stretch has several, and waits for the first keys of each.
_MIN_ROWS = 384  # of one KV head
_MAX_GROUP = 8
_MIN_BLOCKS = constant(4)  # of a stretch: writing and reading a piece costs as much as a block or two


def suits_stretches(query: torch.Tensor, num_kv_heads: int, max_num_seqs: int) -> bool:
    """Returns whether stretches take less time than equally many parts of each row of query [num_seqs, heads, dims]."""
    num_seqs, num_heads, _ = query.shape
    has_many = num_seqs * num_kv_heads >= _MIN_ROWS and num_seqs <= max_num_seqs
    return has_many and num_heads <= _MAX_GROUP * num_kv_heads


@jit
def _num_blocks(context_len: tl.tensor, WINDOW: tl.constexpr, BLOCK_KEYS: tl.constexpr) -> tl.tensor:
    """Returns how many blocks of keys a row has: 0 for one without keys."""
    return tl.cdiv(context_len - first_own_key(context_len, context_len * 0, WINDOW, BLOCK_KEYS), BLOCK_KEYS)


@jit
def find_stretch(
    context_lens_ptr: tl.tensor,
    num_seqs: tl.tensor,
    stretch: tl.tensor,
    num_stretches: tl.tensor,
    WINDOW: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """Returns where a stretch begins, and how long it is.

    (the row, blocks of it that lie in stretches before, blocks of the stretch: none or less behind the last key, blocks
    of every stretch before it).
    """
    rows = tl.arange(0, BLOCK_ROWS)
    blocks = _num_blocks(tl.load(context_lens_ptr + rows, mask=rows < num_seqs, other=0), WINDOW, BLOCK_KEYS)
    total = tl.sum(blocks, axis=0)
    per_stretch = tl.maximum(tl.cdiv(total, num_stretches), _MIN_BLOCKS)
    ends = tl.cumsum(blocks, axis=0)
    start = stretch * per_stretch
    row = tl.sum((ends <= start).to(tl.int32), axis=0)
    skipped = start - tl.max(tl.where(ends <= start, ends, 0), axis=0)
    return row, skipped, tl.minimum(per_stretch, total - start), per_stretch


@jit
def find_piece(
    context_lens_ptr: tl.tensor,
    row: tl.tensor,
    skipped: tl.tensor,
    left: tl.tensor,
    WINDOW: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """Returns the piece of `row` after `skipped` blocks, in a stretch that has `left` more.

    (the length of the row's context, the piece's first key, the key after its last, its blocks, whether it is the whole
    row).
    """
    context_len = tl.load(context_lens_ptr + row)
    start = first_own_key(context_len, context_len * 0, WINDOW, BLOCK_KEYS) + skipped * BLOCK_KEYS
    row_blocks = _num_blocks(context_len, WINDOW, BLOCK_KEYS)
    taken = tl.minimum(row_blocks - skipped, left)
    return context_len, start, tl.minimum(start + taken * BLOCK_KEYS, context_len), taken, taken == row_blocks


@jit_with_varying("num_seqs")
def _merge_pieces_kernel(
    piece_out_ptr: tl.tensor,
    piece_lse_ptr: tl.tensor,
    context_lens_ptr: tl.tensor,
    out_ptr: tl.tensor,
    num_seqs: tl.tensor,
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
    """Program (kv head, stretch): the pieces of the row that began before the stretch and ends in it, if there is one.

    They are weighted by their softmax's denominators.
    """
    let_next_kernel_start(PDL)
    last = tl.program_id(1)
    num_heads = tl.num_programs(0) * GROUP
    row, skipped, left, per_stretch = find_stretch(
        context_lens_ptr, num_seqs, last, tl.num_programs(1), WINDOW, BLOCK_KEYS, BLOCK_ROWS
    )
    is_within_row = (left > 0) & (skipped > 0)
    context_len = tl.load(context_lens_ptr + row, mask=is_within_row, other=0)
    ends_here = skipped + left >= _num_blocks(context_len, WINDOW, BLOCK_KEYS)
    wait_for_previous_kernel(PDL)  # every program waits: the next kernel relies on it
    if not (is_within_row & ends_here):
        return
    first = last - tl.cdiv(skipped, per_stretch)
    group = tl.arange(0, BLOCK_GROUP)
    dim = tl.arange(0, BLOCK_DIM)
    head = tl.program_id(0) * GROUP + group
    mask = (group < GROUP)[:, None] & (dim < HEAD_DIM)[None, :]
    best, total, out = no_keys(BLOCK_GROUP, BLOCK_DIM)
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


def attend_stretches(
    kernel: Any,
    arguments: Mapping[str, Any],
    out: torch.Tensor,
    num_kv_heads: int,
    num_stretches: int,
) -> None:
    """Launches a kernel whose programs (kv head, stretch) attend to their stretches, and merges the pieces.

    arguments: of the kernel, as `decode_arguments` or `fp8_arguments` returns them. out: [num_seqs, num_heads,
    head_dim], contiguous; is written.
    """
    num_seqs, num_heads, head_dim = out.shape
    pieces = (num_stretches + num_seqs, num_heads)
    of_both = {
        **{name: arguments[name] for name in ("context_lens_ptr", "GROUP", "HEAD_DIM", "BLOCK_KEYS", "WINDOW")},
        "out_ptr": out,
        "piece_out_ptr": out.new_empty(*pieces, head_dim, dtype=torch.float32),
        "piece_lse_ptr": out.new_empty(pieces, dtype=torch.float32),  # base-2 logarithms of softmax's denominators
        "num_seqs": num_seqs,
        "BLOCK_ROWS": max(next_power_of_2(num_seqs), _BLOCK_ROWS),
        **pdl_options(out.device),
    }
    kernel[(num_kv_heads, num_stretches)](**{**arguments, **of_both})
    _merge_pieces_kernel[(num_kv_heads, num_stretches)](
        **of_both,
        BLOCK_MERGED=_BLOCK_MERGED,
        BLOCK_GROUP=next_power_of_2(num_heads // num_kv_heads),
        BLOCK_DIM=max(next_power_of_2(head_dim), 16),
        num_warps=1,
    )
