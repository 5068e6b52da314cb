"""ClientSender: sends messages to a client of the engine's process, and never waits for the client."""

from __future__ import annotations

import os
import select
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection

MAX_UNSENT = 64 << 20  # bytes
PATIENCE = 30  # looks in a row at a client that does not keep up
_LOOK_SECONDS = 1.0
_MAX_WRITE = 1 << 18  # bytes at once, so that `send` is short even if the client reads meanwhile


class ClientSender:
    """Sends whole messages in order, from any thread. The client reads them with `Connection.recv_bytes`.

    The socket usually takes a message at once. A thread sends the rest, and looks once a second whether the client
    keeps up, that is, whether it has taken anything and at most MAX_UNSENT bytes are left. The client is dropped after
    PATIENCE looks in a row at which it does not keep up, or at the first one at which both conditions fail. Looks are
    counted, not seconds, because all processes may have been suspended together.

    A dropped client can still read the rest of the message that was being sent, and `last_message`. The thread that
    reads from `connection` gets an EOFError, as if the client had ended. when_dropped: called with the number of bytes
    that were left, and the seconds in which the client did not keep up.

    Messages to a client that has ended are discarded: the thread that reads from `connection` notices its end.
    """

    def __init__(
        self, connection: Connection, last_message: bytes, when_dropped: Callable[[int, float], object]
    ) -> None:
        self._connection, self._last_message, self._when_dropped = connection, last_message, when_dropped
        self._socket = socket.socket(fileno=os.dup(connection.fileno()))
        self._lock = threading.Lock()
        # Guarded by the lock:
        self._unsent: deque[memoryview] = deque()  # messages, the first one perhaps without its beginning
        self._num_unsent = 0  # bytes
        self._is_closed = False
        self._has_changed = threading.Condition(self._lock)
        self._thread = threading.Thread(target=self._run, name="nanovllm-sender", daemon=True)
        self._thread.start()

    def send(self, message: bytes) -> None:
        """Sends a message, or leaves it to the thread. Does not wait."""
        data = framed(message)
        with self._lock:
            if self._is_closed:
                return
            sent = 0 if self._unsent else self._write(data)
            if sent < len(data):
                self._append(memoryview(data)[sent:])

    def flush(self) -> None:
        """Waits a moment for the client to take what is left."""
        deadline = time.monotonic() + _LOOK_SECONDS
        with self._lock:
            while self._unsent and (left := deadline - time.monotonic()) > 0:
                self._has_changed.wait(left)

    def close(self) -> None:
        """Closes the connection. The thread ends once the client has taken what is left, or has ended."""
        with self._lock:
            self._connection.close()
            self._is_closed = True
            self._has_changed.notify_all()

    def _append(self, data: memoryview) -> None:
        self._unsent.append(data)
        self._num_unsent += len(data)
        self._has_changed.notify_all()

    def _write(self, data: bytes | memoryview) -> int:
        """Sends what the socket takes at once. Returns the number of bytes: all of them if the client has ended."""
        try:
            return self._socket.send(data[:_MAX_WRITE], socket.MSG_DONTWAIT)
        except BlockingIOError:
            return 0
        except OSError:
            return len(data)

    # The thread

    def _run(self) -> None:
        num_looks = 0  # in a row, at a client that does not keep up
        with self._socket:
            while self._has_unsent():
                has_taken = self._send_for(_LOOK_SECONDS)
                is_full = self._num_unsent > MAX_UNSENT
                num_looks = 0 if has_taken and not is_full else num_looks + 1
                if num_looks >= PATIENCE or (is_full and not has_taken):
                    self._drop(num_looks * _LOOK_SECONDS)

    def _has_unsent(self) -> bool:
        """Waits until a message is left to this thread. Returns False once there will be none."""
        with self._lock:
            while not self._unsent and not self._is_closed:
                self._has_changed.wait()
            return bool(self._unsent)

    def _send_for(self, seconds: float) -> bool:
        """Sends for `seconds`, or until nothing is left. Returns whether the client has taken anything."""
        deadline, has_taken = time.monotonic() + seconds, False
        poll = select.poll()
        poll.register(self._socket, select.POLLOUT)
        while self._unsent and (left := deadline - time.monotonic()) > 0:
            poll.poll(left * 1e3)
            with self._lock:
                data = self._unsent.popleft()
                sent = self._write(data)
                self._num_unsent -= sent
                if sent < len(data):
                    self._unsent.appendleft(data[sent:])
                elif not self._unsent:
                    self._has_changed.notify_all()
                has_taken = has_taken or sent > 0
        return has_taken

    def _drop(self, seconds: float) -> None:
        with self._lock:
            if self._is_closed:
                return
            self._is_closed = True
            num_unsent, head = self._num_unsent, self._unsent[0]
            self._unsent.clear()
            self._num_unsent = 0
            for data in head, memoryview(framed(self._last_message)):
                self._append(data)
        self._when_dropped(num_unsent, seconds)
        with suppress(OSError):  # it has ended just now
            self._socket.shutdown(socket.SHUT_RD)


def framed(message: bytes) -> bytes:
    """Returns a message as `Connection.send_bytes` writes it, after its length."""
    size = len(message)
    return (struct.pack("!i", size) if size <= 0x7FFFFFFF else struct.pack("!iQ", -1, size)) + message
