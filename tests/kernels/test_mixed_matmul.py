"""The kernel runs on a Hopper GPU at sizes of models, and on a CPU in the emulator at small ones."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

from nanovllm.kernels import mixed_matmul_multiply
from nanovllm.kernels.mixed_matmul import (
    MixedTile,
    _largest_tile,
    choose_mixed_tile,
    mixed_matmul,
    suits_mixed_matmul,
)
from nanovllm.kernels.rms_norm import rms_norm
from nanovllm.kernels.triton_support import shared_memory
from tests.kernels.gluon_emulator import emulate
from tests.kernels.inputs import EMULATED_TYPES, check_close, random_int4_weight
from tests.kernels.kernel_ahead import run_beside_the_kernel_ahead
from tests.kernels.test_skinny_linear import oracle
from tests.runner.test_warm_up import steps_of

pytestmark = pytest.mark.usefixtures("new_memory_is_nan")


def unpacked(dtype: torch.dtype) -> Callable[..., tuple[torch.Tensor, ...]]:
    """What the assembly does: planes of words, less zero points that have as much added as the planes."""
    offset = 128 if dtype is torch.bfloat16 else 1024

    def unpack(words: torch.Tensor, *zeros: torch.Tensor) -> tuple[torch.Tensor, ...]:
        planes = [(words.int() >> 4 * plane & 15) + offset for plane in range(4)]
        return tuple(plane.to(dtype) - zero for plane, zero in zip(planes, zeros, strict=True))

    return unpack


def converted(dtype: torch.dtype, assembly: str) -> Callable[..., tuple[torch.Tensor, ...]]:
    """What the assembly does: bytes with the sign bit inverted are bits of `dtype`, of which it makes numbers."""
    constants = [int(bits, 16) for bits in re.findall(r"mov.b32 \w+, 0x....(....);", assembly)]
    factor, offset = torch.tensor(constants, dtype=torch.uint16).view(dtype).double()

    def convert(words: torch.Tensor) -> tuple[torch.Tensor, ...]:
        flipped = words.contiguous().view(torch.uint8).unflatten(1, (-1, 2)) ^ 128
        numbers = flipped.to(torch.int16).view(dtype).double() * factor + offset
        return numbers.to(dtype).unbind(2)

    return convert


ASSEMBLY = {
    mixed_matmul_multiply._UNPACK_BF16.value: unpacked(torch.bfloat16),
    mixed_matmul_multiply._UNPACK_FP16.value: unpacked(torch.float16),
    mixed_matmul_multiply._INT8_TO_BF16.value: converted(torch.bfloat16, mixed_matmul_multiply._INT8_TO_BF16.value),
    mixed_matmul_multiply._INT8_TO_FP16.value: converted(torch.float16, mixed_matmul_multiply._INT8_TO_FP16.value),
}


def sum_splits(finishing: dict[str, Any]) -> None:
    """`add_splits`, in torch."""
    sums, out, residual = finishing["partial_ptr"].sum(0), finishing["out_ptr"], finishing["residual_ptr"]
    assert sums.shape == (len(out), out.shape[1] * (1 + finishing["IS_GATED"]))
    if finishing["HAS_SCALE"]:
        sums *= finishing["scale_ptr"].T
    if finishing["HAS_BIAS"]:
        sums += finishing["bias_ptr"]
    if finishing["IS_GATED"]:
        gate, up = sums.chunk(2, dim=1)
        sums = torch.nn.functional.silu(gate) * up
    out.copy_(sums + residual if finishing["HAS_RESIDUAL"] else sums)


def emulated(seed: int, programs: int, **replacements: Any) -> Callable[..., torch.Tensor]:
    """`mixed_matmul` on a GPU of so many multiprocessors, in the emulator."""
    return emulate(
        mixed_matmul,
        seed,
        assembly=ASSEMBLY,
        add_splits=sum_splits,
        multiprocessor_count=lambda device: programs,
        shared_memory=lambda device: 227 << 10,
        **replacements,
    )


def int8_weight(generator, rows, input_size, has_one_scale):
    """Returns (weight, scale, no zeros, what they stand for in float64)."""
    values = torch.randint(-128, 128, (rows, input_size), generator=generator, dtype=torch.int8)
    scale = torch.rand(1 if has_one_scale else rows, 1, generator=generator) * 0.01
    return values, scale, None, values.double() * scale.double()


def problem(
    generator,
    num_tokens,
    input_size,
    outputs,
    dtype,
    *,
    group_size=128,
    zeros=True,
    has_one_scale=False,
    gated=False,
    full=True,
):
    """Returns (arguments of `mixed_matmul`, the result in float64): with INT8 weights if group_size is 0."""
    rows = outputs * (1 + gated)
    # x is a part of a larger tensor whose rest is NaN.
    around = torch.full((num_tokens + 3, input_size + 64), torch.nan, dtype=dtype)
    x = around[1 : num_tokens + 1, :input_size]
    x.copy_(torch.randn(num_tokens, input_size, generator=generator))
    if group_size:
        exact, weight, scale, zero = random_int4_weight(generator, x.device, rows, input_size, group_size, zeros)
    else:
        weight, scale, zero, exact = int8_weight(generator, rows, input_size, has_one_scale)
    bias = torch.randn(rows, generator=generator).to(dtype) if full else None
    residual = torch.full((num_tokens, outputs + 8), torch.nan, dtype=dtype)[:, :outputs]
    residual.copy_(torch.randn(num_tokens, outputs, generator=generator))
    parts = {"gated": gated, "residual": residual if full else None}
    arguments = {"bias": bias, "zeros": zero, "group_size": group_size, **parts}
    return (x, weight, scale), arguments, oracle(x.double(), exact.double(), bias, **parts)


def check(generator, num_tokens, input_size, outputs, dtype, tile, seed=0, programs=3, **parts):
    given, arguments, expected = problem(generator, num_tokens, input_size, outputs, dtype, **parts)
    check_close(emulated(seed, programs)(*given, **arguments, tile=tile), expected, dtype)


@pytest.mark.parametrize("num_tokens", [1, 2, 3, 4, 5, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("group_size", [0, 128])
def test_numbers_of_tokens(generator, num_tokens, gated, group_size):
    """With the tile that is chosen for them, and others."""
    parts = {"gated": gated, "group_size": group_size}
    for tile in (None, MixedTile(32, 3), MixedTile(16, 3, warpgroups=3)):
        check(generator, num_tokens, 256, 72, torch.bfloat16, tile, seed=num_tokens, **parts)


@pytest.mark.parametrize("dtype", EMULATED_TYPES)
@pytest.mark.parametrize("group_size", [32, 64, 128, 384, 640])
@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("warpgroups", [2, 3])
def test_groups(generator, dtype, group_size, zeros, gated, warpgroups):
    parts = {"group_size": group_size, "zeros": zeros, "gated": gated}
    check(generator, 19, 640, 104, dtype, MixedTile(16, 3, 1, warpgroups), seed=group_size, **parts)


@pytest.mark.parametrize("dtype", EMULATED_TYPES)
@pytest.mark.parametrize("has_one_scale", [False, True])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("warpgroups", [2, 3])
def test_int8(generator, dtype, has_one_scale, gated, splits, warpgroups):
    parts = {"group_size": 0, "has_one_scale": has_one_scale, "gated": gated}
    check(generator, 19, 640, 104, dtype, MixedTile(16, 3, splits, warpgroups), seed=splits, **parts)


@pytest.mark.parametrize("dtype", EMULATED_TYPES)
def test_every_int8_is_exact(dtype):
    weight = torch.arange(-128, 128, dtype=torch.int8).repeat(16, 1)
    product = emulated(0, 1)(torch.eye(256, dtype=dtype), weight, torch.ones(1, 1))
    assert torch.equal(product.T, weight.to(dtype))


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("group_size", [0, 128])
@pytest.mark.parametrize("splits", [2, 3, 4])
@pytest.mark.parametrize("warpgroups", [2, 3])
def test_splits(generator, full, gated, group_size, splits, warpgroups):
    """Of five blocks of inputs: the last split has fewer, or none."""
    parts = {"gated": gated, "full": full, "group_size": group_size}
    check(generator, 18, 640, 136, torch.float16, MixedTile(16, 2, splits, warpgroups), seed=splits, **parts)


@pytest.mark.parametrize("input_size", [32, 160, 400, 1024])
@pytest.mark.parametrize("outputs", [8, 128, 200])
@pytest.mark.parametrize("warpgroups", [2, 3])
def test_inputs_and_outputs_that_do_not_fill_tiles(generator, input_size, outputs, warpgroups):
    """With three warpgroups, of 8 outputs two have none, and of 200 a second tile has 8 in its first one."""
    for gated in (False, True):
        for group_size in (0, 32, 128):
            parts = {"group_size": group_size, "gated": gated}
            tile = MixedTile(16, 4, 1, warpgroups)
            check(generator, 3, input_size, outputs, torch.bfloat16, tile, seed=outputs, **parts)


@pytest.mark.parametrize("group_size", [0, 128])
@pytest.mark.parametrize("warpgroups", [2, 3])
def test_rows_of_whole_multiples_of_eight_do(generator, group_size, warpgroups):
    check(generator, 5, 256, 72, torch.bfloat16, MixedTile(16, 2, 1, warpgroups), group_size=group_size)


def test_rows_whose_scales_cannot_be_copied_are_refused(generator, monkeypatch):
    """A copy of scales begins at a multiple of 16 bytes: the second group's after 72 scales, and not after 68."""
    monkeypatch.setattr("nanovllm.kernels.mixed_matmul.is_hopper", lambda device: True)
    monkeypatch.setattr("nanovllm.kernels.mixed_matmul.HAS_GLUON", True)
    for outputs, suits in ((72, True), (68, False)):
        given, arguments, _ = problem(generator, 5, 256, outputs, torch.bfloat16)
        assert suits_mixed_matmul(*given, group_size=arguments["group_size"], gated=False) is suits


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("programs", [1, 5])
@pytest.mark.parametrize("group_size", [0, 128])
@pytest.mark.parametrize("warpgroups", [2, 3])
def test_warps_take_turns_in_any_order(generator, seed, programs, group_size, warpgroups):
    tile = MixedTile(16, 2, 2, warpgroups)
    check(generator, 40, 1024, 200, torch.bfloat16, tile, seed=seed, programs=programs, group_size=group_size)


@pytest.mark.parametrize("group_size", [0, 128])
def test_a_row_does_not_depend_on_its_neighbours(generator, group_size):
    given, arguments, _ = problem(generator, 20, 256, 64, torch.bfloat16, group_size=group_size)
    alone = emulated(0, 2)(*given, **arguments)
    given[0][3] = torch.nan
    beside = emulated(0, 2)(*given, **arguments)
    assert beside[3].isnan().all()
    assert torch.equal(torch.cat((alone[:3], alone[4:])), torch.cat((beside[:3], beside[4:])))


@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("warpgroups", [2, 3])
def test_all_that_touch_what_other_kernels_do_wait_for_the_kernel_ahead(generator, seed, splits, warpgroups):
    """It writes activations and residual, and ends once all warpgroups and the warp of the activations wait for it."""
    given, arguments, expected = problem(generator, 18, 512, 136, torch.bfloat16)
    written, tile = [given[0], arguments["residual"]], MixedTile(16, 2, splits, warpgroups)
    got, waiting = run_beside_the_kernel_ahead(emulated, seed, written, warpgroups + 1, *given, **arguments, tile=tile)
    check_close(got, expected, torch.bfloat16)
    computing = ["partition 0 (multiply)", "partition 1 (multiply)", "partition 4 (multiply)"]
    assert waiting == {*computing[:warpgroups], "partition 2 (load_activations)"}


def test_no_tokens_give_no_rows(generator):
    given, arguments, _ = problem(generator, 0, 256, 64, torch.bfloat16)
    assert emulated(0, 2)(*given, **arguments).shape == (0, 64)


@pytest.mark.parametrize("num_tokens", [2, 17, 100, 1024])
@pytest.mark.parametrize(("rows", "input_size"), [(6144, 4096), (24576, 4096), (4096, 12288), (512, 256), (128, 64)])
@pytest.mark.parametrize("group_size", [0, 32, 64, 128])
def test_chosen_tiles_fit_in_shared_memory_and_registers(num_tokens, rows, input_size, group_size):
    memory = 227 << 10
    tile = choose_mixed_tile(num_tokens, rows, input_size, group_size=group_size, num_programs=132, memory=memory)
    groups = 128 // group_size if group_size else 0
    tile_rows, scale_rows, most_registers = {2: (128, 128, 224), 3: (192, 256, 128)}[tile.warpgroups]
    stage = tile_rows * (64 if groups else 128) + tile.tokens * 128 * 2 + 2 * groups * scale_rows * 2
    assert tile.stages >= 3
    assert tile.stages * stage + tile.warpgroups * 2048 + 1024 <= memory
    registers = tile.tokens // 2 * (1 + groups) + 32
    assert registers <= most_registers
    num_blocks = -(-input_size // 128)
    assert (tile.splits - 1) * -(-num_blocks // tile.splits) < num_blocks  # none is empty


@pytest.mark.parametrize("group_size", [0, 128])
def test_the_tile_that_needs_fewer_rounds_is_chosen(group_size):
    """Of 24,576 rows on 132 multiprocessors: 128 tiles of 192 rows, not 192 of 128. Of 4,096, 128 parts of 32 tiles."""
    options = {"group_size": group_size, "num_programs": 132, "memory": 227 << 10}
    for num_tokens in (2, 16, 32, 64):
        assert choose_mixed_tile(num_tokens, 24576, 4096, **options).rows == 192
        assert choose_mixed_tile(num_tokens, 4096, 4096, **options).rows == 128


@pytest.mark.parametrize(("rows", "input_size"), [(10240, 5120), (6144, 4096), (4096, 1024), (1024, 3072)])
@pytest.mark.parametrize("group_size", [0, 128])
def test_tiles_are_compiled_when_the_engine_starts(rows, input_size, group_size):
    options = {"group_size": group_size, "num_programs": 132, "memory": 227 << 10}

    def tile(num_tokens):
        return choose_mixed_tile(num_tokens, rows, input_size, **options)

    compiled = {tile(len(step.decode_rows)) for step in steps_of(max_num_rows=512) if len(step.decode_rows)}
    assert {tile(num_tokens) for num_tokens in range(1, 513)} == compiled


needs_hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU"
)


def on_gpu(given, arguments):
    moved = {name: value.cuda() if isinstance(value, torch.Tensor) else value for name, value in arguments.items()}
    x, weight, scale = given
    if moved["zeros"] is not None:
        moved["zeros"] = moved["zeros"].T.contiguous().T
    return (x.cuda(), weight.cuda(), scale.cuda().T.contiguous().T), moved


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize(
    ("dtype", "parts"),
    [
        *((torch.bfloat16, {"group_size": size, "zeros": zeros}) for size in (32, 64, 128) for zeros in (False, True)),
        (torch.bfloat16, {"group_size": 4096, "zeros": True}),
        (torch.float16, {"group_size": 128, "zeros": True}),
        (torch.bfloat16, {"group_size": 0}),
        (torch.bfloat16, {"group_size": 0, "has_one_scale": True}),
        (torch.float16, {"group_size": 0}),
    ],
    ids=str,
)
@pytest.mark.parametrize("gated", [False, True])
def test_a_layer_on_a_gpu(generator, dtype, parts, gated):
    """With the chosen tiles, and with three warpgroups and as many tokens as they can have."""
    parts = {**parts, "gated": gated}
    given, arguments, expected = problem(generator, 1024, 4096, 1032, dtype, **parts)
    given, arguments = on_gpu(given, arguments)
    assert suits_mixed_matmul(*given, group_size=parts["group_size"], gated=gated)
    x, residual = given[0], arguments.pop("residual")
    for num_tokens in (1, 2, 3, 4, 5, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 200, 256, 511, 1024):
        for tile in (None, _largest_tile(3, num_tokens, parts["group_size"], shared_memory(x.device))):
            got = mixed_matmul(x[:num_tokens], *given[1:], **arguments, residual=residual[:num_tokens], tile=tile)
            check_close(got.cpu(), expected[:num_tokens], dtype)


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize("dtype", EMULATED_TYPES)
def test_every_int8_is_exact_on_a_gpu(dtype):
    weight = torch.arange(-128, 128, dtype=torch.int8, device="cuda").repeat(16, 1)
    product = mixed_matmul(torch.eye(256, dtype=dtype, device="cuda"), weight, torch.ones(1, 1, device="cuda"))
    assert torch.equal(product.T, weight.to(dtype))


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize("group_size", [0, 128])
@pytest.mark.parametrize("num_tokens", [2, 8, 16, 32, 48, 64, 128, 256])
@pytest.mark.parametrize("warpgroups", [2, 3])
def test_layers_in_a_graph_on_a_gpu(generator, group_size, num_tokens, warpgroups):
    """Each product reads what the kernel ahead writes, and starts before that one has ended: replays are exact."""
    dtype, width, inner = torch.bfloat16, 2048, 4096
    parts = {"group_size": group_size, "full": False}
    up, up_arguments, _ = problem(generator, num_tokens, width, inner, dtype, gated=True, **parts)
    down, down_arguments, _ = problem(generator, num_tokens, inner, width, dtype, **parts)
    (x, *up), up_arguments = on_gpu(up, up_arguments)
    (_, *down), down_arguments = on_gpu(down, down_arguments)
    norm = torch.ones(width, dtype=dtype, device="cuda")
    tile = _largest_tile(warpgroups, num_tokens, group_size, shared_memory(x.device))

    def layers(apart: bool) -> torch.Tensor:
        hidden = x
        for _ in range(12):
            normed = rms_norm(hidden, norm, 1e-6)
            between = mixed_matmul(normed, *up, **up_arguments, tile=tile)
            if apart:
                torch.cuda.synchronize()
            hidden = mixed_matmul(between, *down, **down_arguments | {"residual": hidden}, tile=tile)
            if apart:
                torch.cuda.synchronize()
        return hidden

    expected = layers(apart=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = layers(apart=False)
    assert not expected.isnan().any()
    for _ in range(50):
        graph.replay()
        assert torch.equal(out, expected)
