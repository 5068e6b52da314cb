"""Products in the model's dtype with what surrounds them: by which kernel, and the same result by both."""

from __future__ import annotations

import pytest
import torch

from nanovllm.kernels import fused_linear as module
from nanovllm.kernels import row_linear
from nanovllm.kernels.fused_linear import fused_linear, largest_prompt_sizes, suits_fused_linear
from tests.kernels.inputs import check_close
from tests.kernels.test_mixed_matmul import needs_hopper
from tests.kernels.test_skinny_linear import oracle, random_product

LAST, LAST_GATED, LAST_OF_SMALL = module._MAX_TOKENS, module._MAX_GATED_TOKENS, module._MAX_TOKENS_OF_SMALL_WEIGHT
FIRST_GATED, FIRST_ADDED = module._MIN_GATED_PROMPT_TOKENS, module._MIN_ADDED_PROMPT_TOKENS

ROW_WEIGHT = module._ROW_WEIGHT
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
        (FIRST_GATED - 1, LARGE, True, None),
        (FIRST_GATED, LARGE, True, "dense_matmul"),
        (FIRST_GATED, SMALL, True, "dense_matmul"),
        (FIRST_GATED, LARGE, False, None),
        (FIRST_GATED, TINY, True, None),
        (FIRST_ADDED, LARGE, False, None),
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
    assert suits_fused_linear(hidden, weight, gated=gated, only_adds=False) == (kernel is not None)
    if kernel is not None:
        fused_linear(hidden, weight, norm_weight=torch.ones(64), gated=gated)
        assert calls == [(kernel, True)] if kernel == "skinny_linear" else [("rms_norm", False), (kernel, False)]


@pytest.mark.parametrize(
    ("num_tokens", "outputs", "inputs", "dtype", "around", "multiprocessors", "kernel"),
    [
        (1, *ROW_WEIGHT, torch.bfloat16, {}, 132, "row_linear"),
        (1, *ROW_WEIGHT, torch.float16, {}, 132, "row_linear"),
        (1, *ROW_WEIGHT, torch.float32, {}, 132, "skinny_linear"),
        (2, *ROW_WEIGHT, torch.bfloat16, {}, 132, "skinny_linear"),
        (1, ROW_WEIGHT[0] + 2, ROW_WEIGHT[1], torch.bfloat16, {}, 132, "skinny_linear"),
        (1, ROW_WEIGHT[0], ROW_WEIGHT[1] // 2, torch.bfloat16, {}, 132, "skinny_linear"),
        (1, *ROW_WEIGHT, torch.bfloat16, {"norm_weight": torch.ones(ROW_WEIGHT[1])}, 132, "skinny_linear"),
        (1, *ROW_WEIGHT, torch.bfloat16, {"gated": True}, 132, "skinny_linear"),
        (1, *ROW_WEIGHT, torch.bfloat16, {}, 114, "skinny_linear"),
    ],
)
def test_where_one_row_has_a_kernel_of_its_own(
    monkeypatch, num_tokens, outputs, inputs, dtype, around, multiprocessors, kernel
):
    calls = []
    for name in ("skinny_linear", "row_linear"):
        monkeypatch.setattr(module, name, lambda *given, name=name, **named: calls.append((name, given, named)))
    monkeypatch.setattr(row_linear, "HAS_GLUON", True)
    monkeypatch.setattr(module, "multiprocessor_count", lambda device: multiprocessors)
    monkeypatch.setattr(module, "suits_dense_matmul", lambda hidden, weight, gated: False)
    monkeypatch.setattr(module, "suits_skinny_linear", lambda hidden, weight: True)
    hidden, weight = (torch.empty(rows, inputs, dtype=dtype) for rows in (num_tokens, outputs))
    bias, residual = torch.ones(2), torch.zeros(2)
    fused_linear(hidden, weight, bias, residual=residual, **around)
    ((name, given, named),) = calls
    assert name == kernel
    assert given[0] is hidden
    assert given[1] is weight
    assert named["residual"] is residual
    assert bias in (*given[2:], named.get("bias"))


@pytest.mark.parametrize(
    ("num_tokens", "dtype", "on_gpu", "only_adds", "is_taken"),
    [
        (FIRST_ADDED, torch.bfloat16, True, True, True),
        (FIRST_ADDED, torch.float16, True, True, True),
        (FIRST_ADDED - 1, torch.bfloat16, True, True, False),
        (FIRST_ADDED, torch.float32, True, True, False),
        (FIRST_ADDED, torch.bfloat16, False, True, False),
        (FIRST_ADDED, torch.bfloat16, True, False, False),
    ],
)
def test_where_the_blas_adds_the_residual(monkeypatch, num_tokens, dtype, on_gpu, only_adds, is_taken):
    monkeypatch.setattr(module, "suits_skinny_linear", lambda hidden, weight: False)
    hidden, weight = torch.empty(num_tokens, 64, dtype=dtype), torch.empty(64, 64, dtype=dtype)
    monkeypatch.setattr(torch.Tensor, "is_cuda", on_gpu)
    assert suits_fused_linear(hidden, weight, gated=False, only_adds=only_adds) == is_taken


@pytest.mark.parametrize(
    ("max_tokens", "expected"),
    [
        (FIRST_GATED - 1, [FIRST_GATED - 1]),
        (FIRST_GATED, [FIRST_GATED - 1, FIRST_GATED]),
        (9000, [FIRST_GATED - 1, FIRST_ADDED - 1, 9000]),
    ],
)
def test_prompt_steps_that_may_take_most_memory(max_tokens, expected):
    assert largest_prompt_sizes(max_tokens) == expected


def test_a_bias_is_not_left_out(monkeypatch, generator):
    """The BLAS would add the residual or the bias."""
    x, weight, bias, _ = random_product(generator, "cpu", torch.float32, 5, 64, 32)
    asked = []
    monkeypatch.setattr(module, "_choose", lambda *given, **named: asked.append(named) or "skinny")
    fused_linear(x, weight, bias, residual=torch.zeros(5, 32))
    fused_linear(x, weight, residual=torch.zeros(5, 32))
    fused_linear(x, weight)
    assert asked == [{"only_adds": False}, {"only_adds": True}, {"only_adds": False}]


def test_the_blas_adds_to_the_residual_in_its_place(monkeypatch, generator):
    monkeypatch.setattr(module, "_choose", lambda *given, **named: "blas")
    x, weight, _, norm_weight = random_product(generator, "cpu", torch.float32, 5, 64, 32)
    residual = torch.randn(5, 32, generator=generator)
    around = {"norm_weight": norm_weight, "eps": 0.1, "residual": residual}
    expected = oracle(x, weight, None, **around)
    out = fused_linear(x, weight, **around)
    check_close(out, expected, torch.float32)
    assert out.data_ptr() == residual.data_ptr()


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("num_tokens", [1, 4, 5, 16, 33, LAST, LAST_GATED, LAST_OF_SMALL])
def test_every_number_of_rows(generator, dtype, gated, num_tokens):
    x, weight, bias, norm_weight = random_product(generator, "cuda", dtype, num_tokens, 2048, 512)
    residual = torch.randn(num_tokens, 512 // (1 + gated), generator=generator).to("cuda", dtype)
    around = {"norm_weight": norm_weight, "eps": 0.1, "gated": gated, "residual": residual}
    assert suits_fused_linear(x, weight, gated=gated, only_adds=False)
    check_close(fused_linear(x, weight, bias, **around), oracle(x, weight, bias, **around), dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("has_bias", [False, True])
def test_one_row_of_attentions_output(generator, dtype, has_bias):
    outputs, inputs = ROW_WEIGHT
    x, weight, bias, _ = random_product(generator, "cuda", dtype, 1, inputs, outputs)
    residual = torch.randn(1, outputs, generator=generator).to("cuda", dtype)
    got = fused_linear(x, weight, bias if has_bias else None, residual=residual)
    check_close(got, oracle(x, weight, bias if has_bias else None, residual=residual), dtype)


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize("num_tokens", [FIRST_GATED, FIRST_ADDED, FIRST_ADDED + 1, 9001])
@pytest.mark.parametrize("gated", [False, True])
def test_a_prompt_step(generator, gated, num_tokens):
    """Tokens of several bands, the last of which is not full: gated, or added to the residual stream."""
    dtype = torch.bfloat16
    x, weight, _, norm_weight = random_product(generator, "cuda", dtype, num_tokens, 1024, 3072)
    around = {"norm_weight": norm_weight, "eps": 0.1, "gated": gated}
    if not gated:
        around["residual"] = torch.randn(num_tokens, 3072, generator=generator).to("cuda", dtype)
    assert suits_fused_linear(x, weight, gated=gated, only_adds=not gated) == (gated or num_tokens >= FIRST_ADDED)
    if gated or num_tokens >= FIRST_ADDED:
        expected = oracle(x, weight, None, **around)
        check_close(fused_linear(x, weight, **around), expected, dtype)
