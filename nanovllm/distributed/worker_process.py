"""What runs in the process of each rank but 0: it does what rank 0 says, step by step, and says so when it can not.

Rank 0 says everything through one channel that all workers read, and each worker answers through one of its own.
A worker never waits for rank 0 beyond its life: a thread ends the process when rank 0's does, whatever this one is at.
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
from nanovllm.diagnostics.function_trace import start_function_trace
from nanovllm.diagnostics.stacks import answer_with_stacks
from nanovllm.distributed.shm_channel import ChannelReader, ChannelWriter
from nanovllm.engine.batch import ScheduledBatch
from nanovllm.errors import ChannelError
from nanovllm.utils import env
from nanovllm.utils.logger import configure_logging, flush_timed_sections, log_communication, setup_logger

if TYPE_CHECKING:
    from nanovllm.engine.model_runner import ModelRunner

logger = setup_logger(__name__)

_REPORT_SECONDS = 1.0  # that a last word may take


class MessageKind(IntEnum):
    """What a message says, and what its payload is."""

    # from rank 0 to all
    JOIN = 1  # uint64: the port where ranks meet
    STEP = 2  # a ScheduledBatch's buffer: int32 words, with a version of their own
    SYNCHRONIZE = 3  # uint64: a number to answer with, when the device has done all steps before
    SHUTDOWN = 4  # empty
    DIAGNOSE = 5  # uint64: a number to answer with; then a question, as diagnostics/all_ranks.py has it
    # from one worker to rank 0
    ATTACHED = 16  # empty: both channels are open, their names are no longer needed
    READY = 17  # empty: the model is loaded, the cache allocated
    ANSWER = 18  # uint64: the question's number; then the answer, if there is one to give
    FAILED = 19  # FAILURE: when, on the machine's monotonic clock; then the traceback, UTF-8


NUMBER = struct.Struct("=Q")
FAILURE = struct.Struct("=Q")


@dataclass(frozen=True)
class WorkerStart:
    """All that a worker's process is started with."""

    rank: int
    size: int
    config: EngineConfig  # this rank's: with its own device
    commands: str  # names of the channels
    reports: str
    num_threads: int  # for torch, on a CPU
    log_level: int  # of the package's logger in rank 0; NOTSET: as the environment says
    stack: connection.Connection  # a pipe into which it writes where it stands, when asked


def run_worker(start: WorkerStart) -> None:
    """The process from beginning to end."""
    commands, reports = _attach(start)
    try:
        configure_logging(rank=start.rank)
        if start.log_level != logging.NOTSET:
            logging.getLogger("nanovllm").setLevel(start.log_level)
        trace = start_function_trace(start.rank)
        _Worker(start, commands, reports).run()
        if trace is not None:
            trace.stop()
        status = 0
    except BaseException as error:
        text = FAILURE.pack(time.monotonic_ns()) + "".join(traceback.format_exception(error)).encode("utf-8", "replace")
        log_communication(logger, f"send {MessageKind.FAILED.name}", len(text), start.rank, start.size)
        with suppress(ChannelError):  # nobody listens any more
            reports.send(MessageKind.FAILED, text, timeout=_REPORT_SECONDS)
        status = 1
    logging.shutdown()
    sys.stdout.flush()
    os._exit(status)  # at once: collectives that hang, and threads of libraries, do not hold it up


def _attach(start: WorkerStart) -> tuple[ChannelReader, ChannelWriter]:
    commands, reports = ChannelReader(start.commands, start.rank - 1), ChannelWriter.attach(start.reports)
    parent = parent_process()
    assert parent is not None, "a worker is started by rank 0"
    answer_with_stacks(start.stack)

    def end_with_the_parent() -> None:
        connection.wait([parent.sentinel])
        commands.unlink()  # if rank 0 was killed before it could
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
        import torch

        from nanovllm.distributed.process_group import join_ranks, leave_ranks, open_store
        from nanovllm.engine.model_runner import ModelRunner
        from nanovllm.runner.model_plan import ModelPlan

        start = self.start
        torch.set_num_threads(start.num_threads)
        kind, payload = self._receive()
        if kind != MessageKind.JOIN:  # rank 0 gave up before
            return
        store = open_store(start.config, port=NUMBER.unpack(payload)[0])
        parallel = join_ranks(store, start.rank, start.config, ModelPlan.of(start.config).device)
        runner = ModelRunner(start.config, parallel)
        self._send(MessageKind.READY)
        self._follow(runner)
        flush_timed_sections()
        runner.shutdown()
        leave_ranks(parallel)

    def _follow(self, runner: ModelRunner) -> None:
        from nanovllm.diagnostics.all_ranks import answer
        from nanovllm.diagnostics.rank import RankDiagnostics

        diagnostics = RankDiagnostics(runner)
        traces = env.trace_file() is not None
        while True:
            kind, payload = self._receive()
            if kind == MessageKind.STEP:
                batch, began = ScheduledBatch.from_buffer(np.frombuffer(payload, dtype=np.int32)), time.monotonic()
                step = runner.submit(batch)
                if traces:
                    diagnostics.step_times.add(batch.step, batch.kind, began, step)
            elif kind == MessageKind.SYNCHRONIZE:
                runner.synchronize()
                self._send(MessageKind.ANSWER, payload)
            elif kind == MessageKind.DIAGNOSE:
                number, question = payload[: NUMBER.size], payload[NUMBER.size :]
                self._send(MessageKind.ANSWER, number + answer(diagnostics, question))
            elif kind == MessageKind.SHUTDOWN:
                diagnostics.close()
                return
            else:
                raise ChannelError(f"{self.commands.name}: a worker was sent a {kind!r}, which is not for it.")

    def _receive(self) -> tuple[MessageKind, bytearray]:
        message = self.commands.receive()
        assert message is not None, "there is no limit on the time"
        kind = MessageKind(message.kind)
        log_communication(logger, f"receive {kind.name}", len(message.payload), self.start.rank, self.start.size)
        return kind, message.payload

    def _send(self, kind: MessageKind, payload: bytes | bytearray = b"") -> None:
        log_communication(logger, f"send {kind.name}", len(payload), self.start.rank, self.start.size)
        self.reports.send(kind, payload)
