"""Messages through a socket: whole and in order, whoever sends, and whatever happens in the middle."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from multiprocessing import Pipe
from typing import Any

import pytest

from nanovllm.async_engine import outbox as outbox_module
from nanovllm.async_engine.outbox import Outbox, RecordOutbox
from tests.processes import WATCHDOG, until


def make_record_outbox(connection: Any) -> RecordOutbox:
    return RecordOutbox(connection, lambda num_dropped: None)


@pytest.mark.parametrize("make", [Outbox, make_record_outbox])
def test_threads_send_whole_messages(make: Callable[[Any], Outbox | RecordOutbox]) -> None:
    ours, theirs = Pipe()
    outbox, received = make(ours), []  # type: ignore[var-annotated]

    def send(number: int) -> None:
        for index in range(50):
            outbox.send(bytes([number, index]) * 20_000)  # more than one write each

    threads = [threading.Thread(target=send, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    while len(received) < 200:
        assert theirs.poll(WATCHDOG)
        received.append(theirs.recv_bytes())
    assert all(message == message[:2] * 20_000 for message in received)
    for number in range(4):
        assert [message[1] for message in received if message[0] == number] == list(range(50))
    for thread in threads:
        thread.join()
    outbox.close()
    outbox.send(b"dropped")
    theirs.close()


def test_a_message_that_is_sent_in_the_middle_of_another() -> None:
    """As a finalizer does that a garbage collection runs."""

    class Interrupted:
        def __init__(self) -> None:
            self.sent: list[bytes] = []

        def send_bytes(self, message: bytes) -> None:
            if message == b"first":
                outbox.send(b"second")
            self.sent.append(message)

    connection: Any = Interrupted()
    outbox = Outbox(connection)
    outbox.send(b"first")
    outbox.flush()
    assert connection.sent == [b"first", b"second"]


def test_a_thread_that_waits_for_the_other_side_does_not_hold_up_the_end() -> None:
    ours, theirs = Pipe()
    outbox = Outbox(ours)
    sends = threading.Thread(target=outbox.send, args=(bytes(10_000_000),), daemon=True)
    sends.start()
    assert until(lambda: theirs.poll(0))
    closes = threading.Thread(target=outbox.close, daemon=True)  # waits for the message
    closes.start()
    outbox.shut_down()
    sends.join(WATCHDOG)
    closes.join(WATCHDOG)
    assert not sends.is_alive()
    assert ours.closed
    outbox.shut_down()  # does nothing
    theirs.close()


def test_a_garbage_collection_while_it_closes_may_end_it() -> None:
    class Collected:
        def close(self) -> None:
            outbox.shut_down()

        def fileno(self) -> int:
            raise OSError("handle is closed")

    connection: Any = Collected()
    outbox = Outbox(connection)
    closes = threading.Thread(target=outbox.close, daemon=True)
    closes.start()
    assert until(lambda: not closes.is_alive())


# ---- records of the log, and a process that writes it and is suspended


class Sending:
    """An outbox, the other end of its connection, and the numbers of dropped records that were told."""

    def __init__(self) -> None:
        self.ours, self.theirs = Pipe()
        self.dropped: list[int] = []
        self.outbox = RecordOutbox(self.ours, self.dropped.append)

    def read(self) -> bytes:
        assert self.theirs.poll(WATCHDOG)
        return self.theirs.recv_bytes()

    def is_late(self) -> bool:
        """Whether a thread sends."""
        return any(thread.name == "nanovllm-late-records" for thread in threading.enumerate())


@pytest.fixture
def sending() -> Iterator[Sending]:
    sending = Sending()
    yield sending
    sending.theirs.close()
    sending.outbox.close()
    assert until(lambda: not sending.is_late())
    assert sending.outbox._socket.fileno() == -1
    assert sending.ours.closed


def limit(monkeypatch: pytest.MonkeyPatch, patience: float, max_left: int) -> None:
    monkeypatch.setattr(outbox_module, "PATIENCE", patience)
    monkeypatch.setattr(outbox_module, "MAX_LEFT", max_left)


def test_a_reader_that_is_slow_gets_every_record(sending: Sending, monkeypatch: pytest.MonkeyPatch) -> None:
    limit(monkeypatch, patience=WATCHDOG, max_left=0)
    records = [bytes([number % 256]) * 10_000 for number in range(300)]  # more than the socket holds

    def send() -> None:
        for record in records:
            sending.outbox.send_record(record)

    thread = threading.Thread(target=send)
    thread.start()
    assert [sending.read() for _ in records] == records
    thread.join()
    assert sending.dropped == []


def test_a_reader_that_is_suspended_holds_up_nobody(sending: Sending, monkeypatch: pytest.MonkeyPatch) -> None:
    """The latest records are dropped. Other messages are kept, and all that was kept comes whole and in order."""
    limit(monkeypatch, patience=0.01, max_left=20)
    messages = [number.to_bytes(4, "big") * 2_500 for number in range(1000)]
    for message in messages:
        sending.outbox.send_record(message)
    others = [b"a", b"b"]
    for message in others:
        sending.outbox.send(message)
    received = []
    while not received or received[-1] != others[-1]:
        received.append(sending.read())
    num_kept = len(received) - len(others)
    assert received == messages[:num_kept] + others
    assert 20 < num_kept < len(messages)
    assert until(lambda: sending.dropped == [len(messages) - num_kept])
    assert until(lambda: not sending.is_late())
    sending.outbox.send_record(b"kept")
    assert sending.read() == b"kept"
    assert len(sending.dropped) == 1


def test_a_reader_that_ends_while_it_is_waited_for(sending: Sending, monkeypatch: pytest.MonkeyPatch) -> None:
    limit(monkeypatch, patience=0.01, max_left=20)
    while not sending.is_late():
        sending.outbox.send_record(bytes(10_000))
    sending.theirs.close()
    assert until(lambda: not sending.is_late())
    sending.outbox.send_record(b"to nobody")
    sending.outbox.flush()
    assert not sending.outbox._messages
    assert sending.dropped == []
