"""What the sweeps beside this file share: the products of models, compiling many variants, and timing them."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import torch

from tools.bench_quantized_linear import time_calls

Product = Callable[..., torch.Tensor]
Tile = tuple[int, int, int, int]  # outputs of a warp, chunks of a piece, warps, programs of a multiprocessor


class Shape(NamedTuple):
    name: str
    inputs: int
    outputs: int

    @property
    def gated(self) -> bool:
        return self.name == "gate_up"

    @property
    def rows(self) -> int:
        return self.outputs * (1 + self.gated)


def shapes(hidden: int, attention: int, qkv: int, intermediate: int) -> list[Shape]:
    return [
        Shape("qkv", hidden, qkv),
        Shape("o", attention, hidden),
        Shape("gate_up", hidden, intermediate),
        Shape("down", intermediate, hidden),
    ]


MODELS = {
    "0.6": shapes(1024, 2048, 4096, 3072),
    "8": shapes(4096, 4096, 6144, 12288),
    "32": shapes(5120, 8192, 10240, 25600),
}


class Problem:
    """A product, with copies of the weight that are multiplied in turns, and what surrounds it in a decoder layer."""

    def __init__(self, shape: Shape, tokens: int, weights: Sequence[torch.Tensor], **named: Any) -> None:
        self.x = torch.randn(tokens, shape.inputs, device="cuda").bfloat16()
        self.weights, self.named = weights, {**named, "gated": shape.gated}
        if shape.name in ("qkv", "gate_up"):
            norm_weight = torch.rand(shape.inputs, device="cuda").bfloat16() + 0.5
            self.named |= {"norm_weight": norm_weight, "eps": 1e-6}
        else:
            self.named["residual"] = torch.randn(tokens, shape.outputs, device="cuda").bfloat16()

    def first(self, product: Product) -> torch.Tensor:
        return product(self.x, self.weights[0], **self.named).float()

    def microseconds(self, product: Product, busy_seconds: float = 0.03) -> float:
        calls = [partial(product, self.x, weight, **self.named) for weight in self.weights]
        return round(time_calls(calls, busy_seconds), 2)

    def sweep(
        self, product: Product, use: Callable[[Tile], None], tiles: Iterable[Tile], expected: torch.Tensor
    ) -> tuple[str, list[tuple[float, Tile]]]:
        """Returns the largest relative difference from `expected`, and the fastest tiles with their microseconds."""
        found, worst = [], 0.0
        for tile in tiles:
            use(tile)
            worst = max(worst, float((self.first(product) - expected).norm() / expected.norm()))
            found.append((self.microseconds(product, 0.008), tile))
        return f"{worst:.5f}", sorted(found)[:8]


def compile_with_all_cores(compile_one: Callable[..., None], jobs: Sequence[tuple[Any, ...]]) -> None:
    """Compiles variants into Triton's cache, each in one of many processes, and prints what went wrong."""
    with ProcessPoolExecutor((os.cpu_count() or 2) - 1, mp_context=multiprocessing.get_context("spawn")) as pool:
        for job, future in [(job, pool.submit(compile_one, *job)) for job in jobs]:
            if error := future.exception():
                print(*job, error)
