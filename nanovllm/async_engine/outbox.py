"""Outbox: sends messages through a socket from any thread, and from any line of it."""

from __future__ import annotations

import threading
from collections import deque
from contextlib import suppress
from multiprocessing.connection import Connection


class Outbox:
    """Sends whole messages in order. Does nothing once the other side has ended: the receiver reports that.

    A thread that finds another one sending leaves its message to that one. So may a garbage collection in the middle of
    sending, which ends a request and tells the engine.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._messages: deque[bytes] = deque()
        self._lock = threading.Lock()  # of sending

    def send(self, message: bytes) -> None:
        self._messages.append(message)
        while self._messages and self._lock.acquire(blocking=False):
            try:
                self._send_all()
            finally:
                self._lock.release()

    def flush(self) -> None:
        """Waits until every message is sent."""
        with self._lock:
            self._send_all()

    def close(self) -> None:
        """Closes the connection. Later messages are dropped."""
        with self._lock:
            self._connection.close()

    def _send_all(self) -> None:
        while self._messages:
            with suppress(OSError):
                self._connection.send_bytes(self._messages.popleft())
