"""The process of an engine: serves the consumers in the process that started it (`engine_process`), and in others.

Its log goes to that process, which writes it: to the console and the log file of both, and to the program's handlers.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
from contextlib import suppress
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle

from nanovllm.async_engine.client_sender import ClientSender
from nanovllm.async_engine.encoding import (
    AddClient,
    AskMetrics,
    ClientDropped,
    EngineMetrics,
    EngineReady,
    EngineResolved,
    FromProcess,
    LogRecord,
    StartEngine,
    StopEngine,
    ToProcess,
    decode,
    encode,
)
from nanovllm.async_engine.engine_loop import EngineLoop
from nanovllm.async_engine.log_records import RecordSender, report_dropped
from nanovllm.async_engine.messages import DropClient, EngineEnded, Event
from nanovllm.async_engine.outbox import RecordOutbox
from nanovllm.async_engine.routing import first_number, parts
from nanovllm.config import ResolvedConfig
from nanovllm.engine.observer import EngineObserver
from nanovllm.errors import EngineDeadError
from nanovllm.logs import events
from nanovllm.logs.configuration import PACKAGE
from nanovllm.utils.garbage_collection import existing_objects_exempt
from nanovllm.utils.logger import configure_logging, setup_logger

logger = setup_logger(__name__)

_LOOK_SECONDS = 0.5  # between looks at the parent
_EXIT_SECONDS = 10.0  # for the running step, once the parent has ended


class _Client:
    """A process whose requests the engine serves. sender: sends through the connection, and closes it."""

    def __init__(self, connection: Connection, sender: RecordOutbox | ClientSender) -> None:
        self.connection, self._sender = connection, sender

    def send(self, message: FromProcess) -> None:
        self._sender.send(encode(message))

    def flush(self) -> None:
        self._sender.flush()

    def close(self) -> None:
        self._sender.close()

    def next_message(self) -> ToProcess | None:
        """Waits for a message. Returns None when the client has ended."""
        try:
            message: ToProcess = decode(self.connection.recv_bytes())
            return message
        except (EOFError, OSError):
            return None


class _Parent(_Client, EngineObserver):
    """The process that started this one: takes messages and log records, and is told when the model is loaded."""

    def __init__(self, connection: Connection) -> None:
        outbox = RecordOutbox(connection, report_dropped)
        super().__init__(connection, outbox)
        self._outbox = outbox
        self._pid = os.getppid()

    def send_record(self, record: LogRecord) -> None:
        self._outbox.send_record(encode(record))

    def engine_resolved(self, resolved: ResolvedConfig) -> None:
        self.send(EngineResolved(resolved))

    def next_message(self) -> ToProcess | None:
        try:
            # A forked child of the parent keeps its end of the socket open.
            while not self.connection.poll(_LOOK_SECONDS):
                if os.getppid() != self._pid:
                    return None
        except OSError:
            return None
        return super().next_message()


class _Clients:
    """The processes that the engine serves, by number. The parent is the first one."""

    def __init__(self, parent: _Parent) -> None:
        self.parent = parent
        self._clients: dict[int, _Client] = {0: parent}
        self._num_added = 1
        self._lock = threading.Lock()

    def add(self, connection: Connection, pid: int) -> tuple[int, _Client]:
        def report(num_unsent: int, seconds: float) -> None:
            events.api_process_dropped.log(logger, client_pid=pid, unsent_bytes=num_unsent, seconds=seconds)

        sender = ClientSender(connection, encode(ClientDropped()), report)
        with self._lock:
            number, client = self._num_added, _Client(connection, sender)
            self._num_added += 1
            self._clients[number] = client
        return number, client

    def remove(self, number: int) -> None:
        with self._lock:
            self._clients.pop(number).close()

    def deliver(self, event: Event) -> None:
        """Sends each client its part of an event."""
        with self._lock:
            clients = dict(self._clients)
        for number, part in parts(event, list(clients)):
            if number in clients:  # else it has left
                clients[number].send(part)

    def flush(self) -> None:
        with self._lock:
            clients = list(self._clients.values())
        for client in clients:
            client.flush()


def main(descriptor: int) -> None:
    """Serves the process at the other end of a socket, until it says stop or ends."""
    parent = _Parent(Connection(descriptor))
    clients = _Clients(parent)
    status = 1
    start = parent.next_message()
    if isinstance(start, StartEngine):
        logging.getLogger(PACKAGE).addHandler(RecordSender(parent.send_record))
        configure_logging()
        for name, level in start.levels.items():
            logging.getLogger(name).setLevel(level)
        status = _serve(clients, start)
    clients.flush()
    logging.shutdown()
    sys.stdout.flush()
    os._exit(status)  # at once: does not wait for threads of libraries


def _serve(clients: _Clients, start: StartEngine) -> int:
    try:
        loop = EngineLoop(start.config, clients.deliver, clients.parent)
    except BaseException as error:
        clients.deliver(EngineEnded(error))
        return 1
    engine = loop.engine
    reading = _Reading(clients, loop)
    reading.begin(0, clients.parent)
    dead: BaseException = EngineDeadError("exit() was called")
    try:
        with engine, existing_objects_exempt():
            loop.run()
    except BaseException as error:
        dead = error
    reading.send_metrics(clients.parent)
    clients.deliver(EngineEnded(dead))
    return 0


class _Reading:
    """Reads the messages of clients, each in a thread, for the loop of the engine."""

    def __init__(self, clients: _Clients, loop: EngineLoop) -> None:
        self._clients, self._loop = clients, loop

    def begin(self, number: int, client: _Client) -> None:
        """Tells a client that the engine takes requests, and reads them."""
        client.send(EngineReady(self._loop.engine.get_default_sampling_params(), first_number(number)))
        threading.Thread(target=self._read, args=(number, client), name="nanovllm-commands", daemon=True).start()

    def send_metrics(self, client: _Client) -> None:
        engine = self._loop.engine
        client.send(EngineMetrics(engine.metrics.snapshot(engine.scheduler.load).to_numbers()))

    def _read(self, number: int, client: _Client) -> None:
        """Hands commands to the loop until the client has ended. The end of the parent ends this process."""
        while (message := client.next_message()) is not None:
            if isinstance(message, StopEngine):
                self._loop.send(None)
            elif isinstance(message, AskMetrics):
                self.send_metrics(client)
            elif isinstance(message, AddClient):
                with suppress(EOFError, OSError, RuntimeError):  # the parent has ended before it was passed
                    self._add(Connection(recv_handle(client.connection)), message.pid)
            elif not isinstance(message, StartEngine):
                self._loop.send(message)
        if client is self._clients.parent:
            self._loop.send(None)
            threading.Event().wait(_EXIT_SECONDS)  # meanwhile the main thread ends the process
            os._exit(1)
        self._clients.remove(number)
        self._loop.send(DropClient(number))

    def _add(self, connection: Connection, pid: int) -> None:
        number, client = self._clients.add(connection, pid)
        client.send(EngineResolved(self._loop.engine.resolved))
        self.begin(number, client)
