from __future__ import annotations

import pytest
import torch

from nanovllm.kernels.dequantize_weight import dequantize_weight
from nanovllm.kernels.int4_packing import pack_int4
from nanovllm.kernels.skinny_linear import scaled_weight
from tests.kernels.inputs import HALF_TYPES, check_close
from tests.kernels.test_skinny_linear import random_fp8_weight


@pytest.mark.parametrize("dtype", HALF_TYPES)
@pytest.mark.parametrize("kind", ["outputs", "one", "blocks"])
def test_fp8(device, generator, dtype, kind):
    weight, scale = random_fp8_weight(generator, device, 200, 300, kind)
    got = dequantize_weight(weight, scale, dtype, input_size=300, group_size=128 if kind == "blocks" else 0)
    check_close(got, scaled_weight(weight, scale), dtype)


@pytest.mark.parametrize("dtype", HALF_TYPES)
def test_int8(device, generator, dtype):
    weight = torch.randint(-127, 128, (40, 130), generator=generator, dtype=torch.int8).to(device)
    scale = torch.rand(40, 1, generator=generator).to(device)
    check_close(dequantize_weight(weight, scale, dtype, input_size=130), weight * scale, dtype)


@pytest.mark.parametrize("dtype", HALF_TYPES)
@pytest.mark.parametrize(("input_size", "group_size"), [(384, 32), (128, 64), (384, 128), (100, 100)])
@pytest.mark.parametrize("has_zeros", [False, True])
def test_int4(device, generator, dtype, input_size, group_size, has_zeros):
    values = torch.randint(0, 16, (40, input_size), generator=generator)
    scale = torch.rand(40, input_size // group_size, generator=generator).half()
    zeros = torch.randint(0, 17, scale.shape, generator=generator) if has_zeros else torch.full(scale.shape, 8)
    expected = (values - zeros.repeat_interleave(group_size, 1)) * scale.to(dtype).repeat_interleave(group_size, 1)
    got = dequantize_weight(
        pack_int4(values).to(device),
        scale.to(device),
        dtype,
        input_size=input_size,
        zeros=zeros.half().to(device) if has_zeros else None,
        group_size=group_size,
    )
    check_close(got, expected.to(device), dtype)
