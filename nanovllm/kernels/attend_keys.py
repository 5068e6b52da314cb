"""The core of both decode kernels of a cache in the model's dtype: one group's queries and a stretch of one row's keys.

For an FP8 cache: attend_keys_fp8.py.
"""

from __future__ import annotations

from typing import Any

import torch

from nanovllm.kernels.attention_inputs import DecodeMetadata, LayerKVCache
from nanovllm.kernels.online_softmax import attend, attend_block, is_seen, load_block, no_keys
from nanovllm.kernels.triton_support import LOG2_E, jit, next_power_of_2, tl, wait_for_previous_kernel

BLOCK_KEYS = 32  # keys a program reads at a time
PROGRAMS_EACH = 4  # programs that keep a multiprocessor busy
_MIN_DOT_SIZE = 16  # the smallest tile of a matrix product
_BYTES_IN_FLIGHT = 1280  # of one key, summed over the blocks in flight: several programs then share a multiprocessor


@jit
def wait_for_new_keys(start: tl.tensor, context_len: tl.tensor, BLOCK_KEYS: tl.constexpr) -> None:
    """Waits for the kernel ahead if it may store keys of the block at position `start`.

    It stores one token for each row, of which the kernel has num_programs(2). Drafts are rows of their own, so all of
    these tokens may be the last ones of one context.
    """
    if start + BLOCK_KEYS > context_len - tl.num_programs(2):
        wait_for_previous_kernel(True)


@jit
def attend_keys(
    query_ptr: tl.tensor,
    key_ptr: tl.tensor,
    value_ptr: tl.tensor,
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
    block_table_stride: tl.tensor,
    BLOCK_SIZE: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    WINDOW: tl.constexpr,
    PRECISION: tl.constexpr,
    WAITS: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Returns a row's attention to its keys at positions start … end, for the queries that share `kv_head`.

    [BLOCK_GROUP, BLOCK_DIM] float32, and `lse` [BLOCK_GROUP] (see partials.py). seq: int64. `start` lies before `end`.
    WAITS: for the kernel ahead, which computes the queries and stores the step's own keys and values. The first block
    of keys and values is read before that, unless some of it may be the step's own.
    """
    group = tl.arange(0, BLOCK_GROUP)
    dim = tl.arange(0, BLOCK_DIM)
    key_base, value_base = key_ptr + kv_head * kv_head_stride, value_ptr + kv_head * kv_head_stride
    table_ptr = block_tables_ptr + seq * block_table_stride
    first_seen = context_len - WINDOW
    if WAITS:
        wait_for_new_keys(start, context_len, BLOCK_KEYS)
        valid = is_seen(start, end, first_seen, BLOCK_KEYS, WINDOW > 0)
        key, value = load_block(
            key_base, value_base, table_ptr, start, end, valid, page_stride, slot_stride, BLOCK_SIZE, HEAD_DIM,
            BLOCK_DIM, BLOCK_KEYS,
        )  # fmt: skip
        wait_for_previous_kernel(WAITS)
    query = tl.load(
        query_ptr + seq * query_seq_stride + (kv_head * GROUP + group)[:, None] * query_head_stride + dim[None, :],
        mask=(group < GROUP)[:, None] & (dim < HEAD_DIM)[None, :],
        other=0.0,
    )  # [BLOCK_GROUP, BLOCK_DIM]
    best, total, out = no_keys(BLOCK_GROUP, BLOCK_DIM)
    if WAITS:
        best, total, out = attend_block(query, key, value, valid, scale_log2, best, total, out, PRECISION)
        start += BLOCK_KEYS
    best, total, out = attend(
        query,
        key_base,
        value_base,
        table_ptr,
        start,
        end,
        first_seen,
        scale_log2,
        page_stride,
        slot_stride,
        best,
        total,
        out,
        BLOCK_SIZE=BLOCK_SIZE,
        HEAD_DIM=HEAD_DIM,
        BLOCK_KEYS=BLOCK_KEYS,
        HAS_WINDOW=WINDOW > 0,
        PRECISION=PRECISION,
    )
    return out / total[:, None], best + tl.log2(total)


@jit
def store_heads(ptr: tl.tensor, row: tl.tensor, out: tl.tensor, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr) -> None:
    """Stores the first GROUP rows of out [BLOCK_GROUP, BLOCK_DIM] as rows `row` [BLOCK_GROUP]."""
    dim = tl.arange(0, out.shape[1])
    mask = (tl.arange(0, out.shape[0]) < GROUP)[:, None] & (dim < HEAD_DIM)[None, :]
    tl.store(ptr + row[:, None] * HEAD_DIM + dim[None, :], out.to(ptr.dtype.element_ty), mask=mask)


def arguments_of_any_cache(
    query: torch.Tensor, kv_cache: LayerKVCache, metadata: DecodeMetadata, scale: float, window: int | None
) -> dict[str, Any]:
    """Returns the arguments that the decode kernels of every cache have. query [num_seqs, num_heads, head_dim]."""
    num_heads, head_dim = query.shape[1:]
    _, block_size, num_kv_heads, _ = kv_cache.key.shape
    return {
        "query_ptr": query,
        "key_ptr": kv_cache.key,
        "block_tables_ptr": metadata.block_tables,
        "context_lens_ptr": metadata.context_lens,
        "scale_log2": scale * LOG2_E,
        "query_seq_stride": query.stride(0),
        "query_head_stride": query.stride(1),
        "page_stride": kv_cache.key.stride(0),
        "slot_stride": kv_cache.key.stride(1),
        "kv_head_stride": kv_cache.key.stride(2),
        "block_table_stride": metadata.block_tables.stride(0),
        "BLOCK_SIZE": block_size,
        "GROUP": num_heads // num_kv_heads,
        "HEAD_DIM": head_dim,
        "WINDOW": window or 0,
        "PRECISION": "ieee" if query.dtype == torch.float32 else "tf32",
    }


def decode_arguments(
    query: torch.Tensor, kv_cache: LayerKVCache, metadata: DecodeMetadata, scale: float, window: int | None
) -> dict[str, Any]:
    """Returns the arguments and options of a launch that both kernels have. query [num_seqs, num_heads, head_dim]."""
    arguments = arguments_of_any_cache(query, kv_cache, metadata, scale, window)
    block_dim = max(next_power_of_2(arguments["HEAD_DIM"]), _MIN_DOT_SIZE)
    return {
        **arguments,
        "value_ptr": kv_cache.value,
        "BLOCK_GROUP": max(next_power_of_2(arguments["GROUP"]), _MIN_DOT_SIZE),
        "BLOCK_DIM": block_dim,
        "BLOCK_KEYS": BLOCK_KEYS,
        "num_warps": 2,
        "num_stages": max(2, min(5, _BYTES_IN_FLIGHT // (query.itemsize * block_dim))),  # blocks of keys in flight
    }
