"""Which tiles products of one row take."""

from __future__ import annotations

import pytest

from nanovllm.kernels.row_tiles import RowTile, choose_row_tile


def choose(
    num_chunks: int, outputs: int, *, is_int4: bool = False, gated: bool = False, is_plain: bool = True
) -> RowTile:
    return choose_row_tile(num_chunks, outputs, is_int4=is_int4, gated=gated, is_plain=is_plain and not gated)


def in_round(tile: RowTile) -> int:
    return tile.outputs * tile.warps * tile.programs


@pytest.mark.parametrize("is_int4", [False, True])
@pytest.mark.parametrize("gated", [False, True])
def test_rows_have_whole_pieces(is_int4: bool, gated: bool) -> None:
    for num_chunks in range(1, 65):
        for outputs in range(1, 50):
            assert num_chunks % choose(num_chunks, outputs, is_int4=is_int4, gated=gated).chunks == 0


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


def test_five_programs_are_for_plain_products() -> None:
    assert in_round(choose(8, 39, is_plain=False)) == 16
    assert in_round(choose(4, 39, gated=True)) == 16


def test_gated_pairs_are_for_short_rows() -> None:
    assert choose(4, 24, gated=True) == RowTile(2, 1, warps=16, programs=1)
    assert choose(5, 24, gated=True) == RowTile(1, 1, warps=16, programs=1)


def test_short_rows_have_two_programs() -> None:
    assert choose(8, 31) == RowTile(2, 4, warps=8, programs=2)
    assert choose(10, 31) == RowTile(2, 2, warps=16, programs=1)


def test_int4_tiles_of_qwen3_32b() -> None:
    """Those that were fastest in whole steps. Chunks of o: 8, of gate and up: 5, of down: 25."""
    assert choose(8, 39, is_int4=True) == RowTile(2, 4, warps=8, programs=2)
    assert choose(5, 194, is_int4=True, gated=True) == RowTile(2, 1, warps=16, programs=1)
    assert choose(25, 39, is_int4=True) == RowTile(2, 5, warps=8, programs=1)


def test_programs_share_the_registers_of_a_multiprocessor() -> None:
    assert RowTile(1, 1, warps=16, programs=1).max_registers == 128
    assert RowTile(1, 1, warps=4, programs=5).max_registers == 96
    assert RowTile(1, 1, warps=4, programs=1).max_registers == 255
