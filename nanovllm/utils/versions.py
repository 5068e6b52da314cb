"""The versions of what an engine runs on, and the name of its device, found without importing torch."""

from __future__ import annotations

import importlib.util
import platform
import re
import sys
from importlib import metadata
from pathlib import Path

__all__ = ["device_name", "installed_version", "versions"]

_GPUS = Path("/proc/driver/nvidia/gpus")


def versions() -> dict[str, str | None]:
    """Returns versions by name; None for what is not installed, and for the CUDA of a torch without it."""
    return {
        "nanovllm": str(sys.modules["nanovllm"].__version__),
        "python": platform.python_version(),
        "torch": installed_version("torch"),
        "cuda": _cuda(),
        "triton": installed_version("triton"),
    }


def device_name(device: str) -> str:
    """Returns the name of the GPU that an engine with the argument `device` runs on; cpu for a torch without CUDA.

    The driver numbers the machine's GPUs by bus; the first one counts if `device` has no index. `device` itself is
    returned if the driver does not tell.
    """
    if device == "cpu" or _cuda() is None:
        return "cpu"
    index = device.partition(":")[2]
    try:
        folder = sorted(_GPUS.iterdir())[int(index or 0)]
        found = re.search(r"^Model:\s*(.+?)\s*$", (folder / "information").read_text("utf-8"), re.MULTILINE)
    except (OSError, IndexError, ValueError):
        return device
    return found[1] if found else device


def installed_version(name: str) -> str | None:
    """Returns the version of an installed package; None where it is not installed, or only its source is there."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _cuda() -> str | None:
    """Returns the CUDA version that torch was built for, from its version.py."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    try:
        text = Path(spec.origin).with_name("version.py").read_text("utf-8")
    except OSError:
        return None
    found = re.search(r"^cuda\b.*=\s*'([\d.]+)'", text, re.MULTILINE)
    return found[1] if found else None
