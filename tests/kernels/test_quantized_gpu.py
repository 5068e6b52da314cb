"""Products with quantised weights on a GPU, by the kernels that the number of rows chooses."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from nanovllm.kernels import fused_linear, quantized_gpu, row_linear
from nanovllm.kernels.quantized_linear import fp8_linear, int4_linear, int8_linear, suits_fused
from tests.kernels.graphs import same_of_replays
from tests.kernels.inputs import random_int4_weight, relative_error
from tests.kernels.test_skinny_linear import oracle, random_fp8_weight, random_product

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
INPUTS = 512
# FP8 activations are within a sixteenth; a token alone is not rounded, but the reference's is.
TOLERANCES = {"fp8": 4e-2, "fp8-blocks": 4e-2, "int8-w8a16": 1e-2, "int8-w8a8": 2e-2, "int4": 1e-2, "int4-32": 1e-2}


def random_quantized_product(generator, device, kind, outputs, inputs=INPUTS):
    """A product of the input and what surrounds it, on a device."""
    if kind.startswith("fp8"):
        shape = "blocks" if kind == "fp8-blocks" else "outputs"
        weight, scale = random_fp8_weight(generator, device, outputs, inputs, shape)
        return partial(fp8_linear, weight=weight, scale=scale)
    if kind.startswith("int8"):
        weight = torch.randint(-127, 128, (outputs, inputs), generator=generator, dtype=torch.int8).to(device)
        scale = (torch.rand(outputs, 1, generator=generator) * 1e-3).to(device)
        return partial(int8_linear, weight=weight, scale=scale, quantize_input=kind == "int8-w8a8")
    group_size = 32 if kind == "int4-32" else 128
    _, words, scale, zeros = random_int4_weight(generator, device, outputs, inputs, group_size, has_zeros=True)
    return partial(int4_linear, weight=words, scale=scale, zeros=zeros, group_size=group_size)


LAST_HOPPER, LAST_OTHER = quantized_gpu._MAX_HOPPER_INT8_TOKENS, quantized_gpu._MAX_INT8_TOKENS


@pytest.mark.parametrize("has_gluon", [False, True])
def test_which_kernel_multiplies_one_row_by_8_bits(monkeypatch, has_gluon):
    for name in ("row_linear", "skinny_linear"):
        monkeypatch.setattr(quantized_gpu, name, lambda *given, name=name, **named: name)
    monkeypatch.setattr(row_linear, "HAS_GLUON", has_gluon)
    hidden = torch.empty(1, 4096, dtype=torch.bfloat16)
    chosen = quantized_gpu._skinny_product(hidden, torch.empty(256, 4096).char(), torch.empty(256, 1), None)
    assert chosen == ("row_linear" if has_gluon else "skinny_linear")


@pytest.mark.parametrize(
    ("num_tokens", "is_hopper", "quantize_input", "kernel"),
    [
        (1, True, False, "row_linear"),
        (1, True, True, "row_linear"),
        (2, True, False, "mixed_matmul"),
        (LAST_HOPPER, True, False, "mixed_matmul"),
        (LAST_HOPPER + 1, True, False, "_dense_product"),
        (2, False, False, "quantized_matmul"),
        (LAST_OTHER, False, False, "quantized_matmul"),
        (LAST_OTHER + 1, False, False, "_dense_product"),
        (2, True, True, "quantized_matmul"),
    ],
)
def test_which_kernel_multiplies_by_int8(monkeypatch, num_tokens, is_hopper, quantize_input, kernel):
    for name in ("row_linear", "mixed_matmul", "quantized_matmul", "_dense_product"):
        monkeypatch.setattr(quantized_gpu, name, lambda *given, name=name, **named: name)
    monkeypatch.setattr(row_linear, "HAS_GLUON", True)
    monkeypatch.setattr(quantized_gpu, "suits_mixed_matmul", lambda *given, **named: is_hopper)
    monkeypatch.setattr(quantized_gpu, "dequantize_weight", lambda *given, **named: None)
    monkeypatch.setattr(quantized_gpu, "quantize_rows", lambda *given, **named: (None, None))
    chosen = quantized_gpu.int8_product(
        torch.empty(num_tokens, 4096, dtype=torch.bfloat16),
        torch.empty(4096, 4096, dtype=torch.int8),
        torch.empty(4096, 1),
        None,
        quantize_input=quantize_input,
        norm_weight=None,
        eps=0.0,
        gated=False,
        residual=None,
    )
    assert chosen == kernel


LAST_HOPPER_INT4 = quantized_gpu._MAX_HOPPER_INT4_TOKENS
LAST_OTHER_INT4, LAST_INT4_ROW = quantized_gpu._MAX_INT4_TOKENS, quantized_gpu._MAX_INT4_ROW


@pytest.mark.parametrize(
    ("num_tokens", "input_size", "is_hopper", "kernel"),
    [
        (1, LAST_INT4_ROW, True, "row_linear"),
        (1, LAST_INT4_ROW + 128, True, "mixed_matmul"),
        (1, LAST_INT4_ROW + 128, False, "row_linear"),
        (1, row_linear._MAX_INPUTS + 128, False, "quantized_matmul"),
        (0, 4096, False, "row_linear"),
        (2, 4096, True, "mixed_matmul"),
        (LAST_HOPPER_INT4, 4096, True, "mixed_matmul"),
        (LAST_HOPPER_INT4 + 1, 4096, True, "_dense_product"),
        (LAST_OTHER_INT4, 4096, False, "quantized_matmul"),
        (LAST_OTHER_INT4 + 1, 4096, False, "_dense_product"),
    ],
)
def test_which_kernel_multiplies_by_int4(monkeypatch, num_tokens, input_size, is_hopper, kernel):
    for name in ("row_linear", "mixed_matmul", "quantized_matmul", "_dense_product"):
        monkeypatch.setattr(quantized_gpu, name, lambda *given, name=name, **named: name)
    monkeypatch.setattr(row_linear, "HAS_GLUON", True)
    monkeypatch.setattr(quantized_gpu, "suits_mixed_matmul", lambda *given, **named: is_hopper)
    monkeypatch.setattr(quantized_gpu, "dequantize_weight", lambda *given, **named: None)
    chosen = quantized_gpu.int4_product(
        torch.empty(num_tokens, input_size, dtype=torch.bfloat16),
        torch.empty(256, input_size // 4, dtype=torch.int16),
        torch.empty(256, input_size // 128),
        None,
        None,
        group_size=128,
        norm_weight=None,
        eps=0.0,
        gated=False,
        residual=None,
    )
    assert chosen == kernel


LAST_DENSE, LAST_DENSE_BLOCK = quantized_gpu._MAX_DENSE_TOKENS, quantized_gpu._MAX_DENSE_BLOCK_TOKENS
LAST_BLOCK, LAST_GATED_BLOCK = quantized_gpu._MAX_BLOCK_TOKENS, quantized_gpu._MAX_GATED_BLOCK_TOKENS


@pytest.mark.parametrize(
    ("has_blocks", "num_tokens", "is_hopper", "kernel", "gated"),
    [
        (False, 1, True, "row_linear", False),
        (False, 5, True, "dense_matmul", False),
        (False, LAST_DENSE, True, "dense_matmul", False),
        (False, LAST_DENSE + 1, True, "quantized_matmul", False),
        (False, LAST_BLOCK, False, "quantized_matmul", False),
        (True, 1, True, "row_linear", False),
        (True, 5, True, "dense_matmul", False),
        (True, LAST_DENSE_BLOCK, True, "dense_matmul", False),
        (True, LAST_DENSE_BLOCK + 1, True, "_many_rows_block_product", False),
        (True, LAST_BLOCK, False, "quantized_matmul", False),
        (True, LAST_BLOCK + 1, False, "_many_rows_block_product", False),
        (True, LAST_GATED_BLOCK, False, "quantized_matmul", True),
        (True, LAST_GATED_BLOCK + 1, False, "_many_rows_block_product", True),
        (True, LAST_DENSE_BLOCK, True, "dense_matmul", True),
    ],
)
def test_which_kernel_multiplies_by_fp8(monkeypatch, has_blocks, num_tokens, is_hopper, kernel, gated):
    given = {}

    def quantized(hidden, dtype, *, group_size, num_rows, **rest):
        given["rows"] = num_rows or len(hidden)
        return torch.empty(given["rows"], hidden.shape[1]), None

    for name in ("row_linear", "quantized_matmul", "dense_matmul", "_many_rows_block_product"):
        monkeypatch.setattr(quantized_gpu, name, lambda *given, name=name, **named: (name, given[0].shape[0]))
    monkeypatch.setattr(row_linear, "HAS_GLUON", True)
    monkeypatch.setattr(quantized_gpu, "suits_dense_matmul", lambda *given, gated: is_hopper)
    monkeypatch.setattr(quantized_gpu, "quantize_rows", quantized)
    chosen, rows = quantized_gpu.fp8_product(
        torch.empty(num_tokens, 4096, dtype=torch.bfloat16),
        torch.empty(4096, 4096, dtype=torch.float8_e4m3fn),
        torch.empty((32, 32) if has_blocks else (4096, 1)),
        None,
        input_scale=None,
        norm_weight=None,
        eps=0.0,
        gated=gated,
        residual=None,
    )
    assert chosen == kernel
    assert rows == num_tokens
    if has_blocks and chosen == "dense_matmul":
        assert given["rows"] % 4 == 0  # scales of which the accelerator can copy parts


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", TOLERANCES)
@pytest.mark.parametrize("num_tokens", [1, 2, 17, 40, 100, 130, 300, 1100])
@pytest.mark.parametrize(("outputs", "gated"), [(512, False), (512, True), (384, False)])
def test_every_number_of_rows(generator, dtype, kind, num_tokens, outputs, gated):
    x, _, bias, norm_weight = random_product(generator, "cpu", dtype, num_tokens, INPUTS, outputs)
    residual = torch.randn(num_tokens, outputs // (1 + gated), generator=generator).to(dtype)
    state = generator.get_state()
    expected = random_quantized_product(generator, "cpu", kind, outputs)(
        x, bias=bias, norm_weight=norm_weight, eps=0.1, gated=gated, residual=residual
    )
    generator.set_state(state)
    product = random_quantized_product(generator, "cuda", kind, outputs)
    got = product(
        x.cuda(), bias=bias.cuda(), norm_weight=norm_weight.cuda(), eps=0.1, gated=gated, residual=residual.cuda()
    )
    assert suits_fused(x.cuda(), product.keywords["weight"])
    assert got.dtype == dtype
    assert relative_error(got.cpu(), expected) < TOLERANCES[kind]


@pytest.mark.parametrize("taken", [None, "blas"])
def test_a_dequantized_weight_is_multiplied_as_any_other(monkeypatch, generator, taken):
    monkeypatch.setattr(fused_linear, "_choose", lambda *given, **named: taken)
    x, weight, _, norm_weight = random_product(generator, "cpu", torch.float32, 5, 64, 32)
    residual = torch.randn(5, 32, generator=generator)
    around = {"norm_weight": norm_weight, "eps": 0.1, "residual": residual}
    expected = oracle(x, weight, None, **around)
    out = quantized_gpu._dense_product(x, weight, None, gated=False, **around)
    assert relative_error(out, expected) < 1e-5
    assert (out.data_ptr() == residual.data_ptr()) == (taken is not None)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("kind", TOLERANCES)
@pytest.mark.parametrize("gated", [False, True])
def test_a_prompt_step(generator, kind, gated):
    """Without a bias, and with a weight so large that gate and addition are part of the product."""
    num_tokens, inputs, outputs = 4100, 1024, 2048
    x = torch.randn(num_tokens, inputs, generator=generator).bfloat16()
    residual = None if gated else torch.randn(num_tokens, outputs, generator=generator).bfloat16()
    state = generator.get_state()
    expected = random_quantized_product(generator, "cpu", kind, outputs, inputs)(x, gated=gated, residual=residual)
    generator.set_state(state)
    product = random_quantized_product(generator, "cuda", kind, outputs, inputs)
    got = product(x.cuda(), gated=gated, residual=None if residual is None else residual.cuda())
    assert relative_error(got.cpu(), expected) < TOLERANCES[kind]


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("kind", TOLERANCES)
@pytest.mark.parametrize("num_tokens", [1, 5, 40, 300])
def test_chained_products_in_a_graph_see_what_the_ones_before_wrote(generator, kind, num_tokens):
    products = [random_quantized_product(generator, "cuda", kind, INPUTS) for _ in range(20)]
    norm_weight = torch.ones(INPUTS, dtype=torch.bfloat16, device="cuda")
    x = torch.randn(num_tokens, INPUTS, generator=generator).to("cuda", torch.bfloat16)

    def run():
        hidden = x
        for product in products:
            hidden = product(hidden, norm_weight=norm_weight, eps=1e-6, residual=hidden)
        return hidden

    assert bool(same_of_replays(run, 51).isfinite().all())
