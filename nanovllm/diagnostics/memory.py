"""MemoryReport: where a device's memory went, in bytes."""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from nanovllm.attention.interface import LayerKVCache
from nanovllm.utils.device_memory import GB, describe_memory, free_cpu_memory

_PACKED = struct.Struct("=8Q")


@dataclass(frozen=True)
class MemoryReport:
    """Bytes by use; on a GPU they add up to `total`.

    weights: parameters and buffers of the model.
    kv_cache: its blocks. On a CPU their memory is taken as they are first written, so that until then less is in use.
    graphs: what the CUDA graphs hold.
    activations: what torch holds beside these: tensors of the steps, the rows, and memory kept to be used again. On
        a CPU, where torch keeps none, 0.
    other: on a GPU, the CUDA context and other processes; on a CPU, this process's resident memory beside the
        weights: Python, libraries, and the blocks written so far.
    free: of the device, now. total: of the device; on a CPU, what this process has and could have.
    rank: whose; with tensor_parallel_size > 1, `others` are the reports of ranks 1, 2, …
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
        """As bytes, to cross to another process: eight words and the device's name. `others` stay behind."""
        sizes = (self.weights, self.kv_cache, self.graphs, self.activations, self.other, self.free, self.total)
        return _PACKED.pack(self.rank, *sizes) + self.device.encode()

    @classmethod
    def unpack(cls, data: bytes) -> MemoryReport:
        rank, weights, kv_cache, graphs, activations, other, free, total = _PACKED.unpack_from(data)
        device = data[_PACKED.size :].decode()
        return cls(device, weights, kv_cache, graphs, activations, other, free, total, rank)


def measure_memory(
    rank: int,
    device: torch.device,
    model: torch.nn.Module,
    kv_caches: Iterable[LayerKVCache],
    graph_pool: tuple[int, int] | None,
) -> MemoryReport:
    """Measured now, without waiting for the device."""
    weights = _bytes([*model.parameters(), *model.buffers()])
    kv_cache = _bytes(tensor for cache in kv_caches for tensor in vars(cache).values() if tensor is not None)
    if device.type != "cuda":
        resident = int(describe_memory(device)[1].get("resident_bytes", 0))
        free = free_cpu_memory()
        other = max(resident - weights, 0)
        return MemoryReport(str(device), weights, kv_cache, 0, 0, other, free, resident + free, rank)
    free, total = torch.cuda.mem_get_info(device)
    reserved = torch.cuda.memory_reserved(device)
    graphs = sum(
        segment["total_size"]
        for segment in torch.cuda.memory_snapshot()
        if graph_pool is not None and tuple(segment["segment_pool_id"]) == tuple(graph_pool)
    )
    activations = reserved - weights - kv_cache - graphs
    other = total - free - reserved
    return MemoryReport(str(device), weights, kv_cache, graphs, activations, other, free, total, rank)


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Of the storages behind them, each counted once: views and tied weights share theirs."""
    sizes: dict[int, int] = {}
    for tensor in tensors:
        if tensor.is_mkldnn:  # in oneDNN's layout, whose storage torch does not show
            sizes[id(tensor)] = tensor.numel() * tensor.element_size()
        else:
            storage = tensor.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
    return sum(sizes.values())
