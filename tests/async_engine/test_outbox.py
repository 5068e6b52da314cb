"""Messages through a socket: whole and in order, whoever sends, and whatever happens in the middle."""

from __future__ import annotations

import threading
from multiprocessing import Pipe
from typing import Any

from nanovllm.async_engine.outbox import Outbox
from tests.processes import WATCHDOG


def test_threads_send_whole_messages() -> None:
    ours, theirs = Pipe()
    outbox, received = Outbox(ours), []  # type: ignore[var-annotated]

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
