"""Every environment variable that nanovllm reads, typed, in one place.

| function | variable | default |
|---|---|---|
| `log_level()` | `NANOVLLM_LOG_LEVEL` | `INFO` |
| `configure_logging()` | `NANOVLLM_CONFIGURE_LOGGING` | `1` |
| `log_decode_interval()` | `NANOVLLM_LOG_DECODE_INTERVAL` | `10` |
| `cpu_kvcache_gb()` | `NANOVLLM_CPU_KVCACHE_GB` | none: a fraction of the free memory |

A variable is read when its function is called, never at import, and an empty one counts as not set.
A value that is not allowed raises `InvalidArgumentError`, which names variable, value and what is allowed.
"""

from __future__ import annotations

import math
import os

from nanovllm.errors import InvalidArgumentError

__all__ = ["configure_logging", "cpu_kvcache_gb", "log_decode_interval", "log_level"]


def log_level() -> str:
    """The level specification as written, such as `INFO,scheduler=DEBUG`.

    The logger reads it, and answers a mistake with a warning: a typo here should not stop an engine.
    """
    return _read("NANOVLLM_LOG_LEVEL") or "INFO"


def configure_logging() -> bool:
    """Whether nanovllm may attach its console handler and set its loggers' levels."""
    value = _read("NANOVLLM_CONFIGURE_LOGGING") or "1"
    if value not in ("0", "1"):
        raise InvalidArgumentError("NANOVLLM_CONFIGURE_LOGGING", value, "0 or 1")
    return value == "1"


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


def _read(name: str) -> str:
    return os.environ.get(name, "").strip()
