"""Every environment variable that nanovllm reads, typed, in one place.

| function | variable | default |
|---|---|---|
| `log_level()` | `NANOVLLM_LOG_LEVEL` | `INFO` |
| `configure_logging()` | `NANOVLLM_CONFIGURE_LOGGING` | `1` |
| `log_decode_interval()` | `NANOVLLM_LOG_DECODE_INTERVAL` | `10` |
| `cpu_kvcache_gb()` | `NANOVLLM_CPU_KVCACHE_GB` | none: a fraction of the free memory |
| `overlap()` | `NANOVLLM_OVERLAP` | `1` |

A variable is read when its function is called, never at import, and an empty one counts as not set.
A value that is not allowed raises `InvalidArgumentError`, which names variable, value and what is allowed.
"""

from __future__ import annotations

import math
import os

from nanovllm.errors import InvalidArgumentError

__all__ = ["configure_logging", "cpu_kvcache_gb", "log_decode_interval", "log_level", "overlap"]


def log_level() -> str:
    """The level specification as written, such as `INFO,scheduler=DEBUG`.

    The logger reads it, and answers a mistake with a warning: a typo here should not stop an engine.
    """
    return _read("NANOVLLM_LOG_LEVEL") or "INFO"


def configure_logging() -> bool:
    """Whether nanovllm may attach its console handler and set its loggers' levels."""
    return _read_switch("NANOVLLM_CONFIGURE_LOGGING")


def overlap() -> bool:
    """Whether a step may be launched before the last one's tokens were read; off, whatever the engine's arguments say.

    For debugging: with one step at a time, what the log and a debugger show is in step with the device.
    """
    return _read_switch("NANOVLLM_OVERLAP")


def log_decode_interval() -> int:
    """Every how many decode steps one is reported at INFO."""
    value = _read("NANOVLLM_LOG_DECODE_INTERVAL") or "10"
    try:
        interval = int(value)
    except ValueError:
        interval = 0
    if interval < 1:
        raise InvalidArgumentError("NANOVLLM_LOG_DECODE_INTERVAL", value, "an integer ≥ 1")
    return interval


def cpu_kvcache_gb() -> float | None:
    """Size of the KV cache on a CPU in GB (10⁹ bytes), or None where the engine is to decide."""
    value = _read("NANOVLLM_CPU_KVCACHE_GB")
    if not value:
        return None
    try:
        size = float(value)
    except ValueError:
        size = math.nan
    if not (math.isfinite(size) and size > 0):
        raise InvalidArgumentError("NANOVLLM_CPU_KVCACHE_GB", value, "a number of gigabytes > 0, such as 0.5")
    return size


def _read_switch(name: str) -> bool:
    value = _read(name) or "1"
    if value not in ("0", "1"):
        raise InvalidArgumentError(name, value, "0 or 1")
    return value == "1"


def _read(name: str) -> str:
    return os.environ.get(name, "").strip()
