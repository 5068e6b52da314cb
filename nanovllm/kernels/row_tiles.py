"""What a product of `row_linear` looks like, and how it is divided among warps.

Tiles were chosen on an H200 with `tools/bench_row_tiles.py`: by products alone, and for Qwen3-8B, and 32B in FP8 and
INT4, by whole decode steps, where another tile is often fastest.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from nanovllm.kernels.int4_packing import BLOCK_SIZE
from nanovllm.kernels.triton_support import next_power_of_2

CHUNK_BYTES = 512  # of a row that a warp reads at once, 16 a lane
_MIN_BLOCKS = 8  # of the padded input: one chunk in INT4, two in 8 bits, four in 16

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


@dataclass(frozen=True)
class RowShape:
    """A product, as the kernel is compiled for it."""

    kind: str  # of the weight: bf16, fp16, fp8, int8 or int4
    has_zeros: bool
    has_bias: bool
    has_norm: bool
    has_residual: bool
    is_gated: bool
    group_size: int  # inputs that share a scale
    scale_rows: int  # outputs that share a scale
    output_size: int  # half as many as the weight has if gated
    input_size: int
    num_words: int  # of 32 bits, in a row of the weight

    @property
    def is_int4(self) -> bool:
        return self.kind == "int4"

    @property
    def is_half(self) -> bool:
        """True if a weight has 16 bits. Such a weight has no scale."""
        return self.kind in ("bf16", "fp16")

    @property
    def num_parts(self) -> int:
        """Buffers of the input: each has a word for each word of the weight."""
        return 2 if self.is_half else 4

    @property
    def has_group_scale(self) -> bool:
        """True if a scale is of some inputs: in INT4 and FP8 blocks."""
        return self.is_int4 or self.scale_rows > 1

    @property
    def block_words(self) -> int:
        """Words of a row that have BLOCK_SIZE inputs."""
        return BLOCK_SIZE // (8 if self.is_int4 else self.num_parts)

    @property
    def padded_blocks(self) -> int:
        """Of the input: a power of two, ≥ 8."""
        return max(next_power_of_2(-(-self.input_size // BLOCK_SIZE)), _MIN_BLOCKS)

    @property
    def num_chunks(self) -> int:
        """Of a row of the weight."""
        return -(-4 * self.num_words // CHUNK_BYTES)

    def choose_tile(self, num_multiprocessors: int) -> RowTile:
        """Returns the tile for a GPU of so many multiprocessors."""
        num_outputs = -(-self.output_size // num_multiprocessors)
        if self.is_half:
            return _half_tile(self)
        return _int4_tile(self, num_outputs) if self.is_int4 else _byte_tile(self, num_outputs)


def _half_tile(shape: RowShape) -> RowTile:
    """A chunk has 256 inputs. Measured with 16 chunks, 4,096 outputs, and neither norm nor gate."""
    chunks = next(size for size in (4, 2, 1) if shape.num_chunks % size == 0)
    return RowTile(2 // (1 + shape.is_gated), chunks, warps=16, programs=1)


def _byte_tile(shape: RowShape, num_outputs: int) -> RowTile:
    """A chunk has 512 inputs, and a multiprocessor `num_outputs` outputs.

    The warps of a multiprocessor take 16, 32 or, where registers and shared memory allow it, 40 outputs in a round. The
    choice leaves the fewest places empty in the last round. On a tie 32 is preferred, since with two outputs a warp
    reads the input from shared memory half as often, then 16, then 40.
    """
    gated, num_chunks = shape.is_gated, shape.num_chunks
    is_plain = not (gated or shape.has_norm or shape.has_group_scale)
    rounds = [16] if gated and num_chunks > _MAX_CHUNKS_OF_GATED_PAIRS else [32, 16]
    if is_plain and num_chunks <= _MAX_CHUNKS_OF_FIVE_PROGRAMS:
        rounds.append(40)
    in_round = min(rounds, key=lambda size: -(-num_outputs // size) * size)
    outputs = 1 if in_round == 16 else 2
    most_chunks = _MOST_CHUNKS[outputs, gated]
    if shape.kind == "fp8" and shape.has_norm and not shape.has_group_scale and num_chunks in (8, 10) and outputs == 1:
        most_chunks = 2  # qkv of 8B and 32B: with more, single takes 4 and 1.5 % longer over a cache in bf16
    chunks = next(size for size in range(most_chunks, 0, -1) if num_chunks % size == 0)
    if in_round == 40:
        return RowTile(outputs, chunks, warps=4, programs=5)
    if outputs == 2 and not gated and num_chunks <= _MAX_CHUNKS_OF_TWO_PROGRAMS:
        return RowTile(outputs, chunks, warps=8, programs=2)
    return RowTile(outputs, chunks, warps=16, programs=1)


def _int4_tile(shape: RowShape, num_outputs: int) -> RowTile:
    """A chunk has 1,024 inputs. Measured with 1, 4 and 5 chunks if gated, otherwise with 1 to 5, 8, 12 and 25."""
    num_chunks = shape.num_chunks
    if shape.is_gated:
        if num_chunks <= 4:
            return RowTile(2, 1, warps=8, programs=2)
        return RowTile(2 if num_chunks <= 8 else 1, 1, warps=16, programs=1)
    if num_chunks == 1:
        return RowTile(4, 1, warps=16, programs=1)
    # Masks of inputs or outputs would need more registers than there are.
    is_whole = shape.input_size % (2 * CHUNK_BYTES) == 0 and shape.output_size % 32 == 0
    if num_chunks == 4 and num_outputs > 32 and is_whole:
        return RowTile(4, 2, warps=8, programs=2)
    chunks = 3 if num_chunks == 12 else next(size for size in (2, 5, 3, 1) if num_chunks % size == 0)
    if chunks == 5:
        return RowTile(2, 5, warps=4, programs=3) if num_chunks == 5 else RowTile(2, 5, warps=8, programs=1)
    if num_chunks <= 8:
        return RowTile(2, chunks, warps=8, programs=2)
    return RowTile(2, chunks, warps=16, programs=1)
