from __future__ import annotations

import pytest
import torch

from nanovllm.kernels.int4_packing import pack_int4, unpack_int4
from nanovllm.kernels.quantize_rows import quantize_rows
from nanovllm.kernels.quantized_matmul import Tile, quantized_matmul
from nanovllm.kernels.skinny_linear import scaled_weight
from tests.kernels.inputs import HALF_TYPES, check_close
from tests.kernels.test_skinny_linear import oracle, random_fp8_weight

TILES = [Tile(64, 16), Tile(64, 32, splits=2), Tile(128, 64, splits=4)]


def parts_around(generator, device, dtype, num_tokens, outputs, gated):
    """Bias and residual of a product."""
    bias = torch.randn(outputs, generator=generator).to(device, dtype)
    residual = torch.randn(num_tokens, outputs // (1 + gated), generator=generator).to(device, dtype)
    return bias, {"gated": gated, "residual": residual}


@pytest.mark.parametrize("dtype", HALF_TYPES)
@pytest.mark.parametrize("kind", ["outputs", "one", "blocks"])
@pytest.mark.parametrize(("num_tokens", "input_size", "outputs"), [(1, 128, 32), (17, 400, 96), (40, 256, 200)])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("tile", TILES)
def test_fp8_times_fp8(device, generator, dtype, kind, num_tokens, input_size, outputs, gated, tile):
    x = torch.randn(num_tokens, input_size, generator=generator).to(device, dtype)
    weight, scale = random_fp8_weight(generator, device, outputs, input_size, kind)
    group_size = 128 if kind == "blocks" else 0
    x8, x_scale = quantize_rows(x, torch.float8_e4m3fn, group_size=group_size or None)
    bias, around = parts_around(generator, device, dtype, num_tokens, outputs, gated)
    arguments = {"x_scale": x_scale, "group_size": group_size, "dtype": dtype, "tile": tile}
    got = quantized_matmul(x8, weight, scale, bias, **arguments, **around)
    x_kept = x8.double() * x_scale.double().repeat_interleave(group_size or input_size, 1)[:, :input_size]
    check_close(got, oracle(x_kept, scaled_weight(weight, scale), bias, **around), dtype)


@pytest.mark.parametrize("dtype", HALF_TYPES)
@pytest.mark.parametrize(("num_tokens", "input_size", "outputs"), [(3, 128, 32), (33, 400, 96)])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("tile", TILES)
def test_int8_times_int8(device, generator, dtype, num_tokens, input_size, outputs, gated, tile):
    x = torch.randn(num_tokens, input_size, generator=generator).to(device, dtype)
    weight = torch.randint(-127, 128, (outputs, input_size), generator=generator, dtype=torch.int8).to(device)
    scale = (torch.rand(outputs, 1, generator=generator) * 1e-3).to(device)
    x8, x_scale = quantize_rows(x, torch.int8)
    bias, around = parts_around(generator, device, dtype, num_tokens, outputs, gated)
    got = quantized_matmul(x8, weight, scale, bias, x_scale=x_scale, dtype=dtype, tile=tile, **around)
    check_close(got, oracle(x8 * x_scale.double(), weight * scale.double(), bias, **around), dtype)


@pytest.mark.parametrize("dtype", HALF_TYPES)
@pytest.mark.parametrize("to", [torch.float8_e4m3fn, torch.int8])
@pytest.mark.parametrize("tile", TILES)
def test_weights_of_8_bits_are_converted_for_16_bit_activations(device, generator, dtype, to, tile):
    x = torch.randn(20, 400, generator=generator).to(device, dtype)
    weight = torch.randn(96, 400, generator=generator)
    weight = (weight * 20).to(device, to) if to is torch.int8 else weight.to(device, to)
    scale = (torch.rand(96, 1, generator=generator) * 1e-2).to(device)
    got = quantized_matmul(x, weight, scale, dtype=dtype, tile=tile)
    check_close(got, oracle(x, weight.double() * scale), dtype)


@pytest.mark.parametrize("dtype", HALF_TYPES)
@pytest.mark.parametrize("group_size", [32, 128, 384])
@pytest.mark.parametrize("num_tokens", [1, 20])
@pytest.mark.parametrize("has_zeros", [False, True])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("tile", TILES[::2])
def test_int4(device, generator, dtype, group_size, num_tokens, has_zeros, gated, tile):
    input_size, outputs = 384, 96
    x = torch.randn(num_tokens, input_size, generator=generator).to(device, dtype)
    values = torch.randint(0, 16, (outputs, input_size), generator=generator)
    # Powers of two, so that a scaled weight is not rounded.
    scale = 2.0 ** -torch.randint(4, 8, (outputs, input_size // group_size), generator=generator).half()
    zeros = torch.randint(0, 17, scale.shape, generator=generator) if has_zeros else torch.full(scale.shape, 8)
    weight = (values - zeros.repeat_interleave(group_size, 1)) * scale.float().repeat_interleave(group_size, 1)
    bias, around = parts_around(generator, device, dtype, num_tokens, outputs, gated)
    got = quantized_matmul(
        x,
        pack_int4(values).to(device),
        scale.to(device),
        bias,
        zeros=zeros.half().to(device) if has_zeros else None,
        group_size=group_size,
        dtype=dtype,
        tile=tile,
        **around,
    )
    check_close(got, oracle(x, weight.to(device), bias, **around), dtype)


@pytest.mark.parametrize("dtype", HALF_TYPES)
def test_a_row_does_not_depend_on_its_neighbours(device, generator, dtype):
    x = torch.randn(20, 256, generator=generator).to(device, dtype)
    values = torch.randint(0, 16, (64, 256), generator=generator)
    scale = torch.rand(64, 2, generator=generator)
    arguments = {"group_size": 128, "dtype": dtype, "tile": Tile(64, 16, splits=2)}
    weight = pack_int4(values).to(device), scale.to(device)
    alone = quantized_matmul(x, *weight, **arguments)
    x[3] = torch.nan
    beside = quantized_matmul(x, *weight, **arguments)
    assert torch.equal(torch.cat((alone[:3], alone[4:])), torch.cat((beside[:3], beside[4:])))


def test_no_tokens_give_no_rows(device):
    weight, scale = torch.zeros(8, 128, dtype=torch.int8, device=device), torch.ones(8, 1, device=device)
    x = torch.empty(0, 128, dtype=torch.float16, device=device)
    assert quantized_matmul(x, weight, scale, dtype=torch.float16, tile=TILES[0]).shape == (0, 8)


@pytest.mark.parametrize("inputs", [128, 32, 100, 300])
def test_packing_int4_keeps_all_values(device, generator, inputs):
    values = torch.randint(0, 16, (5, inputs), generator=generator).to(device, torch.int8)
    packed = pack_int4(values)
    assert packed.shape == (5, -(-inputs // 128) * 32)
    assert torch.equal(unpack_int4(packed, inputs), values)
