from __future__ import annotations

import pytest
import torch

from nanovllm.kernels.converted_linear import Tile, converted_linear
from nanovllm.kernels.int4_packing import pack_int4
from nanovllm.kernels.skinny_linear import scaled_weight
from tests.kernels.inputs import DTYPES, check_close
from tests.kernels.test_skinny_linear import oracle, random_fp8_weight, random_product

TILES = [Tile(16, 4, num_warps=4, num_stages=3), Tile(32, 8)]


def random_around(generator, device, dtype, num_tokens, input_size, outputs, gated):
    """Input, bias and the arguments for what surrounds a product."""
    x, _, bias, norm_weight = random_product(generator, device, dtype, num_tokens, input_size, outputs)
    # Powers of two: the norm's weight is multiplied in before the product, which rounds to the input's type.
    norm_weight = (2.0 ** torch.randint(-1, 2, (input_size,), generator=generator)).to(device, dtype)
    residual = torch.randn(num_tokens, outputs // (1 + gated), generator=generator).to(device, dtype)
    return x, bias, {"norm_weight": norm_weight, "eps": 0.1, "gated": gated, "residual": residual}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["outputs", "one", "blocks"])
@pytest.mark.parametrize(("num_tokens", "input_size", "outputs"), [(1, 64, 24), (5, 400, 200), (16, 512, 40)])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("tile", TILES)
def test_fp8(device, generator, dtype, kind, num_tokens, input_size, outputs, gated, tile):
    x, bias, around = random_around(generator, device, dtype, num_tokens, input_size, outputs, gated)
    weight, scale = random_fp8_weight(generator, device, outputs, input_size, kind)
    got = converted_linear(x, weight, scale, bias, group_size=128 if kind == "blocks" else 0, tile=tile, **around)
    check_close(got, oracle(x, scaled_weight(weight, scale), bias, **around), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tile", TILES)
def test_int8(device, generator, dtype, tile):
    x, bias, around = random_around(generator, device, dtype, 3, 400, 48, gated=True)
    weight = torch.randint(-127, 128, (48, 400), generator=generator, dtype=torch.int8).to(device)
    scale = (torch.rand(48, 1, generator=generator) * 1e-3).to(device)
    got = converted_linear(x, weight, scale, bias, tile=tile, **around)
    check_close(got, oracle(x, weight * scale.double(), bias, **around), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("input_size", "group_size"), [(384, 32), (128, 64), (384, 128), (96, 96), (384, 384)])
@pytest.mark.parametrize("num_tokens", [1, 10])
@pytest.mark.parametrize("has_zeros", [False, True])
@pytest.mark.parametrize("gated", [False, True])
def test_int4(device, generator, dtype, input_size, group_size, num_tokens, has_zeros, gated):
    outputs = 48
    x, bias, around = random_around(generator, device, dtype, num_tokens, input_size, outputs, gated)
    values = torch.randint(0, 16, (outputs, input_size), generator=generator)
    # Powers of two, so that a scaled weight is not rounded.
    scale = 2.0 ** -torch.randint(4, 8, (outputs, input_size // group_size), generator=generator).float()
    zeros = torch.randint(0, 17, scale.shape, generator=generator) if has_zeros else torch.full(scale.shape, 8)
    weight = (values - zeros.repeat_interleave(group_size, 1)) * scale.repeat_interleave(group_size, 1)
    got = converted_linear(
        x,
        pack_int4(values).to(device),
        scale.to(device),
        bias,
        zeros=zeros.float().to(device) if has_zeros else None,
        group_size=group_size,
        tile=TILES[1],
        **around,
    )
    check_close(got, oracle(x, weight.to(device), bias, **around), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_does_not_depend_on_its_neighbours(device, generator, dtype):
    x, _, around = random_around(generator, device, dtype, 9, 256, 24, gated=False)
    weight, scale = random_fp8_weight(generator, device, 24, 256, "outputs")
    alone = converted_linear(x, weight, scale, tile=TILES[0], **around)
    x[3] = torch.nan
    beside = converted_linear(x, weight, scale, tile=TILES[0], **around)
    assert torch.equal(torch.cat((alone[:3], alone[4:])), torch.cat((beside[:3], beside[4:])))


def test_no_tokens_give_no_rows(device):
    weight, scale = torch.zeros(8, 128, dtype=torch.int8, device=device), torch.ones(8, 1, device=device)
    assert converted_linear(torch.empty(0, 128, device=device), weight, scale, tile=TILES[0]).shape == (0, 8)
