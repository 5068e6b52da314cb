"""The core of both decode kernels of an FP8 cache: one group's queries and a stretch of one row's keys.

With a bf16 cache a program's instructions leave time to spare; with half the bytes they become the limit. In the shape
of the other kernel an H200 takes 180 µs for 256 x 850 tokens, whose bytes take 107 µs. So the products are transposed,
keys and dimensions as their rows: a tile of 8 query heads instead of 16 wastes half as much, and fewer registers leave
room for more programs. A program is one warp, which waits for no other, and takes 16 keys at a time.

Keys and values become fp16, which holds every e4m3 number, takes one instruction for two of them (bf16 takes five), and
rounds queries and weights less than bf16 does. A value tile is read as 16-bit words of two neighbouring dimensions:
the transposition that a matrix product needs exists for such words and not for bytes. Even and odd dimensions of the
output are then two products. Scales are factors of scores and weights: no tile is scaled.
"""

from __future__ import annotations

from typing import Any

import torch

from nanovllm.kernels.attend_keys import arguments_of_any_cache, wait_for_new_keys
from nanovllm.kernels.attention_inputs import DecodeMetadata, LayerKVCache
from nanovllm.kernels.online_softmax import is_seen, softmax_weights
from nanovllm.kernels.page_slots import page_slots
from nanovllm.kernels.triton_support import (
    INTERPRETED,
    constant,
    jit,
    next_power_of_2,
    tl,
    wait_for_previous_kernel,
)

BLOCK_KEYS = 16  # keys a program reads at a time
PROGRAMS_EACH = 16  # programs of one warp that keep a multiprocessor busy
_NUM_STAGES = 4
_MIN_DOT_COLUMNS = 8  # the narrowest tile of a matrix product
_MIN_BLOCK_DIM = 32  # pairs of dimensions are the rows of a product: 16 at least
# Weights times value scales are raised by this factor, so that they are not subnormal in fp16: a weight of 1e-6 still
# counts where values reach 0.01. Values of 28,000 would overflow.
_RAISE = constant(1024.0)


@jit
def _unpack(words: tl.tensor, INTERPRETED: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """Unpacks int16 words of two e4m3 numbers each: (the first of each word, the second of each), in fp16."""
    if INTERPRETED:
        first = words.to(tl.uint8).to(tl.float8e4nv, bitcast=True).to(tl.float16)
        second = (words >> 8).to(tl.uint8).to(tl.float8e4nv, bitcast=True).to(tl.float16)
    else:
        # Two words at a time: their four bytes are sorted, then one instruction converts each pair.
        first, second = tl.inline_asm_elementwise(
            """{
            .reg .b32 sorted;
            .reg .b16 firsts, seconds;
            prmt.b32 sorted, $2, $2, 0x3120;
            mov.b32 {firsts, seconds}, sorted;
            cvt.rn.f16x2.e4m3x2 $0, firsts;
            cvt.rn.f16x2.e4m3x2 $1, seconds;
            }""",
            "=r,=r,r",
            [words],
            dtype=(tl.float16, tl.float16),
            is_pure=True,
            pack=2,
        )
    return first, second


@jit
def _load_block(
    key_base: tl.tensor,
    value_base: tl.tensor,
    key_scale_base: tl.tensor,
    value_scale_base: tl.tensor,
    table_ptr: tl.tensor,
    first: tl.tensor,
    end: tl.tensor,
    valid: tl.tensor,
    page_stride: tl.tensor,
    slot_stride: tl.tensor,
    scale_page_stride: tl.tensor,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """Loads what is stored at positions `first` on, zeros where not `valid` [keys].

    Keys [keys, BLOCK_DIM], words of two values [BLOCK_DIM / 2, keys], and the scales of both [keys]. What is not valid
    is not read: past the context, the cache may hold NaN.
    """
    dim = tl.arange(0, BLOCK_DIM)
    pair = tl.arange(0, BLOCK_DIM // 2)  # dimensions 2 · pair and 2 · pair + 1
    slot = page_slots(table_ptr, first, end, page_stride, slot_stride, BLOCK_SIZE, BLOCK_KEYS)
    key_mask, value_mask = valid[:, None] & (dim < HEAD_DIM)[None, :], (pair < HEAD_DIM // 2)[:, None] & valid[None, :]
    key = tl.load(key_base + slot[:, None] + dim[None, :], mask=key_mask, other=0.0)
    value_words = tl.load(value_base + (slot >> 1)[None, :] + pair[:, None], mask=value_mask, other=0)
    scale_at = page_slots(table_ptr, first, end, scale_page_stride, 1, BLOCK_SIZE, BLOCK_KEYS)
    key_scale = tl.load(key_scale_base + scale_at, mask=valid, other=0.0)
    value_scale = tl.load(value_scale_base + scale_at, mask=valid, other=0.0)
    return key, value_words, key_scale, value_scale


@jit
def _attend_block(
    query: tl.tensor,
    key: tl.tensor,
    value_words: tl.tensor,
    key_scale: tl.tensor,
    value_scale: tl.tensor,
    valid: tl.tensor,
    scale_log2: tl.tensor,
    best: tl.tensor,
    totals: tl.tensor,
    even: tl.tensor,
    odd: tl.tensor,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """Returns (best, totals, even, odd) of query [BLOCK_DIM, BLOCK_GROUP] after the keys of `_load_block`."""
    scores = tl.dot(key.to(tl.float16).to(COMPUTE), query, input_precision=PRECISION)  # [keys, BLOCK_GROUP]
    scores = tl.where(valid[:, None], scores * (key_scale * scale_log2)[:, None], -float("inf"))
    weights, shrink, best = softmax_weights(scores, best, 1.0, AXIS=0)
    totals = totals * shrink[None, :] + weights
    weights = (weights * (value_scale * _RAISE)[:, None]).to(COMPUTE)
    even_values, odd_values = _unpack(value_words, INTERPRETED)
    even = tl.dot(even_values.to(COMPUTE), weights, even * shrink[None, :], input_precision=PRECISION)
    odd = tl.dot(odd_values.to(COMPUTE), weights, odd * shrink[None, :], input_precision=PRECISION)
    return best, totals, even, odd


@jit
def attend_keys_fp8(
    query_ptr: tl.tensor,
    key_ptr: tl.tensor,
    value_words_ptr: tl.tensor,
    key_scale_ptr: tl.tensor,
    value_scale_ptr: tl.tensor,
    block_tables_ptr: tl.tensor,
    kv_head: tl.tensor,
    seq: tl.tensor,
    start: tl.tensor,
    end: tl.tensor,
    context_len: tl.tensor,
    scale_log2: tl.tensor,
    query_seq_stride: tl.tensor,
    query_head_stride: tl.tensor,
    page_stride: tl.tensor,
    slot_stride: tl.tensor,
    kv_head_stride: tl.tensor,
    scale_page_stride: tl.tensor,
    block_table_stride: tl.tensor,
    BLOCK_SIZE: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    WINDOW: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
    WAITS: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Returns a row's attention to its keys at positions start … end, for the queries that share `kv_head`.

    Its even dimensions and its odd ones, [BLOCK_DIM / 2, BLOCK_GROUP] each, and `lse` (see partials.py). seq: int64.
    `start` is a multiple of BLOCK_KEYS, and before `end`. WAITS: as in `attend_keys`.
    """
    dim = tl.arange(0, BLOCK_DIM)
    group = tl.arange(0, BLOCK_GROUP)
    key_base, value_base = key_ptr + kv_head * kv_head_stride, value_words_ptr + kv_head * (kv_head_stride // 2)
    key_scale_base, value_scale_base = key_scale_ptr + kv_head * BLOCK_SIZE, value_scale_ptr + kv_head * BLOCK_SIZE
    table_ptr = block_tables_ptr + seq * block_table_stride
    first_seen = context_len - WINDOW
    if WAITS:
        wait_for_new_keys(start, context_len, BLOCK_KEYS)
        valid = is_seen(start, end, first_seen, BLOCK_KEYS, WINDOW > 0)
        key, value_words, key_scale, value_scale = _load_block(
            key_base, value_base, key_scale_base, value_scale_base, table_ptr, start, end, valid, page_stride,
            slot_stride, scale_page_stride, BLOCK_SIZE, HEAD_DIM, BLOCK_DIM, BLOCK_KEYS,
        )  # fmt: skip
        wait_for_previous_kernel(WAITS)
    query = tl.load(
        query_ptr + seq * query_seq_stride + (kv_head * GROUP + group)[None, :] * query_head_stride + dim[:, None],
        mask=(dim < HEAD_DIM)[:, None] & (group < GROUP)[None, :],
        other=0.0,
    ).to(COMPUTE)  # [BLOCK_DIM, BLOCK_GROUP]
    best = tl.full([BLOCK_GROUP], -float("inf"), tl.float32)
    totals = tl.zeros([BLOCK_KEYS, BLOCK_GROUP], tl.float32)  # summed over keys after the loop
    even = tl.zeros([BLOCK_DIM // 2, BLOCK_GROUP], tl.float32)
    odd = tl.zeros([BLOCK_DIM // 2, BLOCK_GROUP], tl.float32)
    if WAITS:
        best, totals, even, odd = _attend_block(
            query, key, value_words, key_scale, value_scale, valid, scale_log2, best, totals, even, odd, COMPUTE,
            PRECISION, INTERPRETED,
        )  # fmt: skip
        start += BLOCK_KEYS
    for first in range(start, end, BLOCK_KEYS):
        valid = is_seen(first, end, first_seen, BLOCK_KEYS, WINDOW > 0)
        key, value_words, key_scale, value_scale = _load_block(
            key_base, value_base, key_scale_base, value_scale_base, table_ptr, first, end, valid, page_stride,
            slot_stride, scale_page_stride, BLOCK_SIZE, HEAD_DIM, BLOCK_DIM, BLOCK_KEYS,
        )  # fmt: skip
        best, totals, even, odd = _attend_block(
            query, key, value_words, key_scale, value_scale, valid, scale_log2, best, totals, even, odd, COMPUTE,
            PRECISION, INTERPRETED,
        )  # fmt: skip

    total = tl.sum(totals, axis=0)
    even = even / (total * _RAISE)[None, :]
    odd = odd / (total * _RAISE)[None, :]
    return even, odd, best + tl.log2(total)


@jit
def store_pairs(
    ptr: tl.tensor, row: tl.tensor, even: tl.tensor, odd: tl.tensor, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr
) -> None:
    """Stores the first GROUP columns of even and odd [BLOCK_DIM / 2, BLOCK_GROUP] as rows `row` [BLOCK_GROUP]."""
    pair = tl.arange(0, even.shape[0])
    mask = (pair < HEAD_DIM // 2)[:, None] & (tl.arange(0, even.shape[1]) < GROUP)[None, :]
    ptrs = ptr + row[None, :] * HEAD_DIM + 2 * pair[:, None]
    tl.store(ptrs, even.to(ptr.dtype.element_ty), mask=mask)
    tl.store(ptrs + 1, odd.to(ptr.dtype.element_ty), mask=mask)


def fp8_arguments(
    query: torch.Tensor, kv_cache: LayerKVCache, metadata: DecodeMetadata, scale: float, window: int | None
) -> dict[str, Any]:
    """Returns the arguments and options of a launch that both kernels have. query [num_seqs, num_heads, head_dim]."""
    arguments = arguments_of_any_cache(query, kv_cache, metadata, scale, window)
    return {
        **arguments,
        "value_words_ptr": kv_cache.value.view(torch.int16),
        "key_scale_ptr": kv_cache.key_scale,
        "value_scale_ptr": kv_cache.value_scale,
        "scale_page_stride": kv_cache.scale_page_stride,
        "BLOCK_GROUP": max(next_power_of_2(arguments["GROUP"]), _MIN_DOT_COLUMNS),
        "BLOCK_DIM": max(next_power_of_2(arguments["HEAD_DIM"]), _MIN_BLOCK_DIM),
        "BLOCK_KEYS": BLOCK_KEYS,
        "COMPUTE": tl.float32 if query.dtype == torch.float32 else tl.float16,
        "INTERPRETED": INTERPRETED,
        "num_warps": 1,
        "num_stages": _NUM_STAGES,
    }
