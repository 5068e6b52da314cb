"""Causal attention of prompt chunks over the paged cache, for Hopper GPUs (H100, H200).

The kernel of paged_prefill.py loads and computes in turns; here the warps of a program divide the work. One warp copies
keys and values page by page through the tensor memory accelerator, as far ahead as there are buffers. Two warpgroups
hold 64 rows each and compute: while one computes its softmax, the matrix units work for the other, and for its own sum
of values. A program takes one tile after another from a queue, so that the next tile's first loads overlap the end of
the last tile. Triton cannot express this; Gluon, the language below it, can.

Sources: Shah et al., "FlashAttention-3", 2024, https://arxiv.org/abs/2407.08608 (division of work, pipelining);
Kwon et al., "PagedAttention", 2023, https://arxiv.org/abs/2309.06180.
"""

from __future__ import annotations

from functools import cache

import torch

from nanovllm.kernels.attention_inputs import LayerKVCache, PrefillMetadata
from nanovllm.kernels.paged_prefill_hopper_load import first_block, produce
from nanovllm.kernels.triton_support import (
    HAS_GLUON,
    LOG2_E,
    TensorDescriptor,
    constant,
    fence_async_shared,
    gl,
    gluon_jit,
    is_hopper,
    mbarrier,
    multiprocessor_count,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

_ROWS = 64  # queries × heads of a warpgroup: the rows of one matrix instruction
_BLOCK_KEYS = 128
_STAGES = 2  # blocks of keys, and of values, in shared memory
_COLUMNS = 64  # columns of 2 bytes that the accelerator copies at a time: 128 bytes, the width of its swizzle
_SMALLEST_PAGE = 8  # rows after which the swizzle repeats
_DTYPES = (torch.bfloat16, torch.float16)
_HEAD_DIMS = (64, 128)
_GROUPS = (1, 2, 4, 8, 16)  # query heads that share a KV head
_ALIGNED_BYTES = 16  # where the accelerator may begin to read
_UNSEEN = constant(-(2.0**100))  # as in paged_prefill.py


@gluon_jit()
def _receive(number: gl.shared_memory_descriptor) -> gl.tensor:
    """Reads a number of the tile that `produce` announces."""
    return gl.sum(number.load(gl.BlockedLayout([1], [32], [gl.num_warps()], [0])), axis=0)


@gluon_jit()
def _weigh(
    scores: gl.tensor,
    best: gl.tensor,
    total: gl.tensor,
    scale_log2: gl.tensor,
    first: gl.tensor,
    query_position: gl.tensor,
    seen_from: gl.tensor,
    seen_by_all: gl.tensor,
    WINDOW: gl.constexpr,
) -> tuple[gl.tensor, gl.tensor, gl.tensor, gl.tensor]:
    """Takes a step of online_softmax.py for keys from `first` on. All rows see the keys `seen_from` … `seen_by_all`.

    Returns (weights, the factor for the sums so far, best, total).
    """
    BLOCK_KEYS: gl.constexpr = scores.shape[1]
    has_unseen = first + BLOCK_KEYS > seen_by_all
    if WINDOW > 0:
        has_unseen = has_unseen | (first < seen_from)
    if has_unseen:
        position = gl.expand_dims(first + gl.arange(0, BLOCK_KEYS, gl.SliceLayout(0, scores.type.layout)), 0)
        seen = position <= gl.expand_dims(query_position, 1)
        if WINDOW > 0:
            seen = seen & (position > gl.expand_dims(query_position - WINDOW, 1))
        scores = gl.where(seen, scores, _UNSEEN)
    new_best = gl.maximum(best, gl.max(scores, axis=1) * scale_log2)
    weights = gl.exp2(scores * scale_log2 - gl.expand_dims(new_best, 1))
    shrink = gl.exp2(best - new_best)
    return weights, shrink, new_best, total * shrink + gl.sum(weights, axis=1)


@gluon_jit()
def _clear_rows(tile: gl.shared_memory_descriptor, num_rows: gl.tensor) -> None:
    """Zeroes the values from row `num_rows` on: their weights are 0, but 0 × NaN is NaN. Both warpgroups may do it."""
    BLOCK_KEYS: gl.constexpr = tile.shape[0]
    HEAD_DIM: gl.constexpr = tile.shape[1]
    STRIP: gl.constexpr = 16
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [256 // HEAD_DIM, HEAD_DIM // 8], [gl.num_warps(), 1], [1, 0])
    row = gl.arange(0, STRIP, gl.SliceLayout(1, LAYOUT))
    for first in gl.static_range(0, BLOCK_KEYS, STRIP):
        if first + STRIP > num_rows:
            strip = tile.slice(first, STRIP)
            value = strip.load(LAYOUT)
            strip.store(gl.where(gl.expand_dims(first + row < num_rows, 1), value, gl.zeros_like(value)))
    fence_async_shared()


@gluon_jit()
def _consume(
    half: gl.constexpr,
    out_ptr: gl.tensor,
    num_kv_heads: gl.tensor,
    scale_log2: gl.tensor,
    staged: gl.shared_memory_descriptor,
    tile_pipe: gl.tuple,
    key_pipe: gl.tuple,
    value_pipe: gl.tuple,
    GROUP: gl.constexpr,
    WINDOW: gl.constexpr,
) -> None:
    """A computing warpgroup: rows half · 64 … of every tile."""
    tile, queries, tile_ready, tile_free = tile_pipe
    keys, key_ready, key_free = key_pipe
    values, value_ready, value_free = value_pipe
    STAGES: gl.constexpr = keys.shape[0]
    BLOCK_KEYS: gl.constexpr = keys.shape[1]
    ROWS: gl.constexpr = queries.shape[1]
    HEAD_DIM: gl.constexpr = queries.shape[2]
    TILE_TOKENS: gl.constexpr = 2 * ROWS // GROUP
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_KEYS, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, OUT, 2)
    MEMORY: gl.constexpr = gl.BlockedLayout([1, 8], [256 // HEAD_DIM, HEAD_DIM // 8], [4, 1], [1, 0])
    query = queries.index(half)
    row = half * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, SCORES))
    zeros = gl.zeros([ROWS, BLOCK_KEYS], gl.float32, SCORES)
    num_finished = 0
    num_seen = 0  # blocks, of all tiles
    mbarrier.wait(tile_ready, 0)
    num_tokens = _receive(tile.index(0))
    while num_tokens > 0:
        first_row = _receive(tile.index(1))
        kv_head = _receive(tile.index(2))
        first_position = _receive(tile.index(3))
        context_len = _receive(tile.index(4))
        query_position = first_position + row // GROUP
        seen_by_all = first_position + half * ROWS // GROUP + 1  # keys that need no mask
        seen_from = 0
        if WINDOW > 0:
            seen_from = first_position + ((half + 1) * ROWS - 1) // GROUP - WINDOW + 1
        first_key = first_block(first_position, WINDOW, BLOCK_KEYS)
        num_blocks = gl.cdiv(gl.minimum(first_position + TILE_TOKENS, context_len), BLOCK_KEYS)  # of the whole context

        stage = num_seen % STAGES
        mbarrier.wait(key_ready.index(stage), num_seen // STAGES & 1)
        scores = warpgroup_mma(query, keys.index(stage).permute((1, 0)), zeros, use_acc=False, is_async=True)
        scores = warpgroup_mma_wait(deps=[scores])
        mbarrier.arrive(key_free.index(stage))
        best = gl.full([ROWS], float("-inf"), gl.float32, gl.SliceLayout(1, SCORES))
        total = gl.zeros([ROWS], gl.float32, gl.SliceLayout(1, SCORES))
        weights, shrink, best, total = _weigh(
            scores, best, total, scale_log2, first_key, query_position, seen_from, seen_by_all, WINDOW
        )
        weights = gl.convert_layout(weights.to(keys.dtype), WEIGHTS)
        out = gl.zeros([ROWS, HEAD_DIM], gl.float32, OUT)
        num_seen += 1
        # A block's scores and its softmax overlap the product of weights and values of the block before.
        for first in range(first_key + BLOCK_KEYS, num_blocks * BLOCK_KEYS, BLOCK_KEYS):
            stage = num_seen % STAGES
            before = (num_seen - 1) % STAGES
            mbarrier.wait(key_ready.index(stage), num_seen // STAGES & 1)
            scores = warpgroup_mma(query, keys.index(stage).permute((1, 0)), zeros, use_acc=False, is_async=True)
            mbarrier.wait(value_ready.index(before), (num_seen - 1) // STAGES & 1)
            out = warpgroup_mma(weights, values.index(before), out, is_async=True)
            scores = warpgroup_mma_wait(num_outstanding=1, deps=[scores])
            mbarrier.arrive(key_free.index(stage))
            next_weights, shrink, best, total = _weigh(
                scores, best, total, scale_log2, first, query_position, seen_from, seen_by_all, WINDOW
            )
            next_weights = gl.convert_layout(next_weights.to(keys.dtype), WEIGHTS)
            out, weights, next_weights = warpgroup_mma_wait(deps=[out, weights, next_weights])
            mbarrier.arrive(value_free.index(before))
            out = out * gl.expand_dims(gl.convert_layout(shrink, gl.SliceLayout(1, OUT)), 1)
            weights = next_weights
            num_seen += 1
        mbarrier.arrive(tile_free)
        last = (num_seen - 1) % STAGES
        mbarrier.wait(value_ready.index(last), (num_seen - 1) // STAGES & 1)
        num_valid = context_len - (num_blocks - 1) * BLOCK_KEYS
        if num_valid < BLOCK_KEYS:
            _clear_rows(values.index(last), num_valid)
        out = warpgroup_mma(weights, values.index(last), out, is_async=True)
        out = warpgroup_mma_wait(deps=[out])
        mbarrier.arrive(value_free.index(last))

        out = out / gl.expand_dims(gl.convert_layout(total, gl.SliceLayout(1, OUT)), 1)
        staged.index(half).store(out.to(keys.dtype))
        out_row = half * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, MEMORY))
        token = out_row // GROUP
        head = kv_head * GROUP + out_row % GROUP
        dim = gl.arange(0, HEAD_DIM, gl.SliceLayout(0, MEMORY))
        target = ((first_row + token).to(gl.int64) * (num_kv_heads * GROUP) + head) * HEAD_DIM
        mask = gl.expand_dims(token < num_tokens, 1)
        gl.store(
            out_ptr + gl.expand_dims(target, 1) + gl.expand_dims(dim, 0), staged.index(half).load(MEMORY), mask=mask
        )
        num_finished += 1
        mbarrier.wait(tile_ready, num_finished & 1)
        num_tokens = _receive(tile.index(0))


@gluon_jit(
    "block_tables_ptr",
    "cu_seqlens_q_ptr",
    "context_lens_ptr",
    "block_table_stride",
    "num_seqs",
    "num_kv_heads",
    "num_tiles",
)
def _paged_prefill_hopper_kernel(
    query_desc: tma.tensor_descriptor,
    key_desc: tma.tensor_descriptor,
    value_desc: tma.tensor_descriptor,
    block_tables_ptr: gl.tensor,
    cu_seqlens_q_ptr: gl.tensor,
    context_lens_ptr: gl.tensor,
    out_ptr: gl.tensor,
    queue_ptr: gl.tensor,
    scale_log2: gl.tensor,
    block_table_stride: gl.tensor,
    num_seqs: gl.tensor,
    num_kv_heads: gl.tensor,
    num_tiles: gl.tensor,
    BLOCK_SIZE: gl.constexpr,
    GROUP: gl.constexpr,
    ROWS: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    BLOCK_KEYS: gl.constexpr,
    STAGES: gl.constexpr,
    WINDOW: gl.constexpr,
) -> None:
    """Allocates the buffers, each with a barrier for "ready" and one for "free", and starts the warps."""
    TILE_TOKENS: gl.constexpr = 2 * ROWS // GROUP
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    SCALAR: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    tile = gl.allocate_shared_memory(gl.int32, [5, 1], SCALAR)
    query = gl.allocate_shared_memory(key_desc.dtype, [2, ROWS, HEAD_DIM], key_desc.layout)
    staged = gl.allocate_shared_memory(key_desc.dtype, [2, ROWS, HEAD_DIM], key_desc.layout)
    keys = gl.allocate_shared_memory(key_desc.dtype, [STAGES, BLOCK_KEYS, HEAD_DIM], key_desc.layout)
    values = gl.allocate_shared_memory(key_desc.dtype, [STAGES, BLOCK_KEYS, HEAD_DIM], key_desc.layout)
    tile_ready = gl.allocate_shared_memory(gl.int64, [1], BARRIER)
    tile_free = gl.allocate_shared_memory(gl.int64, [1], BARRIER)
    key_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    key_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    value_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    value_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    mbarrier.init(tile_ready, count=1)
    mbarrier.init(tile_free, count=2)  # both warpgroups
    for stage in gl.static_range(STAGES):
        mbarrier.init(key_ready.index(stage), count=1)
        mbarrier.init(key_free.index(stage), count=2)
        mbarrier.init(value_ready.index(stage), count=1)
        mbarrier.init(value_free.index(stage), count=2)
    tile_pipe = (tile, query, tile_ready, tile_free)
    key_pipe = (keys, key_ready, key_free)
    value_pipe = (values, value_ready, value_free)
    gl.warp_specialize(
        [
            (_consume, (0, out_ptr, num_kv_heads, scale_log2, staged, tile_pipe, key_pipe, value_pipe, GROUP, WINDOW)),
            (_consume, (1, out_ptr, num_kv_heads, scale_log2, staged, tile_pipe, key_pipe, value_pipe, GROUP, WINDOW)),
            (
                produce,
                (
                    query_desc,
                    key_desc,
                    value_desc,
                    block_tables_ptr,
                    cu_seqlens_q_ptr,
                    context_lens_ptr,
                    queue_ptr,
                    block_table_stride,
                    num_seqs,
                    num_kv_heads,
                    num_tiles,
                    tile_pipe,
                    key_pipe,
                    value_pipe,
                    BLOCK_SIZE,
                    TILE_TOKENS,
                    WINDOW,
                ),
            ),
        ],
        worker_num_warps=[4, 1],
        worker_num_regs=[240, 24],
    )


@cache
def _swizzle(rank: int) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=rank)


def takes_on_hopper(device: torch.device, dtype: torch.dtype, head_dim: int, block_size: int) -> bool:
    """Returns whether `paged_prefill_hopper` can run such a model, given a group size in `_GROUPS`."""
    return (
        HAS_GLUON
        and is_hopper(device)
        and dtype in _DTYPES
        and head_dim in _HEAD_DIMS
        and block_size >= _SMALLEST_PAGE
        and block_size & (block_size - 1) == 0
    )


def takes_queries_on_hopper(query: torch.Tensor, num_kv_heads: int, block_size: int) -> bool:
    """Returns whether `paged_prefill_hopper` takes query [num_tokens, num_heads, head_dim] and a cache of its dtype."""
    _, num_heads, head_dim = query.shape
    return (
        takes_on_hopper(query.device, query.dtype, head_dim, block_size)
        and num_heads // num_kv_heads in _GROUPS
        and query.stride(2) == 1
        and query.stride(0) * query.itemsize % _ALIGNED_BYTES == 0
        and query.stride(1) * query.itemsize % _ALIGNED_BYTES == 0
        and query.data_ptr() % _ALIGNED_BYTES == 0
    )


def can_run_on_hopper(query: torch.Tensor, key_cache: torch.Tensor) -> bool:
    """Returns whether `paged_prefill_hopper` takes query [num_tokens, num_heads, head_dim] and `LayerKVCache.key`."""
    _, block_size, num_kv_heads, _ = key_cache.shape
    return (
        takes_queries_on_hopper(query, num_kv_heads, block_size)
        and key_cache.dtype == query.dtype
        and key_cache.is_contiguous()
        and key_cache.data_ptr() % _ALIGNED_BYTES == 0
    )


def paged_prefill_hopper(
    query: torch.Tensor,
    kv_cache: LayerKVCache,
    metadata: PrefillMetadata,
    scale: float,
    out: torch.Tensor,
    window: int | None = None,
) -> None:
    """Writes the result of `paged_prefill` into out [num_tokens, num_heads, head_dim]. Needs `can_run_on_hopper`."""
    num_tokens, num_heads, head_dim = query.shape
    num_blocks, block_size, num_kv_heads, _ = kv_cache.key.shape
    group = num_heads // num_kv_heads
    num_seqs = metadata.cu_seqlens_q.shape[0] - 1
    num_tiles = (num_tokens // (2 * _ROWS // group) + num_seqs) * num_kv_heads

    def pages(cache: torch.Tensor) -> TensorDescriptor:
        shape = [num_blocks * block_size, num_kv_heads * head_dim]
        return TensorDescriptor(cache, shape, [shape[1], 1], [min(block_size, _BLOCK_KEYS), _COLUMNS], _swizzle(2))

    _paged_prefill_hopper_kernel[(min(num_tiles, multiprocessor_count(query.device)),)](
        query_desc=TensorDescriptor(
            query, [*query.shape], [*query.stride()], [_ROWS // group, group, _COLUMNS], _swizzle(3)
        ),
        key_desc=pages(kv_cache.key),
        value_desc=pages(kv_cache.value),
        block_tables_ptr=metadata.block_tables,
        cu_seqlens_q_ptr=metadata.cu_seqlens_q,
        context_lens_ptr=metadata.context_lens,
        out_ptr=out,
        queue_ptr=torch.zeros(1, dtype=torch.int32, device=query.device),
        scale_log2=scale * LOG2_E,
        block_table_stride=metadata.block_tables.stride(0),
        num_seqs=num_seqs,
        num_kv_heads=num_kv_heads,
        num_tiles=num_tiles,
        BLOCK_SIZE=block_size,
        GROUP=group,
        ROWS=_ROWS,
        HEAD_DIM=head_dim,
        BLOCK_KEYS=_BLOCK_KEYS,
        STAGES=_STAGES,
        WINDOW=window or 0,
        num_warps=4,
    )
