"""What the sweeps beside this file share: the products of models, and compiling many variants."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any, NamedTuple


class Shape(NamedTuple):
    name: str
    inputs: int
    outputs: int

    @property
    def gated(self) -> bool:
        return self.name == "gate_up"


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


def compile_with_all_cores(compile_one: Callable[..., str | None], jobs: Sequence[tuple[Any, ...]]) -> None:
    """Compiles variants into Triton's cache, each in one of many processes, and prints what went wrong."""
    with ProcessPoolExecutor((os.cpu_count() or 2) - 1, mp_context=multiprocessing.get_context("spawn")) as pool:
        print(*filter(None, pool.map(compile_one, *zip(*jobs, strict=True))), sep="\n")
