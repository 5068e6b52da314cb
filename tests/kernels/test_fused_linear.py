"""Products in the model's dtype with what surrounds them: by which kernel, and the same result by both."""

from __future__ import annotations

import pytest
import torch

from nanovllm.kernels import fused_linear as module
from nanovllm.kernels.fused_linear import fused_linear, suits_fused_linear
from tests.kernels.inputs import check_close
from tests.kernels.test_mixed_matmul import needs_hopper
from tests.kernels.test_skinny_linear import oracle, random_product

LAST, LAST_GATED, LAST_OF_SMALL = module._MAX_TOKENS, module._MAX_GATED_TOKENS, module._MAX_TOKENS_OF_SMALL_WEIGHT


TINY, SMALL, LARGE = module._MIN_WEIGHT - 64, module._SMALL_WEIGHT, module._SMALL_WEIGHT + 64


@pytest.mark.parametrize(
    ("num_tokens", "weights", "gated", "kernel"),
    [
        (1, LARGE, False, "skinny_linear"),
        (2, SMALL, True, "skinny_linear"),  # whose second token needs as many products as are worth it
        (2, LARGE, False, "dense_matmul"),
        (3, SMALL, False, "dense_matmul"),
        (3, SMALL // 2, False, "dense_matmul"),
        (4, SMALL // 4, False, "skinny_linear"),
        (4, TINY, False, "skinny_linear"),
        (5, TINY, False, None),
        (5, SMALL // 2, False, "dense_matmul"),
        (LAST, LARGE, False, "dense_matmul"),
        (LAST + 1, LARGE, False, None),
        (LAST_GATED, LARGE, True, "dense_matmul"),
        (LAST_GATED + 1, LARGE, True, None),
        (LAST_OF_SMALL, SMALL, False, "dense_matmul"),
        (LAST_OF_SMALL + 1, SMALL, True, None),
    ],
)
def test_which_kernel_multiplies(monkeypatch, num_tokens, weights, gated, kernel):
    """`skinny_linear` norms the tokens that it multiplies."""
    calls = []

    def record(name):
        return lambda hidden, *given, **named: calls.append((name, named.get("norm_weight") is not None)) or hidden

    for name in ("skinny_linear", "rms_norm", "dense_matmul"):
        monkeypatch.setattr(module, name, record(name))
    monkeypatch.setattr(module, "suits_skinny_linear", lambda hidden, weight: len(hidden) <= 4)
    monkeypatch.setattr(module, "suits_dense_matmul", lambda hidden, weight, gated: True)
    hidden, weight = torch.empty(num_tokens, 64), torch.empty(weights // 64, 64)
    assert suits_fused_linear(hidden, weight, gated=gated) == (kernel is not None)
    if kernel is not None:
        fused_linear(hidden, weight, norm_weight=torch.ones(64), gated=gated)
        assert calls == [(kernel, True)] if kernel == "skinny_linear" else [("rms_norm", False), (kernel, False)]


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("num_tokens", [1, 4, 5, 16, 33, LAST, LAST_GATED, LAST_OF_SMALL])
def test_every_number_of_rows(generator, dtype, gated, num_tokens):
    x, weight, bias, norm_weight = random_product(generator, "cuda", dtype, num_tokens, 2048, 512)
    residual = torch.randn(num_tokens, 512 // (1 + gated), generator=generator).to("cuda", dtype)
    around = {"norm_weight": norm_weight, "eps": 0.1, "gated": gated, "residual": residual}
    assert suits_fused_linear(x, weight, gated=gated)
    check_close(fused_linear(x, weight, bias, **around), oracle(x, weight, bias, **around), dtype)
