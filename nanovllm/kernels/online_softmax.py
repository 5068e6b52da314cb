"""Softmax over keys that arrive block by block, without a second pass: the core of every attention kernel here.

In torch, for one query, blocks of keys and values, and scores in base 2:

    best, total, out = -inf, 0, zeros(head_dim)
    for key, value in blocks:
        scores = key @ query * scale * log2(e)       # exp2 is the exponential that the hardware has
        new_best = maximum(best, scores.max())       # the largest score so far: no exponent is above 0
        weights = exp2(scores - new_best)
        shrink = exp2(best - new_best)               # what earlier sums are too large by
        total = total * shrink + weights.sum()
        out = out * shrink + weights @ value
        best = new_best
    out = out / total                                # equals softmax(all scores) @ all values
    lse = best + log2(total)                         # the softmax's denominator, for merging (see partials.py)

Source: Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018, https://arxiv.org/abs/1805.02867.
"""

from __future__ import annotations

from nanovllm.kernels.page_slots import page_slots
from nanovllm.kernels.triton_support import jit, tl


@jit
def softmax_weights(
    scores: tl.tensor, best: tl.tensor, scale_log2: tl.tensor, AXIS: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Returns (weights of a block's keys, factor for the sums so far, the new largest score); keys lie along AXIS."""
    new_best = tl.maximum(best, tl.max(scores, axis=AXIS) * scale_log2)
    weights = tl.exp2(scores * scale_log2 - tl.expand_dims(new_best, AXIS))
    shrink = tl.exp2(best - new_best)
    return weights, shrink, new_best


@jit
def accumulate(
    scores: tl.tensor,
    value: tl.tensor,
    scale_log2: tl.tensor,
    best: tl.tensor,
    total: tl.tensor,
    out: tl.tensor,
    PRECISION: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Returns (best, total, out) after a block with scores [rows, keys] and value [keys, dims]."""
    weights, shrink, new_best = softmax_weights(scores, best, scale_log2, AXIS=1)
    total = total * shrink + tl.sum(weights, axis=1)
    out = out * shrink[:, None]
    out = tl.dot(weights.to(value.dtype), value, out, input_precision=PRECISION)
    return new_best, total, out


@jit
def no_keys(ROWS: tl.constexpr, BLOCK_DIM: tl.constexpr) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Returns (best, total, out) before the first key."""
    best = tl.full([ROWS], -float("inf"), tl.float32)
    return best, tl.zeros([ROWS], tl.float32), tl.zeros([ROWS, BLOCK_DIM], tl.float32)


@jit
def is_seen(
    first: tl.tensor, end: tl.tensor, first_seen: tl.tensor, BLOCK_KEYS: tl.constexpr, HAS_WINDOW: tl.constexpr
) -> tl.tensor:
    """Returns which keys at positions `first` on lie before `end` and, with a window, not before `first_seen`."""
    position = first + tl.arange(0, BLOCK_KEYS)
    valid = position < end
    if HAS_WINDOW:
        valid &= position >= first_seen
    return valid


@jit
def load_block(
    key_base: tl.tensor,
    value_base: tl.tensor,
    table_ptr: tl.tensor,
    first: tl.tensor,
    end: tl.tensor,
    valid: tl.tensor,
    page_stride: tl.tensor,
    slot_stride: tl.tensor,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Loads the keys and values [keys, BLOCK_DIM] at positions `first` on, zeros where not `valid` [keys].

    What is not valid is not read: past the context, the cache may hold NaN.
    """
    dim = tl.arange(0, BLOCK_DIM)
    slot = page_slots(table_ptr, first, end, page_stride, slot_stride, BLOCK_SIZE, BLOCK_KEYS)
    mask = valid[:, None] & (dim < HEAD_DIM)[None, :]
    key = tl.load(key_base + slot[:, None] + dim[None, :], mask=mask, other=0.0)
    value = tl.load(value_base + slot[:, None] + dim[None, :], mask=mask, other=0.0)
    return key, value


@jit
def attend_block(
    query: tl.tensor,
    key: tl.tensor,
    value: tl.tensor,
    valid: tl.tensor,
    scale_log2: tl.tensor,
    best: tl.tensor,
    total: tl.tensor,
    out: tl.tensor,
    PRECISION: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Returns (best, total, out) of query [rows, dims] after a block of keys and values [keys, dims]."""
    scores = tl.dot(query, tl.trans(key), input_precision=PRECISION)  # [rows, keys]
    scores = tl.where(valid[None, :], scores, -float("inf"))
    best, total, out = accumulate(scores, value, scale_log2, best, total, out, PRECISION)
    return best, total, out


@jit
def attend(
    query: tl.tensor,
    key_base: tl.tensor,
    value_base: tl.tensor,
    table_ptr: tl.tensor,
    start: tl.tensor,
    end: tl.tensor,
    first_seen: tl.tensor,
    scale_log2: tl.tensor,
    page_stride: tl.tensor,
    slot_stride: tl.tensor,
    best: tl.tensor,
    total: tl.tensor,
    out: tl.tensor,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    PRECISION: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Returns (best, total, out) of query [rows, dims] after keys at positions start … end, which all rows attend to.

    HAS_WINDOW: not to those before `first_seen`, which lies in the first block or before it.
    """
    for first in range(start, end, BLOCK_KEYS):
        valid = is_seen(first, end, first_seen, BLOCK_KEYS, HAS_WINDOW)
        key, value = load_block(
            key_base, value_base, table_ptr, first, end, valid, page_stride, slot_stride, BLOCK_SIZE, HEAD_DIM,
            query.shape[1], BLOCK_KEYS,
        )  # fmt: skip
        best, total, out = attend_block(query, key, value, valid, scale_log2, best, total, out, PRECISION)
    return best, total, out
