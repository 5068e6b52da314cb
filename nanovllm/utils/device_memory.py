"""The memory use of a GPU or of this process, as a phrase for a log line and as exact numbers.

Works without torch: without torch or a GPU it describes the process.
"""

from __future__ import annotations

import os
import sys
from typing import Any

__all__ = ["cuda_index", "describe_memory", "free_cpu_memory", "free_memory"]

GB = 10**9


def describe_memory(device: object) -> tuple[str, dict[str, Any]]:
    """Describes the memory of `device` if it is a GPU that torch can use, otherwise the memory of this process."""
    torch = sys.modules.get("torch")
    index = cuda_index(device) if torch is not None and torch.cuda.is_available() else None
    return _process_memory() if index is None else _gpu_memory(index)


def cuda_index(device: object) -> int | None:
    """Returns the index of a CUDA device given as an index, a name or a `torch.device`; None for other devices."""
    if isinstance(device, int):
        return device
    kind, _, index = str(device).partition(":")
    if kind != "cuda":
        return None
    return int(index) if index else int(sys.modules["torch"].cuda.current_device())


def _gpu_memory(index: int) -> tuple[str, dict[str, Any]]:
    cuda = sys.modules["torch"].cuda
    free, total = cuda.mem_get_info(index)  # of the whole device; the others are torch's in this process
    allocated, reserved = cuda.memory_allocated(index), cuda.memory_reserved(index)
    peak = cuda.max_memory_allocated(index)
    phrase = (
        f"GPU Memory [Device {index}]: Allocated={allocated / GB:.2f}GB, Reserved={reserved / GB:.2f}GB, "
        f"Peak={peak / GB:.2f}GB, Free={free / GB:.2f}GB/{total / GB:.2f}GB"
    )
    fields = {"device": index, "allocated_bytes": allocated, "reserved_bytes": reserved, "peak_bytes": peak}
    return phrase, {**fields, "free_bytes": free, "total_bytes": total}


def _process_memory() -> tuple[str, dict[str, Any]]:
    if sys.platform != "linux":
        import resource  # not on Windows, where the caller reports that the memory is not known

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS
        return f"CPU Memory [this process]: Peak={peak / GB:.2f}GB", {"device": "cpu", "peak_bytes": peak}
    with open("/proc/self/status", encoding="ascii", errors="replace") as status:
        entries = dict(line.split(":", 1) for line in status)
    resident, peak = (int(entries[key].split()[0]) * 1024 for key in ("VmRSS", "VmHWM"))
    phrase = f"CPU Memory [this process]: Resident={resident / GB:.2f}GB, Peak={peak / GB:.2f}GB"
    return phrase, {"device": "cpu", "resident_bytes": resident, "peak_bytes": peak}


def free_memory(device: object) -> int:
    """Returns the free bytes of `device`: of the GPU, or of this machine."""
    index = cuda_index(device)
    return free_cpu_memory() if index is None else int(sys.modules["torch"].cuda.mem_get_info(index)[0])


def free_cpu_memory() -> int:
    """Returns the free bytes of this machine, or an estimate."""
    if sys.platform == "linux":
        with open("/proc/meminfo", encoding="ascii") as meminfo:
            for line in meminfo:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2  # the free part is not known: assume half
    return 4 * GB
