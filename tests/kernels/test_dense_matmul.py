"""The kernel runs on a Hopper GPU at sizes of models, and on a CPU in the emulator at small ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nanovllm.kernels import dense_matmul as dense_module
from nanovllm.kernels import matmul_units
from nanovllm.kernels.dense_matmul import dense_matmul, suits_dense_matmul
from nanovllm.kernels.dense_tiles import DenseTile, choose_dense_tile, possible_tiles
from nanovllm.kernels.rms_norm import rms_norm
from nanovllm.kernels.skinny_linear import scaled_weight
from nanovllm.kernels.triton_support import constant, is_hopper
from tests.kernels.gluon_emulator import emulate
from tests.kernels.gluon_emulator.memory import TensorDescriptor
from tests.kernels.inputs import EMULATED_TYPES, check_close
from tests.kernels.kernel_ahead import run_beside_the_kernel_ahead
from tests.kernels.test_mixed_matmul import needs_hopper
from tests.kernels.test_skinny_linear import oracle
from tests.runner.test_warm_up import steps_of

pytestmark = pytest.mark.usefixtures("new_memory_is_nan")
FP8 = torch.float8_e4m3fn
BLOCKS = "fp8 blocks"  # with scales of 128 inputs
SMALL_TILES = [
    DenseTile(16, 3),
    DenseTile(32, 4, parts=2),
    DenseTile(16, 3, warpgroups=2),
    DenseTile(16, 3, parts=2, warpgroups=3),
]
SMALL_TILES_OF_BLOCKS = [replace(tile, tokens=32) for tile in SMALL_TILES]


def emulated(seed: int, programs: int, **replacements: Any) -> Callable[..., torch.Tensor]:
    """`dense_matmul` on a GPU of so many multiprocessors, in the emulator."""
    return emulate(
        dense_matmul,
        seed,
        multiprocessor_count=lambda device: programs,
        shared_memory=lambda device: 227 << 10,
        **replacements,
    )


def problem(generator, num_tokens, input_size, outputs, kind, *, gated=False, full=True, has_one_scale=False):
    """Returns (arguments of `dense_matmul`, the result in float64). kind: a type, or BLOCKS."""
    rows = outputs * (1 + gated)
    dtype = FP8 if kind is BLOCKS else kind
    out_dtype = torch.bfloat16 if dtype is FP8 else dtype
    # x is a part of a larger tensor whose rest is NaN.
    larger = torch.full((num_tokens + 3, input_size + 64), torch.nan).to(dtype)
    x = larger[1 : num_tokens + 1, :input_size]
    x.copy_(torch.randn(num_tokens, input_size, generator=generator).to(dtype))
    weight = torch.randn(rows, input_size, generator=generator).to(dtype)
    arguments: dict[str, Any] = {"gated": gated, "dtype": out_dtype, "residual": None, "bias": None}
    exact_x, exact_weight = x.double(), weight.double()
    if kind is FP8:
        arguments["scale"] = torch.rand(1 if has_one_scale else rows, 1, generator=generator) * 0.1
        arguments["x_scale"] = torch.rand(num_tokens, 1, generator=generator)
        exact_x, exact_weight = exact_x * arguments["x_scale"].double(), exact_weight * arguments["scale"]
    elif kind is BLOCKS:
        groups = -(-input_size // 128)
        arguments["scale"] = torch.rand(-(-rows // 128), groups, generator=generator) * 0.1
        # As `quantize_rows` lays them out, with more rows than there are tokens, which are NaN.
        arguments["x_scale"] = torch.full((groups, -(-num_tokens // 16) * 16), torch.nan).T
        arguments["x_scale"][:num_tokens] = torch.rand(num_tokens, groups, generator=generator)
        exact_x *= arguments["x_scale"][:num_tokens].repeat_interleave(128, 1)[:, :input_size]
        exact_weight = scaled_weight(weight, arguments["scale"]).double()
    if full:
        arguments["bias"] = torch.randn(rows, generator=generator).to(out_dtype)
        arguments["residual"] = torch.full((num_tokens, outputs + 8), torch.nan, dtype=out_dtype)[:, :outputs]
        arguments["residual"].copy_(torch.randn(num_tokens, outputs, generator=generator))
    around = {"gated": gated, "residual": arguments["residual"]}
    expected = oracle(exact_x, exact_weight, arguments["bias"], **around)
    return (x, weight), arguments, expected


def small_tiles(kind):
    return SMALL_TILES_OF_BLOCKS if kind is BLOCKS else SMALL_TILES


def check(generator, num_tokens, input_size, outputs, kind, tile, seed=0, programs=3, **parts):
    given, arguments, expected = problem(generator, num_tokens, input_size, outputs, kind, **parts)
    check_close(emulated(seed, programs)(*given, **arguments, tile=tile), expected, arguments["dtype"])


@pytest.mark.parametrize("num_tokens", [1, 2, 5, 15, 16, 17, 31, 32, 33, 63, 65, 127, 130])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("kind", [torch.bfloat16, FP8, BLOCKS])
def test_numbers_of_tokens(generator, num_tokens, gated, kind):
    """With the tile that is chosen for them, and others."""
    for tile in (None, *small_tiles(kind)):
        check(generator, num_tokens, 256, 72, kind, tile, seed=num_tokens, gated=gated)


@pytest.mark.parametrize("num_tokens", [64, 65, 90, 127, 130])
@pytest.mark.parametrize("gated", [False, True])
def test_bands_of_tokens(monkeypatch, generator, num_tokens, gated):
    """Two tiles a band: the last one is full, has a single tile, or ends with tokens of the tile before."""
    monkeypatch.setattr(matmul_units, "_BAND_TOKENS", constant(32))
    check(generator, num_tokens, 128, 200, torch.bfloat16, DenseTile(16, 3), seed=num_tokens, gated=gated)


@pytest.mark.parametrize("kind", [*EMULATED_TYPES, FP8, BLOCKS])
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("warpgroups", [1, 2, 3])
def test_bias_and_residual(generator, kind, full, gated, warpgroups):
    input_size = 5 * (64 if kind in EMULATED_TYPES else 128)
    check(generator, 18, input_size, 136, kind, DenseTile(32, 3, 1, warpgroups), gated=gated, full=full)


@pytest.mark.parametrize("has_one_scale", [False, True])
@pytest.mark.parametrize("tokens", [32, 64, 128, 256])
@pytest.mark.parametrize("kind", [torch.bfloat16, FP8, BLOCKS])
def test_many_tokens_are_finished_part_by_part(generator, has_one_scale, tokens, kind):
    for gated in (False, True):
        parts = {"has_one_scale": has_one_scale, "gated": gated}
        check(generator, 150, 256, 72, kind, DenseTile(tokens, 3, warpgroups=2), **parts)


@pytest.mark.parametrize("input_size", [16, 80, 208, 1024])
@pytest.mark.parametrize("outputs", [8, 64, 200])
@pytest.mark.parametrize("kind", [torch.bfloat16, FP8, BLOCKS])
def test_inputs_and_outputs_that_do_not_fill_tiles(generator, input_size, outputs, kind):
    for gated in (False, True):
        for tile in small_tiles(kind):
            check(generator, 3, input_size, outputs, kind, tile, seed=outputs, gated=gated)


def test_rows_of_any_number_do_without_a_gate(generator):
    check(generator, 5, 256, 67, torch.bfloat16, DenseTile(16, 3))


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("programs", [1, 5])
@pytest.mark.parametrize("kind", [torch.bfloat16, FP8, BLOCKS])
@pytest.mark.parametrize("index", range(len(SMALL_TILES)))
def test_warps_take_turns_in_any_order(generator, seed, programs, kind, index):
    check(generator, 40, 1024, 200, kind, small_tiles(kind)[index], seed=seed, programs=programs)


@pytest.mark.parametrize("kind", [torch.bfloat16, BLOCKS])
def test_a_row_does_not_depend_on_its_neighbours(generator, kind):
    given, arguments, _ = problem(generator, 20, 256, 64, kind)
    alone = emulated(0, 2)(*given, **arguments)
    given[0][3] = torch.nan
    beside = emulated(0, 2)(*given, **arguments)
    assert beside[3].isnan().all()
    assert torch.equal(torch.cat((alone[:3], alone[4:])), torch.cat((beside[:3], beside[4:])))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", [torch.bfloat16, FP8, BLOCKS])
@pytest.mark.parametrize("tile", [DenseTile(32, 3), DenseTile(128, 3), DenseTile(32, 3, 1, 2), DenseTile(32, 3, 2, 3)])
def test_all_that_touch_what_other_kernels_do_wait_for_the_kernel_ahead(generator, seed, kind, tile):
    """It writes activations, their scales and the residual, and ends once all who touch them wait for it."""
    given, arguments, expected = problem(generator, 18, 512, 136, kind)
    written = [given[0], arguments["residual"], *([] if kind is torch.bfloat16 else [arguments["x_scale"]])]
    got, waiting = run_beside_the_kernel_ahead(
        emulated, seed, written, tile.warpgroups + 1, *given, **arguments, tile=tile
    )
    check_close(got, expected, torch.bfloat16)
    computing = ["partition 0 (multiply)", "partition 3 (multiply)", "partition 4 (multiply)"]
    assert waiting == {*computing[: tile.warpgroups], "partition 1 (load_activations)"}


@pytest.mark.parametrize("kind", [torch.bfloat16, FP8, BLOCKS])
def test_no_tokens_give_no_rows(generator, kind):
    given, arguments, _ = problem(generator, 0, 256, 64, kind)
    product = emulated(0, 2)(*given, **arguments)
    assert product.shape == (0, 64)
    assert product.dtype is torch.bfloat16


@pytest.mark.parametrize("tile_tokens", [16, 64, 128])
@pytest.mark.parametrize("num_tokens", [9, 40, 100, 136])
def test_few_tokens_that_do_not_exist_are_copied(generator, monkeypatch, num_tokens, tile_tokens):
    """On an H200, down of Qwen3-8B in FP8 takes twice as long with 136 tokens as with 256 if they are copied."""
    num_missing = []
    block = TensorDescriptor.block

    def recorded(desc, at):
        offsets, inside = block(desc, at)
        if desc.shape[0] == num_tokens:
            num_missing.append(int((~inside).any(dim=1).sum()))
        return offsets, inside

    monkeypatch.setattr(TensorDescriptor, "block", recorded)
    given, arguments, expected = problem(generator, num_tokens, 256, 192, torch.bfloat16)
    check_close(emulated(0, 2)(*given, **arguments, tile=DenseTile(tile_tokens, 3)), expected, torch.bfloat16)
    # A tile that holds more than twice the tokens is not chosen.
    assert num_missing
    assert max(num_missing) < max(tile_tokens // 8, 8) or tile_tokens > 2 * num_tokens


@pytest.mark.parametrize("num_tokens", [2, 17, 100, 1024])
@pytest.mark.parametrize("has_groups", [False, True])
def test_tiles_fit_in_shared_memory_and_registers(num_tokens, has_groups):
    memory, registers = 227 << 10, 64 << 10
    tiles = list(possible_tiles(num_tokens, memory, has_groups))
    for tile in tiles:
        assert tile.tokens < 2 * num_tokens or tile.tokens == (32 if has_groups else 16)
        assert tile.stages >= 3
        assert tile.stages * tile.stage_bytes + tile.warpgroups * 2048 + 1024 <= memory
        assert tile.registers * 128 * (tile.warpgroups + 1) <= registers
        assert tile.computing_registers >= tile.tokens // 2 * (1 + has_groups * tile.parts) + 32


@pytest.mark.parametrize(
    ("num_tokens", "rows", "row_bytes", "has_groups", "fastest"),
    [
        (16, 4096, 2048, False, (16, 2, 1)),  # Qwen3-0.6B in bf16: qkv, o, gate and up
        (96, 4096, 2048, False, (64, 2, 1)),
        (256, 4096, 2048, False, (128, 1, 1)),
        (128, 1024, 4096, False, (32, 2, 1)),
        (256, 6144, 2048, False, (64, 1, 3)),
        (128, 24576, 8192, False, (128, 1, 3)),  # Qwen3-8B in bf16: gate and up
        (256, 6144, 4096, False, (64, 1, 3)),  # in FP8: qkv, down
        (256, 4096, 12288, False, (128, 1, 1)),
        (136, 24576, 4096, False, (64, 1, 3)),  # gate and up, while the device's power limit lowers its clock
        (192, 24576, 4096, False, (64, 1, 3)),
        (288, 24576, 4096, False, (64, 1, 3)),
        (384, 24576, 4096, False, (128, 1, 3)),
        (512, 24576, 4096, False, (256, 1, 2)),
        (288, 4096, 12288, False, (64, 1, 3)),  # down
        (512, 4096, 12288, False, (128, 1, 2)),
        (64, 24576, 4096, True, (64, 1, 3)),  # with blocks: gate and up, down
        (64, 4096, 12288, True, (32, 2, 1)),
    ],
)
def test_the_tile_that_was_fastest_on_an_h200_is_chosen(num_tokens, rows, row_bytes, has_groups, fastest):
    options = {"has_groups": has_groups, "num_multiprocessors": 132, "memory": 227 << 10}
    tile = choose_dense_tile(num_tokens, rows, row_bytes, **options)
    assert (tile.tokens, tile.parts, tile.warpgroups) == fastest


@pytest.mark.parametrize("rows", [2048, 4096, 6144, 24576])
@pytest.mark.parametrize("has_groups", [False, True])
def test_tiles_are_compiled_when_the_engine_starts(rows, has_groups):
    options = {"has_groups": has_groups, "num_multiprocessors": 132, "memory": 227 << 10}

    def tile(num_tokens):
        return choose_dense_tile(num_tokens, rows, 4096, **options)

    compiled = {tile(len(step.decode_rows)) for step in steps_of(max_num_rows=512) if len(step.decode_rows)}
    assert {tile(num_tokens) for num_tokens in range(1, 513)} == compiled
    assert len({tile(num_tokens) for num_tokens in range(513, 20000, 7)}) == 1  # that of the largest step


def is_taken(monkeypatch, *, hidden=None, weight=None, gated=False, capability=(9, 0)):
    """Whether tensors like these would suit on a GPU of this capability."""
    monkeypatch.setattr(dense_module, "HAS_GLUON", True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(dense_module, "is_hopper", is_hopper.__wrapped__)  # not as it is cached
    hidden = torch.empty(20, 64, dtype=torch.bfloat16) if hidden is None else hidden
    weight = torch.empty(128, 64, dtype=torch.bfloat16) if weight is None else weight
    same = {name: getattr(hidden, name) for name in ("dtype", "stride", "itemsize", "data_ptr")}
    on_gpu = SimpleNamespace(device=torch.device("cuda"), **same)
    return suits_dense_matmul(on_gpu, weight, gated=gated)


def test_what_it_can_multiply(monkeypatch):
    half = {"dtype": torch.bfloat16}
    assert is_taken(monkeypatch)
    assert is_taken(monkeypatch, weight=torch.empty(128, 64).to(FP8))
    assert is_taken(monkeypatch, weight=torch.empty(67, 64, **half))
    assert is_taken(monkeypatch, hidden=torch.empty(20, 72, **half)[:, :64])


@pytest.mark.parametrize(
    "refused",
    [
        {"capability": (8, 0)},
        {"capability": (10, 0)},
        {"hidden": torch.empty(20, 64)},
        {"hidden": torch.empty(20, 64), "weight": torch.empty(128, 64)},
        {"weight": torch.empty(128, 64, dtype=torch.float16)},
        {"weight": torch.empty(67, 64, dtype=torch.bfloat16), "gated": True},
        {"weight": torch.empty(128, 60, dtype=torch.bfloat16)},
        {"weight": torch.empty(64, 128, dtype=torch.bfloat16).T},
        {"weight": torch.empty(129 * 64, dtype=torch.bfloat16)[1 : 128 * 64 + 1].view(128, 64)},
        {"hidden": torch.empty(20, 65, dtype=torch.bfloat16)[:, 1:]},
        {"hidden": torch.empty(20, 68, dtype=torch.bfloat16)[:, :64]},
        {"hidden": torch.empty(64, 20, dtype=torch.bfloat16).T},
    ],
)
def test_what_it_cannot_multiply(monkeypatch, refused):
    assert not is_taken(monkeypatch, **refused)


def on_gpu(given, arguments):
    moved = {name: value.cuda() if isinstance(value, torch.Tensor) else value for name, value in arguments.items()}
    return tuple(tensor.cuda() for tensor in given), moved


GPU_TILES = [
    DenseTile(32, 9, parts=2),
    DenseTile(128, 8),
    DenseTile(256, 3),
    DenseTile(128, 6, warpgroups=2),
    DenseTile(256, 3, warpgroups=2),
    DenseTile(64, 6, warpgroups=3),
    DenseTile(128, 4, warpgroups=3),
]


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize("kind", [*EMULATED_TYPES, FP8, BLOCKS])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("tile", [None, *GPU_TILES], ids=str)
def test_a_layer_on_a_gpu(generator, kind, gated, tile):
    if tile is not None and kind is BLOCKS:
        tile = replace(tile, tokens=min(tile.tokens, 64))
    given, arguments, expected = problem(generator, 600, 4096, 1032, kind, gated=gated)
    (x, weight), arguments = on_gpu(given, arguments)
    by_token = {name: arguments.pop(name) for name in ("residual", "x_scale") if arguments.get(name) is not None}
    for num_tokens in (1, 2, 5, 16, 17, 32, 33, 64, 65, 128, 129, 200, 256, 257, 511, 600):
        given_now = {name: tensor[:num_tokens] for name, tensor in by_token.items()}
        got = dense_matmul(x[:num_tokens], weight, **arguments, **given_now, tile=tile)
        check_close(got.cpu(), expected[:num_tokens], arguments["dtype"])


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize("num_tokens", [8, 16, 32, 64, 128, 256])
@pytest.mark.parametrize("tile", [None, *GPU_TILES], ids=str)
def test_layers_in_a_graph_on_a_gpu(generator, num_tokens, tile):
    """Each product reads what the kernel ahead writes, and starts before that one has ended: replays are exact."""
    dtype, width, inner = torch.bfloat16, 2048, 4096
    (x, up), up_arguments, _ = problem(generator, num_tokens, width, inner, dtype, gated=True, full=False)
    (_, down), down_arguments, _ = problem(generator, num_tokens, inner, width, dtype, full=False)
    x, up, down = x.cuda(), up.cuda() * width**-0.5, down.cuda() * inner**-0.5
    norm = torch.ones(width, dtype=dtype, device="cuda")

    def layers(apart: bool) -> torch.Tensor:
        hidden = x
        for _ in range(12):
            between = dense_matmul(rms_norm(hidden, norm, 1e-6), up, **up_arguments, tile=tile)
            if apart:
                torch.cuda.synchronize()
            hidden = dense_matmul(between, down, **down_arguments | {"residual": hidden}, tile=tile)
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
