"""MemoryReport: what a device's memory is used for, in bytes."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from nanovllm.attention.interface import LayerKVCache
from nanovllm.experts.experts_method import Experts
from nanovllm.layers.parallel import TensorParallel
from nanovllm.utils.device_memory import GB, describe_memory, free_cpu_memory

_PACKED = struct.Struct("=9Q")


class RankRunner(Protocol):
    """The parts of a rank's model runner that diagnostics read."""

    @property
    def parallel(self) -> TensorParallel: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def model(self) -> torch.nn.Module: ...

    @property
    def kv_caches(self) -> Sequence[LayerKVCache]: ...

    @property
    def graph_pool(self) -> tuple[int, int] | None:
        """The memory pool of the CUDA graphs; None without graphs."""
        ...


@dataclass(frozen=True)
class MemoryReport:
    """Bytes by use. On a GPU they add up to `total`.

    weights: parameters and buffers of the model.
    kv_cache: the blocks. A CPU's memory is in use only once a block is written.
    graphs: memory of the CUDA graphs.
    activations: other memory that torch holds: tensors of steps, rows, cached memory. 0 on a CPU.
    other: on a GPU, the CUDA context and other processes; on a CPU, this process's resident memory without the
        weights: Python, libraries, and the blocks written so far.
    free: free memory of the device. total: memory of the device; on a CPU, resident plus free memory.
    rank: the rank of this report; with tensor_parallel_size > 1, `others` are the reports of ranks 1, 2, …
    experts: the part of `weights` that the experts of a mixture of experts take.
    """

    device: str
    weights: int
    kv_cache: int
    graphs: int
    activations: int
    other: int
    free: int
    total: int
    rank: int = 0
    experts: int = 0
    others: tuple[MemoryReport, ...] = ()

    def __str__(self) -> str:
        names = ("weights", "kv_cache", "graphs", "activations", "other", "free")
        whose = f"{self.device}, rank {self.rank}" if self.rank or self.others else self.device
        lines = [f"Memory of {whose}: {self.total / GB:.3f} GB"]
        for name in names:
            size = getattr(self, name)
            note = " (reserved; in use as blocks are written)" if name == "kv_cache" and self.device == "cpu" else ""
            lines.append(f"  {name:<12}{size / GB:>9.3f} GB {100 * size / max(self.total, 1):5.1f} %{note}")
        return "\n".join([*lines, *map(str, self.others)])

    def pack(self) -> bytes:
        """Returns the report as bytes for another process: nine words and the device's name, without `others`."""
        sizes = (self.weights, self.kv_cache, self.graphs, self.activations, self.other, self.free, self.total)
        return _PACKED.pack(*sizes, self.rank, self.experts) + self.device.encode()

    @classmethod
    def unpack(cls, data: bytes) -> MemoryReport:
        return cls(data[_PACKED.size :].decode(), *_PACKED.unpack_from(data))


def measure_memory(runner: RankRunner) -> MemoryReport:
    """Returns the report of the rank that `runner` computes, without waiting for the device."""
    rank, device, graph_pool = runner.parallel.rank, runner.device, runner.graph_pool
    weights = _bytes([*runner.model.parameters(), *runner.model.buffers()])
    layers = (module for module in runner.model.modules() if isinstance(module, Experts))
    experts = _bytes(parameter for layer in layers for parameter in layer.parameters())
    kv_cache = _bytes(tensor for cache in runner.kv_caches for tensor in vars(cache).values() if tensor is not None)
    if device.type != "cuda":
        resident = int(describe_memory(device)[1].get("resident_bytes", 0))
        free = free_cpu_memory()
        other = max(resident - weights, 0)
        return MemoryReport(str(device), weights, kv_cache, 0, 0, other, free, resident + free, rank, experts)
    free, total = torch.cuda.mem_get_info(device)
    reserved = torch.cuda.memory_reserved(device)
    graphs = sum(
        segment["total_size"]
        for segment in torch.cuda.memory_snapshot()
        if graph_pool is not None and tuple(segment["segment_pool_id"]) == tuple(graph_pool)
    )
    activations = reserved - weights - kv_cache - graphs
    other = total - free - reserved
    return MemoryReport(str(device), weights, kv_cache, graphs, activations, other, free, total, rank, experts)


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Returns the size of the tensors' storages. A storage that views or tied weights share counts once."""
    sizes: dict[int, int] = {}
    for tensor in tensors:
        if tensor.is_mkldnn:  # in oneDNN's layout, whose storage torch does not show
            sizes[id(tensor)] = tensor.numel() * tensor.element_size()
        else:
            storage = tensor.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
    return sum(sizes.values())
