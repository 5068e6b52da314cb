"""The process of an engine: serves the consumers in the process that started it (`engine_process`).

Its log goes to that process, which writes it: to the console and the log file of both, and to the program's handlers.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
from contextlib import suppress
from multiprocessing.connection import Connection

from nanovllm.async_engine.encoding import (
    AskMetrics,
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
from nanovllm.async_engine.messages import EngineEnded
from nanovllm.config import ResolvedConfig
from nanovllm.engine.observer import EngineObserver
from nanovllm.errors import EngineDeadError
from nanovllm.logs.configuration import PACKAGE
from nanovllm.logs.formats import strict_json
from nanovllm.utils.logger import configure_logging

_LOOK_SECONDS = 0.5  # between looks at the parent
_EXIT_SECONDS = 10.0  # for the running step, once the parent has ended


class _Parent(EngineObserver, logging.Handler):
    """The process that started this one: takes messages and log records, and is told when the model is loaded."""

    def __init__(self, connection: Connection) -> None:
        logging.Handler.__init__(self)
        self._connection = connection
        self._pid = os.getppid()
        self._sending = threading.Lock()

    def send(self, message: FromProcess) -> None:
        data = encode(message)
        with self._sending, suppress(OSError):  # it has ended, which `serve` notices
            self._connection.send_bytes(data)

    def engine_resolved(self, resolved: ResolvedConfig) -> None:
        self.send(EngineResolved(resolved))

    def emit(self, record: logging.LogRecord) -> None:
        attributes = {**vars(record), "msg": record.getMessage(), "args": None, "exc_info": None}
        if record.exc_info:
            attributes["exc_text"] = logging.Formatter().formatException(record.exc_info)
        self.send(LogRecord(json.loads(strict_json(attributes))))

    def next_message(self) -> ToProcess | None:
        """Waits for a message. Returns None when the parent has ended."""
        try:
            # A forked child of the parent keeps its end of the socket open.
            while not self._connection.poll(_LOOK_SECONDS):
                if os.getppid() != self._pid:
                    return None
            message: ToProcess = decode(self._connection.recv_bytes())
            return message
        except (EOFError, OSError):
            return None


def main(descriptor: int) -> None:
    """Serves the process at the other end of a socket, until it says stop or ends."""
    parent = _Parent(Connection(descriptor))
    status = 1
    start = parent.next_message()
    if isinstance(start, StartEngine):
        logging.getLogger(PACKAGE).addHandler(parent)
        configure_logging()
        for name, level in start.levels.items():
            logging.getLogger(name).setLevel(level)
        status = _serve(parent, start)
    logging.shutdown()
    sys.stdout.flush()
    os._exit(status)  # at once: does not wait for threads of libraries


def _serve(parent: _Parent, start: StartEngine) -> int:
    try:
        loop = EngineLoop(start.config, parent.send, parent)
    except BaseException as error:
        parent.send(EngineEnded(error))
        return 1
    engine = loop.engine
    threading.Thread(target=_read, args=(parent, loop), name="nanovllm-commands", daemon=True).start()
    parent.send(EngineReady(engine.get_default_sampling_params()))
    dead: BaseException = EngineDeadError("exit() was called")
    try:
        with engine:
            loop.run()
    except BaseException as error:
        dead = error
    _send_metrics(parent, loop)
    parent.send(EngineEnded(dead))
    return 0


def _read(parent: _Parent, loop: EngineLoop) -> None:
    """Hands commands to the loop. Ends the process when the parent has ended."""
    while True:
        message = parent.next_message()
        if message is None:
            loop.send(None)
            threading.Event().wait(_EXIT_SECONDS)  # meanwhile the main thread ends the process
            os._exit(1)
        elif isinstance(message, StopEngine):
            loop.send(None)
        elif isinstance(message, AskMetrics):
            _send_metrics(parent, loop)
        elif not isinstance(message, StartEngine):
            loop.send(message)


def _send_metrics(parent: _Parent, loop: EngineLoop) -> None:
    engine = loop.engine
    parent.send(EngineMetrics(engine.metrics.snapshot(engine.scheduler.load).to_numbers()))
