from __future__ import annotations

from functools import partial

import pytest
import torch

from nanovllm.kernels import skinny_linear as module
from nanovllm.kernels.rms_norm import rms_norm_reference
from nanovllm.kernels.skinny_linear import scaled_weight, skinny_linear, suits_skinny_linear
from nanovllm.kernels.triton_support import next_power_of_2
from tests.kernels.graphs import same_of_replays
from tests.kernels.inputs import DTYPES, check_close


def random_product(generator, device, dtype, num_tokens, input_size, outputs):
    x = torch.randn(num_tokens, input_size, generator=generator).to(device, dtype)
    weight = (torch.randn(outputs, input_size, generator=generator) * input_size**-0.5).to(device, dtype)
    bias = torch.randn(outputs, generator=generator).to(device, dtype)
    norm_weight = torch.rand(input_size, generator=generator).to(device, dtype) + 0.5
    return x, weight, bias, norm_weight


def random_fp8_weight(generator, device, outputs, input_size, kind):
    """A weight and its scales, which are of each of the `outputs`, of `blocks`, or `one` for all."""
    shapes = {"outputs": (outputs, 1), "one": (1, 1), "blocks": (-(-outputs // 128), -(-input_size // 128))}
    weight = (torch.randn(outputs, input_size, generator=generator) * 50).to(torch.float8_e4m3fn)
    scale = (torch.rand(shapes[kind], generator=generator) + 0.5) * 0.02 * input_size**-0.5
    return weight.to(device), scale.to(device)


def oracle(x, weight, bias=None, norm_weight=None, eps=0.0, gated=False, residual=None):
    """In float64."""
    normed = x if norm_weight is None else rms_norm_reference(x.double(), norm_weight.double(), eps)
    out = normed.double() @ weight.double().T
    if bias is not None:
        out = out + bias.double()
    if gated:
        gate, up = out.chunk(2, dim=-1)
        out = torch.nn.functional.silu(gate) * up
    return out if residual is None else out + residual.double()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_tokens", [1, 2, 7, 16, 17])
@pytest.mark.parametrize(("input_size", "outputs"), [(64, 24), (100, 7), (3, 1), (1024, 40)])
def test_the_product_alone(device, generator, dtype, num_tokens, input_size, outputs):
    x, weight, _, _ = random_product(generator, device, dtype, num_tokens, input_size, outputs)
    check_close(skinny_linear(x, weight, use_triton=True), oracle(x, weight), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_tokens", [1, 3])
@pytest.mark.parametrize("input_size", [5000, 20000])
def test_long_rows(device, generator, dtype, num_tokens, input_size):
    x, weight, bias, _ = random_product(generator, device, dtype, num_tokens, input_size, 10)
    check_close(skinny_linear(x, weight, bias, use_triton=True), oracle(x, weight, bias), dtype)


@pytest.mark.parametrize("input_size", [5000, 20000])
@pytest.mark.parametrize("itemsize", [1, 2])
@pytest.mark.parametrize("gated", [False, True])
def test_more_weights_a_program_for_one_token(device, generator, monkeypatch, input_size, itemsize, gated):
    x, weight, _, norm_weight = random_product(generator, device, torch.bfloat16, 1, input_size, 14)
    scale = None
    if itemsize == 1:
        weight, scale = random_fp8_weight(generator, device, 14, input_size, "outputs")
    arguments = {"norm_weight": norm_weight, "eps": 0.1, "gated": gated}
    few, _ = module._choose_tile(1, weight, gated)
    monkeypatch.setattr(module, "_MIN_PROGRAMS", 1)
    many, _ = module._choose_tile(1, weight, gated)
    assert (many > few) is (itemsize == 1 or (input_size == 5000 and not gated))
    got = skinny_linear(x, weight, scale=scale, **arguments, use_triton=True)
    check_close(got, oracle(x, weight if scale is None else scaled_weight(weight, scale), **arguments), x.dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_tokens", [1, 5])
@pytest.mark.parametrize(("input_size", "outputs"), [(64, 24), (1000, 14), (4096, 16)])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("gated", [False, True])
def test_norm_gate_and_residual_are_folded_in(
    device, generator, dtype, num_tokens, input_size, outputs, with_bias, gated
):
    x, weight, bias, norm_weight = random_product(generator, device, dtype, num_tokens, input_size, outputs)
    residual = torch.randn(num_tokens, outputs // (1 + gated), generator=generator).to(device, dtype)
    arguments = {"norm_weight": norm_weight, "eps": 0.1, "gated": gated, "residual": residual}
    before = x.clone(), residual.clone()
    got = skinny_linear(x, weight, bias if with_bias else None, **arguments, use_triton=True)
    check_close(got, oracle(x, weight, bias if with_bias else None, **arguments), dtype)
    assert torch.equal(x, before[0])
    assert torch.equal(residual, before[1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["outputs", "one", "blocks"])
@pytest.mark.parametrize(
    ("input_size", "outputs"), [(32, 300), (64, 24), (400, 200), (1001, 12), (4096, 12), (5120, 12)]
)
@pytest.mark.parametrize("gated", [False, True])
def test_fp8_weights_are_scaled(device, generator, dtype, kind, input_size, outputs, gated):
    x, _, bias, norm_weight = random_product(generator, device, dtype, 3, input_size, outputs)
    weight, scale = random_fp8_weight(generator, device, outputs, input_size, kind)
    arguments = {"norm_weight": norm_weight, "eps": 0.1, "gated": gated}
    got = skinny_linear(x, weight, bias, scale=scale, **arguments, use_triton=True)
    check_close(got, oracle(x, scaled_weight(weight, scale), bias, **arguments), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("input_size", [400, 1001, 4096, 5120])
def test_int8_weights_are_scaled(device, generator, dtype, input_size):
    x, _, _, _ = random_product(generator, device, dtype, 3, input_size, 24)
    weight = torch.randint(-128, 128, (24, input_size), generator=generator, dtype=torch.int8).to(device)
    scale = torch.rand(24, 1, generator=generator).to(device)
    check_close(skinny_linear(x, weight, scale=scale, use_triton=True), oracle(x, weight * scale), dtype)


@pytest.mark.parametrize(
    ("input_size", "parts"),
    [
        (100, (128, 1)),
        (1100, (2048, 1)),
        (2560, (4096, 1)),
        (3072, (4096, 1)),
        (5120, (1024, 5)),
        (11_008, (2048, 6)),
        (12_288, (16_384, 1)),
    ],
)
def test_a_row_of_bytes_has_parts_where_much_of_its_block_would_be_empty(input_size, parts):
    assert module._choose_parts(input_size, itemsize=1) == parts
    assert module._choose_parts(input_size, itemsize=2) == (next_power_of_2(input_size), 1)


def test_a_scale_belongs_to_128_outputs_and_128_inputs():
    weight = torch.ones(130, 200).to(torch.float8_e4m3fn)
    scaled = scaled_weight(weight, torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    assert scaled[[0, 127, 0, 128, 129], [0, 127, 128, 0, 199]].tolist() == [1, 1, 2, 3, 4]


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_the_input_and_the_residual_may_be_strided(device, generator, dtype):
    x, weight, _, norm_weight = random_product(generator, device, dtype, 6, 64, 24)
    wide = torch.cat((x, x + 1), dim=1)
    residual = torch.randn(6, 48, generator=generator).to(device, dtype)[:, :24]
    arguments = {"norm_weight": norm_weight, "eps": 1e-6, "use_triton": True}
    got = skinny_linear(wide[:, :64], weight, residual=residual, **arguments)
    assert torch.equal(got, skinny_linear(x, weight, residual=residual.contiguous(), **arguments))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_does_not_depend_on_its_neighbours(device, generator, dtype):
    x, weight, _, norm_weight = random_product(generator, device, dtype, 9, 128, 24)
    arguments = {"norm_weight": norm_weight, "eps": 1e-6, "use_triton": True}
    alone = skinny_linear(x, weight, **arguments)
    x[3] = torch.nan
    x[8] = torch.inf
    beside = skinny_linear(x, weight, **arguments)
    others = [0, 1, 2, 4, 5, 6, 7]
    assert torch.equal(alone[others], beside[others])


def test_the_reference_is_the_same_function(device, generator):
    x, weight, bias, norm_weight = random_product(generator, device, torch.float32, 4, 64, 24)
    residual = torch.randn(4, 12, generator=generator).to(device)
    arguments = {"norm_weight": norm_weight, "eps": 0.1, "gated": True, "residual": residual}
    got = skinny_linear(x, weight, bias, **arguments, use_triton=False)
    check_close(got, oracle(x, weight, bias, **arguments), torch.float32)


def test_no_tokens_give_no_rows(device):
    weight = torch.ones(8, 16, device=device)
    assert skinny_linear(torch.empty(0, 16, device=device), weight, use_triton=True).shape == (0, 8)


def test_only_few_tokens_on_a_gpu_suit():
    assert not suits_skinny_linear(torch.empty(1, 8), torch.empty(8, 8))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("num_tokens", [1, 8])
def test_chained_kernels_in_a_graph_see_what_the_ones_before_wrote(generator, num_tokens):
    """Each product starts before the one ahead has ended, and buffers are reused: the replays must give one result."""
    device = torch.device("cuda")
    layers = [random_product(generator, device, torch.bfloat16, 1, 1024, 1024)[1:] for _ in range(20)]
    x = torch.randn(num_tokens, 1024, generator=generator).to(device, torch.bfloat16)

    def run(use_triton):
        hidden = x
        for weight, bias, norm_weight in layers:
            arguments = {"norm_weight": norm_weight, "eps": 1e-6, "residual": hidden}
            hidden = skinny_linear(hidden, weight, bias, **arguments, use_triton=use_triton)
        return hidden

    got = same_of_replays(partial(run, True), 100).double()
    expected = run(False).double()
    assert (got - expected).norm() / expected.norm() < 2e-2
