"""OwnerProcess: keeps a forked child from using, or ending, what belongs to its parent."""

from __future__ import annotations

import os
from collections.abc import Callable

from nanovllm.errors import InvalidStateError


class OwnerProcess:
    """The process that made an engine. A forked child has a copy of the engine, but not its threads and its device."""

    def __init__(self) -> None:
        self._pid = os.getpid()

    @property
    def is_current(self) -> bool:
        return os.getpid() == self._pid

    def check(self) -> None:
        """Raises InvalidStateError in a forked child."""
        if not self.is_current:
            raise InvalidStateError(
                f"This engine belongs to process {self._pid}, from which this one, {os.getpid()}, was forked: use it "
                "there, or make an engine here. Processes of multiprocessing's method 'spawn' inherit none."
            )

    def guard(self, function: Callable[..., object]) -> Callable[..., None]:
        """Returns a function that calls `function`, and does nothing in a forked child."""

        def call(*arguments: object) -> None:
            if self.is_current:
                function(*arguments)

        return call
