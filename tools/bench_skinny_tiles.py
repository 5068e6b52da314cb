"""Times the tiles of `skinny_linear` in decode steps of 16-bit weights: needs a GPU.

    python tools/bench_skinny_tiles.py --model qwen3-8b --rows 1

Tiles are first compiled by many processes. Then each is given to one product of all layers, or to the LM head, in an
engine with random weights, between steps with the engine's tile; and the fastest two of each product to all of them. A
line has the median microseconds of a step with the engine's tiles, and by how many one with each other tile is longer
(+) or shorter: outputs of a program, and its warps. The same tiles captured twice differ by up to 10.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from nanovllm.kernels import skinny_linear as skinny
from nanovllm.models.builtin_shapes import BUILTIN_SHAPES
from tools.bench_dense_tiles import compile_all
from tools.bench_quantized_linear import layer_products, surroundings
from tools.step_timer import StepTimer, make_engine

BYTES_OF_THREAD = (32, 512)  # of the weight: fewer are not read 16 at a time twice, more do not fit in registers
MIN_PROGRAMS = 132


class SkinnyTile(NamedTuple):
    outputs: int  # of a program; if gated, as many gates and as many ups
    warps: int  # of a program


class Shape(NamedTuple):
    name: str
    outputs: int  # rows of the weight
    inputs: int

    def __str__(self) -> str:
        return f"{self.name:8}{self.outputs:7}{self.inputs:6}"

    @property
    def gated(self) -> bool:
        return self.name == "gate_up"

    def tiles(self) -> Iterator[SkinnyTile]:
        """Returns the tiles that registers have room for, and that leave no multiprocessor without a program."""
        part, num_parts = skinny._choose_parts(self.inputs, 2)
        sides = 1 + self.gated
        for outputs, warps in product((1, 2, 4, 8, 16, 32), (1, 2, 4, 8, 16)):
            bytes_of_thread = 2 * outputs * sides * part * num_parts // (32 * warps)
            has_room = BYTES_OF_THREAD[0] <= bytes_of_thread <= BYTES_OF_THREAD[1]
            if has_room and self.outputs // sides // outputs >= MIN_PROGRAMS:
                yield SkinnyTile(outputs, warps)


def choosing(tiles: Mapping[Shape, SkinnyTile]) -> AbstractContextManager[object]:
    """Returns a context in which `skinny_linear` takes these tiles."""
    of_sizes = {(shape.outputs, shape.inputs): tile for shape, tile in tiles.items()}
    choose_tile = skinny._choose_tile

    def choose(num_tokens: int, weight: torch.Tensor, gated: bool) -> tuple[int, int]:
        return of_sizes.get(tuple(weight.shape)) or choose_tile(num_tokens, weight, gated)

    return mock.patch.object(skinny, "_choose_tile", choose)


def compile_tile(shape: Shape, tile: SkinnyTile, rows: int) -> None:
    """Compiles a kernel into Triton's cache."""
    hidden = torch.randn(rows, shape.inputs, dtype=torch.bfloat16, device="cuda")
    weight = torch.empty(shape.outputs, shape.inputs, dtype=torch.bfloat16, device="cuda")
    around: dict[str, Any] = {} if shape.name == "head" else surroundings(shape.name, hidden, shape.outputs)
    with choosing({shape: tile}):
        skinny.skinny_linear(hidden, weight, **around)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(BUILTIN_SHAPES), default="qwen3-8b")
    parser.add_argument("--rows", type=int, default=1, help="1 to 4")
    args = parser.parse_args()
    config = BUILTIN_SHAPES[args.model]
    sizes = layer_products(config) | {"head": (config.vocab_size, config.hidden_size)}
    tiles = {shape: list(shape.tiles()) for shape in (Shape(name, *size) for name, size in sizes.items())}
    compile_all(compile_tile, [(shape, tile, args.rows) for shape, some in tiles.items() for tile in some])
    print(f"{args.model} on {torch.cuda.get_device_name()}, microseconds")
    with make_engine(args.model, None) as llm:
        StepTimer(llm, args.rows, choosing, lambda tile: "·".join(map(str, tile))).time_all(tiles)


if __name__ == "__main__":
    main()
