"""All-reduce in one kernel, for messages so small that latency is the whole cost: each rank reads all ranks' data.

Every rank has a buffer that the others can read and write over NVLink. A program copies its part of the tensor into
its rank's buffer, signals the same program of every other rank, waits for the signals of all, and adds up the parts in
the buffers in the order of ranks: each rank gets the same bits. Calls alternate between two slots. A rank that signals
call n + 1 has read all of call n, so call n + 2 may overwrite it.

If a rank is lost, the others would wait forever, so the wait also checks a flag on the host.
"""

from __future__ import annotations

from typing import Protocol

import torch

from nanovllm.kernels.triton_support import jit, join_launch_chain, pdl_options, tl

MAX_BYTES = 2 << 20  # of a tensor: measured up to here, and faster than NCCL
MAX_RANKS = 8
_NUM_PROGRAMS = 64  # the same in every call, so that their call counts agree
_SIGNAL_SIZE = torch.int32.itemsize
_SIGNAL_BYTES = _NUM_PROGRAMS * MAX_RANKS * _SIGNAL_SIZE
BUFFER_BYTES = _SIGNAL_BYTES + 2 * MAX_BYTES
_BLOCK_SIZE = 2048  # elements that a program moves at a time
_LOOKS_PER_FLAG = 1024  # checks of the signals for each check of the host's flag, which goes over the bus
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@jit
def _slot_of(buffer: tl.tensor, slot: tl.tensor, like: tl.tensor) -> tl.tensor:
    """Returns a pointer of `like`'s type to the slot at byte `slot` of a buffer."""
    return tl.multiple_of((buffer + slot).to(like.dtype), 16)


@jit
def _one_shot_all_reduce_kernel(
    tensor_ptr: tl.tensor,
    residual_ptr: tl.tensor,
    buffers_ptr: tl.tensor,
    calls_ptr: tl.tensor,
    broken_off_ptr: tl.tensor,
    num_elements: tl.tensor,
    RANK: tl.constexpr,
    SIZE: tl.constexpr,
    MAX_RANKS: tl.constexpr,
    SIGNAL_SIZE: tl.constexpr,
    SIGNAL_BYTES: tl.constexpr,
    SLOT_BYTES: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    LOOKS_PER_FLAG: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """A buffer holds int32 signals [program, rank that signals], then two slots."""
    join_launch_chain(PDL)
    program = tl.program_id(0)
    call = tl.load(calls_ptr + program) + 1
    slot = SIGNAL_BYTES + (call & 1).to(tl.int64) * SLOT_BYTES
    own_buffer = tl.load(buffers_ptr + RANK)
    own_slot = _slot_of(own_buffer, slot, tensor_ptr)
    first, stride = program * BLOCK_SIZE, tl.num_programs(0) * BLOCK_SIZE
    for start in range(first, num_elements, stride):
        at = start + tl.arange(0, BLOCK_SIZE)
        tl.store(own_slot + at, tl.load(tensor_ptr + at, mask=at < num_elements), mask=at < num_elements)
    tl.debug_barrier()  # the writes of all threads come before the signal

    rank = tl.arange(0, MAX_RANKS)
    is_rank = rank < SIZE
    signal = program * MAX_RANKS * SIGNAL_SIZE
    theirs = (tl.load(buffers_ptr + rank, mask=is_rank, other=0) + signal + RANK * SIGNAL_SIZE).to(calls_ptr.dtype)
    tl.atomic_xchg(theirs, call, mask=is_rank, sem="release", scope="sys")
    own = (own_buffer + signal).to(calls_ptr.dtype)
    num_missing = SIZE
    num_looks = 0
    while num_missing > 0:
        signalled = tl.load(own + rank, mask=is_rank, other=0, volatile=True)
        num_missing = tl.sum(tl.where(is_rank & (signalled - call < 0), 1, 0))  # a difference: counts wrap around
        num_looks += 1
        if num_looks % LOOKS_PER_FLAG == 0:
            num_missing = tl.where(tl.load(broken_off_ptr, volatile=True) != 0, 0, num_missing)
    call = tl.atomic_add(own + RANK, 0, sem="acquire", scope="sys")  # reads come after the writes that were signalled
    tl.debug_barrier()

    for start in range(first, num_elements, stride):
        at = start + tl.arange(0, BLOCK_SIZE)
        total = tl.zeros([BLOCK_SIZE], dtype=tl.float32)
        if residual_ptr is not None:
            total += tl.load(residual_ptr + at, mask=at < num_elements, other=0.0).to(tl.float32)
        for other in tl.static_range(SIZE):
            part_ptr = _slot_of(tl.load(buffers_ptr + other), slot, tensor_ptr) + at
            total += tl.load(part_ptr, mask=at < num_elements, other=0.0, cache_modifier=".cg").to(tl.float32)
        tl.store(tensor_ptr + at, total.to(tensor_ptr.dtype.element_ty), mask=at < num_elements)
    tl.store(calls_ptr + program, call)


class Memory(Protocol):
    """Memory that all ranks can access: `distributed.peer_memory.PeerMemory`."""

    addresses: list[int]  # of each rank's buffer

    def close(self) -> None: ...


class OneShotAllReduce:
    """The all-reduce on one rank. All ranks must make the same calls in the same order, on one stream.

    memory: BUFFER_BYTES of each rank at the addresses by which this rank reaches them; zero before the first call.
    """

    def __init__(self, rank: int, memory: Memory, device: torch.device) -> None:
        self._rank = rank
        self._memory = memory
        self._buffers = torch.tensor(memory.addresses, device=device)  # [size] int64
        self._calls = torch.zeros(_NUM_PROGRAMS, dtype=torch.int32, device=device)
        self._broken_off = torch.zeros(1, dtype=torch.int32, pin_memory=device.type == "cuda")

    def takes(self, tensor: torch.Tensor) -> bool:
        """Returns whether `tensor` is small enough, contiguous and of a dtype that the kernel reads."""
        return tensor.nbytes <= MAX_BYTES and tensor.dtype in _DTYPES and tensor.is_contiguous()

    def __call__(self, tensor: torch.Tensor, residual: torch.Tensor | None = None) -> None:
        """Replaces `tensor` by its sum over ranks, plus `residual` (of its shape and dtype), computed in fp32."""
        assert residual is None or residual.is_contiguous()
        _one_shot_all_reduce_kernel[(_NUM_PROGRAMS,)](
            tensor_ptr=tensor,
            residual_ptr=residual,
            buffers_ptr=self._buffers,
            calls_ptr=self._calls,
            broken_off_ptr=self._broken_off,
            num_elements=tensor.numel(),
            RANK=self._rank,
            SIZE=len(self._buffers),
            MAX_RANKS=MAX_RANKS,
            SIGNAL_SIZE=_SIGNAL_SIZE,
            SIGNAL_BYTES=_SIGNAL_BYTES,
            SLOT_BYTES=MAX_BYTES,
            BLOCK_SIZE=_BLOCK_SIZE,
            LOOKS_PER_FLAG=_LOOKS_PER_FLAG,
            num_warps=8,
            **pdl_options(tensor.device),
        )

    def break_off(self) -> None:
        """Ends the waiting of current and later calls, whose results are then undefined. Callable from any thread."""
        self._broken_off.fill_(1)

    def close(self) -> None:
        """Frees the memory once the device has finished all calls. No call may follow."""
        torch.cuda.synchronize(self._buffers.device)
        self._memory.close()
