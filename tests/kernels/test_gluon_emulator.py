"""The emulator runs correct kernels correctly, and finds the faults that it is there for."""

from __future__ import annotations

import pytest
import torch

from nanovllm.kernels.triton_support import (
    HAS_TRITON,
    TensorDescriptor,
    constant,
    fence_async_shared,
    gl,
    gluon_jit,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from tests.kernels.gluon_emulator import emulate
from tests.kernels.gluon_emulator.memory import NVMMASharedLayout, places_in

SEEDS = range(12)
_ROWS = 64
_COLUMNS = constant(128)


@gluon_jit()
def _read_blocks(
    desc: tma.tensor_descriptor,
    blocks: gl.shared_memory_descriptor,
    ready: gl.shared_memory_descriptor,
    free: gl.shared_memory_descriptor,
    num_blocks: gl.tensor,
    FAULT: gl.constexpr,
) -> None:
    STAGES: gl.constexpr = blocks.shape[0]
    ROWS: gl.constexpr = blocks.shape[1]
    WIDTH: gl.constexpr = desc.block_type.shape[1]
    for number in range(num_blocks):
        stage = number % STAGES
        if FAULT != "copies into a buffer in use":
            mbarrier.wait(free.index(stage), number // STAGES & 1 ^ 1)
        mbarrier.expect(ready.index(stage), ROWS * WIDTH * (2 if FAULT == "expects half of the bytes" else 4))
        parts = blocks.index(stage)._reinterpret(blocks.dtype, [2, ROWS, WIDTH], desc.layout)
        for part in gl.static_range(2):
            at = [number * ROWS, part * WIDTH]
            tma.async_copy_global_to_shared(desc, at, ready.index(stage), parts.index(part))


@gluon_jit()
def _sum_products(
    out_ptr: gl.tensor,
    blocks: gl.shared_memory_descriptor,
    ready: gl.shared_memory_descriptor,
    free: gl.shared_memory_descriptor,
    num_blocks: gl.tensor,
    FAULT: gl.constexpr,
) -> None:
    """Adds up block · blockᵀ, of blocks of which the first row was doubled."""
    STAGES: gl.constexpr = blocks.shape[0]
    ROWS: gl.constexpr = blocks.shape[1]
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 16])
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    total = gl.zeros([ROWS, ROWS], gl.float32, OUT)
    for number in range(num_blocks):
        stage = number % STAGES
        if FAULT != "does not wait for the copy":
            mbarrier.wait(ready.index(stage), number // STAGES & 1)
        block = blocks.index(stage)
        first = block.slice(0, 1)
        first.store((first.load(LAYOUT) * 2).to(block.dtype))
        if FAULT != "no fence":
            fence_async_shared()
        product = warpgroup_mma(block, block.permute((1, 0)), total, is_async=True)
        if FAULT == "frees the buffer before the product":
            mbarrier.arrive(free.index(stage))
        if FAULT == "does not wait for the product":
            total = warpgroup_mma_wait(num_outstanding=1, deps=[product])
        else:
            total = warpgroup_mma_wait(deps=[product])
        if FAULT == "frees twice":
            mbarrier.arrive(free.index(stage), count=2)
        elif FAULT != "frees the buffer before the product" and FAULT != "frees no buffer":
            mbarrier.arrive(free.index(stage))
    row = gl.arange(0, ROWS, gl.SliceLayout(1, OUT))
    column = gl.arange(0, ROWS, gl.SliceLayout(0, OUT))
    gl.store(out_ptr + gl.expand_dims(row * ROWS, 1) + gl.expand_dims(column, 0), total)


@gluon_jit("num_blocks")
def _sum_kernel(
    desc: tma.tensor_descriptor,
    out_ptr: gl.tensor,
    num_blocks: gl.tensor,
    ROWS: gl.constexpr,
    STAGES: gl.constexpr,
    FAULT: gl.constexpr,
) -> None:
    blocks = gl.allocate_shared_memory(desc.dtype, [STAGES, ROWS, _COLUMNS], desc.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(ready.index(stage), count=1)
        mbarrier.init(free.index(stage), count=1)
    gl.warp_specialize(
        [
            (_sum_products, (out_ptr, blocks, ready, free, num_blocks, FAULT)),
            (_read_blocks, (desc, blocks, ready, free, num_blocks, FAULT)),
        ],
        worker_num_warps=[1],
    )


def sum_products(matrix: torch.Tensor, fault: str) -> torch.Tensor:
    """The launch, as host code writes it."""
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    out = torch.full((_ROWS, _ROWS), torch.nan)
    desc = TensorDescriptor(matrix, [*matrix.shape], [*matrix.stride()], [_ROWS, 64], layout)
    num_blocks = -(-matrix.shape[0] // _ROWS)
    _sum_kernel[(1,)](desc, out, num_blocks, ROWS=_ROWS, STAGES=2, FAULT=fault, num_warps=4)
    return out


def run(seed: int, fault: str, generator: torch.Generator) -> bool:
    """Returns whether the sum is right. The last block's rows lie partly outside of the matrix: they are 0."""
    matrix = torch.randint(-3, 4, (5 * _ROWS - 7, 128), generator=generator).to(torch.bfloat16)
    blocks = torch.cat([matrix, torch.zeros(7, 128)]).double().reshape(5, _ROWS, 128)
    blocks[:, 0] *= 2
    out = emulate(sum_products, seed)(matrix, fault)
    return torch.equal(out.double(), (blocks @ blocks.transpose(1, 2)).sum(0))


def test_a_correct_kernel_is_right_in_every_order(generator):
    assert all(run(seed, "none", generator) for seed in SEEDS)


@pytest.mark.parametrize(
    "fault",
    [
        "no fence",
        "does not wait for the copy",
        "does not wait for the product",
        "copies into a buffer in use",
        "expects half of the bytes",
        "frees the buffer before the product",
    ],
)
def test_a_fault_shows_under_most_seeds(generator, fault):
    """As wrong values, or as work that nobody waited for. Not under each: a copy in time hides that nobody waits."""

    def is_found(seed: int) -> bool:
        try:
            return not run(seed, fault, generator)
        except AssertionError:
            return True

    assert sum(map(is_found, SEEDS)) >= len(SEEDS) // 2


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        (
            "frees no buffer",
            r"deadlock: partition 0 \(_sum_products\) of program .* waits for mbarrier.wait\(ready.index\(stage\), .*"
            r"partition 1 \(_read_blocks\) of program .* waits for mbarrier.wait\(free.index\(stage\), ",
        ),
        ("frees twice", "one too many"),
    ],
)
@pytest.mark.parametrize("seed", SEEDS)
def test_what_can_go_no_further_says_why(generator, seed, fault, told):
    with pytest.raises(AssertionError, match=told):
        run(seed, fault, generator)


@gluon_jit()
def _count_kernel(queue_ptr: gl.tensor, out_ptr: gl.tensor, num_items: gl.tensor, ATOMIC: gl.constexpr) -> None:
    """Programs take items from a queue, and mark each."""
    item = gl.load(queue_ptr)
    if ATOMIC:
        item = gl.atomic_add(queue_ptr, 1)
    while item < num_items:
        if not ATOMIC:
            gl.store(queue_ptr, item + 1)
        gl.store(out_ptr + item, gl.load(out_ptr + item) + 1)
        item = gl.atomic_add(queue_ptr, 1) if ATOMIC else gl.load(queue_ptr)


def test_programs_run_side_by_side():
    """A queue without atomic operations hands out an item twice."""
    for atomic in (True, False):
        once = []
        for seed in SEEDS:
            queue, out = torch.zeros(1, dtype=torch.int32), torch.zeros(20, dtype=torch.int32)
            emulate(_count_kernel, seed)[(6,)](queue, out, 20, ATOMIC=atomic)
            once.append(bool((out == 1).all()))
        assert all(once) if atomic else not all(once)


@gluon_jit()
def _numbers_kernel(number: gl.tensor, in_ptr: gl.tensor, out_ptr: gl.tensor, CASE: gl.constexpr) -> None:
    lane = gl.arange(0, 8, gl.BlockedLayout([1], [32], [1], [0]))
    if CASE == "quotients of C":
        gl.store(out_ptr + lane, (number - lane) // 4 * 1000 + (number - lane) % 4)
    if CASE == "32 bits":
        gl.store(out_ptr + lane, (lane + 2147483647) * 3)
    if CASE == "unsigned":
        gl.store(out_ptr + lane, ((number - lane).to(gl.uint32, bitcast=True) >> 28).to(gl.int32))
    if CASE == "nibbles":
        byte = gl.load(in_ptr + lane).to(gl.uint8)
        both = gl.reshape(gl.join(byte & 15, byte >> 4), [4, 4])
        gl.store(out_ptr + lane, gl.sum(gl.reshape(gl.permute(both, (1, 0)), [8, 2]).to(gl.int32), axis=1))
    if CASE == "bf16 by its bits":
        bits = (lane.to(gl.int16) | 0x4300).to(gl.bfloat16, bitcast=True)
        gl.store(out_ptr + lane, bits.to(gl.int32))
    if CASE == "masked":
        gl.store(out_ptr + lane, gl.load(in_ptr + lane, mask=lane < 3, other=9), mask=lane != 1)
    if CASE == "undefined":
        gl.store(out_ptr + lane, gl.where(gl.load(in_ptr + lane, mask=lane < 3) == number, 1, 2))
    if CASE == "ranks":
        gl.store(out_ptr + lane, gl.expand_dims(lane, 0) + lane)
    if CASE == "outside":
        gl.store(out_ptr + lane, gl.load(in_ptr + lane * 2))


NUMBERS = torch.tensor([0x00, 0x21, 0x43, 0x65, 0x87, 0xA9, 0xCB, 0xED], dtype=torch.int32)


def numbers(case: str) -> list[int]:
    out = torch.full((8,), -7, dtype=torch.int32)
    emulate(_numbers_kernel)[(1,)](3, NUMBERS, out, CASE=case)
    return out.tolist()


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        ("quotients of C", [3, 2, 1, 0, -1, -2, -3, -1000]),
        ("32 bits", [2**31 - 3, *range(-(2**31), -(2**31) + 21, 3)]),
        ("unsigned", [0, 0, 0, 0, 15, 15, 15, 15]),
        ("nibbles", [3, 18, 4, 20, 6, 22, 8, 24]),
        ("bf16 by its bits", [128, 129, 130, 131, 132, 133, 134, 135]),
        ("masked", [0, -7, 67, 9, 9, 9, 9, 9]),
        ("undefined", [2] * 8),
    ],
)
def test_numbers(case, expected):
    assert numbers(case) == expected


@pytest.mark.parametrize(("case", "told"), [("ranks", "different ranks"), ("outside", "elements .8, 10, 12, 14. ")])
def test_what_gluon_or_the_gpu_would_not_take(case, told):
    with pytest.raises(AssertionError, match=told):
        numbers(case)


@pytest.mark.skipif(not HAS_TRITON or gl is None, reason="Triton's own layouts are the reference")
@pytest.mark.parametrize("shape", [[64, 128], [16, 4, 64], [512, 128], [64, 256]])
@pytest.mark.parametrize("width", [32, 64, 128])
def test_places_in_swizzled_memory_are_tritons(shape, width):
    libtriton = pytest.importorskip("triton._C.libtriton")
    context = libtriton.ir.context()
    libtriton.ir.load_dialects(context)
    builder = libtriton.gluon_ir.GluonOpBuilder(context)
    if not hasattr(builder, "to_linear_layout"):
        pytest.skip("this Triton does not tell")
    layout = gl.NVMMASharedLayout(width, 16, len(shape))
    bases = builder.to_linear_layout(layout._to_ir(builder), shape).offset_bases
    place = torch.arange(torch.tensor(shape).prod())
    at = torch.zeros(len(place), len(shape), dtype=torch.int64)
    for bit, base in enumerate(bases):
        at ^= (place >> bit & 1).unsqueeze(1) * torch.tensor(base)
    ours = places_in(shape, torch.bfloat16, NVMMASharedLayout(width, 16, len(shape)))
    assert torch.equal(ours[tuple(at.T)], place)
