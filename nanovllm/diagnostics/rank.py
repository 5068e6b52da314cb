"""RankDiagnostics: what one rank tells of its device, its memory and its kernels."""

from __future__ import annotations

import gc
from pathlib import Path

import torch

from nanovllm.attention.interface import LayerKVCache
from nanovllm.config import ResolvedConfig
from nanovllm.diagnostics.memory import MemoryReport, measure_memory
from nanovllm.diagnostics.profiler import RankProfiler
from nanovllm.diagnostics.step_times import StepTime, StepTimes
from nanovllm.errors import InvalidStateError, OutOfMemoryError
from nanovllm.logs import events
from nanovllm.utils.device_memory import describe_memory
from nanovllm.utils.logger import setup_logger

logger = setup_logger(__name__)


class RankDiagnostics:
    """Made by the rank's runner, of what it owns. `graph_pool`: that of its CUDA graphs, None where it has none."""

    def __init__(
        self,
        rank: int,
        device: torch.device,
        model: torch.nn.Module,
        kv_caches: list[LayerKVCache],
        graph_pool: tuple[int, int] | None,
    ) -> None:
        self._rank, self._device, self._model = rank, device, model
        self._kv_caches, self._graph_pool = kv_caches, graph_pool
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

    def explain(self, error: Exception, num_tokens: int, resolved: ResolvedConfig) -> None:
        """Raises OutOfMemoryError, with the numbers and the way out, for torch's error on a step of so many tokens."""
        if not isinstance(error, torch.OutOfMemoryError):
            return
        blocks, tokens = resolved.num_blocks, resolved.max_num_batched_tokens
        raise OutOfMemoryError(
            f"A step of {num_tokens} tokens ran out of memory: {error} {describe_memory(self._device)[0]}. The largest "
            "steps fitted when the engine started: end other processes on this device, or leave steps more room, with "
            f"num_kvcache_blocks={blocks * 9 // 10} instead of {blocks} (or gpu_memory_utilization a tenth lower), or "
            f"max_num_batched_tokens={max(tokens // 2, resolved.max_num_seqs)} instead of {tokens}."
        ) from error

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
