"""How `row_linear` divides a product among warps, as measured on an H200 with `tools/bench_row_tiles.py`."""

from __future__ import annotations

from typing import NamedTuple

_MAX_CHUNKS_OF_FIVE_PROGRAMS = 16  # whose inputs, padded to a power of two, an H200's shared memory holds five times
_MAX_CHUNKS_OF_GATED_PAIRS = 4  # with more, two gates and two ups leave registers for few weights ahead
_MAX_CHUNKS_OF_TWO_PROGRAMS = 8  # with more, each program converting the input costs more than it gains
_MOST_CHUNKS = {(1, False): 5, (2, False): 4, (1, True): 2, (2, True): 1}  # of a piece, by outputs of a warp and gated
_REGISTERS = 65536  # of a multiprocessor
_MAX_REGISTERS = 255  # of a thread


class RowTile(NamedTuple):
    """The work of a warp, and the warps of a multiprocessor."""

    outputs: int  # that a warp computes together; if gated, as many gates and as many ups
    chunks: int  # of a weight's row that a warp loads together; they divide the row evenly
    warps: int  # of a program
    programs: int  # of a multiprocessor

    @property
    def max_registers(self) -> int:
        """The registers of a thread with which so many programs fit."""
        return min(_REGISTERS // (32 * self.warps * self.programs) // 8 * 8, _MAX_REGISTERS)


def choose_row_tile(num_chunks: int, num_outputs: int, *, is_int4: bool, gated: bool, is_plain: bool) -> RowTile:
    """Returns the tile for a weight with rows of `num_chunks` chunks, and `num_outputs` for each multiprocessor.

    is_plain: neither gated nor normed, and an output has one scale.
    """
    return _int4_tile(num_chunks, gated) if is_int4 else _byte_tile(num_chunks, num_outputs, gated, is_plain)


def _byte_tile(num_chunks: int, num_outputs: int, gated: bool, is_plain: bool) -> RowTile:
    """A chunk has 512 inputs.

    The warps of a multiprocessor take 16, 32 or, where registers and shared memory allow it, 40 outputs in a round. The
    choice leaves the fewest places empty in the last round. On a tie 32 is preferred, since with two outputs a warp
    reads the input from shared memory half as often, then 16, then 40.
    """
    rounds = [16] if gated and num_chunks > _MAX_CHUNKS_OF_GATED_PAIRS else [32, 16]
    if is_plain and num_chunks <= _MAX_CHUNKS_OF_FIVE_PROGRAMS:
        rounds.append(40)
    in_round = min(rounds, key=lambda size: -(-num_outputs // size) * size)
    outputs = 1 if in_round == 16 else 2
    chunks = next(size for size in range(_MOST_CHUNKS[outputs, gated], 0, -1) if num_chunks % size == 0)
    if in_round == 40:
        return RowTile(outputs, chunks, warps=4, programs=5)
    if outputs == 2 and not gated and num_chunks <= _MAX_CHUNKS_OF_TWO_PROGRAMS:
        return RowTile(outputs, chunks, warps=8, programs=2)
    return RowTile(outputs, chunks, warps=16, programs=1)


def _int4_tile(num_chunks: int, gated: bool) -> RowTile:
    """A chunk has 1,024 inputs. Measured with 1, 4 and 5 chunks if gated, otherwise with 1 to 5, 8, 12 and 25."""
    if gated:
        if num_chunks <= 4:
            return RowTile(2, 1, warps=8, programs=2)
        return RowTile(2 if num_chunks <= 8 else 1, 1, warps=16, programs=1)
    if num_chunks == 1:
        return RowTile(4, 1, warps=16, programs=1)
    chunks = next(size for size in (2, 5, 3, 1) if num_chunks % size == 0)
    if chunks == 5:
        return RowTile(2, 5, warps=4, programs=3) if num_chunks == 5 else RowTile(2, 5, warps=8, programs=1)
    if num_chunks <= 8:
        return RowTile(2 if num_chunks < 8 else 4, chunks, warps=8, programs=2)
    return RowTile(2, chunks, warps=16, programs=1)
