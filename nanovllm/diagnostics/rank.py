"""RankDiagnostics: what one rank tells of its device, its memory and its kernels."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Protocol

import torch

from nanovllm.attention.interface import LayerKVCache
from nanovllm.diagnostics.memory import MemoryReport, measure_memory
from nanovllm.diagnostics.profiler import RankProfiler
from nanovllm.diagnostics.step_times import StepTime, StepTimes
from nanovllm.errors import InvalidStateError
from nanovllm.layers.parallel import TensorParallel
from nanovllm.logs import events
from nanovllm.utils.device_memory import describe_memory
from nanovllm.utils.logger import setup_logger

logger = setup_logger(__name__)


class DiagnosedRunner(Protocol):
    """What diagnostics read of a model runner."""

    @property
    def parallel(self) -> TensorParallel: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def model(self) -> torch.nn.Module: ...

    @property
    def kv_caches(self) -> list[LayerKVCache]: ...

    @property
    def graph_pool(self) -> tuple[int, int] | None: ...


class RankDiagnostics:
    """Made by an executor, for its rank's runner. Closed before the runner is shut down."""

    def __init__(self, runner: DiagnosedRunner) -> None:
        self._rank, self._device, self._model = runner.parallel.rank, runner.device, runner.model
        self._kv_caches, self._graph_pool = runner.kv_caches, runner.graph_pool
        self._profiler: RankProfiler | None = None
        self.step_times = StepTimes()  # kept where a timeline is written, by ranks above 0

    def start_profile(self, folder: Path) -> None:
        """Raises InvalidStateError when a profile runs, InvalidArgumentError when `folder` can not be written."""
        if self._profiler is not None:
            raise InvalidStateError(
                f"A profile runs already, into {self._profiler.folder}: call stop_profile before start_profile."
            )
        self._profiler = RankProfiler(folder, self._rank, self._device)
        events.profile_started.log(logger, folder=str(folder), rank=self._rank)

    def stop_profile(self) -> str:
        """Writes the trace and the table, logs the table, and returns it. Raises InvalidStateError if none runs."""
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
        return measure_memory(self._rank, self._device, self._model, self._kv_caches, self._graph_pool)

    def memory_use(self) -> tuple[int, int]:
        """Bytes in use once garbage is collected (torch's on a GPU, the process's resident ones on a CPU), and the
        Python objects that the collector tracks.
        """
        gc.collect()
        if self._device.type == "cuda":
            used = torch.cuda.memory_allocated(self._device)
        else:
            used = int(describe_memory(self._device)[1].get("resident_bytes", 0))
        return used, len(gc.get_objects())

    def other_step_times(self) -> dict[int, list[StepTime]]:
        """Of one rank there are none."""
        return {}

    def cancel_profile(self) -> None:
        """A profile that runs ends and is lost."""
        if self._profiler is not None:
            self._profiler.cancel()
        self._profiler = None

    def close(self) -> None:
        """Lets go of what the runner owns, of a profile that runs, too."""
        self.cancel_profile()
        del self._model, self._kv_caches
