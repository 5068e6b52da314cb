"""Turns: lets several threads use one engine. One of them runs a step for all, and the others wait for its end.

A `Call` is one `generate` or `stream` that runs, in the thread that called it.

Ctrl-C may arrive at any line of the main thread. What other threads rely on is therefore done by the interpreter: a
`with` block that locks a `threading.Lock` unlocks it however it is left.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from queue import Empty, SimpleQueue

from nanovllm.engine.sequence import Sequence
from nanovllm.errors import InvalidStateError

# Ctrl-C may stop a thread after its step and before it wakes the others. They then look for themselves after this time.
_MAX_WAIT_SECONDS = 0.1


class Call:
    """The unfinished requests of one `generate` or `stream`. They end with it.

        call = Call()
        with call.running:
            engine.open(call)

    A step discards the requests of calls that no longer hold their lock.
    """

    def __init__(self) -> None:
        self.running = threading.Lock()
        self.request_ids: dict[str, None] = {}  # those without an output yet, in order
        self.num_prompt_tokens = 0  # of all its requests

    def queued(self, request_id: str, sequences: list[Sequence]) -> None:
        """Takes the sequences of a request that is queued."""

    def step_ended(self) -> None:
        """Reads what a step brought. The thread that ran the step calls it before another step may start."""


class Turns:
    """Lets one thread at a time run a step."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._thread: int | None = None  # the one that holds the lock
        self._waiting: deque[SimpleQueue[None]] = deque()

    @property
    def is_taken(self) -> bool:
        """Whether a thread runs a step."""
        return self._lock.locked()

    @property
    def is_ours(self) -> bool:
        """Whether the step that runs called this thread's code: an observer, a finalizer, a signal handler."""
        return self.is_taken and self._thread == threading.get_ident()

    def check_free(self) -> None:
        """Raises InvalidStateError while a thread runs a step."""
        if self._lock.locked():
            raise InvalidStateError(
                "A step of this engine is running, in another thread or below this call. Call `step` from one thread, "
                "or use `generate` and `stream`, which share steps."
            )

    def wait(self) -> bool:
        """Waits until the step that another thread runs has ended. Returns False if no thread runs one."""
        if not self.is_taken:
            return False
        if self.is_ours:
            self.check_free()
        ended: SimpleQueue[None] = SimpleQueue()
        self._waiting.append(ended)
        while self.is_taken:  # still: then its thread finds `ended`
            with suppress(Empty):
                ended.get(timeout=_MAX_WAIT_SECONDS)
                break
        return True

    def run(self, action: Callable[[], None]) -> None:
        """Runs `action` while no other thread runs one, then wakes the threads that wait."""
        try:
            with self._lock:
                self._thread = threading.get_ident()
                try:
                    action()
                finally:
                    self._thread = None
        finally:
            if self._waiting:
                self._wake()

    def _wake(self) -> None:
        with suppress(IndexError):  # another thread may wake some of them
            for _ in range(len(self._waiting)):
                self._waiting.popleft().put(None)
