"""The kernel runs on a GPU, and on a CPU in the emulator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from nanovllm.kernels import int4_skinny_linear as module
from nanovllm.kernels.int4_packing import pack_int4
from nanovllm.kernels.int4_skinny_linear import _choose_tile, int4_skinny_linear, suits_int4_skinny_linear
from tests.kernels.gluon_emulator import emulate
from tests.kernels.graphs import same_of_replays
from tests.kernels.inputs import EMULATED_TYPES, check_close
from tests.kernels.kernel_ahead import run_beside_the_kernel_ahead
from tests.kernels.test_skinny_linear import oracle, random_product


def add_products(a: torch.Tensor, b: torch.Tensor, acc: torch.Tensor) -> torch.Tensor:
    """What dp4a does."""

    def signed(words: torch.Tensor) -> torch.Tensor:
        return words.broadcast_to(acc.shape).contiguous().view(torch.int8).unflatten(-1, (-1, 4)).int()

    return acc + (signed(a) * signed(b)).sum(-1, dtype=torch.int32)


def emulated(seed: int, programs: int, **replacements: Any) -> Callable[..., torch.Tensor]:
    """`int4_skinny_linear` on a GPU of so many multiprocessors, in the emulator."""
    return emulate(  # type: ignore[no-any-return]
        int4_skinny_linear,
        seed,
        assembly={module._ADD_PRODUCTS.value: add_products},
        multiprocessor_count=lambda device: programs,
        **replacements,
    )


@pytest.fixture
def multiply(device: torch.device) -> Callable[..., torch.Tensor]:
    return int4_skinny_linear if device.type == "cuda" else emulated(0, 3)


def random_int4_weight(generator, device, outputs, input_size, group_size, has_zeros):
    """The weight, and as the kernel takes it: words, scale and zeros, of which the engine keeps outputs together."""
    values = torch.randint(0, 16, (outputs, input_size), generator=generator)
    scale = torch.rand(outputs, input_size // group_size, generator=generator) * 0.2 * input_size**-0.5
    zeros = torch.randint(0, 17, scale.shape, generator=generator) if has_zeros else torch.full(scale.shape, 8)
    weight = (values - zeros.repeat_interleave(group_size, 1)) * scale.repeat_interleave(group_size, 1)
    packed_zeros = zeros.float().T.to(device).contiguous().T if has_zeros else None
    return weight.to(device), pack_int4(values).to(device), scale.T.to(device).contiguous().T, packed_zeros


@pytest.mark.parametrize("dtype", EMULATED_TYPES)
@pytest.mark.parametrize(
    ("input_size", "group_size"),
    [(34, 34), (100, 100), (384, 128), (512, 256), (1280, 128), (3072, 512), (3968, 128), (5120, 5120)],
)
@pytest.mark.parametrize("has_zeros", [False, True])
@pytest.mark.parametrize("gated", [False, True])
def test_the_product_with_all_parts(multiply, device, generator, dtype, input_size, group_size, has_zeros, gated):
    outputs = 70
    x, _, bias, norm_weight = random_product(generator, device, dtype, 1, input_size, outputs)
    residual = torch.randn(1, outputs // (1 + gated), generator=generator).to(device, dtype)
    weight, words, scale, zeros = random_int4_weight(generator, device, outputs, input_size, group_size, has_zeros)
    around = {"norm_weight": norm_weight, "eps": 0.1, "gated": gated, "residual": residual}
    got = multiply(x, words, scale, bias, zeros=zeros, group_size=group_size, **around)
    check_close(got, oracle(x, weight, bias, **around), dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", EMULATED_TYPES)
@pytest.mark.parametrize("input_size", [1024, 2048, 3072, 4096, 5120, 8192, 12288, 16384, 25600, 32768])
@pytest.mark.parametrize("gated", [False, True])
def test_rows_of_models(generator, dtype, input_size, gated):
    """As many outputs as programs take in several turns, of short rows."""
    outputs, device = 17000 if input_size <= 4096 else 300, torch.device("cuda")
    x, _, _, norm_weight = random_product(generator, device, dtype, 1, input_size, 2)
    weight, words, scale, zeros = random_int4_weight(generator, device, outputs, input_size, 128, has_zeros=True)
    around = {"norm_weight": norm_weight, "eps": 0.1, "gated": gated}
    got = int4_skinny_linear(x, words, scale, zeros=zeros, group_size=128, **around)
    check_close(got, oracle(x, weight, **around), dtype)


@pytest.mark.parametrize("dtype", EMULATED_TYPES)
@pytest.mark.parametrize("magnitude", [1e-6, 1e4])
def test_inputs_of_any_magnitude(multiply, device, generator, dtype, magnitude):
    """An input a thousand times its neighbours leaves them as exact as bf16 would, beside the sum that it dominates."""
    x = torch.randn(1, 256, generator=generator)
    x[0, 7] *= 1000
    x = (x * magnitude if dtype is torch.bfloat16 else x).to(device, dtype)
    weight, words, scale, _ = random_int4_weight(generator, device, 16, 256, 128, has_zeros=False)
    check_close(multiply(x, words, scale, group_size=128), oracle(x, weight), dtype)


@pytest.mark.parametrize("dtype", EMULATED_TYPES)
@pytest.mark.parametrize("has_norm", [False, True])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_shows(multiply, device, generator, dtype, has_norm, bad):
    x = torch.randn(1, 256, generator=generator).to(device, dtype)
    x[0, 5] = bad
    _, words, scale, _ = random_int4_weight(generator, device, 16, 256, 128, has_zeros=False)
    norm_weight = torch.ones(256, dtype=dtype, device=device) if has_norm else None
    got = multiply(x, words, scale, group_size=128, norm_weight=norm_weight, eps=1e-6)
    assert not bool(got.isfinite().any())


def test_zero_inputs_give_zero(multiply, device, generator):
    _, words, scale, _ = random_int4_weight(generator, device, 16, 128, 128, has_zeros=False)
    x = torch.zeros(1, 128, dtype=torch.float16, device=device)
    assert not multiply(x, words, scale, group_size=128).any()


def test_no_tokens_give_no_rows(generator):
    _, words, scale, _ = random_int4_weight(generator, "cpu", 16, 128, 128, has_zeros=False)
    x = torch.empty(0, 128, dtype=torch.float16)
    assert int4_skinny_linear(x, words, scale, group_size=128).shape == (0, 16)


@pytest.mark.parametrize("seed", range(4))
def test_input_and_residual_are_read_after_the_kernel_ahead_has_ended(generator, seed):
    x, _, _, norm_weight = random_product(generator, "cpu", torch.bfloat16, 1, 384, 2)
    residual = torch.randn(1, 30, generator=generator).bfloat16()
    weight, words, scale, _ = random_int4_weight(generator, "cpu", 30, 384, 128, has_zeros=False)
    around = {"norm_weight": norm_weight, "eps": 0.1, "residual": residual}
    expected = oracle(x, weight, **around)
    written = [x, residual]
    got, waiting = run_beside_the_kernel_ahead(emulated, seed, written, 1, x, words, scale, group_size=128, **around)
    check_close(got, expected, torch.bfloat16)
    assert len(waiting) == 1


@pytest.mark.gpu
def test_chained_kernels_in_a_graph_see_what_the_ones_before_wrote(generator):
    """Each product starts before the one ahead has ended, and buffers are reused: the replays must give one result."""
    device, dtype = torch.device("cuda"), torch.bfloat16
    layers = [random_int4_weight(generator, device, 1024, 1024, 128, has_zeros=True) for _ in range(20)]
    x, _, _, norm_weight = random_product(generator, device, dtype, 1, 1024, 2)
    around = {"norm_weight": norm_weight, "eps": 1e-6}

    def run():
        hidden = x
        for _, words, scale, zeros in layers:
            hidden = int4_skinny_linear(hidden, words, scale, zeros=zeros, group_size=128, residual=hidden, **around)
        return hidden

    got = same_of_replays(run, 100).double()
    expected = x
    for weight, *_ in layers:
        expected = oracle(expected, weight, residual=expected, **around)
    assert (got - expected).norm() / expected.norm() < 2e-2


def test_what_suits(monkeypatch):
    monkeypatch.setattr(module, "HAS_GLUON", True)
    assert suits_int4_skinny_linear(torch.empty(1, 256), 128)
    assert suits_int4_skinny_linear(torch.empty(1, 100), 100)
    assert suits_int4_skinny_linear(torch.empty(0, 256), 128)
    assert not suits_int4_skinny_linear(torch.empty(1, 256), 64)
    assert not suits_int4_skinny_linear(torch.empty(2, 256), 128)
    assert not suits_int4_skinny_linear(torch.empty(1, 255), 255)
    assert not suits_int4_skinny_linear(torch.empty(256)[1:].view(1, 255)[:, :254], 256)
    assert not suits_int4_skinny_linear(torch.empty(1, 512)[:, ::2], 128)
    assert not suits_int4_skinny_linear(torch.empty(1, 32768 + 128), 128)
    monkeypatch.setattr(module, "HAS_GLUON", False)
    assert not suits_int4_skinny_linear(torch.empty(1, 256), 128)


@pytest.mark.parametrize("gated", [False, True])
def test_a_row_has_whole_pieces(gated):
    for num_chunks in range(1, 65):
        assert num_chunks % _choose_tile(num_chunks, gated)[1] == 0
