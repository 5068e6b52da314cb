"""The worker processes as rank 0 sees them: starts them, speaks to them, notices within milliseconds when one is lost.

A thread waits on the processes themselves. When one ends that was not told to, the thread reads its last word, ends
the others, and breaks off the collectives that this process may be waiting in: none of this needs rank 0's main
thread, which then raises `failure` from whatever call it was in. The same thread gives up a worker that lives and keeps
the others waiting for longer than `startup_timeout` or `step_timeout`.
"""

from __future__ import annotations

import logging
import multiprocessing
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import connection
from typing import Any, TypeVar

from nanovllm.config import EngineConfig
from nanovllm.diagnostics.stacks import find_late_rank
from nanovllm.distributed.shm_channel import ChannelReader, ChannelWriter
from nanovllm.distributed.worker_process import FAILURE, NUMBER, MessageKind, WorkerStart, run_worker
from nanovllm.errors import ChannelError, NanoVLLMError, WorkerError
from nanovllm.logs import events
from nanovllm.utils.logger import log_communication, setup_logger

logger = setup_logger(__name__)

T = TypeVar("T")

_REPORT_RING = 1 << 16  # bytes
_EXIT_SECONDS = 5.0  # that workers may take to end by themselves
_LOOK_SECONDS = 0.1
_GRACE_SECONDS = 0.8  # from a collective's failure in rank 0 to the news why
_STAGES = {0: "has not started", MessageKind.ATTACHED: "is loading, and ", MessageKind.READY: ""}


@dataclass
class _Limit:
    field: str  # of the configuration
    left: float  # seconds


class WorkerPool:
    """Ranks 1, 2, …, one process each. `configs`: each one's configuration. `num_threads`: for torch, on a CPU."""

    def __init__(self, configs: Iterable[EngineConfig], num_threads: int) -> None:
        self.failure: WorkerError | None = None
        self.break_off: Callable[[], object] = lambda: None  # ends collectives that hang: set when there is a group
        self._processes: dict[int, Any] = {}
        self._reports: dict[int, ChannelReader] = {}
        self._stage: dict[int, int] = {}
        self._stacks: dict[int, Any] = {}  # rank → the pipe that it writes its stack into
        self._answers: dict[int, bytes] = {}
        self._num_asked = 0
        self._last_words: dict[int, tuple[int, str]] = {}  # rank → when it failed, its traceback
        self._reading = threading.Lock()
        self._ending = threading.Lock()
        self._is_told_to_end = self._has_ended = False
        configs = list(configs)
        self.size = len(configs) + 1
        self._config = configs[0]
        self._limit: _Limit | None = None
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
            self._stacks[rank], stack = context.Pipe(duplex=False)
            start = WorkerStart(rank, self.size, config, *names, num_threads, log_level, stack)
            process = context.Process(target=run_worker, args=(start,), name=f"nanovllm-rank-{rank}", daemon=True)
            # Ctrl-C is for rank 0: workers inherit that it is blocked, and never unblock it.
            blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            try:
                process.start()
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
                stack.close()
            self._processes[rank] = process
            self._stage[rank] = 0

    # Messages

    def send(self, kind: MessageKind, payload: Any = b"") -> None:
        """To all workers. Raises WorkerError when one is lost."""
        self.check()
        self._log("send", kind, memoryview(payload).nbytes)
        self._commands.send(kind, payload, while_waiting=self.check)

    def ask(self, kind: MessageKind, question: bytes = b"") -> list[bytes]:
        """Sends, and returns the workers' answers in the order of their ranks."""
        self._num_asked += 1
        number = NUMBER.pack(self._num_asked)
        self.send(kind, number + question)
        self._wait(lambda: all(self._answers.get(rank, b"").startswith(number) for rank in self._processes))
        return [self._answers.pop(rank)[NUMBER.size :] for rank in self._processes]

    @contextmanager
    def within(self, field: str) -> Iterator[None]:
        """What the ranks do together in the block may take the seconds of this field of the configuration."""
        self._limit = _Limit(field, getattr(self._config, field))
        try:
            yield
        finally:
            self._limit = None

    def check(self) -> None:
        """Raises WorkerError when a worker is lost."""
        if self.failure is not None:
            raise WorkerError(self.failure.rank, self.failure.problem, self.failure.traceback)

    def wait_until_attached(self) -> None:
        """Then the names of the shared memory are taken away: nothing is left whatever becomes of the processes."""
        self._wait(lambda: all(self._stage.values()))
        self._unlink()

    def wait_until_ready(self) -> None:
        self._wait(lambda: self._is_ready)

    def run(self, function: Callable[[Callable[[], None]], T]) -> T:
        """`function(check)` in a thread, waited for in a way that a lost worker ends: it may block for ever.

        check: raises when nobody waits any more.
        """
        future: Future[T] = Future()
        is_abandoned = threading.Event()

        def check() -> None:
            if is_abandoned.is_set():
                raise InterruptedError("nobody waits for this any more")

        def call() -> None:
            try:
                future.set_result(function(check))
            except BaseException as error:
                future.set_exception(error)

        thread = threading.Thread(target=call, name="nanovllm-start", daemon=True)
        try:
            thread.start()
            self._wait(future.done)
        except BaseException:
            is_abandoned.set()
            with suppress(RuntimeError):  # not started yet
                thread.join(_GRACE_SECONDS / 2)  # so that its memory is free again, if it comes to a check by then
            raise
        if error := future.exception():
            raise self.explain(error)
        return future.result()

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

    @property
    def _is_ready(self) -> bool:
        return all(stage == MessageKind.READY for stage in self._stage.values())

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
                    self._log("receive", kind, len(message.payload), rank)
                    if kind == MessageKind.FAILED:
                        text = message.payload[FAILURE.size :].decode("utf-8", "replace")
                        self._last_words[rank] = (*FAILURE.unpack_from(message.payload), text)
                    elif kind == MessageKind.ANSWER:
                        self._answers[rank] = bytes(message.payload)
                    else:
                        self._stage[rank] = kind

    def _log(self, verb: str, kind: MessageKind, num_bytes: int, sender: int = 0) -> None:
        if logger.isEnabledFor(logging.DEBUG):
            operation = f"{verb} {kind.name}" + (f" from rank {sender}" if sender else "")
            log_communication(logger, operation, num_bytes, 0, self.size)

    # Loss and end

    def _watch(self) -> None:
        ranks = {process.sentinel: rank for rank, process in self._processes.items()}
        while True:
            limit, looked = self._limit, time.monotonic()
            ended = connection.wait(list(ranks), timeout=_LOOK_SECONDS)
            if self._is_told_to_end:
                return
            if ended:
                self._lose([ranks[int(sentinel)] for sentinel in ended if isinstance(sentinel, int)])
                return
            if limit is not None and limit is self._limit:
                # While all of us are stopped, by Ctrl-Z say, time passes that is no rank's fault.
                limit.left -= min(time.monotonic() - looked, 2 * _LOOK_SECONDS)
                if limit.left <= 0:
                    self._give_up(limit)
                    return

    def _give_up(self, limit: _Limit) -> None:
        pids = {rank: process.pid for rank, process in self._processes.items()}
        late = find_late_rank(pids, self._stacks, self._stage, _STAGES)
        told = f"{limit.field}={getattr(self._config, limit.field):g} s ({late.states})"
        hint = "Raise it if that is too short for this model and machine."
        self._fail(late.rank, f"kept the others waiting for {told}. {hint}", late.stack)

    def _lose(self, ranks: list[int]) -> None:
        with suppress(ChannelError):  # the loss matters more than what is wrong with a message
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
                self._log("send", MessageKind.SHUTDOWN, 0)
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
            for closable in (*self._processes.values(), *self._stacks.values()):
                closable.close()


def _guard_hint(stage: int) -> str:
    """What to do about a process that ended before our code in it began."""
    if stage:
        return ""
    return (
        " Each rank reads the script that starts the engine: what the script does must stand below "
        "if __name__ == '__main__'."
    )
