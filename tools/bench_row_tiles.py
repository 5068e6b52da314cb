"""Times the tiles of `row_linear` at the products of a decoder layer, alone and in decode steps: needs a GPU.

    python tools/bench_row_tiles.py --model qwen3-8b --kinds fp8 int8 int4 --steps

Tiles are first compiled by many processes; a tile that does not compile ends the run when it is timed. A product
includes the norm before it, the gate or the addition to the residual stream, and is timed over copies of the weight
that together exceed the cache. A line has the largest relative difference of a tile's result from that of the engine's
tile, the time of the engine's tile, and the fastest tiles, in microseconds: outputs of a warp, chunks that it loads
together, warps of a program, programs of a multiprocessor. Of 16-bit weights, which are timed if asked for, the engine
multiplies only o of 8B with this kernel.

With --steps, each tile is then given to one product of all layers in an engine with random weights, between steps with
the engine's tile. Choose by that: step_timer.py says why, and what is printed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from nanovllm.kernels.int4_packing import pack_int4
from nanovllm.kernels.row_linear import _SUMS_BYTES, row_linear
from nanovllm.kernels.row_tiles import RowShape, RowTile
from nanovllm.kernels.triton_support import next_power_of_2, shared_memory
from nanovllm.models.builtin_shapes import BUILTIN_SHAPES
from tools.bench_dense_tiles import compile_all
from tools.bench_quantized_linear import CACHE_BYTES, GROUP_SIZE, LayerProduct, layer_products, surroundings, time_calls
from tools.step_timer import Chooser, StepTimer, dotted, make_engine

KINDS = {"bfloat16": 16, "fp8": 8, "fp8-blocks": 8, "int8": 8, "int4": 4}  # bits
BUSY_SECONDS = 0.008  # for which a tile is repeated before it is timed
OTHER_REGISTERS = 24  # of a thread, beside weights
SHOWN = 8
CHOOSER = Chooser(
    RowShape, "choose_tile", lambda shape, _: (shape.output_size * (1 + shape.is_gated), shape.input_size)
)


@dataclass(frozen=True)
class Shape(LayerProduct):
    kind: str  # of KINDS

    def __str__(self) -> str:
        return f"{self.kind:11}{self.name:8}{self.inputs:6}"

    def tiles(self, memory: int) -> Iterator[RowTile]:
        """Returns the tiles that registers, and `memory` bytes of shared memory, have room for."""
        num_chunks = -(-self.inputs * KINDS[self.kind] // 4096)
        memory_of_program = next_power_of_2(self.inputs) * (2 if self.kind == "int4" else 4) + _SUMS_BYTES
        words = 6 if self.kind == "int4" else 4  # of a chunk, in a lane; in INT4 with scale and zero
        for outputs, chunks in product((1, 2, 4), (1, 2, 3, 4, 5, 7, 8, 10)):
            registers = 2 * words * outputs * chunks * (1 + self.gated) + OTHER_REGISTERS
            for warps, programs in ((4, 3), (4, 4), (4, 5), (8, 1), (8, 2), (16, 1)):
                tile = RowTile(outputs, chunks, warps, programs)
                has_room = registers <= tile.max_registers and programs * memory_of_program <= memory
                if num_chunks % chunks == 0 and has_room:
                    yield tile

    def weight(self) -> dict[str, torch.Tensor]:
        size = (self.outputs, self.inputs)
        if self.kind == "int4":
            return {"weight": pack_int4(torch.randint(0, 16, size, dtype=torch.int8, device="cuda"))}
        if self.kind == "bfloat16":
            return {"weight": torch.randn(size, dtype=torch.bfloat16, device="cuda") * self.inputs**-0.5}
        numbers = torch.randint(-120, 120, size, dtype=torch.int8, device="cuda")
        return {"weight": numbers if self.kind == "int8" else numbers.half().to(torch.float8_e4m3fn)}

    def arguments(self) -> dict[str, Any]:
        """Returns the arguments of `row_linear` but for the weight."""
        x = torch.randn(1, self.inputs, dtype=torch.bfloat16, device="cuda")
        given: dict[str, Any] = {"x": x, **surroundings(self.name, x, self.outputs)}
        if self.kind == "int4":
            groups = (self.inputs // GROUP_SIZE, self.outputs)
            given["scale"] = (torch.rand(groups, device="cuda") * 0.1 * self.inputs**-0.5).half().T
            given |= {"zeros": torch.randint(0, 16, groups, device="cuda").half().T, "group_size": GROUP_SIZE}
        elif self.kind == "fp8-blocks":
            blocks = (-(-self.outputs // 128), -(-self.inputs // 128))
            given["scale"] = torch.rand(blocks, device="cuda") * 0.01 * self.inputs**-0.5
        elif self.kind != "bfloat16":
            given["scale"] = torch.rand(self.outputs, 1, device="cuda") * 0.01 * self.inputs**-0.5
        return given


def compile_tile(shape: Shape, tile: RowTile) -> None:
    """Compiles a kernel into Triton's cache."""
    row_linear(**shape.weight(), **shape.arguments(), tile=tile)


def time_alone(shape: Shape, tiles: Sequence[RowTile]) -> None:
    """Prints the line of a product alone."""
    copies = max(2, CACHE_BYTES * 8 // (shape.outputs * shape.inputs * KINDS[shape.kind]) + 1)
    weights, given = [shape.weight() for _ in range(copies)], shape.arguments()

    def timed(tile: RowTile | None) -> float:
        return time_calls([partial(row_linear, **weight, **given, tile=tile) for weight in weights], BUSY_SECONDS)

    expected = row_linear(**weights[0], **given).float()
    found, worst = [], 0.0
    for tile in tiles:
        got = row_linear(**weights[0], **given, tile=tile).float()
        worst = max(worst, float((got - expected).norm() / expected.norm()))
        found.append((timed(tile), tile))
    found.sort()
    fastest = "  ".join(f"{time_us:.2f} {dotted(tile)}" for time_us, tile in found[:SHOWN])
    print(f"{shape}  {worst:.5f}  chosen {timed(None):.2f}   {fastest}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(BUILTIN_SHAPES), default="qwen3-8b")
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS)[1:])
    parser.add_argument("--steps", action="store_true", help="time tiles in decode steps too")
    args = parser.parse_args()
    memory = shared_memory(torch.device("cuda", torch.cuda.current_device()))
    sizes = layer_products(BUILTIN_SHAPES[args.model])
    shapes = [Shape(name, *size, kind) for kind in args.kinds for name, size in sizes.items()]
    tiles = {shape: list(shape.tiles(memory)) for shape in shapes}
    compile_all(compile_tile, [(shape, tile) for shape, some in tiles.items() for tile in some])
    print(f"{args.model} on {torch.cuda.get_device_name()}, microseconds")
    for shape, some in tiles.items():
        time_alone(shape, some)
    for kind in args.kinds if args.steps else ():
        with make_engine(args.model, kind) as llm:
            of_kind = {shape: some for shape, some in tiles.items() if shape.kind == kind}
            StepTimer(llm, 1, CHOOSER, dotted).time_all(of_kind)


if __name__ == "__main__":
    main()
