"""The worker processes as rank 0 sees them: starts them, speaks to them, notices within milliseconds when one is lost.

A thread waits on the processes themselves. When one ends that was not told to, the thread reads its last word, ends
the others, and breaks off the collectives that this process may be waiting in: none of this needs rank 0's main
thread, which then raises `failure` from whatever call it was in.
"""

from __future__ import annotations

import logging
import multiprocessing
import signal
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from multiprocessing import connection
from typing import Any, TypeVar

from nanovllm.config import EngineConfig
from nanovllm.engine.shm_channel import ChannelReader, ChannelWriter
from nanovllm.engine.worker import FAILURE, MessageKind, WorkerStart, run_worker
from nanovllm.errors import ChannelError, NanoVLLMError, WorkerError
from nanovllm.utils import events
from nanovllm.utils.logger import log_communication, setup_logger

logger = setup_logger(__name__)

T = TypeVar("T")

_REPORT_RING = 1 << 16  # bytes
_SEND_SECONDS = 300.0  # that the slowest rank may hold a message back
_EXIT_SECONDS = 5.0  # that workers may take to end by themselves
_LOOK_SECONDS = 0.5
_GRACE_SECONDS = 0.8  # from a collective's failure in rank 0 to the news why
_STAGES = {0: "has not started", MessageKind.ATTACHED: "is loading"}


class WorkerPool:
    """Ranks 1, 2, …, one process each. `configs`: each one's configuration. `num_threads`: for torch, on a CPU."""

    def __init__(self, configs: Iterable[EngineConfig], num_threads: int) -> None:
        self.failure: WorkerError | None = None
        self.break_off: Callable[[], object] = lambda: None  # ends collectives that hang: set when there is a group
        self._processes: dict[int, Any] = {}
        self._reports: dict[int, ChannelReader] = {}
        self._stage: dict[int, int] = {}
        self._answered: dict[int, bytes] = {}
        self._last_words: dict[int, tuple[int, str]] = {}  # rank → when it failed, its traceback
        self._reading = threading.Lock()
        self._ending = threading.Lock()
        self._is_ready = self._is_told_to_end = self._has_ended = False
        configs = list(configs)
        self.size = len(configs) + 1
        self._timeout = configs[0].startup_timeout
        self._commands = ChannelWriter.create(len(configs))
        try:
            self._start(configs, num_threads)
        except BaseException:
            self.shutdown()
            raise
        self._watch_thread = threading.Thread(target=self._watch, name="nanovllm-worker-watch", daemon=True)
        self._watch_thread.start()

    def _start(self, configs: list[EngineConfig], num_threads: int) -> None:
        context = multiprocessing.get_context("spawn")
        log_level = logging.getLogger("nanovllm").level
        for rank, config in enumerate(configs, start=1):
            made = ChannelWriter.create(1, _REPORT_RING)
            self._reports[rank] = ChannelReader(made.name, 0)
            made.close()
            names = self._commands.name, self._reports[rank].name
            start = WorkerStart(rank, self.size, config, *names, num_threads, log_level)
            process = context.Process(target=run_worker, args=(start,), name=f"nanovllm-rank-{rank}", daemon=True)
            # Ctrl-C is for rank 0: workers inherit that it is blocked, and never unblock it.
            blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            try:
                process.start()
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
            self._processes[rank] = process
            self._stage[rank] = 0

    # Messages

    def send(self, kind: MessageKind, payload: Any = b"", timeout: float = _SEND_SECONDS) -> None:
        """To all workers. Raises WorkerError when one is lost, or reads nothing for `timeout` seconds."""
        self.check()
        if logger.isEnabledFor(logging.DEBUG):
            log_communication(logger, f"send {kind.name}", memoryview(payload).nbytes, 0, self.size)
        try:
            self._commands.send(kind, payload, timeout, self.check)
        except ChannelError as error:
            self._fail(self._slowest(), f"did not read what it was sent within {timeout:.0f} s: {error}")
            self.check()

    def check(self) -> None:
        """Raises WorkerError when a worker is lost."""
        if self.failure is not None:
            raise WorkerError(self.failure.rank, self.failure.problem, self.failure.traceback)

    def wait_until_attached(self) -> None:
        """Then the names of the shared memory are taken away: nothing is left whatever becomes of the processes."""
        self._wait(lambda: all(self._stage.values()))
        self._unlink()

    def wait_until_ready(self) -> None:
        self._wait(lambda: all(stage == MessageKind.READY for stage in self._stage.values()))
        self._is_ready = True

    def wait_for_answers(self, payload: bytes, timeout: float = _SEND_SECONDS) -> None:
        """Until every worker has answered SYNCHRONIZED with `payload`."""
        deadline = time.monotonic() + timeout
        self._wait(
            lambda: all(self._answered.get(rank) == payload for rank in self._processes) or time.monotonic() > deadline
        )
        missing = [rank for rank in self._processes if self._answered.get(rank) != payload]
        if missing:
            self._fail(missing[0], f"did not finish its steps within {timeout:.0f} s.")
            self.check()

    def run(self, function: Callable[[], T]) -> T:
        """`function()` in a thread, waited for in a way that a lost worker ends: it may block for ever."""
        results: list[T] = []
        errors: list[BaseException] = []

        def call() -> None:
            try:
                results.append(function())
            except BaseException as error:
                errors.append(error)

        thread = threading.Thread(target=call, name="nanovllm-join", daemon=True)
        thread.start()
        self._wait(lambda: not thread.is_alive())
        if errors:
            raise self.explain(errors[0])
        return results[0]

    def explain(self, error: BaseException) -> BaseException:
        """What rank 0 should raise for `error` of its own: the loss of a worker, where that is behind it."""
        if isinstance(error, NanoVLLMError):
            return error  # it says itself what is wrong
        if isinstance(error, RuntimeError):  # what collectives raise; the news may be a moment behind
            deadline = time.monotonic() + _GRACE_SECONDS
            while self.failure is None and time.monotonic() < deadline:
                time.sleep(5e-3)
        try:
            self.check()
        except WorkerError as lost:
            lost.__cause__ = error
            return lost
        return error

    def _wait(self, ready: Callable[[], bool]) -> None:
        while True:
            self._read_reports()
            if ready():
                return
            self.check()
            time.sleep(2e-3)

    def _read_reports(self) -> None:
        with self._reading:
            for rank, channel in self._reports.items():
                while (message := channel.receive(timeout=0)) is not None:
                    kind = MessageKind(message.kind)
                    size = len(message.payload)
                    log_communication(logger, f"receive {kind.name} from rank {rank}", size, 0, self.size)
                    if kind == MessageKind.FAILED:
                        text = message.payload[FAILURE.size :].decode("utf-8", "replace")
                        self._last_words[rank] = (*FAILURE.unpack_from(message.payload), text)
                    elif kind == MessageKind.SYNCHRONIZED:
                        self._answered[rank] = bytes(message.payload)
                    else:
                        self._stage[rank] = kind

    # Loss and end

    def _watch(self) -> None:
        ranks = {process.sentinel: rank for rank, process in self._processes.items()}
        deadline = time.monotonic() + self._timeout
        while True:
            # A limited wait: that the pool was told to end, or is ready, is seen in between.
            left = deadline - time.monotonic() if not self._is_ready else _LOOK_SECONDS
            ended = connection.wait(list(ranks), timeout=min(max(left, 0.01), _LOOK_SECONDS))
            if self._is_told_to_end:
                return
            if ended:
                self._lose([ranks[int(sentinel)] for sentinel in ended if isinstance(sentinel, int)])
                return
            if not self._is_ready and time.monotonic() > deadline:
                self._read_reports()
                late = {rank: stage for rank, stage in self._stage.items() if stage != MessageKind.READY}
                if late:
                    rank = min(late, key=lambda rank: late[rank])
                    states = ", ".join(f"rank {rank} {_STAGES[late[rank]]}" for rank in late)
                    problem = f"is not ready after startup_timeout={self._timeout:g} s ({states}). Raise it if that"
                    self._fail(rank, f"{problem} is too short for this model and machine.")
                    return

    def _lose(self, ranks: list[int]) -> None:
        with suppress(ChannelError):  # killed while it wrote
            self._read_reports()
        # One rank's end makes others fail: a killed one comes first, then whoever failed first.
        status: dict[int, int] = {}
        for rank in ranks:
            self._processes[rank].join(1)
            status[rank] = self._processes[rank].exitcode or 0

        def order(rank: int) -> tuple[bool, int]:
            return status[rank] >= 0, self._last_words.get(rank, (0, ""))[0]

        rank = min(ranks, key=order)
        if rank in self._last_words:
            text = self._last_words[rank][1]
            self._fail(rank, f"failed: {text.strip().splitlines()[-1]}", text)
        elif status[rank] < 0:
            self._fail(rank, f"was killed by {signal.Signals(-status[rank]).name}.")
        else:
            self._fail(
                rank, f"ended with exit status {status[rank]} and gave no reason.{_guard_hint(self._stage[rank])}"
            )

    def _fail(self, rank: int, problem: str, traceback: str = "") -> None:
        if self.failure is not None or self._is_told_to_end:
            return
        self.failure = WorkerError(rank, problem, traceback)
        events.worker_lost.log(logger, lost_rank=rank, problem=problem)
        self._kill()
        self.break_off()

    def _slowest(self) -> int:
        alive = [rank for rank, process in self._processes.items() if process.is_alive()]
        return alive[0] if alive else 1

    def _kill(self) -> None:
        for process in self._processes.values():
            process.kill()

    def _unlink(self) -> None:
        for channel in (self._commands, *self._reports.values()):
            channel.unlink()

    def shutdown(self, *, gently: bool = True) -> None:
        """Ends all workers and leaves nothing behind. Calling it again does nothing.

        gently: those that listen give their memory back themselves; else all are killed.
        """
        with self._ending:
            if self._has_ended:
                return
            self._is_told_to_end = self._has_ended = True
            if gently and self.failure is None and self._is_ready:
                with suppress(ChannelError, WorkerError):
                    self._commands.send(MessageKind.SHUTDOWN, timeout=1.0)
                deadline = time.monotonic() + _EXIT_SECONDS
                for process in self._processes.values():
                    process.join(max(deadline - time.monotonic(), 0))
            self._kill()
            for process in self._processes.values():
                process.join()
            if hasattr(self, "_watch_thread") and self._watch_thread is not threading.current_thread():
                self._watch_thread.join()
            self._unlink()
            for channel in (self._commands, *self._reports.values()):
                channel.close()
            for process in self._processes.values():
                process.close()


def _guard_hint(stage: int) -> str:
    """What to do about a process that ended before our code in it began."""
    if stage:
        return ""
    return (
        " Each rank reads the script that starts the engine: what the script does must stand below "
        "if __name__ == '__main__'."
    )
