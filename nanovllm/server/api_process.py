"""An API process: one of several that answer HTTP requests with the same engine. `supervisor` starts them.

It has an event loop, a tokenizer and a connection to the engine's process of its own. Its log goes to the supervisor.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection

from nanovllm.async_engine.encoding import LogRecord, decode, encode
from nanovllm.async_engine.engine_client import EngineClient
from nanovllm.async_engine.log_records import RecordSender, report_dropped
from nanovllm.async_engine.outbox import RecordOutbox
from nanovllm.async_llm import AsyncLLM, connected
from nanovllm.errors import NanoVLLMError
from nanovllm.logs.configuration import PACKAGE
from nanovllm.logs.recent_events import RecentEvent
from nanovllm.server.counts import Counts, shared_table
from nanovllm.server.process_messages import (
    ApiReady,
    AskEvents,
    DrainApi,
    EndApi,
    FromApi,
    LatestEvents,
    StartApi,
    ToApi,
)
from nanovllm.server.serve import HttpServer
from nanovllm.server.service import Service
from nanovllm.server.settings import ServerSettings
from nanovllm.utils.logger import configure_logging


class Supervisor:
    """The process that started this one."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._outbox = RecordOutbox(connection, report_dropped)
        self._asking = threading.Lock()  # one question at a time
        self._answered = threading.Event()
        self._events: list[RecentEvent] = []

    def send(self, message: FromApi) -> None:
        self._outbox.send(encode(message))

    def send_record(self, record: LogRecord) -> None:
        self._outbox.send_record(encode(record))

    def flush(self) -> None:
        self._outbox.flush()

    def next_message(self) -> ToApi | None:
        """Waits for a message. Returns None when the supervisor has ended."""
        try:
            message: ToApi = decode(self._connection.recv_bytes())
            return message
        except (EOFError, OSError):
            return None

    def latest_events(self) -> list[RecentEvent]:
        """Asks for the last events of the whole server's log."""
        with self._asking:
            self._answered.clear()
            self.send(AskEvents())
            self._answered.wait()
            return self._events

    def take_events(self, message: LatestEvents) -> None:
        self._events = message.events
        self._answered.set()


class ApiServer(HttpServer):
    """The server of this process. It ends when the supervisor says so, or when the engine has dropped this process."""

    def __init__(
        self, service: Service, make_engine: Callable[[], AsyncLLM], supervisor: Supervisor, client: EngineClient
    ) -> None:
        super().__init__(service, make_engine)
        self._supervisor, self._client = supervisor, client

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield  # signals are for the supervisor

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        loop = asyncio.get_running_loop()
        threading.Thread(target=self._obey, args=(loop,), name="nanovllm-supervisor", daemon=True).start()

    def _obey(self, loop: asyncio.AbstractEventLoop) -> None:
        while (message := self._supervisor.next_message()) is not None:
            if isinstance(message, LatestEvents):
                self._supervisor.take_events(message)
            elif isinstance(message, DrainApi):
                loop.call_soon_threadsafe(lambda: self._begin(self._drain()))
            elif isinstance(message, EndApi):
                loop.call_soon_threadsafe(self._end, 0, "clean")
        os._exit(1)

    def _has_lost_engine(self) -> None:
        if self._client.is_dropped:
            self._end(1, "the engine has dropped this process")

    def _has_started(self) -> None:
        self._supervisor.send(ApiReady())

    def _has_not_started(self, error: NanoVLLMError) -> None:
        pass  # the supervisor says why

    def _has_begun_to_drain(self) -> None:
        pass  # the supervisor says so once


def main(descriptor: int) -> None:
    """Serves until the supervisor says stop or ends."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # for those who signal the whole group
    supervisor = Supervisor(Connection(descriptor))
    status = 0
    start = supervisor.next_message()
    if isinstance(start, StartApi):
        logging.getLogger(PACKAGE).addHandler(RecordSender(supervisor.send_record))
        configure_logging()
        for name, level in start.levels.items():
            logging.getLogger(name).setLevel(level)
        status = _serve(start, supervisor)
    supervisor.flush()
    os._exit(status)  # at once: does not wait for threads of libraries


def _serve(start: StartApi, supervisor: Supervisor) -> int:
    settings = ServerSettings(**start.settings)
    table = shared_table(start.counts, settings.api_server_count)
    service = Service(settings, counts=Counts(table, start.process))
    service.latest_events = supervisor.latest_events

    client = EngineClient(start.config, Connection(start.engine))

    def make_engine() -> AsyncLLM:
        return connected(start.config, client)

    engine: AsyncLLM | None = None
    if start.is_successor:  # connections wait for it, rather than get status 503
        engine = make_engine()
        service.start(engine)
    server = ApiServer(service, lambda: engine or make_engine(), supervisor, client)
    server.run(sockets=[socket.socket(fileno=start.listener)])
    if server.engine is not None:
        server.engine.exit()
    return server.status
