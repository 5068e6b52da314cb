"""The loading warp of paged_prefill_hopper.py: finds the next tile, and loads its queries, keys and values.

The tensor memory accelerator makes all copies: one thread starts them, and a barrier counts the bytes that arrive.
"""

from __future__ import annotations

from nanovllm.kernels.triton_support import gl, gluon_jit, mbarrier, tma


@gluon_jit()
def _find_tile(
    index: gl.tensor,
    cu_seqlens_q_ptr: gl.tensor,
    num_seqs: gl.tensor,
    num_kv_heads: gl.tensor,
    TILE_TOKENS: gl.constexpr,
) -> tuple[gl.tensor, gl.tensor, gl.tensor]:
    """Returns (sequence, KV head, first token in the chunk) of a tile. A sequence's last tiles see the most keys: they
    come first.

    Sequence i's tiles begin at cu_seqlens_q[i] // TILE_TOKENS + i, which leaves room for each and needs no sum. Some
    tiles have no tokens: their first token lies outside the chunk. So do those before the first sequence, where
    cu_seqlens_q does not begin at 0.
    """
    slot = index // num_kv_heads
    lane = gl.arange(0, 32, gl.BlockedLayout([1], [32], [gl.num_warps()], [0]))
    seq = -1
    for first in range(0, num_seqs, 32):
        candidate = first + lane
        start = gl.load(cu_seqlens_q_ptr + candidate, mask=candidate < num_seqs, other=0)
        begun = (candidate < num_seqs) & (start // TILE_TOKENS + candidate <= slot)
        seq += gl.sum(begun.to(gl.int32), axis=0)
    seq = gl.maximum(seq, 0)
    tiles_end = gl.load(cu_seqlens_q_ptr + seq + 1) // TILE_TOKENS + seq
    return seq, index % num_kv_heads, (tiles_end - slot) * TILE_TOKENS


@gluon_jit()
def first_block(first_position: gl.tensor, WINDOW: gl.constexpr, BLOCK_KEYS: gl.constexpr) -> gl.tensor:
    """Returns the position of the first block of keys that a tile's first query sees; WINDOW 0: the context's first."""
    first = first_position * 0
    if WINDOW > 0:
        first = gl.maximum(first_position - WINDOW + 1, 0) // BLOCK_KEYS * BLOCK_KEYS
    return first


@gluon_jit()
def _load_query(
    query_desc: tma.tensor_descriptor,
    query: gl.shared_memory_descriptor,
    ready: gl.shared_memory_descriptor,
    token: gl.tensor,
    head: gl.tensor,
) -> None:
    """Starts to copy the group's heads of a tile's tokens; row r of query is token r // GROUP, head r % GROUP."""
    TOKENS: gl.constexpr = query_desc.block_type.shape[0]
    GROUP: gl.constexpr = query_desc.block_type.shape[1]
    COLUMNS: gl.constexpr = query_desc.block_type.shape[2]
    PARTS: gl.constexpr = query.shape[2] // COLUMNS
    mbarrier.expect(ready, 2 * query.shape[1] * query.shape[2] * 2)
    for half in gl.static_range(2):
        parts = query.index(half)._reinterpret(query.dtype, [PARTS, TOKENS, GROUP, COLUMNS], query_desc.layout)
        for part in gl.static_range(PARTS):
            at = [token + half * TOKENS, head, part * COLUMNS]
            tma.async_copy_global_to_shared(query_desc, at, ready, parts.index(part))


@gluon_jit()
def _find_slots(
    table_ptr: gl.tensor,
    first: gl.tensor,
    context_len: gl.tensor,
    BLOCK_SIZE: gl.constexpr,
    BLOCK_KEYS: gl.constexpr,
    ROWS: gl.constexpr,
) -> gl.tuple:
    """Returns the slots where every ROWS keys from position `first` on begin; past the context, those of page 0."""
    slots: gl.tuple = ()
    for piece in gl.static_range(BLOCK_KEYS // ROWS):
        position = first + piece * ROWS
        page = gl.load(table_ptr + position // BLOCK_SIZE, mask=position < context_len, other=0)
        slots = slots + (page * BLOCK_SIZE + position % BLOCK_SIZE,)
    return slots


@gluon_jit()
def _load_keys(
    desc: tma.tensor_descriptor,
    tile: gl.shared_memory_descriptor,
    ready: gl.shared_memory_descriptor,
    slots: gl.tuple,
    column: gl.tensor,
) -> None:
    """Starts to copy a block of keys (or values)."""
    ROWS: gl.constexpr = desc.block_type.shape[0]
    COLUMNS: gl.constexpr = desc.block_type.shape[1]
    PIECES: gl.constexpr = tile.shape[0] // ROWS
    PARTS: gl.constexpr = tile.shape[1] // COLUMNS
    COPIES: gl.constexpr = PARTS * PIECES
    mbarrier.expect(ready, tile.shape[0] * tile.shape[1] * 2)
    # A swizzled tile is its parts, one after another, and a part is its rows: any 8 rows can be copied separately.
    copies = tile._reinterpret(tile.dtype, [COPIES, ROWS, COLUMNS], desc.layout)
    for piece in gl.static_range(PIECES):
        for part in gl.static_range(PARTS):
            at = [slots[piece], column + part * COLUMNS]
            tma.async_copy_global_to_shared(desc, at, ready, copies.index(part * PIECES + piece))


@gluon_jit()
def produce(
    query_desc: tma.tensor_descriptor,
    key_desc: tma.tensor_descriptor,
    value_desc: tma.tensor_descriptor,
    block_tables_ptr: gl.tensor,
    cu_seqlens_q_ptr: gl.tensor,
    context_lens_ptr: gl.tensor,
    queue_ptr: gl.tensor,
    block_table_stride: gl.tensor,
    num_seqs: gl.tensor,
    num_kv_heads: gl.tensor,
    num_tiles: gl.tensor,
    tile_pipe: gl.tuple,
    key_pipe: gl.tuple,
    value_pipe: gl.tuple,
    BLOCK_SIZE: gl.constexpr,
    TILE_TOKENS: gl.constexpr,
    WINDOW: gl.constexpr,
) -> None:
    """The loading warp: takes tiles from the queue until none is left, and announces each to the computing warps.

    An announced tile is five numbers: tokens left in the chunk from the tile's first one on (0: no more tiles), row of
    the first token in the batch, KV head, position of the first token, context length.
    """
    tile, query, tile_ready, tile_free = tile_pipe
    keys, key_ready, key_free = key_pipe
    values, value_ready, value_free = value_pipe
    STAGES: gl.constexpr = keys.shape[0]
    BLOCK_KEYS: gl.constexpr = keys.shape[1]
    PAGE_ROWS: gl.constexpr = key_desc.block_type.shape[0]
    GROUP: gl.constexpr = query_desc.block_type.shape[1]
    SCALAR: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    num_started = 0
    num_loaded = 0  # blocks, of all tiles
    index = gl.atomic_add(queue_ptr, 1)
    while index < num_tiles:
        seq, kv_head, first_token = _find_tile(index, cu_seqlens_q_ptr, num_seqs, num_kv_heads, TILE_TOKENS)
        query_start = gl.load(cu_seqlens_q_ptr + seq)
        query_len = gl.load(cu_seqlens_q_ptr + seq + 1) - query_start
        context_len = gl.load(context_lens_ptr + seq)
        index = gl.atomic_add(queue_ptr, 1)
        if (first_token >= 0) & (first_token < query_len):
            first_position = context_len - query_len + first_token
            end = gl.minimum(first_position + TILE_TOKENS, context_len)
            mbarrier.wait(tile_free, num_started & 1 ^ 1)
            tile.index(0).store(gl.full([1], query_len - first_token, gl.int32, SCALAR))
            tile.index(1).store(gl.full([1], query_start + first_token, gl.int32, SCALAR))
            tile.index(2).store(gl.full([1], kv_head, gl.int32, SCALAR))
            tile.index(3).store(gl.full([1], first_position, gl.int32, SCALAR))
            tile.index(4).store(gl.full([1], context_len, gl.int32, SCALAR))
            _load_query(query_desc, query, tile_ready, query_start + first_token, kv_head * GROUP)
            num_started += 1
            table_ptr = block_tables_ptr + seq.to(gl.int64) * block_table_stride
            column = kv_head * keys.shape[2]
            for first in range(first_block(first_position, WINDOW, BLOCK_KEYS), end, BLOCK_KEYS):
                slots = _find_slots(table_ptr, first, context_len, BLOCK_SIZE, BLOCK_KEYS, PAGE_ROWS)
                stage = num_loaded % STAGES
                phase = num_loaded // STAGES & 1 ^ 1
                mbarrier.wait(key_free.index(stage), phase)
                _load_keys(key_desc, keys.index(stage), key_ready.index(stage), slots, column)
                mbarrier.wait(value_free.index(stage), phase)
                _load_keys(value_desc, values.index(stage), value_ready.index(stage), slots, column)
                num_loaded += 1
    mbarrier.wait(tile_free, num_started & 1 ^ 1)
    tile.index(0).store(gl.full([1], 0, gl.int32, SCALAR))
    mbarrier.arrive(tile_ready)
