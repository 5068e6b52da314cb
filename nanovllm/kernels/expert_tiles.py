"""Tokens sorted by expert, and cut into tiles that each belong to one expert.

A token with its k experts is k pairs, numbered token · k + choice. Sorted by expert they are the rows of the grouped
products. Each expert's rows are cut into tiles of at most `block_rows`. How many tiles there are depends on the
router; their number has a bound that depends on the number of tokens alone, and tiles beyond the last are empty.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nanovllm.kernels.expert_routing import Routing
from nanovllm.kernels.triton_support import jit_with_varying, join_launch_chain, next_power_of_2, pdl_options, tl

_BLOCK_TILES = 32  # tiles whose experts a program finds at a time
_BLOCK_BLOCKS = 32  # blocks of tokens whose counts a program adds up at a time


@dataclass(frozen=True)
class ExpertTiles:
    """The order of the pairs, and the tiles."""

    pairs: torch.Tensor  # [num_pairs] int32, sorted by expert; pairs of one expert keep their order
    # Of each tile [max_tiles, 3] int32: its expert, its first row, and the end of its expert's rows. An empty tile's
    # first row is not below the end.
    tiles: torch.Tensor
    block_rows: int


@jit_with_varying("num_tokens", "num_blocks", "max_tiles")
def _sort_by_expert_kernel(
    topk_ids_ptr: tl.tensor,
    block_counts_ptr: tl.tensor,
    ranks_ptr: tl.tensor,
    pairs_ptr: tl.tensor,
    tiles_ptr: tl.tensor,
    num_tokens: tl.tensor,
    num_blocks: tl.tensor,
    max_tiles: tl.tensor,
    TOP_K: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_PAIRS: tl.constexpr,
    BLOCK_EXPERTS: tl.constexpr,
    BLOCK_TILES: tl.constexpr,
    BLOCK_BLOCKS: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """Program (block of tokens): the places of its pairs, and its share of the tiles."""
    join_launch_chain(PDL)
    block = tl.program_id(0)
    expert = tl.arange(0, BLOCK_EXPERTS)
    total = tl.zeros([BLOCK_EXPERTS], tl.int32)
    before = tl.zeros([BLOCK_EXPERTS], tl.int32)
    for first in range(0, num_blocks, BLOCK_BLOCKS):
        other = first + tl.arange(0, BLOCK_BLOCKS)
        counted = (other < num_blocks)[:, None] & (expert < NUM_EXPERTS)[None, :]
        counts = tl.load(block_counts_ptr + other[:, None] * NUM_EXPERTS + expert[None, :], mask=counted, other=0)
        total += tl.sum(counts, axis=0)
        before += tl.sum(tl.where((other < block)[:, None], counts, 0), axis=0)
    starts = tl.cumsum(total, axis=0) - total

    first_pair = block * BLOCK_TOKENS * TOP_K
    pair = first_pair + tl.arange(0, BLOCK_PAIRS)
    mask = (pair < first_pair + BLOCK_TOKENS * TOP_K) & (pair < num_tokens * TOP_K)
    chosen = tl.load(topk_ids_ptr + pair, mask=mask, other=0)
    rank = tl.load(ranks_ptr + pair, mask=mask, other=0)
    tl.store(pairs_ptr + tl.gather(starts + before, chosen, axis=0) + rank, pair, mask=mask)

    num_tiles = tl.cdiv(total, BLOCK_ROWS)
    tile_ends = tl.cumsum(num_tiles, axis=0)
    rows = starts - (tile_ends - num_tiles) * BLOCK_ROWS  # of an expert's tile: this and tile · BLOCK_ROWS
    for first in range(block * BLOCK_TILES, max_tiles, tl.num_programs(0) * BLOCK_TILES):
        tile = first + tl.arange(0, BLOCK_TILES)
        of = tl.sum((tile_ends[None, :] <= tile[:, None]).to(tl.int32), axis=1)
        is_empty = of == BLOCK_EXPERTS  # the tile is past all experts
        of = tl.minimum(of, NUM_EXPERTS - 1)
        row = tl.gather(rows, of, axis=0) + tile * BLOCK_ROWS
        end = tl.where(is_empty, 0, tl.gather(starts + total, of, axis=0))
        exists = tile < max_tiles
        tl.store(tiles_ptr + tile * 3, of, mask=exists)
        tl.store(tiles_ptr + tile * 3 + 1, row, mask=exists)
        tl.store(tiles_ptr + tile * 3 + 2, end, mask=exists)


def sort_by_expert(routing: Routing, block_rows: int) -> ExpertTiles:
    """Returns the pairs of a routing that was counted, sorted by expert, in tiles of at most `block_rows` rows."""
    counts = routing.counts
    assert counts is not None
    num_tokens, top_k, num_experts = routing.num_tokens, routing.top_k, routing.num_experts
    num_pairs, device = num_tokens * top_k, routing.topk_ids.device
    max_tiles = num_pairs // block_rows + min(num_experts, num_pairs)
    num_blocks = len(counts.experts)
    pairs = torch.empty(num_pairs, dtype=torch.int32, device=device)  # [num_pairs]
    tiles = torch.empty(max_tiles, 3, dtype=torch.int32, device=device)  # [max_tiles, 3]
    if num_tokens > 0:
        _sort_by_expert_kernel[(num_blocks,)](
            topk_ids_ptr=routing.topk_ids,
            block_counts_ptr=counts.experts,
            ranks_ptr=counts.ranks,
            pairs_ptr=pairs,
            tiles_ptr=tiles,
            num_tokens=num_tokens,
            num_blocks=num_blocks,
            max_tiles=max_tiles,
            TOP_K=top_k,
            NUM_EXPERTS=num_experts,
            BLOCK_ROWS=block_rows,
            BLOCK_TOKENS=counts.block_tokens,
            BLOCK_PAIRS=next_power_of_2(counts.block_tokens * top_k),
            BLOCK_EXPERTS=next_power_of_2(num_experts),
            BLOCK_TILES=_BLOCK_TILES,
            BLOCK_BLOCKS=_BLOCK_BLOCKS,
            **pdl_options(device),
        )
    return ExpertTiles(pairs, tiles, block_rows)
