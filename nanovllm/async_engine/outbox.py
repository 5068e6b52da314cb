"""Outbox: sends messages through a socket from any thread, and from any line of it."""

from __future__ import annotations

import threading
from collections import deque
from contextlib import nullcontext, suppress
from multiprocessing.connection import Connection
from multiprocessing.reduction import send_handle


class Outbox:
    """Sends whole messages in order. Does nothing once the other side has ended: the receiver reports that.

    A thread that finds another one sending leaves its message to that one. So may a garbage collection in the middle of
    sending, which ends a request and tells the engine.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._messages: deque[tuple[bytes, Connection | None]] = deque()
        self._lock = threading.Lock()  # of sending

    def send(self, message: bytes, passed: Connection | None = None) -> None:
        """Sends a message. passed: a connection that the other side gets after it, and that is closed here."""
        self._messages.append((message, passed))
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
            message, passed = self._messages.popleft()
            with suppress(OSError), nullcontext() if passed is None else passed:
                self._connection.send_bytes(message)
                if passed is not None:
                    send_handle(self._connection, passed.fileno(), None)
