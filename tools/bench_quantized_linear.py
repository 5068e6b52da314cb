"""Times the four products of a decoder layer, with what surrounds them, for each kind of weight: needs a GPU.

    python tools/bench_quantized_linear.py --model qwen3-8b --rows 1 16 64 256 2048

A product includes the norm before it, the gate or the addition to the residual stream. Figures are microseconds, the
median over replays of a CUDA graph that multiplies by copies of the weight in turns, which together exceed the cache.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from nanovllm.kernels.fused_linear import fused_linear, suits_fused_linear
from nanovllm.kernels.linear import linear
from nanovllm.kernels.quantized_linear import fp8_linear, int4_linear, int8_linear, pack_int4
from nanovllm.kernels.rms_norm import add_rms_norm
from nanovllm.kernels.silu_and_mul import silu_and_mul
from nanovllm.models.builtin_shapes import BUILTIN_SHAPES
from nanovllm.models.model_config import ModelConfig

CACHE_BYTES = 160_000_000  # more than the L2 cache of an H200
REPLAYS = 9
GROUP_SIZE = 128

Product = Callable[..., torch.Tensor]  # of the input and what surrounds the product


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(BUILTIN_SHAPES), default="qwen3-8b")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16, 64, 256, 2048])
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    args = parser.parse_args()
    sizes = layer_products(BUILTIN_SHAPES[args.model])
    print(f"{args.model} on {torch.cuda.get_device_name()}, microseconds")
    print(f"{'weights':12}{'rows':>6}" + "".join(f"{name:>10}" for name in sizes) + f"{'layer':>10}")
    for kind in args.kinds:
        times = {
            name: time_product(kind, name, outputs, inputs, args.rows) for name, (outputs, inputs) in sizes.items()
        }
        for index, rows in enumerate(args.rows):
            row = [times[name][index] for name in sizes]
            print(f"{kind:12}{rows:>6}" + "".join(f"{time:>10.1f}" for time in [*row, sum(row)]))


@dataclass(frozen=True)
class LayerProduct:
    """A product of a decoder layer, or the LM head."""

    name: str  # as in `layer_products`, or head
    outputs: int  # rows of the weight
    inputs: int

    @property
    def gated(self) -> bool:
        return self.name == "gate_up"


def layer_products(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """Returns (outputs, inputs) of the four products of a decoder layer, by name."""
    attention = config.num_heads * config.head_dim
    return {
        "qkv": (attention + 2 * config.num_kv_heads * config.head_dim, config.hidden_size),
        "o": (config.hidden_size, attention),
        "gate_up": (2 * config.intermediate_size, config.hidden_size),
        "down": (config.hidden_size, config.intermediate_size),
    }


def all_products(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """Returns those of `layer_products`, and the LM head's."""
    return layer_products(config) | {"head": (config.vocab_size, config.hidden_size)}


def time_product(kind: str, name: str, outputs: int, inputs: int, all_rows: Sequence[int]) -> list[float]:
    """Returns the microseconds of a product for each number of rows."""
    copies = max(2, CACHE_BYTES // (outputs * inputs) + 1)
    products = [KINDS[kind](outputs, inputs) for _ in range(copies)]
    times = []
    for rows in all_rows:
        hidden = torch.randn(rows, inputs, dtype=torch.bfloat16, device="cuda")
        around = surroundings(name, hidden, outputs)
        times.append(time_calls([partial(product, hidden, **around) for product in products]))
    return times


def surroundings(name: str, hidden: torch.Tensor, outputs: int) -> dict[str, Any]:
    """Returns what a decoder layer computes together with the product `name` of hidden [rows, inputs]."""
    rows, inputs = hidden.shape
    if name in ("qkv", "gate_up"):
        return {"norm_weight": hidden.new_ones(inputs), "eps": 1e-6, "gated": name == "gate_up"}
    return {"residual": torch.randn(rows, outputs, dtype=hidden.dtype, device=hidden.device)}


def time_calls(calls: Sequence[Callable[[], torch.Tensor]], busy_seconds: float = 0.0) -> float:
    """Returns the microseconds of a call.

    busy_seconds: how long the calls are repeated before. A device that has worked for a while may be clocked lower.
    """
    for call in calls[:2]:
        call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    until = time.perf_counter() + busy_seconds
    while time.perf_counter() < until:
        graph.replay()
        torch.cuda.synchronize()
    times = []
    for _ in range(REPLAYS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1000 / len(calls))
    return median(times)


def bfloat16_product(outputs: int, inputs: int) -> Product:
    weight = (torch.randn(outputs, inputs, device="cuda") * inputs**-0.5).bfloat16()

    def product(
        hidden: torch.Tensor,
        norm_weight: torch.Tensor | None = None,
        eps: float = 0.0,
        gated: bool = False,
        residual: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if suits_fused_linear(hidden, weight, gated=gated, only_adds=residual is not None):
            around = {"norm_weight": norm_weight, "eps": eps, "gated": gated, "residual": residual}
            return fused_linear(hidden, weight, **around)
        # The addition after a product is part of the next norm.
        normed = hidden if norm_weight is None else add_rms_norm(hidden, hidden, norm_weight, eps)[0]
        out = linear(normed, weight)
        return silu_and_mul(out) if gated else out

    return product


def fp8_product(outputs: int, inputs: int, *, has_blocks: bool = False) -> Product:
    weight = torch.randn(outputs, inputs, dtype=torch.bfloat16, device="cuda").to(torch.float8_e4m3fn)
    shape = (-(-outputs // 128), -(-inputs // 128)) if has_blocks else (outputs, 1)
    scale = torch.rand(shape, device="cuda") * inputs**-0.5
    return lambda hidden, **around: fp8_linear(hidden, weight, scale, **around)


def int8_product(outputs: int, inputs: int, *, quantize_input: bool = False) -> Product:
    weight = torch.randint(-127, 128, (outputs, inputs), dtype=torch.int8, device="cuda")
    scale = torch.rand(outputs, 1, device="cuda") / 127 * inputs**-0.5
    return lambda hidden, **around: int8_linear(hidden, weight, scale, quantize_input=quantize_input, **around)


def int4_product(outputs: int, inputs: int) -> Product:
    weight = pack_int4(torch.randint(0, 16, (outputs, inputs), dtype=torch.int8, device="cuda"))
    scale = (torch.rand(inputs // GROUP_SIZE, outputs, device="cuda") / 8 * inputs**-0.5).half().T
    zeros = torch.randint(0, 16, (inputs // GROUP_SIZE, outputs), device="cuda").half().T
    return lambda hidden, **around: int4_linear(hidden, weight, scale, zeros, group_size=GROUP_SIZE, **around)


KINDS: Mapping[str, Callable[[int, int], Product]] = {
    "bfloat16": bfloat16_product,
    "fp8": fp8_product,
    "fp8-blocks": partial(fp8_product, has_blocks=True),
    "int8-w8a16": int8_product,
    "int8-w8a8": partial(int8_product, quantize_input=True),
    "int4": int4_product,
}

if __name__ == "__main__":
    main()
