"""The environment variables that nanovllm reads. Each is declared once, and called to read it.

    if env.overlap(): ...

A variable is read when it is called, never at import. An empty one counts as not set. A value that is not allowed
raises InvalidArgumentError, which names the variable, its value and what is allowed. tools/generate_logging_docs.py
makes the table in LOGGING.md from these declarations.
"""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from nanovllm.errors import InvalidArgumentError

T_co = TypeVar("T_co", covariant=True)
_environment = os.environ


@dataclass(frozen=True)
class Kind(Generic[T_co]):
    """The form of a value. `parse` reads it from text, or raises ValueError."""

    name: str
    allowed: str
    parse: Callable[[str], T_co]


@dataclass(frozen=True)
class Variable(Generic[T_co]):
    """One environment variable. `unset` describes the default in documents where `default` itself does not."""

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

    @property
    def is_set(self) -> bool:
        """Whether the environment has a value for the variable."""
        return bool(_environment.get(self.name, "").strip())

    def set_default(self, text: str) -> None:
        """Sets the variable, for this process and those that it starts, unless it is set already."""
        if not self.is_set:
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


_PREFIX = "NANOVLLM_"
_SECRET = ("_KEY", "_TOKEN", "_PASSWORD")
_TRACE_SWITCH = {"0": None, "1": Path("nanovllm_trace_rank0.txt")}

LEVELS = Kind(
    "levels", "`DEBUG`, `INFO`, `WARNING`, `ERROR` or `CRITICAL`, or a list such as `INFO,scheduler=DEBUG`", str
)
SWITCH = Kind("switch", "0 or 1", lambda text: ("0", "1").index(text) == 1)
COUNT = Kind("integer", "an integer ≥ 1", _at_least_one)
SECONDS = Kind("number", "a number of seconds > 0", _positive)
MEGABYTES = Kind("integer", "an integer of megabytes ≥ 1", _at_least_one)
GIGABYTES: Kind[float | None] = Kind("number", "a number of gigabytes > 0, such as 0.5", _positive)
FILE: Kind[Path | None] = Kind("path", "the path of a file that can be written", Path)
TRACE: Kind[Path | None] = Kind(
    "path", "0, 1 or the path of a file that can be written", lambda text: _TRACE_SWITCH.get(text, Path(text))
)
URL: Kind[str | None] = Kind("URL", "the address of an OpenTelemetry collector, such as http://localhost:4318", str)
TEXT: Kind[str | None] = Kind("text", "a text", str)
PRESENCE = Kind("presence", "anything", bool)

log_level = Variable(
    "NANOVLLM_LOG_LEVEL",
    LEVELS,
    "INFO",
    "The lowest level that is logged. A mistake in it is a warning, so that a typo does not stop an engine.",
    "`INFO`, of which the console shows a selection",
)
log_format = Variable(
    "NANOVLLM_LOG_FORMAT",
    _choice("text", "json"),
    "text",
    "Lines for people, or one JSON object per line; on the console and in the file.",
)
log_file_format: Variable[str | None] = Variable(
    "NANOVLLM_LOG_FILE_FORMAT",
    _choice("text", "json"),
    None,
    "The same for the file alone.",
    "as `NANOVLLM_LOG_FORMAT`",
)
log_file = Variable(
    "NANOVLLM_LOG_FILE",
    FILE,
    None,
    "Every record is also appended to this file, whatever other handlers do. Rank 1 adds `.rank1` to the name.",
    "no file",
)
log_prompts = Variable(
    "NANOVLLM_LOG_PROMPTS",
    SWITCH,
    False,
    "1: at DEBUG, `request.added` has the text of the prompt and `request.output` that of the output.",
)
log_decode_interval = Variable(
    "NANOVLLM_LOG_DECODE_INTERVAL",
    COUNT,
    10,
    "One in this many decode steps is logged at INFO.",
    "`10`, and 50 on the default console",
)
log_stats_interval = Variable(
    "NANOVLLM_LOG_STATS_INTERVAL", SECONDS, 10.0, "Seconds between the statistics lines of a busy engine."
)
log_slow_seconds = Variable(
    "NANOVLLM_LOG_SLOW_SECONDS",
    SECONDS,
    5.0,
    "A step, or a request's wait for its next token, that takes longer is a warning, and so is a wait in the queue of "
    "four times as long; at most one of each kind a minute.",
)
configure_logging = Variable(
    "NANOVLLM_CONFIGURE_LOGGING", SWITCH, True, "0: no handler is attached, no level is set, no log file is written."
)
no_color = Variable("NO_COLOR", PRESENCE, False, "Any value: no colour on a terminal (no-color.org).", "not set")
trace_file = Variable(
    "NANOVLLM_TRACE_FILE", FILE, None, "Writes a timeline in the Chrome trace format, which Perfetto opens.", "no file"
)
trace_max_mb = Variable(
    "NANOVLLM_TRACE_MAX_MB", MEGABYTES, 1000, "Size at which the timeline ends, with a warning. A MB is 10⁶ bytes."
)
trace_function = Variable(
    "NANOVLLM_TRACE_FUNCTION",
    TRACE,
    None,
    "1 or a path: writes every Python call inside nanovllm to a file, one for each rank. Slow; for hangs and learning.",
    "no file",
)
cpu_kvcache_gb = Variable(
    "NANOVLLM_CPU_KVCACHE_GB", GIGABYTES, None, "Size of the KV cache on a CPU.", "a quarter of the free memory"
)
overlap = Variable(
    "NANOVLLM_OVERLAP",
    SWITCH,
    True,
    "0: a step is launched only after the tokens of the previous one were read, so that the log and a debugger are in "
    "step with the device.",
)
engine_process: Variable[bool | None] = Variable(
    "NANOVLLM_ENGINE_PROCESS",
    SWITCH,
    None,
    "1: `AsyncLLM` runs its engine in a process of its own, 0: in a thread. The argument `engine_process` comes first.",
    "a process on a GPU, a thread on a CPU",
)
grammar_seconds = Variable(
    "NANOVLLM_GRAMMAR_SECONDS",
    SECONDS,
    10.0,
    "Seconds that the grammar of a request with structured outputs may take, to be read, compiled and followed. Then "
    "the request ends with an error.",
)
grammar_length = Variable(
    "NANOVLLM_GRAMMAR_LENGTH", COUNT, 2**18, "The longest schema, regex, grammar or list of choices, in characters."
)
grammar_memory_gb = Variable(
    "NANOVLLM_GRAMMAR_MEMORY_GB",
    Kind("number", "a number of gigabytes > 0, such as 0.5", _positive),
    2.0,
    "Memory of the process that compiles and follows grammars. The request that needs more ends with an error.",
)
api_key = Variable(
    "NANOVLLM_API_KEY", TEXT, None, "The key that `nanovllm serve` asks for, unless `--api-key` gives others.", "no key"
)
otlp_endpoint = Variable(
    "OTEL_EXPORTER_OTLP_ENDPOINT",
    URL,
    None,
    "Sends spans and metrics of requests to this collector if the extra `otel` is installed. Its SDK reads `OTEL_*`.",
    "nothing is sent",
)
otlp_traces_endpoint = Variable(
    "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT",
    URL,
    None,
    "The same for spans only, with the full path: `http://localhost:4318/v1/traces`.",
    "no spans",
)
otlp_metrics_endpoint = Variable(
    "OTEL_EXPORTER_OTLP_METRICS_ENDPOINT",
    URL,
    None,
    "The same for metrics only, with the full path: `http://localhost:4318/v1/metrics`.",
    "no metrics",
)
omp_num_threads = Variable(
    "OMP_NUM_THREADS",
    PRESENCE,
    False,
    "Number of torch's threads on a CPU; where it is set, the engine does not choose it.",
    "one for each core, or 1 where more are slower",
)
mkl_num_threads = Variable("MKL_NUM_THREADS", PRESENCE, False, "The same, for MKL.", "not set")
omp_wait_policy = Variable(
    "OMP_WAIT_POLICY",
    PRESENCE,
    False,
    "How torch's threads wait; where it is set, the engine does not choose it.",
    "not set",
)
gomp_spincount = Variable(
    "GOMP_SPINCOUNT",
    PRESENCE,
    False,
    "The same, in GNU OpenMP's turns of a loop.",
    "10000, if the engine imports torch",
)
nccl_socket_ifname = Variable(
    "NCCL_SOCKET_IFNAME",
    PRESENCE,
    False,
    "The network interfaces where NCCL listens; where it is set, the engine does not choose them.",
    "lo, while several ranks start",
)

cuda_visible_devices = Variable(
    "CUDA_VISIBLE_DEVICES",
    TEXT,
    None,
    "The GPUs that `nanovllm serve --data-parallel-size` gives to its replicas, in this order, by index or UUID.",
    "all GPUs",
)

VARIABLES = tuple(value for value in list(globals().values()) if isinstance(value, Variable))


@contextmanager
def openmp_spins_briefly() -> Iterator[None]:
    """Sets GOMP_SPINCOUNT, which GNU OpenMP reads once, for a library that is loaded in the block.

    It is unset afterwards, so that processes that this one starts do not inherit it.
    """
    _environment[gomp_spincount.name] = "10000"  # long enough to last until the next operator
    try:
        yield
    finally:
        del _environment[gomp_spincount.name]


def leave_logging_alone() -> None:
    """Sets NANOVLLM_CONFIGURE_LOGGING to 0 in this process, whose output another one reads."""
    _environment[configure_logging.name] = "0"


@contextmanager
def nccl_stays_on_this_machine() -> Iterator[None]:
    """Sets NCCL_SOCKET_IFNAME, which NCCL reads once, to the loopback interface, unless it is set.

    It is unset afterwards, so that processes that this one starts do not inherit it.
    """
    if nccl_socket_ifname():
        yield
        return
    _environment[nccl_socket_ifname.name] = "lo"
    try:
        yield
    finally:
        del _environment[nccl_socket_ifname.name]


def visible_gpus() -> list[str] | None:
    """Returns the GPUs in CUDA_VISIBLE_DEVICES as they are written there; None if it is not set.

    CUDA ignores those after a -1.
    """
    text = _environment.get(cuda_visible_devices.name)
    if text is None:
        return None
    names = [name.strip() for name in text.split(",") if name.strip()]
    return names[: names.index("-1")] if "-1" in names else names


def environment_with(changes: Mapping[str, str]) -> dict[str, str]:
    """Returns the environment of this process with `changes`, for a process that it starts."""
    return {**_environment, **changes}


def unknown_variables() -> list[str]:
    """Returns the variables NANOVLLM_… of the environment that nanovllm does not read."""
    known = {variable.name for variable in VARIABLES}
    return [name for name in list(_environment) if name.startswith(_PREFIX) and name not in known]


def nearest_variable(name: str) -> str:
    """Returns the variable whose name is nearest to `name`; "" if none is near."""
    known = [variable.name.removeprefix(_PREFIX) for variable in VARIABLES if variable.name.startswith(_PREFIX)]
    found = difflib.get_close_matches(name.removeprefix(_PREFIX), known, n=1)
    return _PREFIX + found[0] if found else ""


def variables_in_force() -> dict[str, str]:
    """Returns the variables NANOVLLM_… that are set. A value that may be a secret is replaced by `set`."""
    names = [variable.name for variable in VARIABLES if variable.name.startswith(_PREFIX) and variable.is_set]
    return {name: "set" if name.endswith(_SECRET) else _environment[name].strip() for name in names}


def variables_for_workers() -> dict[str, str]:
    """Returns the variables NANOVLLM_… that are set, without secrets: for processes on other machines."""
    return {name: text for name, text in variables_in_force().items() if not name.endswith(_SECRET)}


def num_usable_cores() -> int:
    """Returns the number of cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
