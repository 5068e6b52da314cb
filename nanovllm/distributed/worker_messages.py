"""WorkerMessages: rank 0's messages to and from its workers. One channel to all workers, one from each."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from nanovllm.distributed.shm_channel import ChannelReader, ChannelWriter
from nanovllm.distributed.worker_process import FAILURE, NUMBER, MessageKind
from nanovllm.utils.logger import log_communication, setup_logger

logger = setup_logger(__name__)

_REPORT_RING = 1 << 16  # bytes


@dataclass(frozen=True)
class FailureReport:
    """A worker's message about its own failure. failed_at: nanoseconds of the machine's monotonic clock."""

    failed_at: int
    traceback: str


class WorkerMessages:
    """Rank 0's ends of the channels to and from the workers, ranks 1, 2, …

    stages: rank → the last of ATTACHED and READY that the worker sent, 0 before both. failures: rank → its report.
    """

    def __init__(self, num_workers: int) -> None:
        self.size = num_workers + 1
        self.stages = dict.fromkeys(range(1, self.size), 0)
        self.failures: dict[int, FailureReport] = {}
        self._answers: dict[int, bytes] = {}
        self._num_questions = 0
        self._reading = threading.Lock()
        self._commands = ChannelWriter.create(num_workers)
        self._reports: dict[int, ChannelReader] = {}

    def open_report(self, rank: int) -> tuple[str, str]:
        """Makes the channel of one worker's reports. Returns the names of the commands' and of the reports' channel."""
        created = ChannelWriter.create(1, _REPORT_RING)
        self._reports[rank] = ChannelReader(created.name, 0)
        created.close()
        return self._commands.name, self._reports[rank].name

    @property
    def are_attached(self) -> bool:
        return all(self.stages.values())

    @property
    def are_ready(self) -> bool:
        return all(stage == MessageKind.READY for stage in self.stages.values())

    def send(
        self,
        kind: MessageKind,
        payload: Any = b"",
        *,
        timeout: float | None = None,
        while_waiting: Callable[[], None] | None = None,
        step: int | None = None,
    ) -> None:
        """Sends to all workers, as `ChannelWriter.send`. step: the step that a STEP message holds."""
        started = time.monotonic()
        self._commands.send(kind, payload, timeout, while_waiting)
        if logger.isEnabledFor(logging.DEBUG):
            log_communication(
                logger,
                f"send {kind.name}",
                memoryview(payload).nbytes,
                0,
                self.size,
                wait_ms=self._commands.waited * 1e3,
                started=started,
                step=step,
            )

    def next_question(self) -> bytes:
        """Returns the number of a new question, which its answers repeat."""
        self._num_questions += 1
        return NUMBER.pack(self._num_questions)

    def are_answered(self, number: bytes) -> bool:
        return all(self._answers.get(rank, b"").startswith(number) for rank in self.stages)

    def take_answers(self) -> list[bytes]:
        """Returns the answers to the last question, by rank."""
        return [self._answers.pop(rank)[NUMBER.size :] for rank in self.stages]

    def read_reports(self) -> None:
        """Reads what the workers have sent, without waiting. Any thread may call it."""
        with self._reading:
            for rank, channel in self._reports.items():
                while (message := channel.receive(timeout=0)) is not None:
                    kind = MessageKind(message.kind)
                    self._log_received(kind, len(message.payload), rank)
                    if kind == MessageKind.FAILED:
                        text = message.payload[FAILURE.size :].decode("utf-8", "replace")
                        self.failures[rank] = FailureReport(FAILURE.unpack_from(message.payload)[0], text)
                    elif kind == MessageKind.ANSWER:
                        self._answers[rank] = bytes(message.payload)
                    else:
                        self.stages[rank] = kind

    def _log_received(self, kind: MessageKind, num_bytes: int, sender: int) -> None:
        if logger.isEnabledFor(logging.DEBUG):
            log_communication(logger, f"receive {kind.name} from rank {sender}", num_bytes, 0, self.size)

    def unlink(self) -> None:
        """Removes the names of the shared memory, which is then freed with the last process that has it open."""
        for channel in (self._commands, *self._reports.values()):
            channel.unlink()

    def close(self) -> None:
        self.unlink()
        for channel in (self._commands, *self._reports.values()):
            channel.close()
