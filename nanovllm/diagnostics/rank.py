"""RankDiagnostics: the profiler and the memory of one rank."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path

import torch

from nanovllm.diagnostics.all_ranks import AllRanksDiagnostics, answer
from nanovllm.diagnostics.memory import MemoryReport, RankRunner, measure_memory
from nanovllm.diagnostics.profiler import RankProfiler
from nanovllm.errors import InvalidStateError
from nanovllm.logs import events
from nanovllm.utils.device_memory import describe_memory
from nanovllm.utils.logger import setup_logger

logger = setup_logger(__name__)


class RankDiagnostics:
    """The profiler and the memory of the rank that `runner` computes."""

    def __init__(self, runner: RankRunner) -> None:
        self._runner: RankRunner | None = runner
        self._rank, self._device = runner.parallel.rank, runner.device
        self._profiler: RankProfiler | None = None

    def of_all_ranks(self, ask: Callable[[bytes], list[bytes]]) -> AllRanksDiagnostics:
        """Returns the diagnostics of every rank, for rank 0. ask: sends a question, returns the others' answers."""
        return AllRanksDiagnostics(self, ask)

    def answer(self, question: bytes | bytearray) -> bytes:
        """Returns this rank's answer to a question of rank 0."""
        return answer(self, question)

    def start_profile(self, folder: Path) -> None:
        """Starts a profile.

        Raises InvalidStateError when a profile is running, InvalidArgumentError when `folder` cannot be written.
        """
        if self._profiler is not None:
            raise InvalidStateError(
                f"A profile runs already, into {self._profiler.folder}: call stop_profile before start_profile."
            )
        self._profiler = RankProfiler(folder, self._rank, self._device)
        events.profile_started.log(logger, folder=str(folder), rank=self._rank)

    def stop_profile(self) -> str:
        """Writes the trace and the table, logs the table and returns it.

        Raises InvalidStateError when no profile is running.
        """
        if self._profiler is None:
            raise InvalidStateError("No profile runs: call start_profile(folder) before stop_profile.")
        profiler, self._profiler = self._profiler, None
        table = profiler.stop()
        events.profile_written.log(
            logger,
            trace=str(profiler.trace_file),
            table_file=str(profiler.table_file),
            table=table,
            rank=self._rank,
        )
        return table

    def memory_report(self) -> MemoryReport:
        """Returns what the device's memory is used for, without waiting for the device."""
        assert self._runner is not None, "diagnostics were closed"
        return measure_memory(self._runner)

    def memory_use(self) -> tuple[int, int]:
        """Returns the bytes in use after a garbage collection (torch's on a GPU, the process's resident ones on a
        CPU) and the number of Python objects that the collector tracks.
        """
        gc.collect()
        if self._device.type == "cuda":
            used = torch.cuda.memory_allocated(self._device)
        else:
            used = int(describe_memory(self._device)[1].get("resident_bytes", 0))
        return used, len(gc.get_objects())

    def cancel_profile(self) -> None:
        """Ends a running profile without writing it."""
        if self._profiler is not None:
            self._profiler.cancel()
        self._profiler = None

    def close(self) -> None:
        """Cancels a running profile and releases the runner."""
        self.cancel_profile()
        self._runner = None
