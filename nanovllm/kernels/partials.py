"""Attention of one query in parts of its context, and the merging of the parts.

A part has its own softmax: `out` = softmax(scores) · values, and `lse`, the base-2 logarithm of the denominator. In
torch, the whole is

    weights = exp2(lse - lse.max())                  # [num_partials]
    out = (weights[:, None] * partial_out).sum(0) / weights.sum()
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nanovllm.kernels.attention_inputs import DecodeMetadata
from nanovllm.kernels.online_softmax import softmax_weights
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

PREFIX_BLOCK_KEYS = 64  # keys of a shared prefix that a program reads at a time: its parts are multiples of them
_BLOCK_MERGED = 8  # partial outputs that a program merges at a time
# Of many parts of few heads a program merges 32 at a time, but 32 dimensions alone: loads wait for each other less.
_BLOCK_OF_MANY = 32
_BLOCK_DIM_OF_MANY = 32
_MAX_HEADS_EACH = 8  # for each multiprocessor, so that all these programs run at once
_NO_LSE = constant(-1e30)  # below every lse; -inf - -inf would be NaN, where the first parts are unused


@dataclass(frozen=True)
class Partials:
    """Outputs of the parts of each row's context: first those of a shared prefix, then those of the row's own keys.

    num_partials = num_prefix_splits + num_splits. With a single part there is nothing to merge, and both tensors are
    the output itself.
    """

    out: torch.Tensor  # [num_seqs, num_heads, num_partials, head_dim] float32
    lse: torch.Tensor  # [num_seqs, num_heads, num_partials] float32, base-2 logarithms of the softmax's denominators
    num_prefix_splits: int
    num_splits: int

    @property
    def is_split(self) -> bool:
        """True if there is more than one part."""
        return self.num_prefix_splits + self.num_splits > 1


def empty_partials(out: torch.Tensor, num_splits: int, num_prefix_splits: int = 0) -> Partials:
    """Allocates the parts of out [num_seqs, num_heads, head_dim]; a single part is `out` itself."""
    num_partials = num_prefix_splits + num_splits
    if num_partials == 1:
        return Partials(out, out, num_prefix_splits, num_splits)
    num_seqs, num_heads, head_dim = out.shape
    shape = (num_seqs, num_heads, num_partials)
    partial_out = torch.empty((*shape, head_dim), dtype=torch.float32, device=out.device)  # [*shape, head_dim]
    lse = torch.empty(shape, dtype=torch.float32, device=out.device)  # [*shape]
    return Partials(partial_out, lse, num_prefix_splits, num_splits)


@jit
def keys_per_split(num_keys: tl.tensor, num_splits: tl.tensor, BLOCK_KEYS: tl.constexpr) -> tl.tensor:
    """Returns the keys of each part except the last: a multiple of BLOCK_KEYS. Parts at the end may be empty."""
    return tl.cdiv(tl.cdiv(num_keys, num_splits), BLOCK_KEYS) * BLOCK_KEYS


@jit
def first_own_key(
    context_len: tl.tensor, shared_len: tl.tensor, WINDOW: tl.constexpr, BLOCK_KEYS: tl.constexpr
) -> tl.tensor:
    """Returns where a row's own keys begin: after its shared prefix, or at the block in which its window begins."""
    return tl.maximum(context_len - WINDOW, 0) // BLOCK_KEYS * BLOCK_KEYS if WINDOW else shared_len


@jit_with_varying("num_prefix_splits", "num_splits")
def _merge_partials_kernel(
    partial_out_ptr: tl.tensor,
    partial_lse_ptr: tl.tensor,
    context_lens_ptr: tl.tensor,
    shared_lens_ptr: tl.tensor,
    out_ptr: tl.tensor,
    num_prefix_splits: tl.tensor,
    num_splits: tl.tensor,
    HAS_SHARED: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_MERGED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    PREFIX_BLOCK_KEYS: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """Program (head, sequence, dims): the partial outputs, weighted by their shares of the softmax's denominator."""
    let_next_kernel_start(PDL)
    head = tl.program_id(0)
    seq = tl.program_id(1).to(tl.int64)
    row = seq * tl.num_programs(0) + head
    context_len = tl.load(context_lens_ptr + seq)
    shared_len = tl.load(shared_lens_ptr + seq) if HAS_SHARED else context_len * 0
    own_len = context_len - first_own_key(context_len, shared_len, WINDOW, BLOCK_KEYS)
    split_len = keys_per_split(own_len, num_splits, BLOCK_KEYS)
    prefix_len = split_len
    if HAS_SHARED:
        prefix_len = keys_per_split(shared_len, num_prefix_splits, PREFIX_BLOCK_KEYS)
    first_partial = row * (num_prefix_splits + num_splits)
    dim = tl.program_id(2) * BLOCK_DIM + tl.arange(0, BLOCK_DIM)
    best = _NO_LSE
    total = 0.0
    out = tl.zeros([BLOCK_DIM], tl.float32)
    wait_for_previous_kernel(PDL)
    for first in range(0, num_prefix_splits + tl.cdiv(own_len, split_len), BLOCK_MERGED):
        index = first + tl.arange(0, BLOCK_MERGED)
        split = index - num_prefix_splits
        # Others are never written.
        used = tl.where(split < 0, index * prefix_len < shared_len, split * split_len < own_len)
        lse = tl.load(partial_lse_ptr + first_partial + index, mask=used, other=-float("inf"))
        part_ptrs = partial_out_ptr + (first_partial + index)[:, None] * HEAD_DIM + dim[None, :]
        part_out = tl.load(part_ptrs, mask=used[:, None] & (dim < HEAD_DIM)[None, :], other=0.0)
        weights, shrink, best = softmax_weights(lse, best, 1.0, AXIS=0)
        total = total * shrink + tl.sum(weights, axis=0)
        out = out * shrink + tl.sum(part_out * weights[:, None], axis=0)
    tl.store(out_ptr + row * HEAD_DIM + dim, (out / total).to(out_ptr.dtype.element_ty), mask=dim < HEAD_DIM)


def merge_partials(
    partials: Partials, metadata: DecodeMetadata, out: torch.Tensor, block_keys: int, window: int | None = None
) -> None:
    """Writes out [num_seqs, num_heads, head_dim] from its parts; does nothing where there is one part.

    block_keys: the parts of a row's own keys are multiples of it. metadata.shared is used with prefix splits alone.
    """
    if not partials.is_split:
        return
    num_seqs, num_heads, head_dim = out.shape
    shared = metadata.shared if partials.num_prefix_splits else None
    is_long = partials.num_prefix_splits + partials.num_splits > _BLOCK_MERGED
    divides = is_long and num_seqs * num_heads <= _MAX_HEADS_EACH * multiprocessor_count(out.device)
    block_dim = _BLOCK_DIM_OF_MANY if divides else max(next_power_of_2(head_dim), 16)
    _merge_partials_kernel[(num_heads, num_seqs, -(-head_dim // block_dim))](
        partial_out_ptr=partials.out,
        partial_lse_ptr=partials.lse,
        context_lens_ptr=metadata.context_lens,
        shared_lens_ptr=metadata.context_lens if shared is None else shared.lens,  # not read where nothing is shared
        out_ptr=out,
        num_prefix_splits=partials.num_prefix_splits,
        num_splits=partials.num_splits,
        HAS_SHARED=shared is not None,
        WINDOW=window or 0,
        BLOCK_MERGED=_BLOCK_OF_MANY if divides else _BLOCK_MERGED,
        HEAD_DIM=head_dim,
        BLOCK_DIM=block_dim,
        BLOCK_KEYS=block_keys,
        PREFIX_BLOCK_KEYS=PREFIX_BLOCK_KEYS,
        num_warps=1,  # each lane adds up its own dimensions: no warp waits for another
        **pdl_options(out.device),
    )
