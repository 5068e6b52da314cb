"""Compiles the kernel written in Gluon for a Hopper GPU, on a machine without one.

Prints a JSON object: what ptxas reports of each case, or the error of one that does not compile. It has no entries
where Gluon is not enabled.
"""

from __future__ import annotations

import json
from contextlib import redirect_stdout
from io import StringIO
from typing import Any

import torch
import triton
from triton.runtime import driver

from nanovllm.kernels import paged_prefill_hopper
from nanovllm.kernels.attention_inputs import LayerKVCache, PrefillMetadata
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


CASES = [
    (torch.bfloat16, 64, None),
    (torch.bfloat16, 128, 300),
    (torch.float16, 64, 300),
    (torch.float16, 128, None),
]


def compile_launches_of(kernel: Any) -> None:
    """From here on, a launch of `kernel` compiles it and runs nothing."""
    run = kernel.run
    kernel.run = lambda **options: run(**options | {"warmup": True})


def main() -> None:
    reports: dict[str, str] = {}
    driver.set_active(HopperDriver())
    triton.knobs.nvidia.dump_ptxas_log = True
    triton.knobs.compilation.always_compile = True
    compile_launches_of(paged_prefill_hopper._paged_prefill_hopper_kernel)
    for case in CASES:
        with redirect_stdout(StringIO()) as printed:
            try:
                compile_paged_prefill(*case)
            except Exception as error:
                print(f"{type(error).__name__}: {error}")
        reports[f"paged_prefill_hopper{case}"] = printed.getvalue()
    print(json.dumps(reports))


if __name__ == "__main__":
    main() if HAS_GLUON else print("{}")
