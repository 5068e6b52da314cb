"""RankProfiler: torch's profiler on one rank. Writes a Chrome trace and a table of the most expensive operators."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from nanovllm.errors import InvalidArgumentError, InvalidStateError

_ROWS = 25  # of the table


class RankProfiler:
    """Records from its construction until `stop`: the CPU, and the GPU if the rank has one."""

    def __init__(self, folder: Path, rank: int, device: torch.device) -> None:
        self.folder = folder
        self.trace_file = folder / f"profile_rank{rank}.json"  # Chrome's trace format
        self.table_file = folder / f"profile_rank{rank}.txt"
        self._on_gpu = device.type == "cuda"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.table_file.write_text("", encoding="utf-8")  # fails now rather than after an hour of profiling
        except OSError as error:
            raise InvalidArgumentError(
                "folder", str(folder), f"a folder that can be written ({error.strerror})"
            ) from None
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._on_gpu else [])]
        if torch.autograd.profiler._is_profiler_enabled:  # a second profiler would take the events of the first
            raise InvalidStateError("torch's profiler runs already, started by other code or another engine: stop it.")
        self._profile = profile(activities=activities, acc_events=True)
        self._profile.start()

    def stop(self) -> str:
        """Ends the recording, writes both files and returns the table."""
        if self._on_gpu:
            torch.cuda.synchronize()  # the profile includes launched kernels
        self._profile.stop()
        key = "self_cuda_time_total" if self._on_gpu else "self_cpu_time_total"
        table: str = self._profile.key_averages().table(sort_by=key, row_limit=_ROWS, max_name_column_width=60)
        self._profile.export_chrome_trace(str(self.trace_file))
        self.table_file.write_text(table, encoding="utf-8")
        return table

    def cancel(self) -> None:
        """Ends the recording without writing it."""
        self._profile.stop()
