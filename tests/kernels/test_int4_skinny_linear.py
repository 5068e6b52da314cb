from __future__ import annotations

import pytest
import torch

from nanovllm.kernels.int4_packing import pack_int4
from nanovllm.kernels.int4_skinny_linear import int4_skinny_linear, suits_int4_skinny_linear
from tests.kernels.inputs import DTYPES, check_close
from tests.kernels.test_skinny_linear import oracle, random_product

HALF_TYPES = [dtype for dtype in DTYPES if dtype is not torch.float32]


def random_int4_weight(generator, device, outputs, input_size, group_size, has_zeros):
    """The weight, and as the kernel takes it: words, scale and zeros."""
    values = torch.randint(0, 16, (outputs, input_size), generator=generator)
    scale = torch.rand(outputs, input_size // group_size, generator=generator) * 0.2 * input_size**-0.5
    zeros = torch.randint(0, 17, scale.shape, generator=generator) if has_zeros else torch.full(scale.shape, 8)
    weight = (values - zeros.repeat_interleave(group_size, 1)) * scale.repeat_interleave(group_size, 1)
    packed_zeros = zeros.float().to(device) if has_zeros else None
    return weight.to(device), pack_int4(values).to(device), scale.to(device), packed_zeros


@pytest.mark.parametrize("dtype", HALF_TYPES)
@pytest.mark.parametrize("num_tokens", [1, 6])
@pytest.mark.parametrize(("input_size", "group_size"), [(384, 128), (512, 256), (100, 100)])
@pytest.mark.parametrize("has_zeros", [False, True])
@pytest.mark.parametrize("gated", [False, True])
def test_the_product_with_all_parts(device, generator, dtype, num_tokens, input_size, group_size, has_zeros, gated):
    outputs = 10
    x, _, bias, norm_weight = random_product(generator, device, dtype, num_tokens, input_size, outputs)
    residual = torch.randn(num_tokens, outputs // (1 + gated), generator=generator).to(device, dtype)
    weight, words, scale, zeros = random_int4_weight(generator, device, outputs, input_size, group_size, has_zeros)
    around = {"norm_weight": norm_weight, "eps": 0.1, "gated": gated, "residual": residual}
    got = int4_skinny_linear(x, words, scale, bias, zeros=zeros, group_size=group_size, **around)
    check_close(got, oracle(x, weight, bias, **around), dtype)


@pytest.mark.parametrize("dtype", HALF_TYPES)
@pytest.mark.parametrize("magnitude", [1e-6, 1e4])
def test_inputs_of_any_magnitude(device, generator, dtype, magnitude):
    """An input a thousand times its neighbours leaves them as exact as bf16 would, beside the sum that it dominates."""
    x = torch.randn(1, 256, generator=generator)
    x[0, 7] *= 1000
    x = (x * magnitude if dtype is torch.bfloat16 else x).to(device, dtype)
    weight, words, scale, _ = random_int4_weight(generator, device, 16, 256, 128, has_zeros=False)
    check_close(int4_skinny_linear(x, words, scale, group_size=128), oracle(x, weight), dtype)


@pytest.mark.parametrize("dtype", HALF_TYPES)
def test_a_row_does_not_depend_on_its_neighbours(device, generator, dtype):
    x = torch.randn(6, 128, generator=generator).to(device, dtype)
    _, words, scale, _ = random_int4_weight(generator, device, 16, 128, 128, has_zeros=False)
    alone = int4_skinny_linear(x, words, scale, group_size=128)
    x[3, 5] = torch.nan
    beside = int4_skinny_linear(x, words, scale, group_size=128)
    assert torch.equal(torch.cat((alone[:3], alone[4:])), torch.cat((beside[:3], beside[4:])))
    assert bool(beside[3].isnan().all())


def test_zero_inputs_give_zero(device, generator):
    _, words, scale, _ = random_int4_weight(generator, device, 16, 128, 128, has_zeros=False)
    x = torch.zeros(1, 128, dtype=torch.float16, device=device)
    assert not int4_skinny_linear(x, words, scale, group_size=128).any()


def test_small_groups_and_many_tokens_do_not_suit():
    assert suits_int4_skinny_linear(torch.empty(1, 256), 128)
    assert not suits_int4_skinny_linear(torch.empty(1, 256), 64)
    assert not suits_int4_skinny_linear(torch.empty(9, 256), 128)


def test_no_tokens_give_no_rows(device, generator):
    _, words, scale, _ = random_int4_weight(generator, device, 16, 128, 128, has_zeros=False)
    x = torch.empty(0, 128, dtype=torch.float16, device=device)
    assert int4_skinny_linear(x, words, scale, group_size=128).shape == (0, 16)
