"""MultiProcessExecutor: several ranks. Rank 0 runs in this process, every other rank in a process of its own.

The executor sends the batch's bytes to all workers and runs the same step itself; the ranks meet in the model's
collectives. Every rank samples the same tokens, so only those of rank 0 are read.
"""

from __future__ import annotations

import signal
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from multiprocessing.util import Finalize
from types import FrameType
from typing import TYPE_CHECKING, Any

from nanovllm.config import EngineConfig
from nanovllm.distributed.start_conditions import check_start_conditions
from nanovllm.distributed.worker_pool import WorkerPool
from nanovllm.distributed.worker_process import NUMBER, MessageKind
from nanovllm.engine.batch import ScheduledBatch, StepHandle, StepResult
from nanovllm.engine.executor import Diagnostics, MakeDiagnostics, RankDiagnostics, StartTrace, StepTime, existing
from nanovllm.errors import EngineDeadError, InvalidArgumentError
from nanovllm.utils.stopwatch import Stopwatch

if TYPE_CHECKING:
    import torch

    from nanovllm.engine.model_runner import ModelRunner
    from nanovllm.layers.parallel import TensorParallel


_IDLE_SECONDS = 5.0  # to wait for steps in flight when the engine ends


class MultiProcessExecutor:
    """Runs `config.tensor_parallel_size` ranks. An error in a step of any rank ends all of them.

    Raises WorkerError when a rank is lost: it died, raised (its traceback is in the message), or held up the others
    for longer than `config.startup_timeout` or, in a step, `config.step_timeout`.
    """

    def __init__(
        self,
        config: EngineConfig,
        stopwatch: Stopwatch | None = None,
        make_diagnostics: MakeDiagnostics | None = None,
        start_trace: StartTrace | None = None,
    ) -> None:
        stopwatch = stopwatch or Stopwatch()
        from nanovllm.runner.cpu_threads import choose_cpu_threads, load_torch

        is_fresh = load_torch(config.device)
        import torch

        from nanovllm.runner.model_plan import ModelPlan

        plan = ModelPlan.of(config)  # raises for arguments that cannot work, before any process starts
        size = config.tensor_parallel_size
        configs = [replace(config, device=str(device)) for device in rank_devices(plan.device, size)]
        check_start_conditions(size)
        self._runner: ModelRunner | None = None
        self._parallel: TensorParallel | None = None
        self._server: Any = None  # of the store where the ranks meet
        self._diagnostics: RankDiagnostics | None = None
        self._error: BaseException | None = None
        if plan.device.type == "cpu":
            choose_cpu_threads(is_fresh, size)
        num_threads = max(1, torch.get_num_threads() // size)
        self._workers = WorkerPool(configs[1:], num_threads, make_diagnostics, start_trace)
        # When Python exits, this runs before multiprocessing ends its remaining children.
        self._finalize = Finalize(self, self._workers.shutdown, exitpriority=10)
        try:
            with self._workers.within("startup_timeout"):
                runner = self._start(configs[0], plan.device, stopwatch)
            self._diagnostics = None if make_diagnostics is None else make_diagnostics(runner)
        except BaseException as error:
            cause = self._workers.explain(error) if isinstance(error, Exception) else error
            self.shutdown()
            traceback.clear_frames(error.__traceback__)  # they hold the group, and with it sockets
            if cause is error:
                raise
            raise cause from error

    def _start(self, config: EngineConfig, device: torch.device, stopwatch: Stopwatch) -> ModelRunner:
        from nanovllm.distributed.process_group import join_ranks, leave_ranks, open_server, open_store
        from nanovllm.engine.model_runner import ModelRunner

        stopwatch.lap("imports")
        workers = self._workers
        workers.wait_until_attached()
        self._server = open_server(config)
        port = self._server.port
        workers.send(MessageKind.JOIN, NUMBER.pack(port))
        parallel = self._parallel = workers.run(
            lambda check: join_ranks(open_store(config, port), 0, config, device, check)
        )
        workers.break_off = lambda: leave_ranks(parallel, seconds=0)
        stopwatch.lap("ranks")
        runner = self._runner = workers.run(lambda check: ModelRunner(config, parallel, stopwatch, check))
        workers.wait_until_ready()
        if device.type == "cpu":
            self._server = None  # NCCL asks the store for errors of other ranks as long as the group exists
        stopwatch.lap("other ranks")
        self.resolved = runner.resolved
        return runner

    def submit(self, batch: ScheduledBatch) -> StepHandle:
        runner = self._alive_runner()
        try:
            # Ctrl-C between the two calls would leave the ranks at different steps.
            with _interrupts_deferred(), self._workers.within("step_timeout"):
                self._workers.send(MessageKind.STEP, batch.buffer, batch.step)
                return runner.submit(batch)
        except Exception as error:
            raise self._break(error) from error

    def collect(self, handle: StepHandle) -> StepResult:
        try:
            with self._workers.within("step_timeout"):
                result = handle.wait(self._workers.check)
            self._workers.check()  # an aborted collective returns numbers, too
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
    def diagnostics(self) -> Diagnostics:
        self._alive_runner()
        return existing(self._diagnostics).of_all_ranks(partial(self._ask, MessageKind.DIAGNOSE))

    def capture_ahead(self) -> bool:
        return False  # all ranks would have to capture at the same time: they do so in the steps that need the graphs

    def other_step_times(self) -> dict[int, Sequence[StepTime]]:
        from nanovllm.distributed.step_times import unpack_step_times

        answers = self._ask(MessageKind.STEP_TIMES)
        return {rank: unpack_step_times(data) for rank, data in enumerate(answers, start=1)}

    def _ask(self, kind: MessageKind, question: bytes = b"") -> list[bytes]:
        try:
            with self._workers.within("step_timeout"):
                return self._workers.ask(kind, question)
        except Exception as error:
            raise self._break(error) from error

    def shutdown(self) -> None:
        from nanovllm.distributed.process_group import leave_ranks

        runner, self._runner = self._runner, None
        # Steps in flight read the other ranks' memory. If a lost rank lets them hang, this rank's memory is not freed
        # before its process ends.
        is_idle = runner is None or runner.becomes_idle(_IDLE_SECONDS)
        self._finalize()  # ends the workers; later calls do nothing
        diagnostics, self._diagnostics = self._diagnostics, None
        if diagnostics is not None:
            diagnostics.close()
        if runner is not None and is_idle:
            runner.shutdown()
        parallel, self._parallel = self._parallel, None
        if parallel is not None:
            leave_ranks(parallel)
        self._server = None

    def _break(self, error: Exception) -> BaseException:
        """Ends all ranks, which may be at different steps after an error. Returns the error to raise."""
        self._error = self._workers.explain(error)
        self._workers.break_off()
        self._workers.shutdown(gently=False)
        return self._error

    def _alive_runner(self) -> ModelRunner:
        if self._runner is None or self._error is not None:
            raise EngineDeadError("The executor was shut down." if self._error is None else str(self._error))
        return self._runner


def rank_devices(first: torch.device, size: int) -> list[torch.device]:
    """Returns the device of each rank: consecutive GPUs from `first` on, or the CPU, which the ranks share."""
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
    """Delays Ctrl-C until the end of the block."""
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
