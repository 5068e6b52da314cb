"""EngineProcess: runs the engine of `AsyncLLM` in a process of its own, and talks to it through a socket.

A socket, not `distributed.shm_channel`: a thread that waits for it sleeps without the interpreter lock, and the system
reports at once when the other side has ended. The process is a new interpreter that does not read the caller's script,
so a script needs no `if __name__ == "__main__"`. It inherits a blocked SIGINT, so Ctrl-C is for this process alone.
"""

from __future__ import annotations

import logging
import signal
import subprocess
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from multiprocessing import Pipe
from typing import TYPE_CHECKING

from nanovllm.async_engine.encoding import (
    AskMetrics,
    EngineMetrics,
    EngineReady,
    EngineResolved,
    FromProcess,
    LogRecord,
    StartEngine,
    StopEngine,
    decode,
    encode,
)
from nanovllm.async_engine.messages import Command, EngineEnded, Event
from nanovllm.async_engine.outbox import Outbox
from nanovllm.config import EngineConfig, ResolvedConfig
from nanovllm.engine.observer import engine_ids
from nanovllm.errors import EngineDeadError, InvalidArgumentError
from nanovllm.logs import events
from nanovllm.logs.configuration import PACKAGE
from nanovllm.metrics import MetricsSnapshot
from nanovllm.requests.grammar_compiler import GrammarCompiler
from nanovllm.requests.preparation import RequestPreparation
from nanovllm.requests.tokenization import load_tokenizer
from nanovllm.utils import env
from nanovllm.utils.child_process import NO_PROCESS_HINT, blocked_interrupts, start_interpreter
from nanovllm.utils.logger import configure_logging, setup_logger

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = setup_logger(__name__)

_MAIN = """
from nanovllm.logs.configuration import forward_records
forward_records()
from nanovllm.async_engine.process_main import main
main(descriptor)
"""
_EXIT_SECONDS = 5.0  # for the process to end after its last message
_LOOK_SECONDS = 0.3  # between looks at the process


class EngineProcess:
    """An engine in a process of its own (an `EngineConnection`).

    It holds no reference to its AsyncLLM, so that this can be garbage-collected.
    variables: environment variables of the process that differ from those of this one. replica: its number, which is
    the `engine_id` of its log records and begins their sentences; None if it is the only engine.
    """

    tokenizer: PreTrainedTokenizerBase | None = None
    preparation: RequestPreparation

    def __init__(
        self, config: EngineConfig, variables: Mapping[str, str] | None = None, replica: int | None = None
    ) -> None:
        self._config, self._variables, self._replica = config, variables or {}, replica
        self._engine_id = next(engine_ids) if replica is None else replica  # in the records of the log
        self._connection, self._theirs = Pipe()
        self._outbox = Outbox(self._connection)
        self._asking = threading.Lock()  # one question at a time
        self._metrics = MetricsSnapshot()
        self._answered = threading.Event()
        self._receive: Callable[[Event], None] = lambda event: None
        self._reader = threading.Thread(target=self._read, name="nanovllm-engine-reader", daemon=True)
        self._grammars: GrammarCompiler | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._has_ended = False

    def start(self, receive: Callable[[Event], None]) -> None:
        self._receive = receive
        configure_logging()  # the environment may have changed since the import
        start = _start_message(self._config)
        self._start_process()
        self._outbox.send(start)
        if not self._config.skip_tokenizer_init:
            import transformers  # noqa: F401  # takes a second, in which the process loads the model
        self._prepare(*self._wait_until_ready())
        self._reader.start()

    def _start_process(self) -> None:
        try:
            with blocked_interrupts():  # only this process handles Ctrl-C
                self._process = start_interpreter(_MAIN, self._theirs, env=env.environment_with(self._variables))
        except OSError as error:
            problem = f"The engine's process cannot be started ({error.strerror}). {NO_PROCESS_HINT}"
            raise EngineDeadError(problem) from error

    def _wait_until_ready(self) -> tuple[ResolvedConfig, EngineReady]:
        """Returns what the process tells while it starts. Raises the error for which it does not start."""
        resolved: ResolvedConfig | None = None
        while True:
            message = self._next_message()
            if isinstance(message, EngineResolved):
                resolved = message.resolved
                if not self._config.skip_tokenizer_init:
                    self.tokenizer = load_tokenizer(self._config, resolved.model)
            elif isinstance(message, EngineReady):
                assert resolved is not None, "it is ready after its model is loaded"
                return resolved, message
            elif isinstance(message, EngineEnded):
                self._end_process(_EXIT_SECONDS)
                raise message.error

    def _prepare(self, resolved: ResolvedConfig, ready: EngineReady) -> None:
        self._grammars = GrammarCompiler(self.tokenizer, resolved)
        self.preparation = RequestPreparation(self.tokenizer, resolved, self._grammars, ready.default_params)

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
        if not self._reader.is_alive():  # it has not started, or has ended
            self._end_process(0)
            return
        self._outbox.send(encode(StopEngine()))
        # Garbage collection may call this on the reader's thread, which cannot join itself.
        if wait and self._reader is not threading.current_thread():
            self._reader.join()

    def _next_message(self) -> FromProcess:
        """Waits for a message that is not for the log alone. The end of the process counts as one."""
        while True:
            try:
                while not self._connection.poll(_LOOK_SECONDS):
                    if self._process is not None and self._process.poll() is not None and not self._connection.poll(0):
                        raise EOFError
                message: FromProcess = decode(self._connection.recv_bytes())
            except (EOFError, OSError):
                return EngineEnded(self._lost())
            if not isinstance(message, LogRecord):
                return message
            self._log(message)

    def _log(self, message: LogRecord) -> None:
        record = logging.makeLogRecord(message.attributes)
        if getattr(record, "engine_id", None) is not None:
            record.engine_id = self._engine_id
        if self._replica is not None and getattr(record, "event", "") != events.rule.name:
            record.msg = f"[Replica {self._replica}] {record.msg}"
        record_logger = logging.getLogger(record.name)
        if record_logger.isEnabledFor(record.levelno):
            with suppress(OSError, ValueError):  # a handler's stream is closed
                record_logger.handle(record)

    def _lost(self) -> EngineDeadError:
        """Returns the error for a process that ended without a word, and logs it."""
        assert self._process is not None, "it was started"
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(_EXIT_SECONDS)
        whose = "the engine's process" if self._replica is None else f"the process of replica {self._replica},"
        problem = f"{whose} {self._process.pid} {_ending(self._process.returncode)}"
        events.engine_process_lost.log(logger, problem=problem)
        return EngineDeadError(problem)

    def _read(self) -> None:
        """Hands events on until the engine has ended."""
        try:
            end = self._hand_on()
        except BaseException as error:  # whatever it is, nobody waits forever
            end = EngineEnded(error)
        self._has_ended = True
        self._answered.set()
        self._receive(end)
        self._end_process(_EXIT_SECONDS)

    def _hand_on(self) -> EngineEnded:
        while True:
            message = self._next_message()
            if isinstance(message, EngineEnded):
                return message
            if isinstance(message, EngineMetrics):
                self._metrics = MetricsSnapshot.from_numbers(message.numbers)
                self._answered.set()
            elif not isinstance(message, (EngineResolved, EngineReady, LogRecord)):
                self._receive(message)

    def _end_process(self, seconds: float) -> None:
        """Frees what belongs to the process, which gets some seconds to end by itself."""
        if self._grammars is not None:
            self._grammars.shutdown()
        if self._process is not None:
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(seconds)
            self._process.kill()
            self._process.wait()
        self._outbox.close()


def _ending(code: int | None) -> str:
    """Returns how a process ended, from its exit code."""
    if code is None:
        return "has closed its connection"
    if code >= 0:
        return f"ended with exit code {code}"
    name = signal.Signals(-code).name if -code in signal.valid_signals() else f"signal {-code}"
    return f"was ended by {name}" + (", as the system does when memory runs out" if name == "SIGKILL" else "")


def _levels() -> dict[str, int]:
    """Returns the levels of the package's loggers, by name."""
    names = [name for name in list(logging.root.manager.loggerDict) if name.startswith(f"{PACKAGE}.")]
    levels = {name: logging.getLogger(name).level for name in (PACKAGE, *names)}
    return {name: level for name, level in levels.items() if level != logging.NOTSET}


def _start_message(config: EngineConfig) -> bytes:
    try:
        return encode(StartEngine(config, _levels()))
    except TypeError:  # all other fields are checked
        allowed = "made of texts, numbers, lists and dictionaries, to be sent to the engine's process"
        raise InvalidArgumentError(
            "hf_overrides", config.hf_overrides, allowed, "Or set engine_process=False."
        ) from None
