"""Finds a block of keys in the paged cache, for all attention kernels."""

from __future__ import annotations

from nanovllm.kernels.triton_support import jit, tl


@jit
def page_slots(
    table_ptr: tl.tensor,
    first: tl.tensor,
    end: tl.tensor,
    page_stride: tl.tensor,
    slot_stride: tl.tensor,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
) -> tl.tensor:
    """Returns the offsets [BLOCK_KEYS] of the keys from position `first` on; entries at or after `end` are undefined.

    `first` is a multiple of BLOCK_KEYS. Keys cannot be fetched before their pages are known, so the table is read with
    few, scalar loads: one if a page holds the whole block, one per page if the block spans up to 8 pages, otherwise
    one per key.
    """
    key = tl.arange(0, BLOCK_KEYS)
    if BLOCK_SIZE % BLOCK_KEYS == 0:
        page = tl.load(table_ptr + first // BLOCK_SIZE).to(tl.int64)
        slots = page * page_stride + (first % BLOCK_SIZE + key) * slot_stride
    elif BLOCK_KEYS % BLOCK_SIZE == 0 and BLOCK_KEYS <= 8 * BLOCK_SIZE:
        page = tl.load(table_ptr + first // BLOCK_SIZE) + tl.zeros([BLOCK_KEYS], tl.int32)
        for index in tl.static_range(1, BLOCK_KEYS // BLOCK_SIZE):
            start = first + index * BLOCK_SIZE
            next_page = tl.load(table_ptr + start // BLOCK_SIZE, mask=start < end, other=0)
            page = tl.where(key >= index * BLOCK_SIZE, next_page, page)
        slots = page.to(tl.int64) * page_stride + (key % BLOCK_SIZE) * slot_stride
    else:
        position = first + key
        page = tl.load(table_ptr + position // BLOCK_SIZE, mask=position < end, other=0).to(tl.int64)
        slots = page * page_stride + (position % BLOCK_SIZE) * slot_stride
    return slots
