"""Messages between processes of one machine, through a ring in shared memory with one writer and several readers.

    segment   magic, version, capacity, number of readers · head · a tail for each reader · the ring
    head      bytes written so far; it only grows, and its remainder by the capacity is the position in the ring
    tail      bytes that a reader has copied out, its acknowledgement; the writer never overtakes the slowest reader
    record    sequence, kind, length of the message, offset and size of this piece · the piece

All numbers are 64-bit words in the machine's byte order. Records begin at multiples of 64 bytes, and each number that
one process writes and others read has a cache line of its own. A message longer than a quarter of the ring is sent in
pieces, so that writer and readers copy at the same time and any size works. A message is a kind and bytes, without
pickle.

A waiting process spins for two milliseconds, yielding its core, then sleeps for a sixteenth of the time waited so far,
at most 2 ms: messages of a busy engine take microseconds, and an idle engine uses no core.

A segment's name, nanovllm-<pid>-<start time>-<random>, identifies the process that made it. Creating a segment removes
those of processes that no longer exist. Once all readers are attached the name is no longer needed and `unlink` removes
it: the memory is then freed when the last process closes it or ends.
"""

from __future__ import annotations

import os
import secrets
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from typing import Any

from nanovllm.errors import ChannelError

VERSION = 1
PREFIX = "nanovllm"
_MAGIC = int.from_bytes(PREFIX.encode(), "little")
_LINE = 64  # bytes: a cache line, and the size of a record's header
_HEAD = _LINE // 8  # index of a word; the tails follow, a line each
_SPIN_SECONDS = 2e-3
_MIN_SLEEP, _MAX_SLEEP = 5e-5, 2e-3
_SHARED_MEMORY_FOLDER = Path("/dev/shm")
_yield: Callable[[], None] = getattr(os, "sched_yield", lambda: time.sleep(0))


@dataclass(frozen=True)
class Message:
    kind: int
    sequence: int  # 0, 1, … in the order of sending
    payload: bytearray  # a copy, because the ring is overwritten


class _Segment:
    """The shared memory, as words and as bytes. `while_waiting` is called between sleeps and may raise."""

    def __init__(self, memory: SharedMemory, num_readers: int, capacity: int) -> None:
        self._memory = memory
        self.name = memory.name
        self.num_readers = num_readers
        self.capacity = capacity
        start = _data_start(num_readers)
        buffer = _buffer_of(memory)
        self._words = buffer[:start].cast("Q")
        self._data = buffer[start : start + capacity]
        self._headers = self._data.cast("Q")
        self.waited = 0.0  # seconds that the last `send` or `receive` waited for the other side
        self._fence_lock = threading.Lock()
        self._fence_lock.acquire()

    def unlink(self) -> None:
        """Removes the name; attached processes stay attached. Calling it again does nothing."""
        with suppress(FileNotFoundError):
            self._memory.unlink()

    def close(self) -> None:
        """Closes the memory. Calling it again does nothing; any other call raises afterwards."""
        for view in (self._words, self._headers, self._data):
            view.release()
        self._memory.close()

    def _fence(self) -> None:
        """Makes earlier writes visible to others before later ones. x86 guarantees this anyway, ARM does not."""
        self._fence_lock.release()
        self._fence_lock.acquire()

    def _wait(self, ready: Callable[[], bool], timeout: float | None, while_waiting: Callable[[], None] | None) -> bool:
        """Waits until `ready()`. Returns False after `timeout` seconds (None: no limit)."""
        if ready():
            return True
        started = time.monotonic()
        while True:
            waited = time.monotonic() - started
            if ready():
                self.waited += waited
                return True
            if timeout is not None and waited >= timeout:
                return False
            if waited < _SPIN_SECONDS:
                _yield()
                continue
            if while_waiting is not None:
                while_waiting()
            pause = min(max(waited / 16, _MIN_SLEEP), _MAX_SLEEP)
            time.sleep(pause if timeout is None else min(pause, timeout - waited))


class ChannelWriter(_Segment):
    """The writer of a channel. `create` makes a channel; `attach` opens one that another process made."""

    def __init__(self, memory: SharedMemory, num_readers: int, capacity: int) -> None:
        super().__init__(memory, num_readers, capacity)
        self._sequence = 0
        self._head = 0
        self._is_broken = False

    @classmethod
    def create(cls, num_readers: int, capacity: int = 1 << 20) -> ChannelWriter:
        """Creates a channel, after removing those of processes that no longer exist.

        capacity: bytes of the ring, a multiple of 64. Raises ChannelError when the system has no shared memory for it.
        """
        assert capacity >= 512, "a quarter of the ring holds a header and a piece"
        assert capacity % _LINE == 0, "the ring holds whole cache lines"
        remove_stale_segments()
        memory = _create_memory(_data_start(num_readers) + capacity)
        channel = cls(memory, num_readers, capacity)
        for index, number in enumerate((VERSION, capacity, num_readers), start=1):
            channel._words[index] = number
        channel._fence()
        channel._words[0] = _MAGIC
        return channel

    @classmethod
    def attach(cls, name: str) -> ChannelWriter:
        """Opens a channel that has no message yet. Raises ChannelError if `name` is no channel of this version."""
        return cls(*_open(name))

    def send(
        self,
        kind: int,
        payload: Any = b"",
        timeout: float | None = None,
        while_waiting: Callable[[], None] | None = None,
    ) -> None:
        """Returns when the whole message is in the ring. payload: a C-contiguous buffer.

        Raises ChannelError when a reader has not made room within `timeout` seconds. If a part of the message was
        written by then, the channel cannot be used any more.
        """
        if self._is_broken:
            raise ChannelError(f"{self.name}: an earlier message was cut short, nothing can follow it.")
        self.waited = 0.0
        view = memoryview(payload)
        data = view.cast("B") if view.nbytes else memoryview(b"")
        piece_limit = self.capacity // 4 - _LINE
        deadline = None if timeout is None else time.monotonic() + timeout
        offset = 0
        try:
            while True:
                piece = data[offset : offset + piece_limit]
                self._write(kind, len(data), offset, piece, deadline, while_waiting)
                offset += len(piece)
                if offset == len(data):
                    break
        except BaseException:
            self._is_broken = offset > 0
            raise
        self._sequence += 1

    def _write(
        self,
        kind: int,
        length: int,
        offset: int,
        piece: memoryview,
        deadline: float | None,
        while_waiting: Callable[[], None] | None,
    ) -> None:
        end = self._head + _LINE + _padded(len(piece))
        if not self._is_free(end):
            timeout = None if deadline is None else max(deadline - time.monotonic(), 0)
            if not self._wait(lambda: self._is_free(end), timeout, while_waiting):
                behind = [reader for reader in range(self.num_readers) if end - self._tail(reader) > self.capacity]
                raise ChannelError(f"{self.name}: readers {behind} have not made room for {len(piece)} bytes in time.")
        place = self._head % self.capacity
        header = place // 8
        for index, number in enumerate((self._sequence, kind, length, offset, len(piece))):
            self._headers[header + index] = number
        start = (place + _LINE) % self.capacity
        first = min(len(piece), self.capacity - start)
        self._data[start : start + first] = piece[:first]
        self._data[: len(piece) - first] = piece[first:]
        self._fence()
        self._head = self._words[_HEAD] = end

    def _tail(self, reader: int) -> int:
        return self._words[_HEAD * (2 + reader)]

    def _is_free(self, end: int) -> bool:
        return all(end - self._tail(reader) <= self.capacity for reader in range(self.num_readers))


class ChannelReader(_Segment):
    """One reader of a channel, by its number. Raises ChannelError if `name` is no channel of this version."""

    def __init__(self, name: str, reader: int) -> None:
        memory, num_readers, capacity = _open(name)
        super().__init__(memory, num_readers, capacity)
        if not 0 <= reader < num_readers:
            self.close()
            raise ChannelError(f"{name} has {num_readers} readers, there is no reader {reader}.")
        self._tail_word = _HEAD * (2 + reader)
        self._tail = self._words[self._tail_word]
        self._sequence = 0
        self._payload = bytearray()  # of the message being received
        self._received = 0  # bytes of the payload

    def receive(self, timeout: float | None = None, while_waiting: Callable[[], None] | None = None) -> Message | None:
        """Returns the next message, or None after `timeout` seconds without one (0: does not wait).

        A partly received message is kept for the next call, so a writer that stops in the middle blocks no reader.
        Raises ChannelError for bytes that are not the expected record.
        """
        self.waited = 0.0
        while True:
            if self._words[_HEAD] == self._tail and (
                timeout == 0 or not self._wait(lambda: self._words[_HEAD] != self._tail, timeout, while_waiting)
            ):
                return None
            self._fence()
            place = self._tail % self.capacity
            header = place // 8
            sequence, kind, length, offset, size = self._headers[header : header + 5].tolist()
            if sequence != self._sequence or offset != self._received or size > min(length - offset, self.capacity):
                raise ChannelError(
                    f"{self.name}: expected message {self._sequence} from byte {self._received} on, found "
                    f"{sequence} from {offset} on with {size} of {length} bytes."
                )
            if not offset:
                self._payload = bytearray(length)
            start = (place + _LINE) % self.capacity
            first = min(size, self.capacity - start)
            self._payload[offset : offset + first] = self._data[start : start + first]
            self._payload[offset + first : offset + size] = self._data[: size - first]
            self._received += size
            self._fence()
            self._tail += _LINE + _padded(size)
            self._words[self._tail_word] = self._tail
            if self._received == length:
                self._sequence += 1
                self._received = 0
                return Message(kind, sequence, self._payload)


def _create_memory(size: int) -> SharedMemory:
    """Returns new shared memory that takes its `size` bytes at once: later, a lack of them would end the process."""
    folder, memory = _SHARED_MEMORY_FOLDER, None
    try:
        memory = SharedMemory(_new_name(), create=True, size=size)
        if (path := folder / memory.name).exists() and hasattr(os, "posix_fallocate"):
            with path.open("r+b") as file:
                os.posix_fallocate(file.fileno(), 0, size)
    except OSError as error:
        if memory is not None:
            memory.close()
            memory.unlink()
        raise ChannelError(
            f"The ranks cannot exchange messages: {size} bytes of shared memory are not available in {folder} "
            f"({error.strerror}). Make it writable and larger, as with `docker run --shm-size=1g`, or with "
            f"`mount -o remount,rw,size=1g {folder}`."
        ) from error
    return memory


def _open(name: str) -> tuple[SharedMemory, int, int]:
    """Returns the memory, the number of readers and the capacity."""
    try:
        memory = SharedMemory(name)
    except (FileNotFoundError, ValueError) as error:
        raise ChannelError(f"There is no channel {name}: its process ended, or never made it.") from error
    size = memory.size
    words = _buffer_of(memory)[: size // 8 * 8].cast("Q")
    magic, version, capacity, num_readers = words[:4].tolist() if size >= _LINE else (0, 0, 0, 0)
    words.release()
    if (magic, version) != (_MAGIC, VERSION) or size < _data_start(num_readers) + capacity:
        memory.close()
        raise ChannelError(f"{name}, of {size} bytes, is no channel of version {VERSION} (it has version {version}).")
    return memory, num_readers, capacity


def remove_stale_segments(folder: Path = _SHARED_MEMORY_FOLDER) -> list[str]:
    """Removes the segments of processes that no longer exist, and returns their names."""
    removed = []
    for path in folder.glob(f"{PREFIX}-*-*-*") if folder.is_dir() else ():
        parts = path.name.split("-")
        if len(parts) == 4 and parts[1].isdigit() and _start_time(int(parts[1])) != parts[2]:
            with suppress(OSError):  # of another user, or already removed by another process
                path.unlink()
                removed.append(path.name)
    return removed


def _new_name() -> str:
    return f"{PREFIX}-{os.getpid()}-{_start_time(os.getpid()) or 0}-{secrets.token_hex(4)}"


def _start_time(pid: int) -> str | None:
    """Returns when a process started, in ticks since boot; None without such a process or without /proc."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()[19]
    except OSError:
        return None


def _buffer_of(memory: SharedMemory) -> memoryview:
    assert memory.buf is not None, "closed"
    return memory.buf


def _data_start(num_readers: int) -> int:
    return _LINE * (2 + num_readers)


def _padded(size: int) -> int:
    return -(-size // _LINE) * _LINE
