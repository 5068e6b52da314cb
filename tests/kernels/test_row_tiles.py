"""Which tiles products of one row take."""

from __future__ import annotations

import pytest

from nanovllm.kernels.row_tiles import CHUNK_BYTES, RowShape, RowTile

BITS = {"bf16": 16, "int8": 8, "fp8": 8, "int4": 4}


def choose(
    num_chunks: int,
    outputs: int,
    kind: str = "int8",
    *,
    gated: bool = False,
    normed: bool = False,
    num_multiprocessors: int = 1,
    missing_inputs: int = 0,
) -> RowTile:
    """outputs: of a multiprocessor. missing_inputs: of the last chunk."""
    shape = RowShape(
        kind,
        has_zeros=False,
        has_bias=False,
        has_norm=normed,
        has_residual=False,
        is_gated=gated,
        group_size=128,
        scale_rows=1,
        output_size=outputs * num_multiprocessors,
        input_size=num_chunks * CHUNK_BYTES * 8 // BITS[kind] - missing_inputs,
        num_words=num_chunks * CHUNK_BYTES // 4,
    )
    return shape.choose_tile(num_multiprocessors)


def in_round(tile: RowTile) -> int:
    return tile.outputs * tile.warps * tile.programs


@pytest.mark.parametrize("kind", ["bf16", "int8", "fp8", "int4"])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("normed", [False, True])
def test_rows_have_whole_pieces(kind: str, gated: bool, normed: bool) -> None:
    for num_chunks in range(1, 65):
        for outputs in range(1, 50):
            assert num_chunks % choose(num_chunks, outputs, kind, gated=gated, normed=normed).chunks == 0


@pytest.mark.parametrize(
    ("num_chunks", "outputs", "expected"),
    [
        (8, 8, 16),
        (8, 20, 32),  # a tie with two rounds of 16
        (8, 39, 40),
        (16, 39, 40),
        (17, 39, 16),  # five programs have no room for so many inputs
        (8, 47, 16),
        (10, 78, 16),  # 80 places, a tie with two rounds of 40
    ],
)
def test_the_last_round_of_outputs_is_as_full_as_can_be(num_chunks: int, outputs: int, expected: int) -> None:
    assert in_round(choose(num_chunks, outputs)) == expected


def test_weights_of_16_bits_take_what_was_measured() -> None:
    assert choose(16, 32, "bf16") == RowTile(2, 4, warps=16, programs=1)


def test_five_programs_are_for_plain_products() -> None:
    assert in_round(choose(8, 39, normed=True)) == 16
    assert in_round(choose(4, 39, gated=True)) == 16


def test_gated_pairs_are_for_short_rows() -> None:
    assert choose(4, 24, gated=True) == RowTile(2, 1, warps=16, programs=1)
    assert choose(5, 24, gated=True) == RowTile(1, 1, warps=16, programs=1)


def test_short_rows_have_two_programs() -> None:
    assert choose(8, 31) == RowTile(2, 4, warps=8, programs=2)
    assert choose(10, 31) == RowTile(2, 2, warps=16, programs=1)


def test_fp8_tiles_of_qwen3_8b() -> None:
    """Those that were fastest in whole steps, here and below. Chunks of qkv, o, and gate and up: 8, of down: 24."""
    assert choose(8, 47, "fp8", normed=True) == RowTile(1, 2, warps=16, programs=1)
    assert choose(8, 47, "int8", normed=True) == RowTile(1, 4, warps=16, programs=1)
    assert choose(8, 32, "fp8") == RowTile(2, 4, warps=8, programs=2)
    assert choose(8, 94, "fp8", gated=True, normed=True) == RowTile(1, 2, warps=16, programs=1)
    assert choose(24, 32, "fp8") == RowTile(2, 4, warps=16, programs=1)


def test_fp8_tiles_of_qwen3_32b() -> None:
    """Chunks of qkv, and of gate and up: 10, of o: 16, of down: 50."""
    assert choose(10, 78, "fp8", normed=True) == RowTile(1, 2, warps=16, programs=1)
    assert choose(10, 78, "int8", normed=True) == RowTile(1, 5, warps=16, programs=1)
    assert choose(16, 39, "fp8") == RowTile(2, 4, warps=4, programs=5)
    assert choose(10, 194, "fp8", gated=True, normed=True) == RowTile(1, 2, warps=16, programs=1)
    assert choose(50, 39, "fp8") == RowTile(1, 5, warps=16, programs=1)


def test_int4_tiles_of_qwen3_8b() -> None:
    """Chunks of qkv and o: 4, of down: 12. Qkv without masks."""
    assert choose(4, 48, "int4", normed=True, num_multiprocessors=2) == RowTile(4, 2, warps=8, programs=2)
    assert choose(4, 47, "int4", normed=True) == RowTile(2, 2, warps=8, programs=2)
    assert choose(4, 48, "int4", normed=True, num_multiprocessors=2, missing_inputs=512) == RowTile(2, 2, 8, 2)
    assert choose(4, 32, "int4") == RowTile(2, 2, warps=8, programs=2)
    assert choose(12, 32, "int4") == RowTile(2, 3, warps=16, programs=1)


def test_int4_tiles_of_qwen3_32b() -> None:
    """Chunks of qkv and of gate and up: 5, of o: 8, of down: 25."""
    assert choose(5, 78, "int4", normed=True) == RowTile(2, 5, warps=4, programs=3)
    assert choose(8, 39, "int4") == RowTile(2, 2, warps=8, programs=2)
    assert choose(5, 194, "int4", gated=True) == RowTile(2, 1, warps=16, programs=1)
    assert choose(25, 39, "int4") == RowTile(2, 5, warps=8, programs=1)


def test_programs_share_the_registers_of_a_multiprocessor() -> None:
    assert RowTile(1, 1, warps=16, programs=1).max_registers == 128
    assert RowTile(1, 1, warps=4, programs=5).max_registers == 96
    assert RowTile(1, 1, warps=4, programs=1).max_registers == 255
