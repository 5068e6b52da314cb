"""Checks that this process can start several ranks, before one of them fails or hangs for another reason."""

from __future__ import annotations

import multiprocessing
import resource
import socket
import sys
from pathlib import Path

from nanovllm.errors import InvalidArgumentError

_DESCRIPTORS, _DESCRIPTORS_PER_RANK = 32, 8  # more than rank 0 opens while it starts
_ADDRESS_SPACE = 1_000_000_000  # bytes; about what a small model and the threads of gloo take beside torch


def check_start_conditions(num_ranks: int) -> None:
    """Raises InvalidArgumentError, which says what to do, if this process cannot start `num_ranks` ranks."""
    for problem in (_daemon(), _script(), _loopback(), _descriptors(num_ranks), _address_space()):
        if problem is not None:
            raise InvalidArgumentError("tensor_parallel_size", num_ranks, *problem)


def _daemon() -> tuple[str, str] | None:
    if not multiprocessing.current_process().daemon:
        return None
    hint = "Start the engine in a process with daemon=False, or in a ProcessPoolExecutor."
    return "1 in a daemonic process, such as one of multiprocessing.Pool, which cannot start others", hint


def _script() -> tuple[str, str] | None:
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        hint = "What the script does must stand below if __name__ == '__main__', because each rank reads the script."
        return "1 while another process reads the script", hint
    main = sys.modules["__main__"]
    path = getattr(main, "__file__", None)
    if path is None or getattr(main, "__spec__", None) is not None or Path(path).exists():
        return None
    return f"1 for a script that is not a file ({path})", "Each rank reads the script: write it to a file."


def _loopback() -> tuple[str, str] | None:
    try:
        with socket.socket(type=socket.SOCK_DGRAM) as probe:
            probe.connect(("127.0.0.1", 9))  # sends nothing
    except OSError as error:
        hint = "The ranks meet at 127.0.0.1: run `ip link set lo up`, or use a container with a network."
        return f"1 without a loopback network ({error.strerror})", hint
    return None


def _descriptors(num_ranks: int) -> tuple[str, str] | None:
    limit, folder = resource.getrlimit(resource.RLIMIT_NOFILE)[0], Path("/proc/self/fd")
    if limit == resource.RLIM_INFINITY or not folder.is_dir():
        return None
    free, needed = limit - len(list(folder.iterdir())), _DESCRIPTORS + _DESCRIPTORS_PER_RANK * num_ranks
    if free >= needed:
        return None
    return f"1 with {free} free file descriptors", f"It needs {needed}: raise the limit, as with `ulimit -n 1024`."


def _address_space() -> tuple[str, str] | None:
    limit, statm = resource.getrlimit(resource.RLIMIT_AS)[0], Path("/proc/self/statm")
    if limit == resource.RLIM_INFINITY or not statm.exists():
        return None
    free = limit - int(statm.read_text(encoding="ascii").split()[0]) * resource.getpagesize()
    if free >= _ADDRESS_SPACE:
        return None
    hint = f"Each rank needs {_ADDRESS_SPACE / 1e9:g} GB and the model: raise the limit, as with `ulimit -v unlimited`."
    return f"1 with {free / 1e9:.2f} GB of free address space", hint
