"""Compiles the kernels written in Gluon for a Hopper GPU, on a machine without one.

Prints a JSON object: what ptxas reports of each case, or the error of one that does not compile. It has no entries
where Gluon is not enabled.
"""

from __future__ import annotations

import json
from contextlib import redirect_stdout
from dataclasses import replace
from io import StringIO
from typing import Any

import torch
import triton
from triton.runtime import driver

from nanovllm.kernels import dense_matmul, mixed_matmul, paged_prefill_hopper, row_linear
from nanovllm.kernels.attention_inputs import LayerKVCache, PrefillMetadata
from nanovllm.kernels.dense_tiles import DenseTile
from nanovllm.kernels.triton_support import HAS_GLUON
from tests.kernels.hopper_driver import HopperDriver


def compile_paged_prefill(dtype: torch.dtype, head_dim: int, window: int | None) -> None:
    num_tokens, block_size = 64, 16
    query = torch.empty(num_tokens, 8, head_dim, dtype=dtype)
    pages = torch.empty(num_tokens // block_size, block_size, 2, head_dim, dtype=dtype)
    tables = torch.arange(num_tokens // block_size, dtype=torch.int32).unsqueeze(0)
    lens = torch.tensor([0, num_tokens], dtype=torch.int32)
    paged_prefill_hopper.paged_prefill_hopper(
        query,
        LayerKVCache(pages, pages),
        PrefillMetadata(lens, lens[1:], tables, num_tokens, num_tokens),
        scale=1.0,
        out=torch.empty_like(query),
        window=window,
    )


def compile_mixed_matmul(
    dtype: torch.dtype, num_tokens: int, group_size: int, has_zeros: bool, gated: bool, splits: int, warpgroups: int
) -> None:
    """Bias and residual follow a product without splits."""
    input_size, outputs = 2048, 256
    tile = mixed_matmul._largest_tile(warpgroups, num_tokens, group_size, memory=227 << 10)
    if group_size:
        weight = torch.empty(outputs, input_size // 4, dtype=torch.int16)
        scale = torch.empty(input_size // group_size, outputs, dtype=torch.float16).T
    else:
        weight = torch.empty(outputs, input_size, dtype=torch.int8)
        scale = torch.empty(outputs, 1)
    mixed_matmul.mixed_matmul(
        torch.empty(num_tokens, input_size, dtype=dtype),
        weight,
        scale,
        torch.empty(outputs, dtype=dtype),
        zeros=scale if has_zeros else None,
        group_size=group_size,
        gated=gated,
        residual=torch.empty(num_tokens, outputs // (1 + gated), dtype=dtype),
        tile=replace(tile, splits=splits),
    )


def compile_row_linear(
    kind: str, dtype: torch.dtype, input_size: int, gated: bool, has_norm: bool, outputs: int = 8
) -> None:
    """kind: half (of dtype), int4, symmetric (INT4 without zeros), int8, fp8, or blocks (FP8 with scales of 128
    inputs).

    Bias comes with a norm, residual without. outputs: of a multiprocessor, of which the device that is compiled for has
    one.
    """
    outputs *= 1 + gated
    blocks = -(-input_size // 128)
    if kind in ("int4", "symmetric"):
        scale = torch.empty(blocks, outputs, dtype=torch.float16).T
        weight = torch.empty(outputs, blocks * 32, dtype=torch.int16)
        given: dict[str, Any] = {"zeros": scale if kind == "int4" else None, "group_size": 128}
    else:
        scale = torch.empty(-(-outputs // 128), blocks) if kind == "blocks" else torch.empty(outputs, 1)
        weight_dtype = {"half": dtype, "int8": torch.int8}.get(kind, torch.float8_e4m3fn)
        weight = torch.empty(outputs, input_size, dtype=weight_dtype)
        given = {}
    row_linear.row_linear(
        torch.empty(1, input_size, dtype=dtype),
        weight,
        None if kind == "half" else scale,
        torch.empty(outputs, dtype=dtype) if has_norm else None,
        norm_weight=torch.empty(input_size, dtype=dtype) if has_norm else None,
        gated=gated,
        residual=None if has_norm else torch.empty(1, outputs, dtype=dtype),
        **given,
    )


def compile_dense_matmul(kind: str, gated: bool, tile: DenseTile, num_tokens: int = 32) -> None:
    """kind: bf16, fp8, or blocks (FP8 with scales of 128 inputs)."""
    input_size, outputs = 2048, 256
    groups = input_size // dense_matmul.GROUP_SIZE
    dtype = torch.bfloat16 if kind == "bf16" else torch.float8_e4m3fn
    around: dict[str, Any] = {
        "bf16": {},
        "fp8": {"scale": torch.empty(outputs, 1), "x_scale": torch.empty(num_tokens, 1)},
        "blocks": {"scale": torch.empty(2, groups), "x_scale": torch.empty(groups, num_tokens).T},
    }[kind]
    dense_matmul.dense_matmul(
        torch.empty(num_tokens, input_size).to(dtype),
        torch.empty(outputs, input_size).to(dtype),
        torch.empty(outputs, dtype=torch.bfloat16),
        gated=gated,
        residual=None if gated else torch.empty(num_tokens, outputs, dtype=torch.bfloat16),
        dtype=torch.bfloat16,
        tile=tile,
        **around,
    )


CASES = [
    (compile_paged_prefill, (torch.bfloat16, 64, None)),
    (compile_paged_prefill, (torch.bfloat16, 128, 300)),
    (compile_paged_prefill, (torch.float16, 64, 300)),
    (compile_paged_prefill, (torch.float16, 128, None)),
    (compile_mixed_matmul, (torch.bfloat16, 16, 128, True, False, 2, 2)),
    (compile_mixed_matmul, (torch.float16, 32, 128, True, True, 1, 2)),
    (compile_mixed_matmul, (torch.bfloat16, 64, 128, True, True, 1, 2)),
    (compile_mixed_matmul, (torch.bfloat16, 128, 128, True, True, 1, 2)),
    (compile_mixed_matmul, (torch.float16, 128, 64, True, False, 1, 2)),
    (compile_mixed_matmul, (torch.bfloat16, 64, 32, True, True, 2, 2)),
    (compile_mixed_matmul, (torch.bfloat16, 128, 2048, False, False, 1, 2)),
    (compile_mixed_matmul, (torch.bfloat16, 16, 0, False, False, 2, 2)),
    (compile_mixed_matmul, (torch.float16, 64, 0, False, False, 1, 2)),
    (compile_mixed_matmul, (torch.bfloat16, 128, 0, False, True, 1, 2)),
    (compile_mixed_matmul, (torch.float16, 16, 2048, False, False, 1, 3)),
    (compile_mixed_matmul, (torch.bfloat16, 64, 128, True, True, 1, 3)),
    (compile_mixed_matmul, (torch.float16, 64, 64, True, True, 1, 3)),
    (compile_mixed_matmul, (torch.bfloat16, 32, 32, True, False, 2, 3)),
    (compile_mixed_matmul, (torch.bfloat16, 16, 0, False, True, 2, 3)),
    (compile_mixed_matmul, (torch.bfloat16, 128, 0, False, True, 1, 3)),
    (compile_row_linear, ("half", torch.bfloat16, 4096, False, False, 32)),
    (compile_row_linear, ("half", torch.float16, 4096, False, False, 32)),
    (compile_row_linear, ("half", torch.bfloat16, 1024, True, True)),
    (compile_row_linear, ("int4", torch.bfloat16, 1024, False, True)),
    (compile_row_linear, ("symmetric", torch.bfloat16, 1024, True, True)),
    (compile_row_linear, ("int4", torch.float16, 3072, False, False)),
    (compile_row_linear, ("int4", torch.bfloat16, 4096, False, True)),
    (compile_row_linear, ("int4", torch.bfloat16, 4096, False, True, 64)),
    (compile_row_linear, ("int4", torch.bfloat16, 3584, False, True, 64)),
    (compile_row_linear, ("int4", torch.bfloat16, 4096, True, True)),
    (compile_row_linear, ("int4", torch.bfloat16, 5120, False, True)),
    (compile_row_linear, ("int4", torch.bfloat16, 5120, True, True)),
    (compile_row_linear, ("int4", torch.bfloat16, 8192, False, False)),
    (compile_row_linear, ("int4", torch.bfloat16, 8192, True, True)),
    (compile_row_linear, ("int4", torch.float16, 8960, False, False)),
    (compile_row_linear, ("int4", torch.bfloat16, 12288, False, False)),
    (compile_row_linear, ("int4", torch.bfloat16, 16384, True, True)),
    (compile_row_linear, ("int4", torch.bfloat16, 25600, False, False)),
    (compile_row_linear, ("fp8", torch.bfloat16, 1024, True, True, 24)),
    (compile_row_linear, ("fp8", torch.bfloat16, 4096, True, True, 94)),
    (compile_row_linear, ("fp8", torch.bfloat16, 4096, False, True, 47)),
    (compile_row_linear, ("fp8", torch.bfloat16, 4096, False, False, 32)),
    (compile_row_linear, ("fp8", torch.bfloat16, 5120, False, True, 78)),
    (compile_row_linear, ("fp8", torch.float16, 8192, False, False, 39)),
    (compile_row_linear, ("fp8", torch.float16, 12288, False, False, 32)),
    (compile_row_linear, ("blocks", torch.bfloat16, 4096, True, True, 94)),
    (compile_row_linear, ("blocks", torch.bfloat16, 4096, False, True, 47)),
    (compile_row_linear, ("blocks", torch.bfloat16, 4096, False, False, 32)),
    (compile_row_linear, ("blocks", torch.bfloat16, 12288, False, False, 32)),
    (compile_row_linear, ("int8", torch.bfloat16, 5120, True, True, 194)),
    (compile_row_linear, ("int8", torch.float16, 8192, False, False, 39)),
    (compile_row_linear, ("int8", torch.bfloat16, 25600, False, False, 39)),
    (compile_dense_matmul, ("bf16", False, DenseTile(32, 9, parts=2))),
    (compile_dense_matmul, ("bf16", True, DenseTile(128, 5, warpgroups=3))),
    (compile_dense_matmul, ("bf16", False, DenseTile(256, 4, warpgroups=2))),
    (compile_dense_matmul, ("bf16", True, DenseTile(256, 4, warpgroups=2), 2048)),
    (compile_dense_matmul, ("fp8", True, DenseTile(256, 4, warpgroups=2), 512)),
    (compile_dense_matmul, ("fp8", True, DenseTile(64, 6, warpgroups=3))),
    (compile_dense_matmul, ("blocks", True, DenseTile(64, 6, parts=2))),
    (compile_dense_matmul, ("blocks", False, DenseTile(64, 6, warpgroups=3))),
]


def compile_launches_of(kernel: Any, **changed: Any) -> None:
    """From here on, a launch of `kernel` compiles it, with some arguments changed, and runs nothing."""
    run = kernel.run
    kernel.run = lambda **options: run(**options | changed | {"warmup": True})


def main() -> None:
    reports: dict[str, str] = {}
    driver.set_active(HopperDriver())
    triton.knobs.nvidia.dump_ptxas_log = True
    triton.knobs.compilation.always_compile = True
    compile_launches_of(paged_prefill_hopper._paged_prefill_hopper_kernel)
    compile_launches_of(mixed_matmul._mixed_matmul_kernel, PDL=True, launch_pdl=True)
    compile_launches_of(dense_matmul._dense_matmul_kernel, PDL=True, launch_pdl=True)
    compile_launches_of(row_linear._row_linear_kernel, PDL=True, launch_pdl=True)
    for compile_case, arguments in CASES:
        with redirect_stdout(StringIO()) as printed:
            try:
                compile_case(*arguments)  # type: ignore[operator]
            except Exception as error:
                print(f"{type(error).__name__}: {error}")
        reports[f"{compile_case.__name__}{arguments}"] = printed.getvalue()
    print(json.dumps(reports))


if __name__ == "__main__":
    main() if HAS_GLUON else print("{}")
