"""The machine that a benchmark runs on: device name, package versions, load, copy bandwidth."""

from __future__ import annotations

import os
import platform
import time
from importlib import metadata
from pathlib import Path

import torch

import nanovllm

_PACKAGES = ("torch", "triton", "transformers", "flash-attn", "flash-attn-4", "numpy")
_CPUINFO = Path("/proc/cpuinfo")


def versions() -> dict[str, str]:
    """Returns the versions of Python, nanovllm and the packages that matter to speed, if installed."""
    found = {"python": platform.python_version(), "nanovllm": nanovllm.__version__}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def device_name(device: torch.device) -> str:
    """Returns the name of the GPU, or of the CPU with the number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    if _CPUINFO.exists():
        lines = _CPUINFO.read_text(encoding="utf-8").splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    return f"{name}, {torch.get_num_threads()} threads"


def load_average() -> float | None:
    """Returns the mean number of runnable threads in the last minute, or None if the system does not report it."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def copy_bytes_per_second(device: torch.device) -> float:
    """Returns the bandwidth of a copy larger than any cache: bytes read plus bytes written, the best of ten."""
    on_gpu = device.type == "cuda"
    num_bytes = min(1 << 30, torch.cuda.mem_get_info(device)[0] // 4) if on_gpu else 1 << 28
    source = torch.ones(num_bytes, dtype=torch.uint8, device=device)
    target = torch.ones_like(source)
    best = 0.0
    for _ in range(10):
        if on_gpu:
            torch.cuda.synchronize(device)
        started = time.perf_counter()
        target.copy_(source)
        if on_gpu:
            torch.cuda.synchronize(device)
        best = max(best, 2 * num_bytes / (time.perf_counter() - started))
    return best
