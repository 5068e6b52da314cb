"""bench.py with other tiles of `row_linear`, to find out what decides the time of a step of one row.

    python docs/experiments/bench_tiles.py --halves -- --model qwen3-8b --quantization fp8 --workload single …

Of the kernel as it is: --halves lets a product take half of a multiprocessor's warps and registers, so that the next
one's programs are there before it has ended. Of the kernel with a ring (row-ring.patch): --ring-kb and --kernels set
how much is copied ahead and how many kernels share a multiprocessor. --carveout asks the driver, for every kernel of
Triton, to leave all memory that may be shared memory to shared memory, in case it empties a multiprocessor to change
that between kernels.
"""

from __future__ import annotations

import argparse
import ctypes
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import triton

from nanovllm.cli.bench import main as bench
from nanovllm.kernels import row_linear, row_tiles

_PREFERRED_SHARED_MEMORY_CARVEOUT = 9  # of CUfunction_attribute


def ask_for_shared_memory() -> None:
    driver = ctypes.CDLL("libcuda.so.1")

    def loaded(module: int, function: int, *_rest: object) -> None:
        attribute = _PREFERRED_SHARED_MEMORY_CARVEOUT
        assert driver.cuFuncSetAttribute(ctypes.c_void_p(function), attribute, 100) == 0, "cuFuncSetAttribute"

    triton.knobs.runtime.kernel_load_end_hook.add(loaded)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--halves", action="store_true")
    parser.add_argument("--kernels", type=int)
    parser.add_argument("--ring-kb", type=int)
    parser.add_argument("--carveout", action="store_true")
    parser.add_argument("rest", nargs="*", help="options of bench.py, after --")
    args = parser.parse_args()
    if args.carveout:
        ask_for_shared_memory()
    choose = row_linear.choose_row_tile

    def chosen(*given: Any, **named: Any) -> Any:
        tile = choose(*given, **named)
        if args.halves:
            tile = tile._replace(warps=8, programs=1)
        if args.kernels:
            _num_chunks, _num_outputs, input_bytes, memory = given
            tile = tile._replace(kernels=args.kernels).with_stages(memory, input_bytes, named["gated"])
        if args.ring_kb:
            stages = args.ring_kb * 1024 // tile.piece_bytes(named["gated"])
            tile = tile._replace(stages=max(min(tile.stages, stages), 1))
        return tile

    row_linear.choose_row_tile = chosen
    if args.halves:
        row_tiles.RowTile.max_registers = property(lambda self: 128)
    sys.exit(bench(args.rest, prog="bench.py"))


if __name__ == "__main__":
    main()
