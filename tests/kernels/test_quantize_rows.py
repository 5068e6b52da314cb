from __future__ import annotations

import pytest
import torch

from nanovllm.kernels.quantize_rows import GROUP_SIZE, quantize_rows
from nanovllm.kernels.rms_norm import rms_norm_reference
from tests.kernels.inputs import DTYPES, relative_error

LARGEST = {torch.float8_e4m3fn: 448, torch.int8: 127}


def restored(quantized, scale, group_size=None):
    """What the quantised rows stand for, in float64."""
    hidden_size = quantized.shape[1]
    size = group_size or hidden_size
    spread = scale.double().repeat_interleave(size, dim=1)[:, :hidden_size]
    return quantized.double() * spread


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("to", [torch.float8_e4m3fn, torch.int8])
@pytest.mark.parametrize("group_size", [None, GROUP_SIZE])
@pytest.mark.parametrize(("num_tokens", "hidden_size"), [(1, 128), (5, 384), (3, 200), (2, 64)])
@pytest.mark.parametrize("with_norm", [False, True])
def test_scales_are_the_largest_magnitudes_and_numbers_are_near(
    device, generator, dtype, to, group_size, num_tokens, hidden_size, with_norm
):
    x = (torch.randn(num_tokens, hidden_size, generator=generator) * 3).to(device, dtype)
    weight = torch.rand(hidden_size, generator=generator).to(device, dtype) + 0.5 if with_norm else None
    got, scale = quantize_rows(x, to, group_size=group_size, norm_weight=weight, eps=0.1, use_triton=True)
    expected = x if weight is None else rms_norm_reference(x, weight, 0.1)
    size = group_size or hidden_size
    padded = torch.nn.functional.pad(expected.double(), (0, -hidden_size % size)).view(num_tokens, -1, size)
    largest = padded.abs().amax(-1) / LARGEST[to]
    assert got.dtype == to
    assert got.shape == x.shape
    assert scale.shape == largest.shape
    assert relative_error(scale, largest) < 2e-3  # the norm may be rounded another way
    # A step of INT8 is one scale. FP8 has a number within a sixteenth.
    step = scale.double().repeat_interleave(size, dim=1)[:, :hidden_size]
    allowed = 0.51 * step if to is torch.int8 else 0.063 * expected.double().abs() + step / 500
    assert bool(((restored(got, scale, group_size) - expected.double()).abs() <= allowed + 0.004 * step).all())


@pytest.mark.parametrize("to", [torch.float8_e4m3fn, torch.int8])
def test_a_given_scale_is_used_for_all_rows_and_larger_numbers_are_cut_off(device, generator, to):
    x = torch.randn(4, 256, generator=generator).to(device)
    given = torch.tensor([0.5 / LARGEST[to]], device=device)
    got, scale = quantize_rows(x, to, input_scale=given, use_triton=True)
    assert torch.equal(scale, given.expand(4, 1))
    kept = restored(got, scale)
    assert float(kept.abs().max()) <= 0.5 + 1e-6
    large = x.abs() > 0.5
    assert torch.allclose(kept[large], x[large].sign().double() * 0.5, atol=1e-6)


@pytest.mark.parametrize("to", [torch.float8_e4m3fn, torch.int8])
def test_a_row_of_zeros_stays_zero(device, to):
    got, scale = quantize_rows(torch.zeros(2, 128, device=device), to, use_triton=True)
    assert not got.float().any()
    assert bool(scale.isfinite().all())


def test_integers_are_rounded_to_nearest(device):
    x = torch.tensor([[127.0, 0.4, 0.6, -0.6, -1.4, 2.5]], device=device)
    got, _ = quantize_rows(x, torch.int8, use_triton=True)
    assert got.tolist() == [[127, 0, 1, -1, -1, 2]]


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_may_be_strided(device, generator, dtype):
    x = torch.randn(3, 256, generator=generator).to(device, dtype)
    left = quantize_rows(x[:, :128], torch.int8, use_triton=True)
    assert torch.equal(left[0], quantize_rows(x[:, :128].contiguous(), torch.int8, use_triton=True)[0])


def test_no_tokens_give_no_rows(device):
    got, scale = quantize_rows(torch.empty(0, 128, device=device), torch.int8, use_triton=True)
    assert got.shape == (0, 128)
    assert scale.shape == (0, 1)


@pytest.mark.parametrize("to", [torch.float8_e4m3fn, torch.int8])
@pytest.mark.parametrize("group_size", [None, GROUP_SIZE])
def test_the_reference_is_the_same_function(device, generator, to, group_size):
    x = torch.randn(3, 300, generator=generator).to(device)
    weight = torch.rand(300, generator=generator).to(device) + 0.5
    arguments = {"group_size": group_size, "norm_weight": weight, "eps": 0.1}
    got, scale = quantize_rows(x, to, **arguments, use_triton=True)
    expected, expected_scale = quantize_rows(x, to, **arguments, use_triton=False)
    assert relative_error(scale, expected_scale) < 1e-5
    assert relative_error(got.double(), expected.double()) < 5e-3  # of all numbers, few are rounded another way
