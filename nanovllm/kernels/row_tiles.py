"""How `row_linear` divides a product among warps, as measured on an H200 with `tools/bench_row_tiles.py`."""

from __future__ import annotations

from typing import NamedTuple

_MAX_CHUNKS_OF_FIVE_PROGRAMS = 16  # whose inputs, padded to a power of two, fit in shared memory five times
_MAX_CHUNKS_OF_GATED_PAIRS = 4  # with more, two gates and two ups leave registers for few weights ahead
_MAX_CHUNKS_OF_TWO_PROGRAMS = 8  # with more, each program converting the input costs more than it gains
_MOST_CHUNKS = {(1, False): 5, (2, False): 4, (1, True): 2, (2, True): 1}  # of a piece, by outputs of a warp and gated
_REGISTERS = 65536  # of a multiprocessor
_MAX_REGISTERS = 255  # of a thread


class RowTile(NamedTuple):
    """The work of a warp, and the warps of a multiprocessor."""

    rows: int  # outputs that a warp computes together; gated, so many gates and so many ups
    chunks: int  # of a row, which a warp loads together; a row has a multiple of them
    warps: int  # of a program
    programs: int  # of a multiprocessor

    @property
    def max_registers(self) -> int:
        """The registers of a thread with which so many programs fit."""
        return min(_REGISTERS // (32 * self.warps * self.programs) // 8 * 8, _MAX_REGISTERS)


def choose_row_tile(num_chunks: int, outputs: int, *, is_int4: bool, gated: bool, is_plain: bool) -> RowTile:
    """Returns the tile for rows of so many chunks, of which each multiprocessor has `outputs`.

    is_plain: neither gated nor normed, and an output has one scale.
    """
    return _int4_tile(num_chunks, gated) if is_int4 else _byte_tile(num_chunks, outputs, gated, is_plain)


def _byte_tile(num_chunks: int, outputs: int, gated: bool, is_plain: bool) -> RowTile:
    """A chunk has 512 inputs.

    The warps of a multiprocessor take 16 outputs in a round, or 32, or 40 where registers and shared memory allow it:
    what leaves the fewest places empty in the last round. On a tie 32 wins, as with two outputs a warp reads the input
    from shared memory half as often, and 40 loses.
    """
    rounds = [16] if gated and num_chunks > _MAX_CHUNKS_OF_GATED_PAIRS else [32, 16]
    if is_plain and num_chunks <= _MAX_CHUNKS_OF_FIVE_PROGRAMS:
        rounds.append(40)
    in_round = min(rounds, key=lambda size: -(-outputs // size) * size)
    rows = 1 if in_round == 16 else 2
    chunks = next(size for size in range(_MOST_CHUNKS[rows, gated], 0, -1) if num_chunks % size == 0)
    if in_round == 40:
        return RowTile(rows, chunks, warps=4, programs=5)
    if rows == 2 and not gated and num_chunks <= _MAX_CHUNKS_OF_TWO_PROGRAMS:
        return RowTile(rows, chunks, warps=8, programs=2)
    return RowTile(rows, chunks, warps=16, programs=1)


def _int4_tile(num_chunks: int, gated: bool) -> RowTile:
    """A chunk has 1,024 inputs. Measured with 1, 4 and 5 chunks if gated, otherwise with 1 to 5, 8, 12 and 25."""
    if gated:
        rows = 2 if num_chunks <= 8 else 1
        return RowTile(rows, 1, warps=8, programs=2) if num_chunks <= 4 else RowTile(rows, 1, warps=16, programs=1)
    if num_chunks == 1:
        return RowTile(4, 1, warps=16, programs=1)
    chunks = next(size for size in (2, 5, 3, 1) if num_chunks % size == 0)
    if chunks == 5:
        return RowTile(2, 5, warps=4, programs=3) if num_chunks == 5 else RowTile(2, 5, warps=8, programs=1)
    if num_chunks <= 8:
        return RowTile(2 if num_chunks < 8 else 4, chunks, warps=8, programs=2)
    return RowTile(2, chunks, warps=16, programs=1)
