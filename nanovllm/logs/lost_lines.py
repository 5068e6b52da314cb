"""LostLines: what could not be written to a file costs one warning a minute, not one a line."""

from __future__ import annotations

import logging
import threading
import time
from pathlib import Path

from nanovllm.logs import events

__all__ = ["LostLines"]

logger = logging.getLogger(__name__)

_WARNING_SECONDS = 60.0  # between two warnings about one file


class LostLines:
    """Counts the lines that a file has lost."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._num_lost = 0  # since the last warning
        self._error = ""
        self._next_warning = 0.0
        self._lock = threading.Lock()

    def add(self, error: Exception, num_lost: int = 1) -> None:
        """Counts lines that were not written because of `error`."""
        with self._lock:
            self._num_lost += num_lost
            self._error = getattr(error, "strerror", None) or repr(error)

    def warn(self) -> None:
        """Logs what was lost, if a warning is due. The caller holds no lock that logging takes."""
        if not self._num_lost:
            return
        with self._lock:
            if not self._num_lost or time.monotonic() < self._next_warning:
                return
            self._next_warning = time.monotonic() + _WARNING_SECONDS
            num_lost, self._num_lost = self._num_lost, 0
        events.log_lost.log(logger, path=str(self._path), error=self._error, num_lost=num_lost)
