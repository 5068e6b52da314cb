"""Shared memory, barriers, copies by the tensor memory accelerator, and matrix products of a warpgroup.

An allocation is bytes, and a view of it the place of each element. Two pictures of the bytes are kept: what loads and
stores of the threads see, and what copies and matrix products see. A store reaches the second one at the next fence.
"""

from __future__ import annotations

import linecache
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch

from tests.kernels.gluon_emulator.machine import machine
from tests.kernels.gluon_emulator.tensors import RAW, Pointer, Tensor, as_tensor, flat, undefined

_ALIGNED_BYTES = 16
_LARGEST_BOX = 256  # elements of a copy in one dimension


@dataclass(frozen=True)
class NVMMASharedLayout:
    """The layout of operands: parts as wide as the swizzle, one after another. A part is its rows, swizzled."""

    swizzle_byte_width: int
    element_bitwidth: int
    rank: int = 2
    transposed: bool = False
    fp4_padded: bool = False
    cga_layout: Any = None

    @staticmethod
    def get_default_for(block_shape: Sequence[int], dtype: torch.dtype, **ignored: Any) -> NVMMASharedLayout:
        row = block_shape[-1] * dtype.itemsize
        width = next((width for width in (128, 64, 32) if row % width == 0), 0)
        return NVMMASharedLayout(width, dtype.itemsize * 8, len(block_shape))


def swizzle_width(layout: Any) -> int:
    """In bytes; 0 where elements follow one another row by row."""
    return getattr(layout, "swizzle_byte_width", 0)


def places_in(shape: Sequence[int], dtype: torch.dtype, layout: Any) -> torch.Tensor:
    """The place of each element, in elements. Leading dimensions that the layout does not have are outermost."""
    width = swizzle_width(layout)
    if not width:
        return torch.arange(math.prod(shape)).reshape(shape)
    assert not layout.transposed, "transposed layouts are not emulated"
    assert layout.element_bitwidth == dtype.itemsize * 8
    rows = math.prod(shape[len(shape) - layout.rank : -1])
    row_bytes = shape[-1] * dtype.itemsize
    assert row_bytes % width == 0, f"rows of {row_bytes} bytes in a swizzle of {width}"
    row, byte = torch.arange(rows).unsqueeze(1), torch.arange(shape[-1]) * dtype.itemsize
    # Pieces of 16 bytes change places by the row. The pattern repeats after 8 rows of 128 bytes, 8 of two times 64, …
    moved = row * width // 128 % (width // 16) * 16
    block = (byte // width * rows + row) * width + (byte % width ^ moved)
    first = torch.arange(math.prod(shape[: len(shape) - layout.rank])).reshape(-1, 1, 1) * rows * row_bytes
    return ((first + block) // dtype.itemsize).reshape(shape)


class Barrier:
    """Turns to its next phase when `count` arrivals have come and all expected bytes with them."""

    def __init__(self, count: int) -> None:
        self.count = self.missing = count
        self.missing_bytes = 0
        self.phase = 0

    def arrive(self, count: int) -> None:
        assert count <= self.missing, f"a barrier for {self.count} arrivals has one too many"
        self.missing -= count
        self._turn()

    def expect(self, num_bytes: int) -> None:
        self.missing_bytes += num_bytes
        self.arrive(1)

    def receive(self, num_bytes: int) -> None:
        self.missing_bytes -= num_bytes
        self._turn()

    def _turn(self) -> None:
        if not self.missing and not self.missing_bytes:
            self.phase ^= 1
            self.missing = self.count


@dataclass(eq=False)
class Allocation:
    threads: torch.Tensor  # bytes, as loads and stores see them
    units: torch.Tensor  # as copies and matrix products see them
    barriers: dict[int, Barrier] = field(default_factory=dict)  # by place


class SharedMemory:
    """A view of an allocation."""

    def __init__(self, allocation: Allocation, dtype: torch.dtype, places: torch.Tensor, layout: Any) -> None:
        self.allocation, self.dtype, self.places, self.layout = allocation, dtype, places, layout
        self.shape = list(places.shape)
        self.rank, self.numel = places.dim(), places.numel()

    @property
    def type(self) -> SharedMemory:
        return self

    def raw(self, picture: torch.Tensor) -> torch.Tensor:
        return picture.view(RAW[self.dtype.itemsize])

    def seen_by_units(self) -> torch.Tensor:
        return self.raw(self.allocation.units)[self.places].view(self.dtype)

    def overwrite(self, value: torch.Tensor) -> None:
        """As a copy does it."""
        for picture in (self.allocation.threads, self.allocation.units):
            self.raw(picture)[self.places] = value.contiguous().view(RAW[self.dtype.itemsize])

    def load(self, layout: Any = None) -> Tensor:
        machine().pause()
        return Tensor(self.raw(self.allocation.threads)[self.places].view(self.dtype))

    def store(self, value: Tensor) -> None:
        assert value.shape == self.shape, f"{value.shape} is stored in {self.shape}"
        assert value.dtype is self.dtype, f"{value.dtype} is stored as {self.dtype}"
        machine().pause()
        self.raw(self.allocation.threads)[self.places] = value.data.contiguous().view(RAW[self.dtype.itemsize])
        machine().running.unfenced.append(self)

    def index(self, index: Any) -> SharedMemory:
        assert 0 <= int(index) < self.shape[0], f"part {int(index)} of {self.shape[0]}"
        return self._view(self.places[int(index)])

    def slice(self, start: int, length: int, dim: int = 0) -> SharedMemory:
        assert 0 <= start <= start + length <= self.shape[dim], f"{start} … {start + length} of {self.shape[dim]}"
        return self._view(self.places.narrow(dim, start, length))

    def permute(self, order: Sequence[int]) -> SharedMemory:
        return self._view(self.places.permute(tuple(order)))

    def reshape(self, shape: Sequence[int]) -> SharedMemory:
        return self._view(self.places.reshape(tuple(shape)))

    def _view(self, places: torch.Tensor) -> SharedMemory:
        return SharedMemory(self.allocation, self.dtype, places, self.layout)

    def _reinterpret(self, dtype: torch.dtype, shape: Sequence[int], layout: Any) -> SharedMemory:
        num_bytes = self.numel * self.dtype.itemsize
        shape = [int(size) for size in shape]
        first = int(self.places.min())
        assert int(self.places.max()) - first + 1 == self.numel, "a view with gaps cannot be reinterpreted"
        assert math.prod(shape) * dtype.itemsize <= num_bytes, f"{shape} does not fit in {num_bytes} bytes"
        first_place = first * self.dtype.itemsize // dtype.itemsize
        return SharedMemory(self.allocation, dtype, first_place + places_in(shape, dtype, layout), layout)

    def _keep_alive(self) -> None:
        pass

    @property
    def barrier(self) -> Barrier:
        assert self.numel == 1, f"a barrier is one element, not {self.shape}"
        found = self.allocation.barriers.get(int(self.places))
        assert found is not None, "a barrier is used before mbarrier.init"
        return found


def allocate_shared_memory(
    dtype: torch.dtype, shape: Sequence[Any], layout: Any, value: Tensor | None = None
) -> SharedMemory:
    shape = [int(size) for size in shape]
    num_bytes = math.prod(shape) * dtype.itemsize
    allocation = Allocation(undefined([num_bytes], torch.uint8), undefined([num_bytes], torch.uint8))
    memory = SharedMemory(allocation, dtype, places_in(shape, dtype, layout), layout)
    if value is not None:
        memory.store(value)
    return memory


def fence_async_shared(cluster: bool = False) -> None:
    """Lets copies and matrix products see what this partition has stored."""
    machine().pause()
    for memory in machine().running.unfenced:
        memory.raw(memory.allocation.units)[memory.places] = memory.raw(memory.allocation.threads)[memory.places]
    machine().running.unfenced.clear()


def _init(barrier: SharedMemory, count: int) -> None:
    barrier.allocation.barriers[int(barrier.places)] = Barrier(int(count))


def _invalidate(barrier: SharedMemory) -> None:
    del barrier.allocation.barriers[int(barrier.places)]


def _allocate_mbarrier(batch: int | None = None, two_ctas: bool = False) -> SharedMemory:
    return allocate_shared_memory(torch.int64, [1] if batch is None else [batch, 1], None)


def _expect(barrier: SharedMemory, bytes_per_cta: int, pred: Any = True) -> None:
    machine().pause()
    if pred:
        barrier.barrier.expect(int(bytes_per_cta))


def _arrive(barrier: SharedMemory, *, count: int = 1, pred: Any = True) -> None:
    machine().pause()
    if pred:
        barrier.barrier.arrive(int(count))


def _wait(barrier: SharedMemory, phase: Any, pred: Any = True, deps: Sequence[Any] = ()) -> None:
    """Returns once the phase of that parity has passed."""
    frame = sys._getframe(1)
    file, line = frame.f_code.co_filename, frame.f_lineno
    where = f"{linecache.getline(file, line).strip()} (line {line}, phase {int(phase)})"
    state, parity = barrier.barrier, int(phase)
    assert parity in (0, 1), f"phase {parity} is neither 0 nor 1"
    if pred:
        machine().pause(lambda: state.phase != parity, where)


@dataclass
class TensorDescriptor:
    """A tensor of the host as the accelerator reads it, block by block; strides are in elements."""

    base: Any  # torch.Tensor or, made in a kernel, Pointer
    shape: Sequence[Any]
    strides: Sequence[Any]
    block_shape: Sequence[int]
    layout: Any
    padding: str = "zero"

    def __post_init__(self) -> None:
        assert len(self.shape) == len(self.strides) == len(self.block_shape) == self.layout.rank
        pointer = self.base if isinstance(self.base, Pointer) else Pointer(flat(self.base), as_tensor(0, torch.int64))
        self.memory, self.dtype = pointer.memory[int(pointer.offset) :], pointer.dtype
        self.shape, self.strides = [int(size) for size in self.shape], [int(stride) for stride in self.strides]
        assert self.memory.data_ptr() % _ALIGNED_BYTES == 0, "the tensor begins at no multiple of 16 bytes"
        assert all(stride * self.dtype.itemsize % _ALIGNED_BYTES == 0 for stride in self.strides[:-1]), self.strides
        assert self.strides[-1] == 1, "the last dimension is not contiguous"
        assert all(size <= _LARGEST_BOX for size in self.block_shape), self.block_shape
        self.nbytes_per_cta = math.prod(self.block_shape) * self.dtype.itemsize
        width = swizzle_width(self.layout)
        assert not width or self.block_shape[-1] * self.dtype.itemsize == width, "a block is as wide as the swizzle"

    @classmethod
    def from_tensor(
        cls, tensor: torch.Tensor, block_shape: Sequence[int], layout: Any, **options: Any
    ) -> TensorDescriptor:
        return cls(tensor, tensor.shape, tensor.stride(), block_shape, layout, **options)

    @property
    def block_type(self) -> SimpleNamespace:
        return SimpleNamespace(shape=list(self.block_shape), element_ty=self.dtype)

    def block(self, at: Sequence[Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """(offset of each element of the block that begins there, which lie within the tensor)."""
        offsets, inside = torch.zeros((), dtype=torch.int64), torch.tensor(True)
        for dim, (size, stride, length) in enumerate(zip(self.shape, self.strides, self.block_shape, strict=True)):
            position = int(at[dim]) + torch.arange(length).reshape(-1, *[1] * (len(self.shape) - dim - 1))
            offsets, inside = offsets + position * stride, inside & (position >= 0) & (position < size)
        return offsets, inside

    def check(self, at: Sequence[Any], memory: SharedMemory) -> list[int]:
        assert memory.shape == list(self.block_shape), f"a block of {self.block_shape} is copied to {memory.shape}"
        assert memory.dtype is self.dtype, f"{self.dtype} is copied to {memory.dtype}"
        assert swizzle_width(memory.layout) == swizzle_width(self.layout), "another swizzle than the descriptor's"
        assert int(at[-1]) * self.dtype.itemsize % _ALIGNED_BYTES == 0, f"a copy begins at column {int(at[-1])}"
        return [int(position) for position in at]


def _copy_to_shared(
    desc: TensorDescriptor, coord: Sequence[Any], barrier: SharedMemory, result: SharedMemory, pred: Any = True
) -> None:
    """Starts a copy. Until it takes place, the target holds nothing that one may read."""
    at, state = desc.check(coord, result), barrier.barrier
    if not pred:
        return
    result.overwrite(undefined(result.shape, result.dtype))

    def take_place() -> None:
        offsets, inside = desc.block(at)
        block = torch.zeros(offsets.shape, dtype=desc.dtype)
        block[inside] = desc.memory[offsets[inside]]
        result.overwrite(block)
        state.receive(desc.nbytes_per_cta)

    machine().start("copy", take_place, in_order=False)


def _copy_to_global(desc: TensorDescriptor, coord: Sequence[Any], src: SharedMemory) -> None:
    at = desc.check(coord, src)

    def take_place() -> None:
        offsets, inside = desc.block(at)
        desc.memory[offsets[inside]] = src.seen_by_units()[inside]

    machine().start("copy back", take_place)


def _store_wait(pendings: int) -> None:
    machine().finish("copy back", int(pendings))


class Product:
    """A matrix product, perhaps still to come. Only a further product and a wait may take it."""

    def __init__(self, a: Any, b: SharedMemory, acc: Any, use_acc: bool) -> None:
        self.a, self.b, self.acc, self.use_acc = a, b, acc, use_acc
        self.shape, self.dtype = acc.shape, acc.dtype
        self.result: torch.Tensor | None = None

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise AssertionError("a matrix product is used before warpgroup_mma_wait has returned it")

    def take_place(self) -> None:
        a = self.a.seen_by_units() if isinstance(self.a, SharedMemory) else self.a.data
        exact = torch.float32 if a.dtype.is_floating_point else torch.int32
        result = a.to(exact) @ self.b.seen_by_units().to(exact)
        if self.use_acc:
            before = self.acc.result if isinstance(self.acc, Product) else self.acc.data
            assert before is not None  # products take place in order
            result += before
        self.result = result.to(self.dtype)


def warpgroup_mma(
    a: Any,
    b: SharedMemory,
    acc: Any,
    *,
    use_acc: Any = True,
    precision: str | None = None,
    max_num_imprecise_acc: int | None = None,
    is_async: bool = False,
) -> Any:
    assert [*a.shape, *b.shape] == [acc.shape[0], a.shape[1], a.shape[1], acc.shape[1]], (a.shape, b.shape, acc.shape)
    assert isinstance(b, SharedMemory), "the second operand is in shared memory"
    assert a.dtype == b.dtype, f"a product of {a.dtype} and {b.dtype}"
    product = Product(a, b, acc, bool(use_acc))
    machine().start("product", product.take_place)
    return product if is_async else warpgroup_mma_wait(0, [product])


def warpgroup_mma_wait(num_outstanding: int = 0, deps: Sequence[Any] = ()) -> Any:
    """Returns the products that have taken place as tensors, and the rest as it is."""
    machine().finish("product", int(num_outstanding))
    results = [Tensor(dep.result) if isinstance(dep, Product) and dep.result is not None else dep for dep in deps]
    return results[0] if len(results) == 1 else tuple(results)


mbarrier = SimpleNamespace(
    MBarrierLayout=lambda *ignored: None,
    allocate_mbarrier=_allocate_mbarrier,
    init=_init,
    invalidate=_invalidate,
    expect=_expect,
    arrive=_arrive,
    wait=_wait,
)
tma = SimpleNamespace(
    async_copy_global_to_shared=_copy_to_shared,
    async_copy_shared_to_global=_copy_to_global,
    store_wait=_store_wait,
    make_tensor_descriptor=TensorDescriptor,
)
