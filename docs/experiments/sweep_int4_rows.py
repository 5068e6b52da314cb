"""Times tiles of `int4_skinny_linear` with several tokens, and `mixed_matmul`, at shapes of models.

    python docs/experiments/sweep_int4_rows.py 8 32

Needs a Hopper GPU and `int4-few-rows.patch`. A line: tokens, the shape, the microseconds of `mixed_matmul` (with the
norm's kernel before it) and of the tile that the engine would take, the largest relative difference, and the fastest
tiles.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "docs" / "experiments")]

from sweeps import MODELS, Problem, Shape, Tile, compile_with_all_cores  # noqa: E402

from nanovllm.kernels import int4_skinny_linear as module  # noqa: E402
from nanovllm.kernels.int4_packing import pack_int4  # noqa: E402
from nanovllm.kernels.mixed_matmul import mixed_matmul  # noqa: E402
from nanovllm.kernels.rms_norm import rms_norm  # noqa: E402


def problem(tokens: int, shape: Shape, copies: int) -> Problem:
    rows, groups = shape.rows, shape.inputs // 128
    weights = [pack_int4(torch.randint(0, 16, (rows, shape.inputs), device="cuda")) for _ in range(copies)]
    scale = torch.rand(groups, rows, device="cuda").T / 8 * shape.inputs**-0.5
    zeros = torch.randint(0, 16, (groups, rows), device="cuda").float().T
    return Problem(shape, tokens, weights, scale=scale, zeros=zeros, group_size=128)


def by_mixed_matmul(
    x: torch.Tensor, weight: torch.Tensor, norm_weight: torch.Tensor | None = None, eps: float = 0.0, **named: Any
) -> torch.Tensor:
    normed = x if norm_weight is None else rms_norm(x, norm_weight, eps)
    return mixed_matmul(normed, weight, **named)


def tiles(tokens: int, shape: Shape) -> Iterator[Tile]:
    chunks = -(-shape.inputs // 1024)
    for rows in (1, 2) if shape.gated else (1, 2, 4):
        for piece in (1, 2, 3, 5):
            registers = 6 * piece * rows * (1 + shape.gated) * 2 + 4 * tokens * rows
            if chunks % piece == 0 and registers <= 130:
                for warps, programs in ((4, 2), (4, 3), (4, 4), (8, 1), (8, 2), (16, 1)):
                    if tokens * chunks * 8 * 268 * programs <= 220_000:  # bytes of shared memory
                        yield rows, piece, warps, programs


def use(tile: Tile) -> None:
    module._choose_tile = lambda num_tokens, num_chunks, gated: tile


def compile_tile(tokens: int, shape: Shape, tile: Tile) -> None:
    use(tile)
    problem(tokens, shape, 1).first(module.int4_skinny_linear)


def measure(tokens: int, shape: Shape, chosen: Tile) -> None:
    ours = problem(tokens, shape, max(2, 320_000_000 // (shape.rows * shape.inputs) + 1))
    use(chosen)
    before, now = ours.microseconds(by_mixed_matmul), ours.microseconds(module.int4_skinny_linear)
    worst, fastest = ours.sweep(module.int4_skinny_linear, use, tiles(tokens, shape), ours.first(by_mixed_matmul))
    print(tokens, shape.name, shape.inputs, before, now, worst, *fastest, flush=True)


def main() -> None:
    choose = module._choose_tile  # before `use` replaces it
    pairs = [(tokens, shape) for model in sys.argv[1:] for shape in MODELS[model] for tokens in (2, 4)]
    compile_with_all_cores(compile_tile, [(*pair, tile) for pair in pairs for tile in tiles(*pair)])
    for tokens, shape in pairs:
        measure(tokens, shape, choose(tokens, -(-shape.inputs // 1024), shape.gated))


if __name__ == "__main__":
    main()
