"""The process of a rank above 0: runs the steps that rank 0 sends, and reports its errors.

Rank 0 sends every message through one channel that all workers read; each worker answers through a channel of its
own. A worker does not outlive rank 0: a thread ends the process as soon as rank 0's process ends.
"""

from __future__ import annotations

import logging
import os
import struct
import sys
import threading
import time
import traceback
from contextlib import suppress
from dataclasses import dataclass
from enum import IntEnum
from multiprocessing import connection, parent_process
from typing import TYPE_CHECKING

import numpy as np

from nanovllm.config import EngineConfig
from nanovllm.distributed.shm_channel import ChannelReader, ChannelWriter
from nanovllm.distributed.stacks import answer_with_stacks
from nanovllm.engine.batch import ScheduledBatch
from nanovllm.engine.executor import MakeDiagnostics, RankDiagnostics, StartTrace, existing
from nanovllm.errors import ChannelError
from nanovllm.runner.cpu_threads import load_torch
from nanovllm.utils import env
from nanovllm.utils.garbage_collection import existing_objects_exempt
from nanovllm.utils.logger import configure_logging, flush_timed_sections, log_communication, setup_logger

if TYPE_CHECKING:
    from nanovllm.engine.model_runner import ModelRunner

logger = setup_logger(__name__)

_REPORT_SECONDS = 1.0  # to send the message about a failure
_PARENT_SECONDS = 0.5  # between looks at the parent


class MessageKind(IntEnum):
    """The kinds of messages, each with its payload."""

    # from rank 0 to all
    JOIN = 1  # uint64: the port of the store where the ranks meet
    STEP = 2  # a ScheduledBatch's buffer: int32 words, which begin with their own version
    SYNCHRONIZE = 3  # uint64: a number that the answer repeats, once the device has finished all earlier steps
    SHUTDOWN = 4  # empty
    DIAGNOSE = 5  # uint64: a number that the answer repeats; then a question for the diagnostics
    STEP_TIMES = 6  # uint64: a number that the answer repeats
    # from one worker to rank 0
    ATTACHED = 16  # empty: both channels are open, so their names are no longer needed
    READY = 17  # empty: the model is loaded and the KV cache allocated
    ANSWER = 18  # uint64: the question's number; then the answer, which may be empty
    FAILED = 19  # FAILURE: the time on the machine's monotonic clock, in ns; then the traceback in UTF-8


NUMBER = struct.Struct("=Q")
FAILURE = struct.Struct("=Q")


@dataclass(frozen=True)
class WorkerStart:
    """Everything that a worker process needs to start. The only object that multiprocessing pickles."""

    rank: int
    size: int
    config: EngineConfig  # of this rank, with its own device
    commands: str  # name of the channel that it reads
    reports: str  # name of the channel that it writes
    num_threads: int  # for torch, on a CPU
    log_level: int  # of the package's logger in rank 0; NOTSET: the environment decides
    stack: connection.Connection  # a pipe into which it writes its Python stack on a signal
    make_diagnostics: MakeDiagnostics | None
    start_trace: StartTrace | None


def run_worker(start: WorkerStart) -> None:
    """Runs a worker, from the start of its process to the end."""
    commands, reports = _attach(start)
    try:
        configure_logging(rank=start.rank)
        if start.log_level != logging.NOTSET:
            logging.getLogger("nanovllm").setLevel(start.log_level)
        trace = start.start_trace(start.rank) if start.start_trace is not None else None
        _Worker(start, commands, reports).run()
        if trace is not None:
            trace.stop()
        status = 0
    except BaseException as error:
        text = FAILURE.pack(time.monotonic_ns()) + "".join(traceback.format_exception(error)).encode("utf-8", "replace")
        log_communication(logger, f"send {MessageKind.FAILED.name}", len(text), start.rank, start.size)
        with suppress(ChannelError):  # rank 0 no longer reads
            reports.send(MessageKind.FAILED, text, timeout=_REPORT_SECONDS)
        status = 1
    logging.shutdown()
    sys.stdout.flush()
    os._exit(status)  # at once: does not wait for hanging collectives or for threads of libraries


def _attach(start: WorkerStart) -> tuple[ChannelReader, ChannelWriter]:
    commands, reports = ChannelReader(start.commands, start.rank - 1), ChannelWriter.attach(start.reports)
    parent = parent_process()
    assert parent is not None, "a worker is started by rank 0"
    answer_with_stacks(start.stack)

    def end_with_the_parent() -> None:
        # A forked child of rank 0 inherits its end of the sentinel, which is then not ready when rank 0 ends.
        while not connection.wait([parent.sentinel], timeout=_PARENT_SECONDS) and os.getppid() == parent.pid:
            pass
        commands.unlink()  # in case rank 0 was killed before it did
        reports.unlink()
        os._exit(1)

    threading.Thread(target=end_with_the_parent, name="nanovllm-parent-watch", daemon=True).start()
    return commands, reports


class _Worker:
    def __init__(self, start: WorkerStart, commands: ChannelReader, reports: ChannelWriter) -> None:
        self.start = start
        self.commands = commands
        self.reports = reports

    def run(self) -> None:
        self._send(MessageKind.ATTACHED)
        load_torch(self.start.config.device)
        import torch

        from nanovllm.distributed.process_group import join_ranks, leave_ranks, open_store
        from nanovllm.engine.model_runner import ModelRunner
        from nanovllm.runner.model_plan import ModelPlan

        start = self.start
        torch.set_num_threads(start.num_threads)
        kind, payload = self._receive()
        if kind != MessageKind.JOIN:  # rank 0 failed before the ranks met
            return
        store = open_store(start.config, NUMBER.unpack(payload)[0])
        parallel = join_ranks(store, start.rank, start.config, ModelPlan.of(start.config).device)
        runner = ModelRunner(start.config, parallel)
        diagnostics = None if start.make_diagnostics is None else start.make_diagnostics(runner)
        self._send(MessageKind.READY)
        with existing_objects_exempt():
            self._follow(runner, diagnostics)
        flush_timed_sections()
        if diagnostics is not None:
            diagnostics.close()
        runner.shutdown()
        leave_ranks(parallel)

    def _follow(self, runner: ModelRunner, diagnostics: RankDiagnostics | None) -> None:
        """Handles messages from rank 0 until SHUTDOWN."""
        from nanovllm.distributed.step_times import StepTimes, pack_step_times

        step_times = StepTimes() if env.trace_file() is not None else None
        while True:
            kind, payload = self._receive()
            if kind == MessageKind.STEP:
                batch, began = ScheduledBatch.from_buffer(np.frombuffer(payload, dtype=np.int32)), time.monotonic()
                step = runner.submit(batch)
                if step_times is not None:
                    step_times.add(batch.step, batch.kind, began, step)
            elif kind == MessageKind.SYNCHRONIZE:
                runner.synchronize()
                self._send(MessageKind.ANSWER, payload)
            elif kind == MessageKind.DIAGNOSE:
                number, question = payload[: NUMBER.size], payload[NUMBER.size :]
                self._send(MessageKind.ANSWER, number + existing(diagnostics).answer(question))
            elif kind == MessageKind.STEP_TIMES:
                times = [] if step_times is None else step_times.take()
                self._send(MessageKind.ANSWER, payload + pack_step_times(times))
            elif kind == MessageKind.SHUTDOWN:
                return
            else:
                raise ChannelError(f"{self.commands.name}: a worker received {kind!r}, which no worker handles.")

    def _receive(self) -> tuple[MessageKind, bytearray]:
        started = time.monotonic()
        message = self.commands.receive()
        assert message is not None, "receive has no timeout"
        kind = MessageKind(message.kind)
        if logger.isEnabledFor(logging.DEBUG):
            is_step = kind == MessageKind.STEP
            log_communication(
                logger,
                f"receive {kind.name}",
                len(message.payload),
                self.start.rank,
                self.start.size,
                wait_ms=self.commands.waited * 1e3,
                started=started,
                step=ScheduledBatch.from_buffer(np.frombuffer(message.payload, dtype=np.int32)).step
                if is_step
                else None,
            )
        return kind, message.payload

    def _send(self, kind: MessageKind, payload: bytes | bytearray = b"") -> None:
        log_communication(logger, f"send {kind.name}", len(payload), self.start.rank, self.start.size)
        self.reports.send(kind, payload)
