"""Times the experts of a sparse layer, for each kind of weight: needs a GPU.

    python tools/bench_experts.py --model qwen3-30b-a3b --tokens 1 16 128 4096

Sorting, both products and the sum are included; routing is not. With few tokens the norm is, too. Figures are
microseconds, the median over replays of a CUDA graph in which tokens with other experts take turns.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(1, str(Path(__file__).resolve().parent))

from bench_quantized_linear import GROUP_SIZE, time_calls

from nanovllm.kernels.chosen_experts import MAX_FEW_TOKENS
from nanovllm.kernels.expert_matrices import ExpertMatrices
from nanovllm.kernels.expert_routing import route
from nanovllm.kernels.experts import experts_mlp
from nanovllm.kernels.quantized_experts import quantized_experts_mlp
from nanovllm.models.builtin_shapes import BUILTIN_SHAPES

BLOCK = 128
MAX_TURNS = 24

Matrices = Callable[[int, int, int, int], torch.Tensor | ExpertMatrices]  # experts, outputs, inputs, pieces


def main() -> None:
    sparse = sorted(name for name, config in BUILTIN_SHAPES.items() if config.experts is not None)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sparse, default=sparse[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 4, 16, 64, 128, 256, 512, 4096])
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    args = parser.parse_args()
    print(f"{args.model} on {torch.cuda.get_device_name()}, microseconds")
    print(f"{'weights':12}" + "".join(f"{count:>9}" for count in args.tokens))
    for kind in args.kinds:
        times = time_experts(args.model, kind, args.tokens)
        print(f"{kind:12}" + "".join(f"{time:>9.1f}" for time in times), flush=True)


def time_experts(model: str, kind: str, counts: list[int]) -> list[float]:
    """Returns the microseconds of a layer's experts for each number of tokens."""
    config = BUILTIN_SHAPES[model]
    experts, hidden = config.experts, config.hidden_size
    assert experts is not None, "the choices are sparse models"
    inner = experts.moe_intermediate_size
    gate_up = KINDS[kind](experts.num_experts, 2 * inner, hidden, 2)
    down = KINDS[kind](experts.num_experts, hidden, inner, 1)
    multiply = quantized_experts_mlp if isinstance(gate_up, ExpertMatrices) else experts_mlp
    norm_weight = torch.ones(hidden, dtype=torch.bfloat16, device="cuda")
    times = []
    for count in counts:
        norm = {"norm_weight": norm_weight, "eps": 1e-6} if count <= MAX_FEW_TOKENS else {}
        calls = []
        for _ in range(max(2, MAX_TURNS // count)):
            x = torch.randn(count, hidden, dtype=torch.bfloat16, device="cuda")
            logits = torch.randn(count, experts.num_experts, device="cuda")
            routing = route(logits, experts.num_experts_per_tok, True)
            calls.append(partial(multiply, x, gate_up, down, routing, x, **norm))
        times.append(time_calls(calls))
    return times


def bfloat16_matrices(experts: int, outputs: int, inputs: int, pieces: int) -> torch.Tensor:
    return torch.randn(experts, outputs, inputs, dtype=torch.bfloat16, device="cuda") * inputs**-0.5


def quantized_matrices(
    experts: int, outputs: int, inputs: int, pieces: int, *, dtype: torch.dtype, block: tuple[int, int | None]
) -> ExpertMatrices:
    """block: outputs and inputs that share a scale; None: all inputs."""
    rows, columns = block[0], block[1] or inputs
    if dtype is torch.float8_e4m3fn:
        weight = torch.randn(experts, outputs, inputs, dtype=torch.bfloat16, device="cuda").to(dtype)
    else:
        width = inputs if dtype is torch.int8 else inputs // 4
        limits = torch.iinfo(dtype)
        weight = torch.randint(limits.min, limits.max, (experts, outputs, width), dtype=dtype, device="cuda")
    scale = torch.rand(experts, -(-inputs // columns), outputs // rows, device="cuda").transpose(1, 2) * 1e-3
    scale = scale.half() if dtype is torch.int16 else scale
    zeros = torch.full_like(scale, 8.0) if dtype is torch.int16 else None
    return ExpertMatrices(weight, scale, zeros, inputs, (rows, columns), pieces)


KINDS: Mapping[str, Matrices] = {
    "bfloat16": bfloat16_matrices,
    "fp8": partial(quantized_matrices, dtype=torch.float8_e4m3fn, block=(1, None)),
    "fp8-blocks": partial(quantized_matrices, dtype=torch.float8_e4m3fn, block=(BLOCK, BLOCK)),
    "int8": partial(quantized_matrices, dtype=torch.int8, block=(1, None)),
    "int4": partial(quantized_matrices, dtype=torch.int16, block=(1, GROUP_SIZE)),
}

if __name__ == "__main__":
    main()
