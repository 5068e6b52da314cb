"""supervise: runs the server as several API processes with one engine, until a signal ends it.

    this process ─── settings, signals ──▶  API process 0, 1, …  ◀── HTTP ── clients
         ╎       ◀── logs ─────────────────      │       ▲
         ╎                               commands│       │events
         ╎                                       ▼       │
         └ ─ ─ ─ ─ settings, signals ─ ─ ─▶  engine's process

An API process that ends by itself is started again, and its requests are dropped by the engine. Nothing else is lost
with it: its listening socket stays open here, and its successor takes the connections that wait.
"""

from __future__ import annotations

import os
import queue
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from functools import partial
from multiprocessing import Pipe
from multiprocessing.connection import Connection

from nanovllm.async_engine.encoding import LogRecord, decode, encode
from nanovllm.async_engine.engine_process import EngineProcess, ending, levels
from nanovllm.async_engine.log_records import write_record
from nanovllm.async_engine.messages import EngineEnded, Event
from nanovllm.async_engine.outbox import Outbox
from nanovllm.config import EngineConfig
from nanovllm.errors import NanoVLLMError
from nanovllm.logs import events
from nanovllm.logs.configuration import attached
from nanovllm.logs.recent_events import RecentEvents
from nanovllm.server.counts import Counts, shared_table
from nanovllm.server.process_messages import ApiReady, AskEvents, DrainApi, EndApi, LatestEvents, StartApi, ToApi
from nanovllm.server.serve import address_of
from nanovllm.server.settings import ServerSettings
from nanovllm.utils.child_process import blocked_interrupts, start_interpreter
from nanovllm.utils.logger import setup_logger

logger = setup_logger(__name__)

_MAIN = """
from nanovllm.logs.configuration import forward_records
forward_records()
from nanovllm.server.api_process import main
main(descriptor)
"""


def supervise(settings: ServerSettings, engine_args: EngineConfig) -> int:
    """Serves until a signal, and returns the exit status, as `serve` does."""
    config = EngineConfig(**asdict(engine_args))  # without a subclass
    with tempfile.TemporaryFile() as counts:
        table = shared_table(counts.fileno(), settings.api_server_count)
        try:
            listeners = listen(settings)
        except OSError as error:
            print(f"nanovllm serve: cannot listen: {error.strerror or error}", file=sys.stderr)
            status, outcome = 1, "error"
        else:
            server = _Supervisor(settings, config, listeners, counts.fileno(), Counts(table))
            status, outcome = server.run()
    events.server_stopped.log(logger, outcome=outcome, status=status)
    return status


class ApiProcess:
    """An API process, seen from here."""

    def __init__(self, index: int, process: subprocess.Popen[bytes], connection: Connection) -> None:
        self.index, self.process, self.connection = index, process, connection
        self.is_ready = False
        self._outbox = Outbox(connection)

    def send(self, message: ToApi) -> None:
        self._outbox.send(encode(message))

    def close(self) -> None:
        self._outbox.close()


class _Supervisor:
    """All but the threads that read messages runs in the main thread, which takes one piece of work after another."""

    def __init__(
        self,
        settings: ServerSettings,
        config: EngineConfig,
        listeners: list[socket.socket],
        counts_file: int,
        counts: Counts,
    ) -> None:
        self._settings, self._config, self._listeners = settings, config.for_serving(), listeners
        self._counts_file, self._counts = counts_file, counts
        self._address = address_of(settings, listeners[0])
        self._engine = EngineProcess(self._config, serves=False)
        self._has_engine = self._is_dead = self._has_started = self._is_ending = False
        self._num_signals = 0
        self._status, self._outcome = 0, "clean"
        self._processes: dict[int, ApiProcess] = {}  # by index
        self._recent_events = RecentEvents()
        self._work: queue.SimpleQueue[Callable[[], object]] = queue.SimpleQueue()

    def run(self) -> tuple[int, str]:
        """Serves. Returns the exit status and its reason."""
        try:
            with attached(self._recent_events), self._signals():
                self._begin()
                while self._processes:
                    self._work.get()()
        finally:
            for each in self._processes.values():
                each.process.kill()
                each.process.wait()
            for listener in self._listeners:
                listener.close()
            if self._settings.uds is not None:
                with suppress(OSError):
                    os.unlink(self._settings.uds)
            if self._has_engine:
                self._engine.stop()
        return self._status, self._outcome

    @contextmanager
    def _signals(self) -> Iterator[None]:
        def handle(number: int, frame: object) -> None:
            self._work.put(partial(self._take_signal, signal.Signals(number)))

        before = {each: signal.signal(each, handle) for each in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    # What it starts

    def _begin(self) -> None:
        try:
            self._engine.launch()
        except NanoVLLMError as error:
            self._take_failure(error)
            return
        # A daemon thread: a signal ends the server while the engine starts.
        threading.Thread(target=self._start_engine, name="nanovllm-start", daemon=True).start()
        for index in range(self._settings.api_server_count):
            self._start(index)

    def _start_engine(self) -> None:
        try:
            self._engine.start(self._receive)
        except BaseException as error:
            self._work.put(partial(self._take_failure, error))
        else:
            self._has_engine = True

    def _start(self, index: int, is_successor: bool = False) -> None:
        """Starts an API process."""
        ours, theirs = Pipe()
        engine, of_engine = Pipe()
        listener = self._listeners[index % len(self._listeners)]
        with engine, blocked_interrupts():
            inherited = engine.fileno(), listener.fileno(), self._counts_file
            process = ApiProcess(index, start_interpreter(_MAIN, theirs, inherited=inherited), ours)
            start = StartApi(
                settings=asdict(replace(self._settings, exit_on_death=False)),  # this process sees to that
                config=self._config,
                levels=levels(),
                process=index,
                is_successor=is_successor,
                engine=engine.fileno(),
                listener=listener.fileno(),
                counts=self._counts_file,
            )
        self._engine.add_client(of_engine, process.process.pid)
        process.send(start)
        self._processes[index] = process
        threading.Thread(target=self._read, args=(process,), name="nanovllm-api-reader", daemon=True).start()

    # What it is told, in threads

    def _receive(self, event: Event) -> None:
        if isinstance(event, EngineEnded):
            self._work.put(self._take_death)

    def _read(self, process: ApiProcess) -> None:
        """Takes the messages of an API process until it has ended."""
        while True:
            try:
                message = decode(process.connection.recv_bytes())
            except (EOFError, OSError):
                break
            if isinstance(message, LogRecord):
                write_record(message, None)
            elif isinstance(message, AskEvents):
                process.send(LatestEvents(self._recent_events.latest()))
            elif isinstance(message, ApiReady):
                self._work.put(partial(self._take_ready, process))
        process.process.wait()
        self._work.put(partial(self._take_end, process))

    # What it does about it

    def _take_signal(self, number: signal.Signals) -> None:
        self._num_signals += 1
        if self._num_signals > 1:
            self._is_ending, self._status, self._outcome = True, 128 + number, f"a second {number.name}"
            for each in self._processes.values():
                each.process.kill()
            return
        seconds = self._settings.drain_timeout
        events.server_draining.log(logger, num_unfinished=self._counts.requests, threshold=seconds)
        self._is_ending = True
        for each in self._processes.values():
            each.send(DrainApi())

    def _take_ready(self, process: ApiProcess) -> None:
        process.is_ready = True
        if not self._has_started and all(each.is_ready for each in self._processes.values()):
            self._has_started = True
            events.server_started.log(logger, model=self._settings.served_model_name[0], address=self._address)

    def _take_end(self, process: ApiProcess) -> None:
        """Acts on the end of an API process."""
        del self._processes[process.index]
        process.close()
        self._counts.clear(process.index)
        if self._is_ending or self._is_dead:
            if len(self._listeners) > 1:  # else the others share it
                self._listeners[process.index].close()
            return
        problem = f"API process {process.process.pid} {ending(process.process.returncode)}"
        events.api_process_lost.log(logger, problem=problem)
        if process.is_ready:
            self._start(process.index, is_successor=True)
        else:
            self._end(1, "an API process did not start")

    def _take_failure(self, error: BaseException) -> None:
        if not isinstance(error, NanoVLLMError):
            raise error
        print(f"nanovllm serve: {error}", file=sys.stderr)
        self._end(1, "the engine did not start")

    def _take_death(self) -> None:
        self._is_dead = True
        if self._settings.exit_on_death:
            self._end(1, "the engine has died")

    def _end(self, status: int, outcome: str) -> None:
        self._is_ending, self._status, self._outcome = True, status, outcome
        for each in self._processes.values():
            each.send(EndApi())


def listen(settings: ServerSettings) -> list[socket.socket]:
    """Returns the sockets that API processes accept connections from: one each for a port, one for a Unix socket.

    The system divides the connections to a port among its sockets. Raises OSError.
    """
    if settings.uds is not None:
        if os.path.exists(settings.uds) and stat.S_ISSOCK(os.stat(settings.uds).st_mode):
            os.unlink(settings.uds)  # of a server that was killed
        shared = socket.socket(socket.AF_UNIX)
        shared.bind(settings.uds)
        os.chmod(settings.uds, 0o666)
        return [shared]
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    with socket.socket(family) as first:  # fails if another server listens at the port; those below share it
        first.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        first.bind((settings.host, settings.port))
        port = first.getsockname()[1]
    sockets = [socket.socket(family) for _ in range(settings.api_server_count)]
    for each in sockets:
        each.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        each.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        each.bind((settings.host, port))
    return sockets
