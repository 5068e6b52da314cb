from __future__ import annotations

import threading
import time

import pytest
import torch

from nanovllm.kernels import one_shot_all_reduce as module
from nanovllm.kernels.one_shot_all_reduce import BUFFER_BYTES, MAX_BYTES, MAX_RANKS, OneShotAllReduce

SIGNALS = module._NUM_PROGRAMS * MAX_RANKS
SIZES = [1, 3, 2048, 64 * 2048 + 5]


class Buffers:
    """Of ranks that share a device."""

    def __init__(self, size: int, device: torch.device) -> None:
        self.tensors = [torch.zeros(BUFFER_BYTES, dtype=torch.uint8, device=device) for _ in range(size)]
        self.addresses = [buffer.data_ptr() for buffer in self.tensors]

    def signals(self, rank: int) -> torch.Tensor:
        """[program, rank that told]"""
        return self.tensors[rank][: SIGNALS * 4].view(torch.int32).view(-1, MAX_RANKS)

    def close(self) -> None: ...


def slot(buffer: torch.Tensor, call: int, part: torch.Tensor) -> torch.Tensor:
    start = SIGNALS * 4 + call % 2 * MAX_BYTES
    return buffer[start : start + part.nbytes].view(part.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("size", "rank"), [(8, 7), (2, 0), (2, 1), (3, 1)])
def test_a_rank_among_others_that_came_before(device, generator, size, rank, dtype):
    """The others' parts and signals are there already: what this rank makes of them, and what it tells them."""
    buffers = Buffers(size, device)
    all_reduce = OneShotAllReduce(rank, buffers, device)
    for call, count in enumerate(SIZES, start=1):
        parts = [torch.randn(count, generator=generator).to(dtype).to(device) for _ in range(size)]
        for other, buffer in enumerate(buffers.tensors):
            if other != rank:
                slot(buffer, call, parts[other]).copy_(parts[other])
                buffers.signals(rank)[:, other] = call
        total = parts[rank].clone()
        residual = torch.randn(count, generator=generator).to(dtype).to(device) if call % 2 else None
        all_reduce(total, residual)
        expected = torch.zeros(count, device=device) if residual is None else residual.float()
        for part in parts:
            expected += part.float()
        rounding = {} if dtype == torch.bfloat16 and device.type == "cpu" else {"rtol": 0, "atol": 0}
        torch.testing.assert_close(total, expected.to(dtype), **rounding)
        torch.testing.assert_close(slot(buffers.tensors[rank], call, total), parts[rank], rtol=0, atol=0)
        for other in range(size):
            assert buffers.signals(other)[:, rank].tolist() == [call] * module._NUM_PROGRAMS


def test_counts_of_calls_wrap_around(device):
    buffers = Buffers(2, device)
    all_reduce = OneShotAllReduce(0, buffers, device)
    all_reduce._calls.fill_(2**31 - 1)
    buffers.signals(0)[:, 1] = -(2**31)
    tensor = torch.ones(5, device=device)
    all_reduce(tensor)
    assert tensor.tolist() == [1.0] * 5  # the other's slot holds zeros
    assert all_reduce._calls.tolist() == [-(2**31)] * module._NUM_PROGRAMS


def test_what_it_takes(device):
    all_reduce = OneShotAllReduce(0, Buffers(2, device), device)
    assert all_reduce.takes(torch.empty(MAX_BYTES // 2, dtype=torch.bfloat16))
    assert not all_reduce.takes(torch.empty(MAX_BYTES // 2 + 1, dtype=torch.bfloat16))
    assert not all_reduce.takes(torch.empty(4, dtype=torch.int64))
    assert not all_reduce.takes(torch.empty(4, 4).t()[:, :2])


@pytest.mark.gpu
@pytest.mark.parametrize("size", [2, 3])
def test_ranks_at_once(size):
    """Ranks as streams of one GPU: 2,000 calls of all sizes, in CUDA graphs that each rank replays at its own pace."""
    device = torch.device("cuda")
    buffers = Buffers(size, device)
    ranks = [OneShotAllReduce(rank, buffers, device) for rank in range(size)]
    counts = [1, 4096, 70_000, 3, 262_144, 4096, 2048]  # odd: slots swap their places from replay to replay
    inputs = [[torch.randn(count, device=device) for count in counts] for _ in ranks]
    totals = [[torch.empty_like(part) for part in parts] for parts in inputs]
    expected = [sum(parts) for parts in zip(*inputs, strict=True)]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in ranks]
    graphs = []
    for rank, stream in enumerate(streams):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for part, total in zip(inputs[rank], totals[rank], strict=True):
                total.copy_(part)
                ranks[rank](total)
        graphs.append(graph)
    for _ in range(2000 // len(counts)):
        for graph, stream in zip(graphs, streams, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
    torch.cuda.synchronize()
    for rank_totals in totals:
        for total, wanted in zip(rank_totals, expected, strict=True):
            torch.testing.assert_close(total, wanted)
    for total, first in zip(totals[1], totals[0], strict=True):
        torch.testing.assert_close(total, first, rtol=0, atol=0)  # every rank has the same bits


@pytest.mark.gpu
def test_waiting_for_a_rank_that_never_comes_can_be_broken_off():
    device = torch.device("cuda")
    all_reduce = OneShotAllReduce(0, Buffers(2, device), device)
    threading.Timer(0.3, all_reduce.break_off).start()
    started = time.perf_counter()
    for _ in range(3):
        all_reduce(torch.ones(10, device=device))
    torch.cuda.synchronize()
    assert 0.2 < time.perf_counter() - started < 60  # the watchdog of a hang
