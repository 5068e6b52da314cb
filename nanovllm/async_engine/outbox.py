"""Outbox and RecordOutbox: send messages through a socket from any thread, and from any line of it."""

from __future__ import annotations

import os
import select
import socket
import threading
from collections import deque
from collections.abc import Callable
from contextlib import nullcontext, suppress
from multiprocessing.connection import Connection
from multiprocessing.reduction import send_handle

from nanovllm.async_engine.client_sender import framed

MAX_LEFT = 10_000  # messages that wait for the other side; after that, records are dropped
PATIENCE = 0.5  # seconds without room in the socket, after which a thread waits for it


class Outbox:
    """Sends whole messages in order. Does nothing once the other side has ended: the receiver reports that.

    A thread that finds another one sending leaves its message to that one. So may a garbage collection in the middle of
    sending, which ends a request and tells the engine.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._messages: deque[tuple[bytes, Connection | None]] = deque()
        self._lock = threading.Lock()  # of sending
        self._closing = threading.RLock()  # a garbage collection within `close` may call `shut_down`

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
        with self._lock, self._closing:
            self._connection.close()

    def shut_down(self) -> None:
        """Ends the connection for both sides, also while a thread waits in it. It must be closed afterwards."""
        # The number of a descriptor that another thread has closed may at once be another socket's.
        with self._closing, suppress(OSError), socket.socket(fileno=os.dup(self._connection.fileno())) as ours:
            ours.shutdown(socket.SHUT_RDWR)

    def _send_all(self) -> None:
        while self._messages:
            message, passed = self._messages.popleft()
            with suppress(OSError), nullcontext() if passed is None else passed:
                self._connection.send_bytes(message)
                if passed is not None:
                    send_handle(self._connection, passed.fileno(), None)


class RecordOutbox:
    """Sends messages to the process that writes the log, which may be suspended: records of the log hold up nobody.

    A message waits until the socket has room, so that a reader who is only slow gets every record. After PATIENCE
    seconds a thread waits instead, until everything is sent. Meanwhile messages are kept, but records beyond MAX_LEFT
    messages are dropped. The others are as many as the requests of the other side bring.

    when_late_ends: called after that with the number of records that were dropped, if any were.
    """

    def __init__(self, connection: Connection, when_late_ends: Callable[[int], object]) -> None:
        self._connection, self._when_late_ends = connection, when_late_ends
        self._socket = socket.socket(fileno=os.dup(connection.fileno()))
        self._messages: deque[memoryview] = deque()  # the first one perhaps without its beginning
        self._lock = threading.Lock()  # of sending
        self._is_late = False  # whether the thread sends
        self._num_dropped = 0  # while it does
        self._counting = threading.RLock()

    def send(self, message: bytes) -> None:
        """Sends a message, or leaves it to a thread that sends."""
        self._messages.append(memoryview(framed(message)))
        self._send_now()

    def send_record(self, record: bytes) -> None:
        """Sends a record of the log as `send` does, or drops it."""
        if self._is_late and len(self._messages) >= MAX_LEFT:
            with self._counting:
                self._num_dropped += 1
        else:
            self.send(record)

    def flush(self) -> None:
        """Waits until every message is sent."""
        with self._lock:
            self._send_all(None)

    def close(self) -> None:
        """Closes the connection. Later messages are dropped."""
        with self._lock:
            self._connection.close()
            self._socket.close()

    def _send_now(self) -> None:
        while self._messages and not self._is_late and self._lock.acquire(blocking=False):
            try:
                if not self._send_all(PATIENCE):
                    threading.Thread(target=self._send_late, name="nanovllm-late-records", daemon=True).start()
                    self._is_late = True  # only now: if no thread could start, the next message tries again
            finally:
                self._lock.release()

    def _send_late(self) -> None:
        self.flush()
        self._is_late = False
        self._send_now()  # what was left to this thread since
        with self._counting:
            num_dropped, self._num_dropped = self._num_dropped, 0
        if num_dropped:
            self._when_late_ends(num_dropped)

    def _send_all(self, patience: float | None) -> bool:
        """Sends all messages. Returns False when the socket has had no room for `patience` seconds; None: waits."""
        while self._messages:
            data = self._messages[0]
            try:
                sent = self._socket.send(data, socket.MSG_DONTWAIT)
            except BlockingIOError:
                if not self._waits_for_room(patience):
                    return False
                continue
            except OSError:  # the other side has ended
                self._messages.clear()
                return True
            self._messages.popleft()
            if sent < len(data):
                self._messages.appendleft(data[sent:])
        return True

    def _waits_for_room(self, seconds: float | None) -> bool:
        poll = select.poll()
        poll.register(self._socket, select.POLLOUT)
        return bool(poll.poll(None if seconds is None else seconds * 1e3))
