"""Times tiles of `int4_skinny_linear` with several tokens, and `mixed_matmul`, at shapes of models.

    python docs/experiments/sweep_int4_rows.py 8 32

Needs a Hopper GPU and `int4-few-rows.patch`. A line: tokens, the shape, the microseconds of `mixed_matmul` (with the
norm's kernel before it) and of the tile that the engine would take, the largest relative difference, and the fastest
tiles (outputs of a warp, chunks of a piece, warps, programs of a multiprocessor).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "docs" / "experiments")]

from shapes import MODELS, Shape, compile_with_all_cores  # noqa: E402

from nanovllm.kernels import int4_skinny_linear as module  # noqa: E402
from nanovllm.kernels.int4_packing import pack_int4  # noqa: E402
from nanovllm.kernels.mixed_matmul import mixed_matmul  # noqa: E402
from nanovllm.kernels.rms_norm import rms_norm  # noqa: E402
from tools.bench_quantized_linear import time_calls  # noqa: E402

Tile = tuple[int, int, int, int]
choose_tile = module._choose_tile


def arguments(tokens: int, shape: Shape, copies: int) -> tuple[torch.Tensor, list[torch.Tensor], dict[str, Any]]:
    rows, groups = shape.outputs * (1 + shape.gated), shape.inputs // 128
    weights = [pack_int4(torch.randint(0, 16, (rows, shape.inputs), device="cuda")) for _ in range(copies)]
    scale = torch.rand(groups, rows, device="cuda").T / 8 * shape.inputs**-0.5
    zeros = torch.randint(0, 16, (groups, rows), device="cuda").float().T
    named: dict[str, Any] = {"scale": scale, "zeros": zeros, "group_size": 128, "gated": shape.gated}
    if shape.name in ("qkv", "gate_up"):
        named |= {"norm_weight": torch.rand(shape.inputs, device="cuda").bfloat16() + 0.5, "eps": 1e-6}
    else:
        named["residual"] = torch.randn(tokens, shape.outputs, device="cuda").bfloat16()
    return torch.randn(tokens, shape.inputs, device="cuda").bfloat16(), weights, named


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
                    if tokens * chunks * 8 * 268 * programs <= 220_000:
                        yield rows, piece, warps, programs


def use(tile: Tile) -> None:
    module._choose_tile = lambda num_tokens, num_chunks, gated: tile


def compile_tile(tokens: int, shape: Shape, tile: Tile) -> str | None:
    """Returns what went wrong."""
    try:
        use(tile)
        x, weights, named = arguments(tokens, shape, 1)
        module.int4_skinny_linear(x, weights[0], **named)
    except Exception as error:
        return f"{tokens} {shape} {tile}: {error}"
    return None


def measure(tokens: int, shape: Shape) -> None:
    copies = max(2, 320_000_000 // (shape.outputs * (1 + shape.gated) * shape.inputs) + 1)
    x, weights, named = arguments(tokens, shape, copies)

    def microseconds(product: Any, busy_seconds: float) -> float:
        return round(time_calls([partial(product, x, weight, **named) for weight in weights], busy_seconds), 2)

    expected = by_mixed_matmul(x, weights[0], **named).float()
    mixed = microseconds(by_mixed_matmul, 0.03)
    use(choose_tile(tokens, -(-shape.inputs // 1024), shape.gated))
    chosen, found, worst = microseconds(module.int4_skinny_linear, 0.03), [], 0.0
    for tile in tiles(tokens, shape):
        use(tile)
        got = module.int4_skinny_linear(x, weights[0], **named).float()
        worst = max(worst, float((got - expected).norm() / expected.norm()))
        found.append((microseconds(module.int4_skinny_linear, 0.008), tile))
    print(tokens, shape.name, shape.inputs, mixed, chosen, f"{worst:.5f}", *sorted(found)[:6], flush=True)


def main() -> None:
    pairs = [(tokens, shape) for model in sys.argv[1:] for shape in MODELS[model] for tokens in (2, 4)]
    compile_with_all_cores(compile_tile, [(*pair, tile) for pair in pairs for tile in tiles(*pair)])
    for pair in pairs:
        measure(*pair)


if __name__ == "__main__":
    main()
