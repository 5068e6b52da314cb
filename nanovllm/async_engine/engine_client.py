"""EngineClient: talks through a socket to an engine that runs in another process.

A socket, not `distributed.shm_channel`: a thread that waits for it sleeps without the interpreter lock, and the system
reports at once when the other side has ended.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING

from nanovllm.async_engine.encoding import (
    AskMetrics,
    ClientDropped,
    EngineMetrics,
    EngineReady,
    EngineResolved,
    FromProcess,
    LogRecord,
    decode,
    encode,
)
from nanovllm.async_engine.messages import Command, EngineEnded, Event
from nanovllm.async_engine.outbox import Outbox
from nanovllm.config import EngineConfig, ResolvedConfig
from nanovllm.errors import EngineDeadError
from nanovllm.metrics import MetricsSnapshot
from nanovllm.requests.grammar_compiler import GrammarCompiler
from nanovllm.requests.preparation import RequestPreparation
from nanovllm.requests.tokenization import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_LOOK_SECONDS = 0.3  # between looks at whether the engine has ended


class EngineClient:
    """One of the clients of an engine's process (an `EngineConnection`). config: that of the engine.

    It holds no reference to its AsyncLLM, so that this can be garbage-collected.
    """

    is_dropped = False  # whether the engine goes on without this process, which did not read what it was sent
    tokenizer: PreTrainedTokenizerBase | None = None
    preparation: RequestPreparation
    first_number = 0

    def __init__(self, config: EngineConfig, connection: Connection) -> None:
        self._config = config
        self._connection = connection
        self._outbox = Outbox(connection)
        self._asking = threading.Lock()  # one question at a time
        self._metrics = MetricsSnapshot()
        self._answered = threading.Event()
        self._receive: Callable[[Event], None] = lambda event: None
        self._reader = threading.Thread(target=self._read, name="nanovllm-engine-reader", daemon=True)
        self._grammars: GrammarCompiler | None = None
        self._has_ended = False

    def start(self, receive: Callable[[Event], None]) -> None:
        self._receive = receive
        if self._has_tokenizer:
            import transformers  # noqa: F401  # takes a second, in which the engine loads the model
        self._wait_until_ready()
        self._reader.start()

    @property
    def _has_tokenizer(self) -> bool:
        return not self._config.skip_tokenizer_init

    def _wait_until_ready(self) -> None:
        """Takes what the engine tells while it starts. Raises the error for which it does not start."""
        resolved: ResolvedConfig | None = None
        while True:
            message = self._next_message()
            if isinstance(message, EngineResolved):
                resolved = message.resolved
                if self._has_tokenizer:
                    self.tokenizer = load_tokenizer(self._config, resolved.model)
            elif isinstance(message, EngineReady):
                assert resolved is not None, "it is ready after its model is loaded"
                self.first_number = message.first_number
                self._grammars = GrammarCompiler(self.tokenizer, resolved)
                params = message.default_params
                self.preparation = RequestPreparation(self.tokenizer, resolved, self._grammars, params)
                return
            elif isinstance(message, EngineEnded):
                self._close()
                raise message.error

    def send(self, command: Command) -> None:
        self._outbox.send(encode(command))

    def metrics(self) -> MetricsSnapshot:
        with self._asking:
            if not self._has_ended:
                self._answered.clear()
                self._outbox.send(encode(AskMetrics()))
                while not self._has_ended and not self._answered.wait(_LOOK_SECONDS):
                    pass
            return self._metrics

    def stop(self, wait: bool = True) -> None:
        if self._reader.is_alive():
            self._outbox.shut_down()  # which the reader notices
            self._join(wait)

    def _join(self, wait: bool) -> None:
        # Garbage collection may call this on the reader's thread, which cannot join itself.
        if wait and self._reader is not threading.current_thread():
            self._reader.join()

    def _next_message(self) -> FromProcess:
        """Waits for a message. The end of the process counts as one."""
        try:
            message: FromProcess = decode(self._connection.recv_bytes())
        except (EOFError, OSError):
            return EngineEnded(EngineDeadError("the engine's process has ended"))
        return message

    def _read(self) -> None:
        """Hands events on until the engine has ended."""
        try:
            end = self._hand_on()
        except BaseException as error:  # whatever it is, nobody waits forever
            end = EngineEnded(error)
        self._has_ended = True
        self._answered.set()
        self._receive(end)
        self._close()

    def _hand_on(self) -> EngineEnded:
        while True:
            message = self._next_message()
            if isinstance(message, EngineEnded):
                return message
            if isinstance(message, ClientDropped):
                self.is_dropped = True
                return EngineEnded(EngineDeadError("for this process, which did not read what it was sent"))
            if isinstance(message, EngineMetrics):
                self._metrics = MetricsSnapshot.from_numbers(message.numbers)
                self._answered.set()
            elif not isinstance(message, (EngineResolved, EngineReady, LogRecord)):
                self._receive(message)

    def _close(self) -> None:
        """Frees what belongs to the connection."""
        if self._grammars is not None:
            self._grammars.shutdown()
        self._outbox.close()
