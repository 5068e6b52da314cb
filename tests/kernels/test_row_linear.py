"""The kernel runs on a GPU, and on a CPU in the emulator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from nanovllm.kernels import row_linear as module
from nanovllm.kernels.row_linear import row_linear, suits_row_linear
from nanovllm.kernels.skinny_linear import scaled_weight
from tests.kernels.gluon_emulator import emulate
from tests.kernels.graphs import same_of_replays
from tests.kernels.inputs import EMULATED_TYPES, check_close, random_int4_weight
from tests.kernels.kernel_ahead import run_beside_the_kernel_ahead
from tests.kernels.test_skinny_linear import oracle, random_fp8_weight, random_product

KINDS = ["half", "outputs", "blocks", "int8", "int4"]


def add_products(a: torch.Tensor, b: torch.Tensor, acc: torch.Tensor) -> torch.Tensor:
    """What dp4a does."""

    def signed(words: torch.Tensor) -> torch.Tensor:
        return words.broadcast_to(acc.shape).contiguous().view(torch.int8).unflatten(-1, (-1, 4)).int()

    return acc + (signed(a) * signed(b)).sum(-1, dtype=torch.int32)


def numbers_of(dtype: torch.dtype) -> Callable[[torch.Tensor], tuple[torch.Tensor, ...]]:
    """What the conversions do: a word's four numbers."""
    return lambda words: words.contiguous().view(dtype).unflatten(-1, (-1, 4)).float().unbind(-1)


ASSEMBLY = {
    module._ADD_PRODUCTS.value: add_products,
    module.INT8_TO_FLOAT.value: numbers_of(torch.int8),
    module._FP8_TO_FLOAT.value: numbers_of(torch.float8_e4m3fn),
}


def emulated(seed: int, programs: int, **replacements: Any) -> Callable[..., torch.Tensor]:
    """`row_linear` on a GPU of so many multiprocessors, in the emulator."""
    return emulate(  # type: ignore[no-any-return]
        row_linear, seed, assembly=ASSEMBLY, multiprocessor_count=lambda device: programs, **replacements
    )


@pytest.fixture
def multiply(device: torch.device) -> Callable[..., torch.Tensor]:
    return row_linear if device.type == "cuda" else emulated(0, 3)


def random_weight(generator, device, outputs, input_size, kind, dtype=torch.bfloat16):
    """The weight, and what `row_linear` takes for it. kind: half (of dtype), int4, int8, or of `random_fp8_weight`."""
    if kind == "half":
        weight = (torch.randn(outputs, input_size, generator=generator) * input_size**-0.5).to(device, dtype)
        return weight, {"weight": weight}
    if kind == "int4":
        weight, words, scale, zeros = random_int4_weight(generator, device, outputs, input_size, 128, has_zeros=True)
        return weight, {"weight": words, "scale": scale, "zeros": zeros, "group_size": 128}
    if kind == "int8":
        numbers = torch.randint(-127, 128, (outputs, input_size), generator=generator).to(device, torch.int8)
        scale = ((torch.rand(outputs, 1, generator=generator) + 0.5) * 0.01 * input_size**-0.5).to(device)
    else:
        numbers, scale = random_fp8_weight(generator, device, outputs, input_size, kind)
    return scaled_weight(numbers, scale), {"weight": numbers, "scale": scale}


@pytest.mark.parametrize("dtype", EMULATED_TYPES)
@pytest.mark.parametrize(
    ("input_size", "group_size"),
    [(34, 34), (100, 100), (384, 128), (512, 256), (1280, 128), (3072, 512), (3968, 128), (5120, 5120)],
)
@pytest.mark.parametrize("has_zeros", [False, True])
@pytest.mark.parametrize("gated", [False, True])
def test_int4_with_all_parts(multiply, device, generator, dtype, input_size, group_size, has_zeros, gated):
    outputs = 70
    x, _, bias, norm_weight = random_product(generator, device, dtype, 1, input_size, outputs)
    residual = torch.randn(1, outputs // (1 + gated), generator=generator).to(device, dtype)
    weight, words, scale, zeros = random_int4_weight(generator, device, outputs, input_size, group_size, has_zeros)
    around = {"norm_weight": norm_weight, "eps": 0.1, "gated": gated, "residual": residual}
    got = multiply(x, words, scale, bias, zeros=zeros, group_size=group_size, **around)
    check_close(got, oracle(x, weight, bias, **around), dtype)


@pytest.mark.parametrize("dtype", EMULATED_TYPES)
@pytest.mark.parametrize("input_size", [100, 512, 1100, 2560])
@pytest.mark.parametrize("kind", ["half", "outputs", "one", "blocks", "int8"])
@pytest.mark.parametrize("gated", [False, True])
def test_8_and_16_bits_with_all_parts(multiply, device, generator, dtype, input_size, kind, gated):
    outputs = 300
    x, _, bias, norm_weight = random_product(generator, device, dtype, 1, input_size, outputs)
    residual = torch.randn(1, outputs // (1 + gated), generator=generator).to(device, dtype)
    weight, given = random_weight(generator, device, outputs, input_size, kind, dtype)
    around = {"norm_weight": norm_weight, "eps": 0.1, "gated": gated, "residual": residual}
    check_close(multiply(x, bias=bias, **given, **around), oracle(x, weight, bias, **around), dtype)


@pytest.mark.parametrize("kind", KINDS)
def test_the_product_alone(multiply, device, generator, kind):
    x, *_ = random_product(generator, device, torch.bfloat16, 1, 640, 2)
    weight, given = random_weight(generator, device, 110, 640, kind)
    check_close(multiply(x, **given), oracle(x, weight), torch.bfloat16)


@pytest.mark.parametrize("dtype", EMULATED_TYPES)
@pytest.mark.parametrize("index", [0, 1, 127, 1023, 1024, 3001, 4095])
def test_one_input_of_16_bits_gives_its_column_exactly(multiply, device, generator, dtype, index):
    """As many inputs as the engine multiplies by this kernel, in pieces of several chunks."""
    x = torch.zeros(1, 4096, dtype=dtype, device=device)
    x[0, index] = 1
    weight = torch.randn(40, 4096, generator=generator).to(device, dtype)
    torch.testing.assert_close(multiply(x, weight), weight[:, index].unsqueeze(0), rtol=0, atol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", EMULATED_TYPES)
@pytest.mark.parametrize("input_size", [1024, 2048, 3072, 4096, 5120, 8192, 11008, 12288, 16384, 25600, 32768])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gated", [False, True])
def test_rows_of_models(generator, dtype, input_size, kind, gated):
    """As many outputs as programs take in several turns, of short rows."""
    outputs, device = 17000 if input_size <= 4096 else 300, torch.device("cuda")
    x, _, _, norm_weight = random_product(generator, device, dtype, 1, input_size, 2)
    weight, given = random_weight(generator, device, outputs, input_size, kind, dtype)
    around = {"norm_weight": norm_weight, "eps": 0.1, "gated": gated}
    check_close(row_linear(x, **given, **around), oracle(x, weight, **around), dtype)


@pytest.mark.parametrize("dtype", EMULATED_TYPES)
@pytest.mark.parametrize("magnitude", [1e-6, 1e4])
def test_int4_with_inputs_of_any_magnitude(multiply, device, generator, dtype, magnitude):
    """An input a thousand times its neighbours leaves them as exact as bf16 would, beside the sum that it dominates."""
    x = torch.randn(1, 256, generator=generator)
    x[0, 7] *= 1000
    x = (x * magnitude if dtype is torch.bfloat16 else x).to(device, dtype)
    weight, words, scale, _ = random_int4_weight(generator, device, 16, 256, 128, has_zeros=False)
    check_close(multiply(x, words, scale, group_size=128), oracle(x, weight), dtype)


@pytest.mark.parametrize("dtype", EMULATED_TYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("has_norm", [False, True])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_shows(multiply, device, generator, dtype, kind, has_norm, bad):
    x = torch.randn(1, 256, generator=generator).to(device, dtype)
    x[0, 5] = bad
    _, given = random_weight(generator, device, 16, 256, kind, dtype)
    norm_weight = torch.ones(256, dtype=dtype, device=device) if has_norm else None
    assert not bool(multiply(x, norm_weight=norm_weight, eps=1e-6, **given).isfinite().any())


@pytest.mark.parametrize("kind", KINDS)
def test_zero_inputs_give_zero(multiply, device, generator, kind):
    _, given = random_weight(generator, device, 16, 128, kind, torch.float16)
    assert not multiply(torch.zeros(1, 128, dtype=torch.float16, device=device), **given).any()


@pytest.mark.parametrize("kind", KINDS)
def test_no_tokens_give_no_rows(generator, kind):
    _, given = random_weight(generator, "cpu", 16, 128, kind, torch.float16)
    assert row_linear(torch.empty(0, 128, dtype=torch.float16), **given).shape == (0, 16)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(2))
def test_input_and_residual_are_read_after_the_kernel_ahead_has_ended(generator, kind, seed):
    x, _, _, norm_weight = random_product(generator, "cpu", torch.bfloat16, 1, 384, 2)
    residual = torch.randn(1, 12, generator=generator).bfloat16()
    weight, given = random_weight(generator, "cpu", 12, 384, kind)
    around = {"norm_weight": norm_weight, "eps": 0.1, "residual": residual}
    expected = oracle(x, weight, **around)
    got, waiting = run_beside_the_kernel_ahead(emulated, seed, [x, residual], 1, x, **given, **around)
    check_close(got, expected, torch.bfloat16)
    assert len(waiting) == 1


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_chained_kernels_in_a_graph_see_what_the_ones_before_wrote(generator, kind):
    """Each product starts before the one ahead has ended, and buffers are reused: the replays must give one result."""
    device, dtype = torch.device("cuda"), torch.bfloat16
    layers = [random_weight(generator, device, 1024, 1024, kind) for _ in range(20)]
    x, _, _, norm_weight = random_product(generator, device, dtype, 1, 1024, 2)
    around = {"norm_weight": norm_weight, "eps": 1e-6}

    def run():
        hidden = x
        for _, given in layers:
            hidden = row_linear(hidden, residual=hidden, **given, **around)
        return hidden

    got = same_of_replays(run, 100).double()
    expected = x
    for weight, _ in layers:
        expected = oracle(expected, weight, residual=expected, **around)
    assert (got - expected).norm() / expected.norm() < 2e-2


def test_what_suits(monkeypatch):
    def tokens(*shape: int) -> torch.Tensor:
        return torch.empty(*shape, dtype=torch.bfloat16)

    monkeypatch.setattr(module, "HAS_GLUON", True)
    assert suits_row_linear(tokens(1, 256))
    assert suits_row_linear(tokens(1, 256), 128)
    assert suits_row_linear(tokens(1, 100), 100)
    assert suits_row_linear(tokens(1, 254), 256)
    assert suits_row_linear(tokens(0, 256), 128)
    assert not suits_row_linear(tokens(1, 256), 64)
    assert not suits_row_linear(tokens(2, 256), 128)
    assert not suits_row_linear(tokens(1, 254))
    assert not suits_row_linear(tokens(1, 255), 255)
    assert not suits_row_linear(tokens(256)[1:].view(1, 255)[:, :254], 256)
    assert not suits_row_linear(tokens(258)[2:].view(1, 256))
    assert not suits_row_linear(tokens(1, 512)[:, ::2], 128)
    assert not suits_row_linear(tokens(1, 32768 + 128), 128)
    assert not suits_row_linear(tokens(1, 256).float())
    monkeypatch.setattr(module, "shared_memory", lambda device: 99 << 10)
    assert suits_row_linear(tokens(1, 16384))
    assert not suits_row_linear(tokens(1, 18944))
    assert suits_row_linear(tokens(1, 18944), 128)
    monkeypatch.setattr(module, "HAS_GLUON", False)
    assert not suits_row_linear(tokens(1, 256), 128)
