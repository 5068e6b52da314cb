"""StepWatch: notices an engine that hangs."""

from __future__ import annotations

import threading
import time
from typing import Protocol

from nanovllm.metrics import MetricsSnapshot

_ASK_SECONDS = 1.0  # between questions to the engine
_LONGEST_LOOK = 0.5  # seconds that count between two looks


class Connection(Protocol):
    """The connection to an engine: `EngineProcess`."""

    def metrics(self) -> MetricsSnapshot: ...


class StepWatch:
    """Asks an engine for its figures, which change with every step, until `stop`.

    seconds: how long an engine with requests may end no step, and any engine may leave a question without an answer.
    """

    def __init__(self, connection: Connection, seconds: float) -> None:
        self._connection, self._seconds = connection, seconds
        self._left, self._looked = seconds, time.monotonic()
        self._num_signs = self._num_seen = 0  # of life
        self._stopped = threading.Event()
        threading.Thread(target=self._ask, name="nanovllm-step-watch", daemon=True).start()

    def hangs(self) -> bool:
        """Returns whether the time is over. To be called several times a second.

        Time in which this process is stopped, by Ctrl-Z for example, does not count.
        """
        now, num_signs = time.monotonic(), self._num_signs
        self._left -= min(now - self._looked, _LONGEST_LOOK)
        if num_signs != self._num_seen:
            self._left = self._seconds
        self._looked, self._num_seen = now, num_signs
        return self._left <= 0

    def stop(self) -> None:
        self._stopped.set()

    def _ask(self) -> None:
        before: MetricsSnapshot | None = None
        while not self._stopped.wait(_ASK_SECONDS):
            figures = self._connection.metrics()  # waits for the answer
            if figures != before or not (figures.num_running or figures.num_waiting):
                self._num_signs += 1
            before = figures
