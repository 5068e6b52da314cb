"""Times the tiles of `skinny_linear` in decode steps of one row with 16-bit weights: needs a GPU.

    python tools/bench_skinny_tiles.py --model qwen3-8b

Tiles are first compiled by many processes. Then each is given to one product of all layers, or to the LM head, in an
engine with random weights, between steps with the engine's tile (step_timer.py says why, and what is printed). A tile
is outputs of a program · its warps.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from nanovllm.kernels import skinny_linear as skinny
from nanovllm.models.builtin_shapes import BUILTIN_SHAPES
from tools.bench_dense_tiles import compile_all
from tools.bench_quantized_linear import LayerProduct, all_products, surroundings
from tools.step_timer import Chooser, StepTimer, choosing, dotted, make_engine

BYTES_OF_THREAD = (32, 512)  # of the weight: with fewer, it reads 16 less than twice; more do not fit in registers
MIN_PROGRAMS = 132
CHOOSER = Chooser(skinny, "_choose_tile", lambda num_tokens, weight, gated: tuple(weight.shape))


class SkinnyTile(NamedTuple):
    outputs: int  # of a program; if gated, as many gates and as many ups
    warps: int  # of a program


@dataclass(frozen=True)
class Shape(LayerProduct):
    def __str__(self) -> str:
        return f"{self.name:8}{self.outputs:7}{self.inputs:6}"

    def tiles(self) -> Iterator[SkinnyTile]:
        """Returns the tiles that registers have room for, and that leave no multiprocessor without a program."""
        columns, _ = skinny._choose_parts(self.inputs, itemsize=2)
        sides = 1 + self.gated
        for outputs, warps in product((1, 2, 4, 8, 16, 32), (1, 2, 4, 8, 16)):
            bytes_of_thread = 2 * outputs * sides * columns // (32 * warps)
            has_room = BYTES_OF_THREAD[0] <= bytes_of_thread <= BYTES_OF_THREAD[1]
            if has_room and self.outputs // sides // outputs >= MIN_PROGRAMS:
                yield SkinnyTile(outputs, warps)


def compile_tile(shape: Shape, tile: SkinnyTile) -> None:
    """Compiles a kernel into Triton's cache."""
    hidden = torch.randn(1, shape.inputs, dtype=torch.bfloat16, device="cuda")
    weight = torch.empty(shape.outputs, shape.inputs, dtype=torch.bfloat16, device="cuda")
    around: dict[str, Any] = {} if shape.name == "head" else surroundings(shape.name, hidden, shape.outputs)
    with choosing(CHOOSER, {shape: tile}):
        skinny.skinny_linear(hidden, weight, **around)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(BUILTIN_SHAPES), default="qwen3-8b")
    args = parser.parse_args()
    sizes = all_products(BUILTIN_SHAPES[args.model])
    tiles = {shape: list(shape.tiles()) for shape in (Shape(name, *size) for name, size in sizes.items())}
    compile_all(compile_tile, [(shape, tile) for shape, some in tiles.items() for tile in some])
    print(f"{args.model} on {torch.cuda.get_device_name()}, microseconds")
    with make_engine(args.model, "bfloat16") as llm:
        StepTimer(llm, 1, CHOOSER, dotted).time_all(tiles)


if __name__ == "__main__":
    main()
