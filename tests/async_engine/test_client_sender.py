"""Messages to a client that reads late, slowly or not at all: whole, in order, and never waited for."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from multiprocessing import Pipe
from multiprocessing.connection import Connection

import pytest

from nanovllm.async_engine import client_sender
from nanovllm.async_engine.client_sender import ClientSender
from tests.processes import WATCHDOG, until

LAST = b"last"


class Sending:
    """A sender, the client's end of its connection, and what was told about its end."""

    def __init__(self) -> None:
        self.ours, self.client = Pipe()
        self.drops: list[tuple[int, float]] = []
        self.sender = ClientSender(self.ours, LAST, lambda *drop: self.drops.append(drop))

    def receive(self) -> bytes:
        assert self.client.poll(WATCHDOG)
        return self.client.recv_bytes()

    def receive_all(self) -> list[bytes]:
        """Everything until the connection is closed."""
        received = []
        try:
            while True:
                received.append(self.receive())
        except EOFError:
            return received


@pytest.fixture
def sending() -> Iterator[Sending]:
    sending = Sending()
    yield sending
    sending.client.close()
    sending.sender.close()
    assert until(lambda: not sending.sender._thread.is_alive())
    assert sending.sender._socket.fileno() == -1
    assert sending.ours.closed


def message(number: int, size: int) -> bytes:
    return number.to_bytes(4, "big") * (size // 4)


def fill(sending: Sending) -> list[bytes]:
    """Sends until the socket takes a part of a message only. Returns the messages."""
    sent: list[bytes] = []
    while not sending.sender._unsent:
        sent.append(message(len(sent), 100_000))
        sending.sender.send(sent[-1])
    return sent


def hasten(monkeypatch: pytest.MonkeyPatch, **constants: float) -> None:
    for name, value in {"_LOOK_SECONDS": 0.02, **constants}.items():
        monkeypatch.setattr(client_sender, name, value)


def test_a_client_that_reads_late_gets_all_messages_in_order(sending: Sending) -> None:
    sizes = [0, 4, 300_000, 8, 2_000_000, 0, 100_000, 12]
    sent = [message(number, size) for number, size in enumerate(10 * sizes)]
    for each in sent:
        sending.sender.send(each)
    assert [sending.receive() for _ in sent] == sent
    assert until(lambda: sending.sender._num_unsent == 0 and not sending.sender._unsent)
    sending.sender.send(b"at once")
    assert not sending.sender._unsent
    assert sending.receive() == b"at once"
    assert sending.drops == []


def test_threads_send_whole_messages(sending: Sending) -> None:
    def send(number: int) -> None:
        for index in range(50):
            sending.sender.send(bytes([number, index]) * 20_000)

    threads = [threading.Thread(target=send, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    received = [sending.receive() for _ in range(200)]
    assert all(each == each[:2] * 20_000 for each in received)
    for number in range(4):
        assert [each[1] for each in received if each[0] == number] == list(range(50))
    for thread in threads:
        thread.join()


def dropped(sending: Sending, sent: list[bytes]) -> None:
    """Checks what a client that was dropped finds: the first messages, whole, and the last message."""
    assert until(lambda: bool(sending.drops))
    with pytest.raises(EOFError):  # whoever waits for the client's messages
        sending.ours.recv_bytes()
    sending.sender.send(b"ignored")
    sending.sender.close()
    *received, last = sending.receive_all()
    assert last == LAST
    assert 0 < len(received) < len(sent)
    assert received == sent[: len(received)]
    assert len(sending.drops) == 1


def test_a_client_that_reads_nothing_is_dropped_in_the_end(sending: Sending, monkeypatch: pytest.MonkeyPatch) -> None:
    sent = fill(sending)
    for number in range(100):
        sent.append(message(len(sent), 4 * number))
        sending.sender.send(sent[-1])
    sending.sender.flush()
    hasten(monkeypatch, PATIENCE=5)
    dropped(sending, sent)
    ((num_unsent, seconds),) = sending.drops
    assert num_unsent > sum(map(len, sent[-100:]))
    assert seconds >= 5 * 0.02


def test_a_client_that_reads_nothing_is_dropped_when_much_is_left(
    sending: Sending, monkeypatch: pytest.MonkeyPatch
) -> None:
    hasten(monkeypatch, PATIENCE=10**9, MAX_UNSENT=1_000_000)
    sent = fill(sending)
    assert not sending.drops
    for _ in range(20):
        sent.append(message(len(sent), 100_000))
        sending.sender.send(sent[-1])
    dropped(sending, sent)
    ((num_unsent, _),) = sending.drops
    assert num_unsent > 1_000_000


def test_a_client_that_reads_too_slowly_is_dropped(sending: Sending, monkeypatch: pytest.MonkeyPatch) -> None:
    hasten(monkeypatch, PATIENCE=5, MAX_UNSENT=1_000_000)
    sent, received = fill(sending), []
    while not sending.drops:
        for _ in range(2):
            sent.append(message(len(sent), 100_000))
            sending.sender.send(sent[-1])
        received.append(sending.receive())
    sending.sender.close()
    *rest, last = sending.receive_all()
    assert last == LAST
    assert received + rest == sent[: len(received + rest)]


def test_a_message_of_any_size_reaches_a_client_that_reads(sending: Sending, monkeypatch: pytest.MonkeyPatch) -> None:
    hasten(monkeypatch, MAX_UNSENT=1_000, _LOOK_SECONDS=20)
    sent = [message(number, 30_000_000) for number in range(2)]
    for each in sent:
        sending.sender.send(each)
    assert [sending.receive() for _ in sent] == sent
    assert not sending.drops


@pytest.mark.parametrize("is_full", [False, True])
def test_a_client_that_has_ended(sending: Sending, is_full: bool) -> None:
    if is_full:
        fill(sending)
    sending.client.close()
    for _ in range(100):
        sending.sender.send(bytes(100_000))
    assert until(lambda: not sending.sender._unsent)
    assert sending.drops == []


def test_descriptors_are_closed() -> None:
    def descriptors() -> int:
        return len(os.listdir("/dev/fd"))

    before = descriptors()
    for _ in range(3):
        ours, client = Pipe()
        sender = ClientSender(ours, LAST, lambda *drop: None)
        sender.send(b"a")
        sender.close()
        assert isinstance(client, Connection)
        assert client.recv_bytes() == b"a"
        client.close()
    assert until(lambda: descriptors() == before)
