from __future__ import annotations

import pytest
import torch

from nanovllm.kernels.rms_norm import add_rms_norm, rms_norm, rms_norm_reference
from tests.kernels.inputs import DTYPES, check_close


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_tokens", "hidden_size"), [(1, 1), (3, 100), (7, 1024), (2, 5120)])
def test_rms_norm_equals_its_reference(device, generator, dtype, num_tokens, hidden_size):
    x = torch.randn(num_tokens, hidden_size, generator=generator).to(device, dtype)
    weight = torch.randn(hidden_size, generator=generator).to(device, dtype)
    got = rms_norm(x, weight, 1e-6, use_triton=True)
    check_close(got, rms_norm_reference(x.double(), weight.double(), 1e-6), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm_reads_strided_rows(device, generator, dtype):
    wide = torch.randn(5, 3, 96, generator=generator).to(device, dtype)
    weight = torch.randn(96, generator=generator).to(device, dtype)
    got = rms_norm(wide[:, 1], weight, 1e-5, use_triton=True)
    assert torch.equal(got, rms_norm(wide[:, 1].contiguous(), weight, 1e-5, use_triton=True))


def test_rms_norm_keeps_small_inputs_apart_from_zero(device):
    x = torch.full((1, 64), 1e-4, device=device)
    got = rms_norm(x, torch.ones(64, device=device), 1e-6, use_triton=True)
    torch.testing.assert_close(got, torch.full_like(x, 1e-4 / (1e-8 + 1e-6) ** 0.5))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_tokens", "hidden_size"), [(1, 64), (5, 1000)])
def test_add_rms_norm_rounds_the_sum_and_norms_what_it_rounded(device, generator, dtype, num_tokens, hidden_size):
    x = torch.randn(num_tokens, hidden_size, generator=generator).to(device, dtype)
    residual = (100 * torch.randn(num_tokens, hidden_size, generator=generator)).to(device, dtype)
    weight = torch.randn(hidden_size, generator=generator).to(device, dtype)
    before = x.clone(), residual.clone()
    normed, new_residual = add_rms_norm(x, residual, weight, 1e-6, use_triton=True)
    assert torch.equal(new_residual, x + residual)
    check_close(normed, rms_norm_reference(new_residual.double(), weight.double(), 1e-6), dtype)
    assert torch.equal(x, before[0])
    assert torch.equal(residual, before[1])


def test_no_tokens_give_no_rows(device):
    x = torch.empty(0, 8, device=device)
    assert rms_norm(x, torch.ones(8, device=device), 1e-6, use_triton=True).shape == (0, 8)
