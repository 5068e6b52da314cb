"""Times tiles of `row_linear`, and `skinny_linear`, at shapes of models.

    python docs/experiments/sweep_row_linear.py 0.6 8 32

Needs a Hopper GPU and `row-linear.patch`. Variants are first compiled by many processes. A line: the shape, the
microseconds of `skinny_linear` before and after, the largest relative difference, and the fastest tiles (outputs of a
warp, chunks of a piece, warps, programs of a multiprocessor).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "docs" / "experiments")]

from shapes import MODELS, Shape, compile_with_all_cores  # noqa: E402

from nanovllm.kernels import row_linear as module  # noqa: E402
from nanovllm.kernels.skinny_linear import skinny_linear  # noqa: E402
from tools.bench_quantized_linear import time_calls  # noqa: E402

Tile = tuple[int, int, int, int]


def arguments(kind: str, shape: Shape, copies: int) -> tuple[torch.Tensor, list[torch.Tensor], dict[str, Any]]:
    rows = shape.outputs * (1 + shape.gated)
    numbers = [torch.randint(-120, 120, (rows, shape.inputs), dtype=torch.int8, device="cuda") for _ in range(copies)]
    weights = numbers if kind == "int8" else [each.half().to(torch.float8_e4m3fn) for each in numbers]
    scale = torch.rand(rows, 1, device="cuda") * 0.01 * shape.inputs**-0.5
    named: dict[str, Any] = {"scale": scale, "gated": shape.gated}
    if shape.name in ("qkv", "gate_up"):
        named |= {"norm_weight": torch.rand(shape.inputs, device="cuda").bfloat16() + 0.5, "eps": 1e-6}
    else:
        named["residual"] = torch.randn(1, shape.outputs, device="cuda").bfloat16()
    return torch.randn(1, shape.inputs, device="cuda").bfloat16(), weights, named


def tiles(shape: Shape) -> Iterator[Tile]:
    chunks = -(-shape.inputs // 512)
    for rows in (1, 2) if shape.gated else (2, 4):
        for piece in (1, 2, 3, 4, 5):
            registers = 4 * piece * rows * (1 + shape.gated) * 2  # of the weights alone
            if chunks % piece == 0 and chunks // piece <= 16 and registers <= 100:
                for warps, programs in ((4, 3), (4, 4), (8, 1), (8, 2), (16, 1)):
                    yield rows, piece, warps, programs


def compile_tile(kind: str, shape: Shape, tile: Tile) -> str | None:
    """Returns what went wrong."""
    try:
        use(tile)
        x, weights, named = arguments(kind, shape, 1)
        module.row_linear(x, weights[0], **named)
    except Exception as error:
        return f"{kind} {shape} {tile}: {error}"
    return None


def use(tile: Tile) -> None:
    module._choose_tile = lambda num_chunks, gated: tile


def main() -> None:
    jobs = [
        (kind, shape, tile)
        for model in sys.argv[1:]
        for shape in MODELS[model]
        for kind in ("fp8", "int8")
        for tile in tiles(shape)
    ]
    compile_with_all_cores(compile_tile, jobs)
    for kind, shape in dict.fromkeys((kind, shape) for kind, shape, _ in jobs):
        measure(kind, shape)


def measure(kind: str, shape: Shape) -> None:
    copies = max(2, 160_000_000 // (shape.outputs * (1 + shape.gated) * shape.inputs) + 1)
    x, weights, named = arguments(kind, shape, copies)

    def microseconds(product: Callable[..., torch.Tensor], busy_seconds: float) -> float:
        return round(time_calls([partial(product, x, weight, **named) for weight in weights], busy_seconds), 2)

    expected = skinny_linear(x, weights[0], **named).float()
    before = microseconds(skinny_linear, 0.03)
    found, worst = [], 0.0
    for tile in tiles(shape):
        use(tile)
        got = module.row_linear(x, weights[0], **named).float()
        worst = max(worst, float((got - expected).norm() / expected.norm()))
        found.append((microseconds(module.row_linear, 0.008), tile))
    after = microseconds(skinny_linear, 0.03)
    print(kind, shape.name, shape.inputs, before, after, f"{worst:.5f}", *sorted(found)[:8], flush=True)


if __name__ == "__main__":
    main()
