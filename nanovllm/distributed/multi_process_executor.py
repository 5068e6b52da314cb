"""Several ranks: one in this process, each other in one of its own, all running the same steps.

A step is the batch's bytes, sent to all workers, then run here as there; the ranks meet in the model's collectives.
Every rank samples the same tokens, so that nothing but rank 0's is read.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from multiprocessing.util import Finalize
from types import FrameType
from typing import TYPE_CHECKING

from nanovllm.config import EngineConfig
from nanovllm.distributed.worker_pool import WorkerPool
from nanovllm.distributed.worker_process import NUMBER, MessageKind
from nanovllm.engine.batch import ScheduledBatch, StepHandle, StepResult
from nanovllm.errors import EngineDeadError, InvalidArgumentError
from nanovllm.utils.stopwatch import Stopwatch

if TYPE_CHECKING:
    import torch

    from nanovllm.diagnostics.all_ranks import AllRanksDiagnostics
    from nanovllm.diagnostics.rank import RankDiagnostics
    from nanovllm.engine.model_runner import ModelRunner
    from nanovllm.layers.parallel import TensorParallel


_IDLE_SECONDS = 5.0  # that steps in flight may take when the engine ends


class MultiProcessExecutor:
    """`config.tensor_parallel_size` ranks. An error in a step, on whichever rank, ends all of them.

    Raises WorkerError when a rank is lost: it died, raised (its traceback is in the message), or kept the others
    waiting for longer than `config.startup_timeout` or, in a step, `config.step_timeout`.
    """

    def __init__(self, config: EngineConfig, stopwatch: Stopwatch | None = None) -> None:
        stopwatch = stopwatch or Stopwatch()
        import torch

        from nanovllm.runner.model_plan import ModelPlan

        plan = ModelPlan.of(config)  # what can not work is refused before any process starts
        size = config.tensor_parallel_size
        configs = [replace(config, device=str(device)) for device in rank_devices(plan.device, size)]
        self._runner: ModelRunner | None = None
        self._diagnostics: RankDiagnostics | None = None
        self._parallel: TensorParallel | None = None
        self._error: BaseException | None = None
        self._workers = WorkerPool(configs[1:], max(1, torch.get_num_threads() // size))
        # Before multiprocessing ends what is left of its children, when Python ends.
        self._finalize = Finalize(self, self._workers.shutdown, exitpriority=10)
        try:
            with self._workers.within("startup_timeout"):
                self._start(configs[0], plan.device, stopwatch)
        except BaseException as error:
            cause = error if not isinstance(error, Exception) else self._workers.explain(error)
            self.shutdown()
            if cause is error:
                raise
            raise cause from error

    def _start(self, config: EngineConfig, device: torch.device, stopwatch: Stopwatch) -> None:
        from nanovllm.distributed.process_group import join_ranks, leave_ranks, open_store
        from nanovllm.engine.model_runner import ModelRunner

        stopwatch.lap("imports")
        workers = self._workers
        workers.wait_until_attached()
        store = open_store(config)
        workers.send(MessageKind.JOIN, NUMBER.pack(store.port))
        parallel = self._parallel = workers.run(lambda check: join_ranks(store, 0, config, device))
        workers.break_off = lambda: leave_ranks(parallel, seconds=0)
        stopwatch.lap("ranks")
        self._runner = workers.run(lambda check: ModelRunner(config, parallel, stopwatch, check))
        workers.wait_until_ready()
        stopwatch.lap("other ranks")
        self.resolved = self._runner.resolved

    def submit(self, batch: ScheduledBatch) -> StepHandle:
        runner = self._alive_runner()
        try:
            # Ctrl-C between the two would leave the ranks at different steps
            with _interrupts_deferred(), self._workers.within("step_timeout"):
                self._workers.send(MessageKind.STEP, batch.buffer)
                return runner.submit(batch)
        except Exception as error:
            raise self._break(error) from error

    def collect(self, handle: StepHandle) -> StepResult:
        try:
            with self._workers.within("step_timeout"):
                result = handle.wait(self._workers.check)
            self._workers.check()  # a collective that was broken off gives numbers, too
        except Exception as error:
            raise self._break(error) from error
        return result

    def synchronize(self) -> None:
        if self._error is not None:
            raise EngineDeadError(f"A rank failed: {self._error}") from self._error
        if self._runner is None:
            return
        try:
            with self._workers.within("step_timeout"):
                self._runner.synchronize()
        except Exception as error:
            raise self._break(error) from error
        self._ask(MessageKind.SYNCHRONIZE)

    @property
    def diagnostics(self) -> AllRanksDiagnostics:
        from nanovllm.diagnostics.all_ranks import AllRanksDiagnostics
        from nanovllm.diagnostics.rank import RankDiagnostics

        runner = self._alive_runner()
        if self._diagnostics is None:
            self._diagnostics = RankDiagnostics(runner)
        return AllRanksDiagnostics(self._diagnostics, partial(self._ask, MessageKind.DIAGNOSE))

    def _ask(self, kind: MessageKind, question: bytes = b"") -> list[bytes]:
        try:
            with self._workers.within("step_timeout"):
                return self._workers.ask(kind, question)
        except Exception as error:
            raise self._break(error) from error

    def shutdown(self) -> None:
        from nanovllm.distributed.process_group import leave_ranks

        runner, self._runner = self._runner, None
        # Steps in flight read the other ranks' memory. Where a lost rank lets them hang, memory goes with this process.
        is_idle = runner is None or runner.becomes_idle(_IDLE_SECONDS)
        self._finalize()  # once: ends the workers
        if self._diagnostics is not None:
            self._diagnostics.close()
            self._diagnostics = None
        if runner is not None and is_idle:
            runner.shutdown()
        parallel, self._parallel = self._parallel, None
        if parallel is not None:
            leave_ranks(parallel)

    def _break(self, error: Exception) -> BaseException:
        """After an error the ranks are at different places: all end. Returns what to raise."""
        self._error = self._workers.explain(error)
        self._workers.break_off()
        self._workers.shutdown(gently=False)
        return self._error

    def _alive_runner(self) -> ModelRunner:
        if self._runner is None or self._error is not None:
            raise EngineDeadError("The executor was shut down." if self._error is None else str(self._error))
        return self._runner


def rank_devices(first: torch.device, size: int) -> list[torch.device]:
    """One GPU a rank, from `first` on; on a CPU they share it."""
    import torch

    if first.type == "cpu":
        return [first] * size
    count = torch.cuda.device_count()
    if first.index + size > count:
        raise InvalidArgumentError(
            "tensor_parallel_size",
            size,
            f"at most {count - first.index}: the GPUs from {first} on",
            "Each rank has a GPU of its own.",
        )
    return [torch.device("cuda", first.index + rank) for rank in range(size)]


@contextmanager
def _interrupts_deferred() -> Iterator[None]:
    """Ctrl-C takes effect at the end of the block."""
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield
        return
    received: list[tuple[int, FrameType | None]] = []
    signal.signal(signal.SIGINT, lambda number, frame: received.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if received:
            handler(*received[0])
