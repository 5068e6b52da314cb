"""EngineProcess: runs the engine of `AsyncLLM` in a process of its own.

The process is a new interpreter that does not read the caller's script, so a script needs no `if __name__ ==
"__main__"`. It inherits a blocked SIGINT, so Ctrl-C is for this process alone.
"""

from __future__ import annotations

import logging
import signal
import subprocess
from collections.abc import Callable, Mapping
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection

from nanovllm.async_engine.encoding import AddClient, FromProcess, LogRecord, StartEngine, StopEngine, decode, encode
from nanovllm.async_engine.engine_client import EngineClient
from nanovllm.async_engine.log_records import write_record
from nanovllm.async_engine.messages import EngineEnded, Event
from nanovllm.config import EngineConfig
from nanovllm.engine.observer import engine_ids
from nanovllm.errors import EngineDeadError, InvalidArgumentError
from nanovllm.logs import events
from nanovllm.logs.configuration import PACKAGE
from nanovllm.utils import env
from nanovllm.utils.child_process import NO_PROCESS_HINT, blocked_interrupts, start_interpreter
from nanovllm.utils.logger import configure_logging, setup_logger

logger = setup_logger(__name__)

_MAIN = """
from nanovllm.logs.configuration import forward_records
forward_records()
from nanovllm.async_engine.process_main import main
main(descriptor)
"""
_EXIT_SECONDS = 5.0  # for the process to end after its last message
_LOOK_SECONDS = 0.3  # between looks at the process


class EngineProcess(EngineClient):
    """An engine in a process that belongs to this one. This one is its first client; `add_client` makes others.

    serves: False if only the others ask for tokens, so that this process loads no tokenizer. variables: environment
    variables of the process that differ from those of this one. replica: its number, which is the `engine_id` of its
    log records and begins their sentences; None if it is the only engine.
    """

    def __init__(
        self,
        config: EngineConfig,
        serves: bool = True,
        *,
        variables: Mapping[str, str] | None = None,
        replica: int | None = None,
    ) -> None:
        ours, self._theirs = Pipe()
        super().__init__(config, ours)
        self._serves = serves
        self._variables, self._replica = variables or {}, replica
        self._engine_id = next(engine_ids) if replica is None else replica  # in the records of the log
        self._process: subprocess.Popen[bytes] | None = None
        self._problem: str | None = None

    def launch(self) -> None:
        """Starts the process, without waiting for it."""
        configure_logging()  # the environment may have changed since the import
        start = _start_message(self._config)
        self._start_process()
        self._outbox.send(start)

    def start(self, receive: Callable[[Event], None]) -> None:
        if self._process is None:
            self.launch()
        super().start(receive)

    @property
    def _has_tokenizer(self) -> bool:
        return self._serves and super()._has_tokenizer

    def _start_process(self) -> None:
        try:
            with blocked_interrupts():  # only this process handles Ctrl-C
                self._process = start_interpreter(_MAIN, self._theirs, env=env.environment_with(self._variables))
        except OSError as error:
            problem = f"The engine's process cannot be started ({error.strerror}). {NO_PROCESS_HINT}"
            raise EngineDeadError(problem) from error

    def add_client(self, connection: Connection, pid: int) -> None:
        """Serves an `EngineClient` in another process. connection: this end of its connection, closed here."""
        self._outbox.send(encode(AddClient(pid)), connection)

    def kill(self, problem: str) -> None:
        """Ends the process at once. problem: why, for the log and the error of its requests."""
        assert self._process is not None, "it was started"
        self._problem = problem
        self._process.kill()

    def stop(self, wait: bool = True) -> None:
        if not self._reader.is_alive():  # it has not started, or has ended
            self._end_process(0)
            return
        self._outbox.send(encode(StopEngine()))
        self._join(wait)

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
            write_record(message, self._engine_id, "" if self._replica is None else f"[Replica {self._replica}] ")

    def _lost(self) -> EngineDeadError:
        """Returns the error for a process that ended without a word, and logs it."""
        assert self._process is not None, "it was started"
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(_EXIT_SECONDS)
        whose = "the engine's process" if self._replica is None else f"the process of replica {self._replica},"
        problem = f"{whose} {self._process.pid} {self._problem or ending(self._process.returncode)}"
        events.engine_process_lost.log(logger, problem=problem)
        return EngineDeadError(problem)

    def _close(self) -> None:
        self._end_process(_EXIT_SECONDS)

    def _end_process(self, seconds: float) -> None:
        """Frees what belongs to the process, which gets some seconds to end by itself."""
        if self._process is not None:
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(seconds)
            self._process.kill()
            self._process.wait()
        super()._close()


def ending(code: int | None) -> str:
    """Returns how a process ended, from its exit code."""
    if code is None:
        return "has closed its connection"
    if code >= 0:
        return f"ended with exit code {code}"
    name = signal.Signals(-code).name if -code in signal.valid_signals() else f"signal {-code}"
    return f"was ended by {name}" + (", as the system does when memory runs out" if name == "SIGKILL" else "")


def levels() -> dict[str, int]:
    """Returns the levels of the package's loggers, by name."""
    names = [name for name in list(logging.root.manager.loggerDict) if name.startswith(f"{PACKAGE}.")]
    levels = {name: logging.getLogger(name).level for name in (PACKAGE, *names)}
    return {name: level for name, level in levels.items() if level != logging.NOTSET}


def _start_message(config: EngineConfig) -> bytes:
    try:
        return encode(StartEngine(config, levels()))
    except TypeError:  # all other fields are checked
        allowed = "made of texts, numbers, lists and dictionaries, to be sent to the engine's process"
        raise InvalidArgumentError(
            "hf_overrides", config.hf_overrides, allowed, "Or set engine_process=False."
        ) from None
