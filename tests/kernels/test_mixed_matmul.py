"""The kernel runs on a Hopper GPU at sizes of models, and on a CPU in the emulator at small ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from nanovllm.kernels import mixed_matmul_multiply
from nanovllm.kernels.add_splits import finishing_arguments
from nanovllm.kernels.int4_packing import pack_int4
from nanovllm.kernels.mixed_matmul import MixedTile, choose_mixed_tile, mixed_matmul, suits_mixed_matmul
from nanovllm.kernels.rms_norm import rms_norm
from tests.kernels.gluon_emulator import emulate
from tests.kernels.gluon_emulator.machine import machine
from tests.kernels.inputs import check_close
from tests.kernels.test_skinny_linear import oracle

HALF_TYPES = [torch.bfloat16, torch.float16]


def unpacked(dtype: torch.dtype) -> Callable[..., tuple[torch.Tensor, ...]]:
    """What the assembly does: planes of words, less zero points that have as much added as the planes."""
    offset = 128 if dtype is torch.bfloat16 else 1024

    def unpack(words: torch.Tensor, *zeros: torch.Tensor) -> tuple[torch.Tensor, ...]:
        planes = [(words.int() >> 4 * plane & 15) + offset for plane in range(4)]
        return tuple(plane.to(dtype) - zero for plane, zero in zip(planes, zeros, strict=True))

    return unpack


ASSEMBLY = {
    mixed_matmul_multiply._UNPACK_BF16.value: unpacked(torch.bfloat16),
    mixed_matmul_multiply._UNPACK_FP16.value: unpacked(torch.float16),
}


def sum_splits(finishing: dict[str, Any]) -> None:
    """`add_splits`, in torch."""
    sums, out, residual = finishing["partial_ptr"].sum(0), finishing["out_ptr"], finishing["residual_ptr"]
    assert sums.shape == (len(out), out.shape[1] * (1 + finishing["IS_GATED"]))
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


@pytest.fixture(autouse=True)
def new_memory_is_nan() -> Iterator[None]:
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def problem(generator, num_tokens, input_size, outputs, dtype, *, group_size=128, zeros=True, gated=False, full=True):
    """Returns (arguments of `mixed_matmul`, the result in float64)."""
    rows = outputs * (1 + gated)
    # x is a part of a larger tensor whose rest is NaN.
    around = torch.full((num_tokens + 3, input_size + 64), torch.nan, dtype=dtype)
    x = around[1 : num_tokens + 1, :input_size]
    x.copy_(torch.randn(num_tokens, input_size, generator=generator))
    values = torch.randint(0, 16, (rows, input_size), generator=generator)
    groups = -(-input_size // group_size)
    scale = torch.rand(groups, rows, generator=generator).T * 0.1
    zero = torch.randint(0, 17, (groups, rows), generator=generator).T if zeros else torch.full((rows, groups), 8)
    each = group_size if groups > 1 else input_size
    weight = (values - zero.repeat_interleave(each, 1)[:, :input_size]).double()
    weight *= scale.double().repeat_interleave(each, 1)[:, :input_size]
    bias = torch.randn(rows, generator=generator).to(dtype) if full else None
    residual = torch.full((num_tokens, outputs + 8), torch.nan, dtype=dtype)[:, :outputs]
    residual.copy_(torch.randn(num_tokens, outputs, generator=generator))
    parts = {"gated": gated, "residual": residual if full else None}
    zeros = zero.float().T.contiguous().T if zeros else None
    arguments = {"bias": bias, "zeros": zeros, "group_size": group_size, **parts}
    return (x, pack_int4(values), scale), arguments, oracle(x.double(), weight, bias, **parts)


def check(generator, num_tokens, input_size, outputs, dtype, tile, seed=0, programs=3, **parts):
    given, arguments, expected = problem(generator, num_tokens, input_size, outputs, dtype, **parts)
    check_close(emulated(seed, programs)(*given, **arguments, tile=tile), expected, dtype)


@pytest.mark.parametrize("num_tokens", [1, 2, 3, 4, 5, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127])
@pytest.mark.parametrize("gated", [False, True])
def test_numbers_of_tokens(generator, num_tokens, gated):
    """With the tile that is chosen for them, and another one."""
    for tile in (None, MixedTile(32, 1, 3)):
        check(generator, num_tokens, 256, 72, torch.bfloat16, tile, seed=num_tokens, gated=gated)


@pytest.mark.parametrize("dtype", HALF_TYPES)
@pytest.mark.parametrize(
    ("group_size", "blocks"),  # sums of more groups would not fit into the registers
    [(32, 1), (64, 1), (128, 1), (128, 2), (384, 1), (384, 2), (640, 1), (640, 2)],
)
@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("gated", [False, True])
def test_groups(generator, dtype, group_size, blocks, zeros, gated):
    parts = {"group_size": group_size, "zeros": zeros, "gated": gated}
    check(generator, 19, 640, 72, dtype, MixedTile(16, blocks, 3), seed=group_size, **parts)


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("splits", [2, 3, 4])
def test_splits(generator, full, gated, splits):
    """Of five blocks of inputs: the last split has fewer, or none."""
    check(generator, 18, 640, 136, torch.float16, MixedTile(16, 1, 2, splits), seed=splits, gated=gated, full=full)


@pytest.mark.parametrize("input_size", [32, 160, 400, 1024])
@pytest.mark.parametrize("outputs", [8, 128, 200])
def test_inputs_and_outputs_that_do_not_fill_tiles(generator, input_size, outputs):
    for gated in (False, True):
        parts = {"group_size": 32, "gated": gated}
        check(generator, 3, input_size, outputs, torch.bfloat16, MixedTile(16, 1, 4), seed=outputs, **parts)
        parts["group_size"] = 128
        check(generator, 3, input_size, outputs, torch.bfloat16, MixedTile(16, 2, 4), seed=outputs, **parts)


def test_rows_of_whole_multiples_of_four_do(generator):
    check(generator, 5, 256, 68, torch.bfloat16, MixedTile(16, 2, 2))


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("programs", [1, 5])
def test_warps_take_turns_in_any_order(generator, seed, programs):
    check(generator, 40, 1024, 200, torch.bfloat16, MixedTile(16, 2, 2, 2), seed=seed, programs=programs)


def test_a_row_does_not_depend_on_its_neighbours(generator):
    given, arguments, _ = problem(generator, 20, 256, 64, torch.bfloat16)
    alone = emulated(0, 2)(*given, **arguments)
    given[0][3] = torch.nan
    beside = emulated(0, 2)(*given, **arguments)
    assert beside[3].isnan().all()
    assert torch.equal(torch.cat((alone[:3], alone[4:])), torch.cat((beside[:3], beside[4:])))


@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("seed", range(4))
def test_all_that_touch_what_other_kernels_do_wait_for_the_kernel_ahead(generator, seed, splits):
    """It writes activations and residual, and ends once both warpgroups and the warp of the activations wait for it."""
    given, arguments, expected = problem(generator, 18, 512, 136, torch.bfloat16)
    written = [(tensor, tensor.clone()) for tensor in (given[0], arguments["residual"])]
    waiting = set()

    def wait_for_previous_kernel() -> None:
        waiting.add(machine().running.name.partition(" of ")[0])
        machine().pause(lambda: len(waiting) == 3, "the kernel ahead")
        for tensor, values in written:
            tensor.copy_(values)

    def finishing_with_pdl(*given, **options):
        return finishing_arguments(*given, **options) | {"PDL": True}

    for tensor, _ in written:
        tensor.fill_(torch.nan)
    product = emulated(
        seed,
        1,
        finishing_arguments=finishing_with_pdl,
        gdc_launch_dependents=lambda: None,
        gdc_wait=wait_for_previous_kernel,
    )
    check_close(product(*given, **arguments, tile=MixedTile(16, 2, 2, splits)), expected, torch.bfloat16)
    assert waiting == {"partition 0 (multiply)", "partition 1 (multiply)", "partition 2 (load_activations)"}


def test_no_tokens_give_no_rows(generator):
    given, arguments, _ = problem(generator, 0, 256, 64, torch.bfloat16)
    assert emulated(0, 2)(*given, **arguments).shape == (0, 64)


@pytest.mark.parametrize("num_tokens", [2, 17, 100, 1024])
@pytest.mark.parametrize(("rows", "input_size"), [(6144, 4096), (24576, 4096), (4096, 12288), (512, 256), (128, 64)])
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_chosen_tiles_fit_in_shared_memory_and_registers(num_tokens, rows, input_size, group_size):
    memory = 227 << 10
    tile = choose_mixed_tile(num_tokens, rows, input_size, group_size=group_size, num_programs=132, memory=memory)
    groups = 128 // group_size
    scales = 2 * groups * 128 * 4
    assert tile.stages >= 4
    assert tile.stages * tile.blocks * (64 * 128 + tile.tokens * 128 * 2 + scales) <= memory - 1024
    registers = tile.tokens // 2 * (1 + tile.blocks * groups) + 32 * tile.blocks
    assert registers <= 224
    num_blocks = -(-input_size // (128 * tile.blocks))
    assert (tile.splits - 1) * -(-num_blocks // tile.splits) < num_blocks  # none is empty


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
@pytest.mark.parametrize("dtype", HALF_TYPES)
@pytest.mark.parametrize("group_size", [32, 64, 128, 4096])
@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("gated", [False, True])
def test_a_layer_on_a_gpu(generator, dtype, group_size, zeros, gated):
    parts = {"group_size": group_size, "zeros": zeros, "gated": gated}
    given, arguments, expected = problem(generator, 1024, 4096, 1032, dtype, **parts)
    given, arguments = on_gpu(given, arguments)
    assert suits_mixed_matmul(*given, group_size=group_size, gated=gated)
    x, residual = given[0], arguments.pop("residual")
    for num_tokens in (1, 2, 3, 4, 5, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 200, 256, 511, 1024):
        got = mixed_matmul(x[:num_tokens], *given[1:], **arguments, residual=residual[:num_tokens])
        check_close(got.cpu(), expected[:num_tokens], dtype)


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize("num_tokens", [2, 8, 16, 32, 48, 64, 128])
def test_layers_in_a_graph_on_a_gpu(generator, num_tokens):
    """Each product reads what the kernel ahead writes, and starts before that one has ended: replays are exact."""
    dtype, width, inner = torch.bfloat16, 2048, 4096
    up, up_arguments, _ = problem(generator, num_tokens, width, inner, dtype, gated=True, full=False)
    down, down_arguments, _ = problem(generator, num_tokens, inner, width, dtype, full=False)
    (x, *up), up_arguments = on_gpu(up, up_arguments)
    (_, *down), down_arguments = on_gpu(down, down_arguments)
    norm = torch.ones(width, dtype=dtype, device="cuda")

    def layers(apart: bool) -> torch.Tensor:
        hidden = x
        for _ in range(12):
            normed = rms_norm(hidden, norm, 1e-6)
            between = mixed_matmul(normed, *up, **up_arguments)
            if apart:
                torch.cuda.synchronize()
            hidden = mixed_matmul(between, *down, **down_arguments | {"residual": hidden})
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
