"""The shapes of a unit of work of dense_matmul.py, and which should be fastest."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from itertools import product

from nanovllm.kernels.matmul_units import (
    FINISHING_BYTES,
    MAX_COUNTED_TOKENS,
    RESERVED_BYTES,
    SWIZZLE_BYTES,
    WARPGROUP_ROWS,
    counted_tokens,
)
from nanovllm.kernels.triton_support import next_power_of_2

_MIN_TOKENS = 16
_MIN_GROUPED_TOKENS = 32  # a copy of scales goes to a multiple of 128 bytes
_MANY_TOKENS = 16384  # what more than `MAX_COUNTED_TOKENS` count as
_MAX_GROUPED_TOKENS = 64  # with scales of 128 inputs, more are slower
_MAX_TOKENS = {1: 256, 2: 256, 3: 128}  # by computing warpgroups: their sums fit in registers
_MIN_STAGES, _MAX_STAGES = 3, 12
_REGISTERS = 65536  # of a multiprocessor
_MAX_REGISTERS = 240  # of a thread
_LOADING_REGISTERS = 24  # of a loading thread
_THREADS = 128  # of a warpgroup, and of the loading warps, which count as one
# What an H200 does in a microsecond, and the microseconds that a unit of work takes beside its copies and products:
# fitted to the times of all tiles for 16 to 512 rows, for Qwen3-0.6B and 8B, by `tools/bench_dense_tiles.py`, where the
# device has worked for a while and its power limit lowers its clock.
_ALL_MEMORY = 4.2e6  # bytes of weights that all multiprocessors read
_ALL_CACHE = 9.5e6  # bytes that all of them copy, most of them from the L2 cache
_CACHE = 2.0e5  # bytes that one of them copies
_MATH = 6.0e4  # bytes of a row, times tokens, that a warpgroup's 64 rows are multiplied with
_GROUPED_MATH = 4.8e4  # the same with scales of 128 inputs
_UNIT_TIME = 2.4


@dataclass(frozen=True)
class DenseTile:
    """The shape of a unit of work.

    stages: of `parts` times 128 bytes of each row. warpgroups: that compute, 64 rows of the weight each.
    """

    tokens: int
    stages: int
    parts: int = 1
    warpgroups: int = 1

    @property
    def rows(self) -> int:
        """Of the weight."""
        return WARPGROUP_ROWS * self.warpgroups

    @property
    def stage_bytes(self) -> int:
        """With scales of the activations."""
        return self.parts * ((self.rows + self.tokens) * SWIZZLE_BYTES + 4 * self.tokens)

    @property
    def registers(self) -> int:
        """Of each thread when the program starts."""
        return min(_REGISTERS // (_THREADS * (self.warpgroups + 1)) // 8 * 8, _MAX_REGISTERS)

    @property
    def computing_registers(self) -> int:
        """Of a computing thread, once the loading ones have given theirs away."""
        given = self.registers * (self.warpgroups + 1) - _LOADING_REGISTERS
        return min(given // self.warpgroups // 8 * 8, _MAX_REGISTERS)


@cache  # a step asks for the same few shapes in every layer
def choose_dense_tile(
    num_tokens: int,
    rows: int,
    row_bytes: int,
    *,
    has_groups: bool,
    num_multiprocessors: int,
    memory: int,
) -> DenseTile:
    """Returns the tile that should be fastest for a weight of `rows` rows, by an estimate.

    It is that of `counted_tokens`. All prompt steps have the same one, which the largest step compiles when the engine
    starts. has_groups: of inputs, with scales. memory: bytes of shared memory that a program may use.
    """
    num_tokens = counted_tokens(num_tokens) if num_tokens <= MAX_COUNTED_TOKENS else _MANY_TOKENS
    math = _GROUPED_MATH if has_groups else _MATH
    return min(
        possible_tiles(num_tokens, memory, has_groups),
        key=lambda tile: _estimate(tile, num_tokens, rows, row_bytes, math, num_multiprocessors),
    )


def possible_tiles(num_tokens: int, memory: int, has_groups: bool) -> Iterator[DenseTile]:
    """Yields the tiles that shared memory and registers have room for, with as many stages as fit.

    Of two that should be equally fast the first one is: it has fewer warpgroups, or copies each weight less often.
    """
    fewest = _MIN_GROUPED_TOKENS if has_groups else _MIN_TOKENS
    for warpgroups, tokens in product((1, 2, 3), (256, 128, 64, 32, 16)):
        most = min(_MAX_TOKENS[warpgroups], max(next_power_of_2(num_tokens), fewest))
        if not fewest <= tokens <= (min(most, _MAX_GROUPED_TOKENS) if has_groups else most):
            continue
        # Larger stages are waited for less often, and smaller ones leave more of them.
        parts = 2 if tokens <= 64 and tokens * warpgroups <= 128 else 1
        tile = DenseTile(tokens, 1, parts, warpgroups)
        left = memory - RESERVED_BYTES - warpgroups * FINISHING_BYTES
        stages = min(left // tile.stage_bytes, _MAX_STAGES)
        if stages >= _MIN_STAGES:
            yield replace(tile, stages=stages)


def _estimate(
    tile: DenseTile, num_tokens: int, rows: int, row_bytes: int, math: float, num_multiprocessors: int
) -> float:
    """Returns microseconds: the longest of reading the weight, and of a multiprocessor's copies and products."""
    units = -(-rows // tile.rows) * -(-num_tokens // tile.tokens)
    rounds = -(-units // num_multiprocessors)
    rate = min(_CACHE, _ALL_CACHE / min(units, num_multiprocessors))
    copies = (tile.rows + tile.tokens) * row_bytes / rate
    products = tile.warpgroups * tile.tokens * row_bytes / math
    return max(rounds * max(copies, products), rows * row_bytes / _ALL_MEMORY) + rounds * _UNIT_TIME
