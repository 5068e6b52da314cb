"""What processes of our own have in common when they start."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

NO_PROCESS_HINT = "The system allows no further process: end others, or raise its limits (`ulimit -u`, `ulimit -v`)."
_FIRST_LINES = """
import json, sys
sys.path[:] = json.loads(sys.argv[1])
descriptor = int(sys.argv[2])
"""


@contextmanager
def blocked_interrupts() -> Iterator[None]:
    """Blocks SIGINT in this thread. A process that is started meanwhile never gets it: Ctrl-C is for this one alone."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def start_interpreter(
    main: str, theirs: Connection, *options: str, inherited: Iterable[int] = (), **arguments: Any
) -> subprocess.Popen[bytes]:
    """Starts a new interpreter, which finds modules where this one does and does not read the caller's script.

    main: what it runs; `descriptor` is that of its end of the connection. options: of Python. arguments: of Popen.
    theirs: its end, which is closed here. inherited: further descriptors that it gets.
    Raises OSError if the system allows no further process.
    """
    with theirs:
        return subprocess.Popen(
            [sys.executable, *options, "-c", _FIRST_LINES + main, json.dumps(sys.path), str(theirs.fileno())],
            pass_fds=(theirs.fileno(), *inherited),
            stdin=subprocess.DEVNULL,
            **arguments,
        )
