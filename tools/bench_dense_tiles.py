"""Times the tiles of `dense_matmul` at the products of a decoder layer and the LM head: needs a Hopper GPU.

    python tools/bench_dense_tiles.py --model qwen3-0.6b --kinds bfloat16 --rows 16 64 256

Every tile is compiled first, by as many processes as there are cores. Then each product is timed with each tile, over
copies of the weight that together exceed the cache, as the median over replays of a CUDA graph. For each number of rows
it prints the fastest tiles, the one that `choose_dense_tile` takes, and, to compare, what the engine would take without
`dense_matmul`: the BLAS, with SiLU · mul after it but without the residual, which the next norm adds; or
`quantized_matmul`. With FP8 weights that have a scale for each output, it also prints torch's product, as the BLAS's.

With --steps, each tile is then given to one product of all layers in an engine with random weights, between steps with
the engine's tile. Choose by that: step_timer.py says why, and what is printed.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from nanovllm.kernels import dense_matmul as dense
from nanovllm.kernels.dense_tiles import DenseTile, choose_dense_tile, possible_tiles
from nanovllm.kernels.linear import linear
from nanovllm.kernels.matmul_units import MAX_COUNTED_TOKENS
from nanovllm.kernels.quantized_gpu import _INPUTS, _MAX_BLOCK_TOKENS, _MAX_GATED_BLOCK_TOKENS, GROUP_SIZE, _choose_tile
from nanovllm.kernels.quantized_matmul import quantized_matmul
from nanovllm.kernels.silu_and_mul import silu_and_mul
from nanovllm.kernels.triton_support import multiprocessor_count, shared_memory
from nanovllm.models.builtin_shapes import BUILTIN_SHAPES
from tools.bench_quantized_linear import CACHE_BYTES, LayerProduct, all_products, time_calls
from tools.step_timer import Chooser, StepTimer, make_engine

KINDS = ("bfloat16", "fp8", "fp8-blocks")
FP8 = torch.float8_e4m3fn
MEMORY = 227 << 10
SHOWN = 3

Times = list[tuple[float, str]]  # microseconds, and what took them


@dataclass(frozen=True)
class Shape(LayerProduct):
    kind: str  # of KINDS

    def __str__(self) -> str:
        return f"{self.kind:13}{self.name:8}"

    @property
    def is_fp8(self) -> bool:
        return self.kind.startswith("fp8")

    @property
    def has_groups(self) -> bool:
        return self.kind == "fp8-blocks"

    @property
    def has_residual(self) -> bool:
        return self.name in ("o", "down")

    def arguments(self, rows: int, device: str) -> tuple[tuple[torch.Tensor, torch.Tensor], dict[str, Any]]:
        """Returns the arguments of `dense_matmul`, with one weight."""
        half = {"dtype": torch.bfloat16, "device": device}
        dtype = FP8 if self.is_fp8 else torch.bfloat16
        x = torch.randn(rows, self.inputs, **half).to(dtype)
        weight = (torch.randn(self.outputs, self.inputs, **half) * self.inputs**-0.5).to(dtype)
        named: dict[str, Any] = {"gated": self.gated, "dtype": torch.bfloat16}
        if self.has_residual:
            named["residual"] = torch.randn(rows, self.outputs, **half)
        if self.kind == "fp8":
            named |= {
                "scale": torch.ones(self.outputs, 1, device=device),
                "x_scale": torch.ones(rows, 1, device=device),
            }
        elif self.has_groups:
            groups = -(-self.inputs // 128)
            named["scale"] = torch.ones(-(-self.outputs // 128), groups, device=device)
            named["x_scale"] = torch.ones(groups, -(-rows // 16) * 16, device=device).T
        return (x, weight), named

    def gate(self, out: torch.Tensor) -> torch.Tensor:
        """Does what follows a product that does not include it."""
        return silu_and_mul(out) if self.gated else out

    def tiles(self, rows: int) -> list[DenseTile]:
        found = list(possible_tiles(rows, MEMORY, self.has_groups))
        most = max(tile.tokens for tile in found)
        return [tile for tile in found if min(rows, 8 * most) <= 8 * tile.tokens]


def _prepare_compiling() -> None:
    """Lets this process compile for a Hopper GPU that it does not use."""
    from triton.runtime import driver

    from tests.kernels.compile_gluon_for_hopper import compile_launches_of
    from tests.kernels.hopper_driver import HopperDriver

    driver.set_active(HopperDriver())
    compile_launches_of(dense._dense_matmul_kernel, PDL=True, launch_pdl=True)


def compile_tile(shape: Shape, tile: DenseTile, rows: int) -> None:
    """Compiles a kernel into Triton's cache."""
    (x, weight), named = shape.arguments(rows, "cpu")
    dense.dense_matmul(x, weight, **named, tile=tile)


def _compiled_rows(rows: int) -> int:
    """Returns a number of rows for which the same variant is compiled, and not for each."""
    return 16 if rows <= MAX_COUNTED_TOKENS else 2 * MAX_COUNTED_TOKENS


def _sizes(itemsize: int, num_tokens: int, rows: int, row_bytes: int, **others: object) -> tuple[int, int]:
    """Returns the weight's (outputs, inputs), from what `choose_dense_tile` takes."""
    return rows, row_bytes // itemsize


def compile_all(
    compile_one: Callable[..., None], jobs: Sequence[tuple[Any, ...]], prepare: Callable[[], None] | None = None
) -> None:
    """Calls `compile_one` for each of `jobs`, in as many processes as there are cores, and prints what goes wrong.

    prepare: what each process calls first.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(os.cpu_count() or 1, mp_context=context, initializer=prepare) as pool:
        for error in filter(None, pool.map(partial(_error_of, compile_one), jobs)):
            print("not compiled:", error)


def _error_of(compile_one: Callable[..., None], job: tuple[Any, ...]) -> str | None:
    """Compiles. Returns what went wrong as text, since not every error of the compiler can be pickled."""
    try:
        compile_one(*job)
    except Exception as error:
        return f"{' '.join(map(str, job))}: {type(error).__name__}: {error}"
    return None


def without_dense(shape: Shape, x: torch.Tensor, named: Mapping[str, Any]) -> Callable[..., torch.Tensor]:
    """Returns the product, of any weight of the shape, as it would be without `dense_matmul`."""
    if not shape.is_fp8:
        return lambda weight: shape.gate(linear(x, weight))
    if shape.has_groups and len(x) > (_MAX_GATED_BLOCK_TOKENS if shape.gated else _MAX_BLOCK_TOKENS):
        rows = named["x_scale"].shape[0]
        padded = torch.nn.functional.pad(x.view(torch.int8), (0, 0, 0, rows - len(x))).view(FP8)
        scales = {"scale_a": named["x_scale"], "scale_b": named["scale"].T}
        return lambda weight: shape.gate(torch._scaled_mm(padded, weight.T, **scales, out_dtype=torch.bfloat16))
    x_scale = named["x_scale"][: len(x)].T.contiguous().T
    inputs, group_size = (GROUP_SIZE, GROUP_SIZE) if shape.has_groups else (_INPUTS, 0)

    def multiplied(weight: torch.Tensor) -> torch.Tensor:
        tile = _choose_tile(x.view(torch.int8), weight, gated=shape.gated, inputs=inputs)
        return quantized_matmul(x, weight, tile=tile, group_size=group_size, **{**named, "x_scale": x_scale})

    return multiplied


def by_torch(shape: Shape, x: torch.Tensor, named: Mapping[str, Any]) -> Callable[..., torch.Tensor]:
    """Returns torch's product of FP8 with scales of rows, with SiLU · mul after it but without the residual."""
    options = {"scale_a": named["x_scale"], "scale_b": named["scale"].T.contiguous(), "out_dtype": torch.bfloat16}
    return lambda weight: shape.gate(torch._scaled_mm(x, weight.T, **options, use_fast_accum=True))


def time_shape(shape: Shape, all_rows: Sequence[int], busy_seconds: float) -> dict[int, tuple[Times, Times]]:
    """Returns, for each number of rows, the microseconds of all tiles, fastest first; and those to compare with."""
    device = torch.device("cuda", torch.cuda.current_device())
    copies = max(2, CACHE_BYTES // (shape.outputs * shape.inputs * (1 if shape.is_fp8 else 2)) + 1)
    weights = [shape.arguments(1, "cuda")[0][1] for _ in range(copies)]
    found = {}
    for rows in all_rows:
        (x, _), named = shape.arguments(rows, "cuda")

        def timed(call: Callable[..., torch.Tensor]) -> float:
            return time_calls([partial(call, weight) for weight in weights], busy_seconds)

        def dense_with(tile: DenseTile, *, x: torch.Tensor = x, named: Mapping[str, Any] = named) -> float:
            return timed(lambda weight: dense.dense_matmul(x, weight, **named, tile=tile))

        times = []
        for tile in shape.tiles(rows):
            try:
                times.append((dense_with(tile), describe(tile)))
            except Exception as error:
                print(f"{shape.name} {rows} {tile}: {type(error).__name__}: {error}"[:300])
        chosen = choose_dense_tile(
            rows,
            shape.outputs,
            shape.inputs * x.itemsize,
            has_groups=shape.has_groups,
            num_multiprocessors=multiprocessor_count(device),
            memory=shared_memory(device),
        )
        times.sort()
        others = [(dense_with(chosen), f"chosen {describe(chosen)}")]
        ways = {"without": without_dense, "torch": by_torch} if shape.kind == "fp8" else {"without": without_dense}
        for name, way in ways.items():
            try:
                others.append((timed(way(shape, x, named)), name))
            except Exception as error:
                print(f"{shape.name} {rows} {name}: {type(error).__name__}: {error}"[:300])
        found[rows] = times, others
    return found


def describe(tile: DenseTile) -> str:
    return f"{tile.warpgroups}w t{tile.tokens} p{tile.parts} s{tile.stages}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(BUILTIN_SHAPES), default="qwen3-0.6b")
    parser.add_argument("--rows", type=int, nargs="+", default=[16, 64, 128, 256])
    parser.add_argument("--products", nargs="+", default=None, help="qkv, o, gate_up, down, head; default: all")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=["bfloat16"])
    parser.add_argument(
        "--busy", type=float, default=0.0, help="seconds for which a tile is repeated before it is timed"
    )
    parser.add_argument("--steps", action="store_true", help="time tiles in decode steps too")
    parser.add_argument("--json", type=Path, help="where to write all times of products alone")
    args = parser.parse_args()
    sizes = all_products(BUILTIN_SHAPES[args.model])
    shapes = [
        Shape(name, *size, kind)
        for kind in args.kinds
        for name, size in sizes.items()
        if name in (args.products or sizes)
    ]
    compile_all(
        compile_tile,
        sorted(
            {(shape, tile, _compiled_rows(n)) for shape in shapes for n in args.rows for tile in shape.tiles(n)},
            key=str,
        ),
        _prepare_compiling,
    )
    print(f"{args.model} on {torch.cuda.get_device_name()}, microseconds")
    everything: list[dict[str, Any]] = []
    for shape in shapes:
        for rows, (times, others) in time_shape(shape, args.rows, args.busy).items():
            shown = [*times[:SHOWN], *others]
            print(
                f"{shape.kind:13} {shape.name:8}{rows:>5}  " + "   ".join(f"{time:6.1f} {name}" for time, name in shown)
            )
            everything.append({**asdict(shape), "rows": rows, "times": [*times, *others]})
    if args.json is not None:
        args.json.write_text(json.dumps(everything))
    for kind in args.kinds if args.steps else ():
        chooser = Chooser(dense, "choose_dense_tile", partial(_sizes, 2 if kind == "bfloat16" else 1))
        with make_engine(args.model, kind, max(args.rows)) as llm:
            for rows in args.rows:
                print(f"{kind}, steps of {rows} rows")
                tiles = {shape: shape.tiles(rows) for shape in shapes if shape.kind == kind}
                StepTimer(llm, rows, chooser, describe).time_all(tiles)


if __name__ == "__main__":
    main()
