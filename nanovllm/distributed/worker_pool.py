"""WorkerPool: starts the worker processes, waits for them, notices within milliseconds when one is lost, ends them.

A thread, the watch, waits for the end of the processes themselves. When a worker ends unexpectedly, the watch reads its
last message, kills the other workers and aborts the collectives that this process may be waiting in. None of this needs
rank 0's main thread, which then raises `failure` from whatever call it is in. The watch also treats a worker as failed
that is alive and holds up the others for longer than `startup_timeout` or `step_timeout`.
"""

from __future__ import annotations

import logging
import multiprocessing
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import connection
from typing import Any, TypeVar

from nanovllm.config import EngineConfig
from nanovllm.distributed.lost_rank import first_lost_rank
from nanovllm.distributed.stacks import find_late_rank
from nanovllm.distributed.worker_messages import WorkerMessages
from nanovllm.distributed.worker_process import MessageKind, WorkerStart, run_worker
from nanovllm.engine.executor import MakeDiagnostics, StartTrace
from nanovllm.errors import ChannelError, NanoVLLMError, WorkerError
from nanovllm.logs import events
from nanovllm.utils.child_process import NO_PROCESS_HINT, blocked_interrupts
from nanovllm.utils.logger import setup_logger

logger = setup_logger(__name__)

T = TypeVar("T")

_EXIT_SECONDS = 5.0  # for workers to end by themselves
_LOOK_SECONDS = 0.1
_GRACE_SECONDS = 0.8  # from a collective's failure in rank 0 until the watch knows the cause
_STAGES = {0: "has not started", MessageKind.ATTACHED: "is loading, and ", MessageKind.READY: ""}


@dataclass
class _Limit:
    field: str  # of the configuration
    left: float  # seconds


class WorkerPool:
    """Ranks 1, 2, …, one process each.

    configs: one for each worker. num_threads: torch's threads in each worker, on a CPU. make_diagnostics: called in
    each worker once its runner is ready; start_trace: when its process begins.
    """

    def __init__(
        self,
        configs: Sequence[EngineConfig],
        num_threads: int,
        make_diagnostics: MakeDiagnostics | None = None,
        start_trace: StartTrace | None = None,
    ) -> None:
        self.failure: WorkerError | None = None
        self.break_off: Callable[[], object] = lambda: None  # aborts hanging collectives; set when a group exists
        self._processes: dict[int, Any] = {}
        self._stacks: dict[int, Any] = {}  # rank → the pipe into which it writes its stack
        self._ending = threading.Lock()
        self._is_told_to_end = self._has_ended = False
        self._config = configs[0]
        self._limit: _Limit | None = None
        self._watch_thread: threading.Thread | None = None
        self._messages = WorkerMessages(len(configs))
        try:
            for rank, config in enumerate(configs, start=1):
                commands, reports = self._messages.open_report(rank)
                self._stacks[rank], stack = multiprocessing.Pipe(duplex=False)
                start = WorkerStart(
                    rank=rank,
                    size=len(configs) + 1,
                    config=config,
                    commands=commands,
                    reports=reports,
                    num_threads=num_threads,
                    log_level=logging.getLogger("nanovllm").level,
                    stack=stack,
                    make_diagnostics=make_diagnostics,
                    start_trace=start_trace,
                )
                self._start_process(start)
        except BaseException:
            self.shutdown()
            raise
        self._watch_thread = threading.Thread(target=self._watch, name="nanovllm-worker-watch", daemon=True)
        self._watch_thread.start()

    def _start_process(self, start: WorkerStart) -> None:
        context = multiprocessing.get_context("spawn")
        process = context.Process(target=run_worker, args=(start,), name=f"nanovllm-rank-{start.rank}", daemon=True)
        try:
            with blocked_interrupts():  # only rank 0 handles Ctrl-C
                process.start()
        except OSError as error:
            raise WorkerError(start.rank, f"cannot be started ({error.strerror}). {NO_PROCESS_HINT}") from error
        finally:
            start.stack.close()
        self._processes[start.rank] = process
        # A forked child of this process would end the daemons that it finds there. `shutdown` ends the workers instead.
        multiprocessing.process._children.discard(process)  # type: ignore[attr-defined]

    # Messages

    def send(self, kind: MessageKind, payload: Any = b"", step: int | None = None) -> None:
        """Sends to all workers. step: the step that a STEP message holds. Raises WorkerError when one is lost."""
        self.check()
        self._messages.send(kind, payload, while_waiting=self.check, step=step)

    def ask(self, kind: MessageKind, question: bytes = b"") -> list[bytes]:
        """Sends a question to all workers and returns their answers in rank order."""
        number = self._messages.next_question()
        self.send(kind, number + question)
        self._wait(lambda: self._messages.are_answered(number))
        return self._messages.take_answers()

    def wait_until_attached(self) -> None:
        """Waits until all workers have opened the shared memory, then removes its names.

        From then on nothing is left in /dev/shm, however the processes end.
        """
        self._wait(lambda: self._messages.are_attached)
        self._messages.unlink()

    def wait_until_ready(self) -> None:
        """Waits until all workers have loaded the model."""
        self._wait(lambda: self._messages.are_ready)

    def _wait(self, is_done: Callable[[], bool]) -> None:
        while True:
            self._messages.read_reports()
            if is_done():
                return
            self.check()
            time.sleep(2e-3)

    # Work of rank 0 that must end when a worker is lost

    @contextmanager
    def within(self, field: str) -> Iterator[None]:
        """Limits what the ranks do together in the block to the seconds in this field of the configuration."""
        self._limit = _Limit(field, getattr(self._config, field))
        try:
            yield
        finally:
            self._limit = None

    def check(self) -> None:
        """Raises WorkerError when a worker is lost."""
        if self.failure is not None:
            raise WorkerError(self.failure.rank, self.failure.problem, self.failure.traceback)

    def run(self, function: Callable[[Callable[[], None]], T]) -> T:
        """Runs `function(check)` in a thread and returns its result, or raises WorkerError when a worker is lost.

        `function` may block forever. check: raises when the result is no longer wanted.
        """
        future: Future[T] = Future()
        is_abandoned = threading.Event()

        def check() -> None:
            if is_abandoned.is_set():
                raise InterruptedError("the result is no longer wanted")

        def call() -> None:
            try:
                future.set_result(function(check))
            except BaseException as error:
                if not is_abandoned.is_set():  # its frames would keep what they hold
                    future.set_exception(error)

        thread = threading.Thread(target=call, name="nanovllm-start", daemon=True)
        try:
            thread.start()
            self._wait(future.done)
        except BaseException:
            is_abandoned.set()
            with suppress(RuntimeError):  # the thread has not started
                thread.join(_GRACE_SECONDS / 2)  # frees its memory, if it reaches a check by then
            raise
        if error := future.exception():
            raise self.explain(error)
        return future.result()

    def explain(self, error: BaseException) -> BaseException:
        """Returns what rank 0 should raise for its own `error`: the loss of a worker, if that is the cause."""
        if isinstance(error, NanoVLLMError):
            return error
        if isinstance(error, RuntimeError):  # as collectives raise, perhaps before the watch knows of the loss
            deadline = time.monotonic() + _GRACE_SECONDS
            while self.failure is None and time.monotonic() < deadline:
                time.sleep(5e-3)
        try:
            self.check()
        except WorkerError as lost:
            lost.__cause__ = error
            return lost
        return error

    # The watch

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
                # Time in which all ranks are stopped, by Ctrl-Z for example, does not count against any of them.
                limit.left -= min(time.monotonic() - looked, 2 * _LOOK_SECONDS)
                if limit.left <= 0:
                    self._give_up(limit)
                    return

    def _lose(self, ranks: list[int]) -> None:
        """Treats the workers `ranks`, which have ended, as failed."""
        with suppress(ChannelError):  # the loss matters more than a malformed message
            self._messages.read_reports()
        exit_codes = {}
        for rank in ranks:
            self._processes[rank].join(1)
            exit_codes[rank] = self._processes[rank].exitcode or 0
        self._fail(first_lost_rank(exit_codes, self._messages.failures, self._messages.stages))

    def _give_up(self, limit: _Limit) -> None:
        """Treats the rank that holds up the others as failed."""
        pids = {rank: process.pid for rank, process in self._processes.items()}
        late = find_late_rank(pids, self._stacks, self._messages.stages, _STAGES)
        told = f"{limit.field}={getattr(self._config, limit.field):g} s ({late.states})"
        hint = "Raise it if that is too short for this model and machine."
        self._fail(WorkerError(late.rank, f"kept the others waiting for {told}. {hint}", late.stack))

    def _fail(self, error: WorkerError) -> None:
        if self.failure is not None or self._is_told_to_end:
            return
        self.failure = error
        events.worker_lost.log(logger, lost_rank=error.rank, problem=error.problem)
        self._kill()
        self.break_off()

    # The end

    def _kill(self) -> None:
        for process in self._processes.values():
            process.kill()

    def shutdown(self, *, gently: bool = True) -> None:
        """Ends all workers and frees what the pool holds. Calling it again does nothing.

        gently: workers that still listen free their memory themselves; otherwise all are killed at once.
        """
        with self._ending:
            if self._has_ended:
                return
            self._is_told_to_end = self._has_ended = True
            if gently and self.failure is None and self._messages.are_ready:
                with suppress(ChannelError, WorkerError):
                    self._messages.send(MessageKind.SHUTDOWN, timeout=1.0)
                deadline = time.monotonic() + _EXIT_SECONDS
                for process in self._processes.values():
                    process.join(max(deadline - time.monotonic(), 0))
            self._kill()
            for process in self._processes.values():
                process.join()
            if self._watch_thread is not None and self._watch_thread is not threading.current_thread():
                self._watch_thread.join()
            self._messages.close()
            self.break_off = lambda: None  # it holds the group, and with it sockets
            for closable in (*self._processes.values(), *self._stacks.values()):
                closable.close()
