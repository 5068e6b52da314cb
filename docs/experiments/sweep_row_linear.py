"""Times tiles of `row_linear`, and `skinny_linear`, at shapes of models.

    python docs/experiments/sweep_row_linear.py 0.6 8 32

Needs a Hopper GPU and `row-linear.patch`. Variants are first compiled by many processes. A line: the shape, the
microseconds of `skinny_linear` before and after, the largest relative difference, and the fastest tiles.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "docs" / "experiments")]

from sweeps import MODELS, Problem, Shape, Tile, compile_with_all_cores  # noqa: E402

from nanovllm.kernels import row_linear as module  # noqa: E402
from nanovllm.kernels.skinny_linear import skinny_linear  # noqa: E402


def problem(kind: str, shape: Shape, copies: int) -> Problem:
    size = (shape.rows, shape.inputs)
    numbers = [torch.randint(-120, 120, size, dtype=torch.int8, device="cuda") for _ in range(copies)]
    weights = numbers if kind == "int8" else [each.half().to(torch.float8_e4m3fn) for each in numbers]
    scale = torch.rand(shape.rows, 1, device="cuda") * 0.01 * shape.inputs**-0.5
    return Problem(shape, 1, weights, scale=scale)


def tiles(shape: Shape) -> Iterator[Tile]:
    chunks = -(-shape.inputs // 512)
    for rows in (1, 2) if shape.gated else (2, 4):
        for piece in (1, 2, 3, 4, 5):
            registers = 4 * piece * rows * (1 + shape.gated) * 2  # of the weights alone
            if chunks % piece == 0 and chunks // piece <= 16 and registers <= 100:
                for warps, programs in ((4, 3), (4, 4), (8, 1), (8, 2), (16, 1)):
                    yield rows, piece, warps, programs


def use(tile: Tile) -> None:
    module._choose_tile = lambda num_chunks, gated: tile


def compile_tile(kind: str, shape: Shape, tile: Tile) -> None:
    use(tile)
    problem(kind, shape, 1).first(module.row_linear)


def measure(kind: str, shape: Shape) -> None:
    ours = problem(kind, shape, max(2, 160_000_000 // (shape.rows * shape.inputs) + 1))
    before = ours.microseconds(skinny_linear)
    worst, fastest = ours.sweep(module.row_linear, use, tiles(shape), ours.first(skinny_linear))
    print(kind, shape.name, shape.inputs, before, ours.microseconds(skinny_linear), worst, *fastest, flush=True)


def main() -> None:
    pairs = [(kind, shape) for model in sys.argv[1:] for shape in MODELS[model] for kind in ("fp8", "int8")]
    compile_with_all_cores(compile_tile, [(kind, shape, tile) for kind, shape in pairs for tile in tiles(shape)])
    for pair in pairs:
        measure(*pair)


if __name__ == "__main__":
    main()
