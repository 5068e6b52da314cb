"""Every environment variable that nanovllm reads: one typed declaration each, which is called to read it.

    if env.overlap(): ...

A variable is read when it is called, never at import, and an empty one counts as not set. A value that is not
allowed raises `InvalidArgumentError`, which names variable, value and what is allowed. LOGGING.md has them as a
table, made from here by tools/generate_logging_docs.py.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from nanovllm.errors import InvalidArgumentError

T_co = TypeVar("T_co", covariant=True)
_environment = os.environ


@dataclass(frozen=True)
class Kind(Generic[T_co]):
    """How a value is written. `parse` makes it of the text, or raises ValueError."""

    name: str
    allowed: str
    parse: Callable[[str], T_co]


@dataclass(frozen=True)
class Variable(Generic[T_co]):
    """One environment variable. `unset`: what the default is called in documents, where `default` does not say it."""

    name: str
    kind: Kind[T_co]
    default: T_co
    meaning: str
    unset: str = ""

    def __call__(self) -> T_co:
        text = _environment.get(self.name, "").strip()
        if not text:
            return self.default
        try:
            return self.kind.parse(text)
        except ValueError:
            raise InvalidArgumentError(self.name, text, self.kind.allowed) from None

    def set_default(self, text: str) -> None:
        """Sets the variable, for this process and those that it starts, unless it is set already."""
        if not _environment.get(self.name, "").strip():
            _environment[self.name] = text


def _choice(*allowed: str) -> Kind[str]:
    return Kind("choice", " or ".join(allowed), lambda text: allowed[allowed.index(text)])


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise ValueError
    return value


def _at_least_one(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError
    return value


_TRACE_SWITCH = {"0": None, "1": Path("nanovllm_trace_rank0.txt")}

LEVELS = Kind(
    "levels", "`DEBUG`, `INFO`, `WARNING`, `ERROR` or `CRITICAL`, or a list such as `INFO,scheduler=DEBUG`", str
)
SWITCH = Kind("switch", "0 or 1", lambda text: ("0", "1").index(text) == 1)
COUNT = Kind("integer", "an integer ≥ 1", _at_least_one)
SECONDS = Kind("number", "a number of seconds > 0", _positive)
GIGABYTES: Kind[float | None] = Kind("number", "a number of gigabytes > 0, such as 0.5", _positive)
FILE: Kind[Path | None] = Kind("path", "the path of a file that can be written", Path)
TRACE: Kind[Path | None] = Kind(
    "path", "0, 1 or the path of a file that can be written", lambda text: _TRACE_SWITCH.get(text, Path(text))
)
URL: Kind[str | None] = Kind("URL", "the address of an OpenTelemetry collector, such as http://localhost:4318", str)
PRESENCE = Kind("presence", "anything", bool)

log_level = Variable(
    "NANOVLLM_LOG_LEVEL",
    LEVELS,
    "INFO",
    "From which level on records are taken. A mistake is a warning: a typo here should not stop an engine.",
)
log_format = Variable(
    "NANOVLLM_LOG_FORMAT",
    _choice("text", "json"),
    "text",
    "Lines for people, or one JSON object a line; on the console and in the file.",
)
log_file = Variable(
    "NANOVLLM_LOG_FILE",
    FILE,
    None,
    "Every record goes to the end of this file too, whatever else takes it. Rank 1 adds `.rank1` to the name.",
    "no file",
)
log_prompts = Variable(
    "NANOVLLM_LOG_PROMPTS",
    SWITCH,
    False,
    "1: at DEBUG `request.added` has the prompt's text, and `request.output` the output's.",
)
log_decode_interval = Variable(
    "NANOVLLM_LOG_DECODE_INTERVAL", COUNT, 10, "Every how many decode steps one is reported at INFO."
)
log_stats_interval = Variable(
    "NANOVLLM_LOG_STATS_INTERVAL", SECONDS, 10.0, "How often a busy engine reports its statistics, in seconds."
)
configure_logging = Variable(
    "NANOVLLM_CONFIGURE_LOGGING", SWITCH, True, "0: no handler is attached, no level is set, no log file is written."
)
no_color = Variable(
    "NO_COLOR", PRESENCE, False, "Takes away the colour that levels have on a terminal (no-color.org).", "not set"
)
trace_file = Variable(
    "NANOVLLM_TRACE_FILE", FILE, None, "Writes a timeline in Chrome's trace format, which Perfetto opens.", "no file"
)
trace_function = Variable(
    "NANOVLLM_TRACE_FUNCTION",
    TRACE,
    None,
    "1, or a path: writes every Python call within nanovllm to a file a rank. Slow; for hangs and for learning.",
    "no file",
)
cpu_kvcache_gb = Variable(
    "NANOVLLM_CPU_KVCACHE_GB", GIGABYTES, None, "Size of the KV cache on a CPU.", "a quarter of the free memory"
)
overlap = Variable(
    "NANOVLLM_OVERLAP",
    SWITCH,
    True,
    "0: no step is launched before the last one's tokens were read. What the log and a debugger show is then in step "
    "with the device.",
)
otlp_endpoint = Variable(
    "OTEL_EXPORTER_OTLP_ENDPOINT",
    URL,
    None,
    "Sends a span for each request to this collector, if `nanovllm[otel]` is installed; its SDK reads `OTEL_*`, too.",
    "no spans",
)
otlp_traces_endpoint = Variable(
    "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT",
    URL,
    None,
    "The same for spans alone, with the whole path: `http://localhost:4318/v1/traces`.",
    "no spans",
)

VARIABLES = tuple(value for value in list(globals().values()) if isinstance(value, Variable))
