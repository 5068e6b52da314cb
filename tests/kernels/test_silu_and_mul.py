from __future__ import annotations

import pytest
import torch

from nanovllm.kernels.silu_and_mul import gelu_and_mul, gelu_and_mul_reference, silu_and_mul, silu_and_mul_reference
from tests.kernels.inputs import DTYPES, check_close


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_tokens", "intermediate_size"), [(1, 1), (3, 100), (2, 3072)])
def test_silu_and_mul_equals_its_reference(device, generator, dtype, num_tokens, intermediate_size):
    gate_up = (4 * torch.randn(num_tokens, 2 * intermediate_size, generator=generator)).to(device, dtype)
    got = silu_and_mul(gate_up, use_triton=True)
    gate, up = gate_up.double().chunk(2, dim=-1)
    check_close(got, gate * torch.sigmoid(gate) * up, dtype)
    check_close(silu_and_mul_reference(gate_up), got, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gelu_and_mul_equals_its_reference(device, generator, dtype):
    gate_up = (4 * torch.randn(3, 200, generator=generator)).to(device, dtype)
    gate, up = gate_up.double().chunk(2, dim=-1)
    expected = torch.nn.functional.gelu(gate, approximate="tanh") * up
    check_close(gelu_and_mul(gate_up, use_triton=True), expected, dtype)
    check_close(gelu_and_mul_reference(gate_up), expected, dtype)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # exp(1e4) = inf is meant
@pytest.mark.parametrize("act_and_mul", [silu_and_mul, gelu_and_mul])
def test_extreme_gates_stay_finite(device, act_and_mul):
    gate_up = torch.tensor([[-1e4, 1e4, -100.0, 1.0, 1.0, 1.0]], device=device)
    assert act_and_mul(gate_up, use_triton=True).tolist() == [[0.0, 1e4, 0.0]]
