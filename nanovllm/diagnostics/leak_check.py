"""A leak check: the same work again and again, and whether what it leaves behind stops growing."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

from nanovllm.errors import InvalidArgumentError

# What a run may leave behind once memory has settled: allocators take memory in such pieces now and then.
_BYTES_ALLOWED = 256 * 1024
_OBJECTS_ALLOWED = 20


@dataclass(frozen=True)
class MemoryUse:
    """After a run, summed over ranks. used_bytes: torch's on a GPU, the process's resident ones on a CPU."""

    used_bytes: int
    python_objects: int  # those that Python's garbage collector tracks
    used_blocks: int  # of the KV cache; none belongs to anyone when no request is left


@dataclass(frozen=True)
class LeakCheck:
    """One `MemoryUse` after each run. The first half warms caches; growth is a run's, over the second half."""

    measurements: tuple[MemoryUse, ...]

    @property
    def bytes_per_run(self) -> float:
        return self._growth([use.used_bytes for use in self.measurements])

    @property
    def objects_per_run(self) -> float:
        return self._growth([use.python_objects for use in self.measurements])

    @property
    def settles(self) -> bool:
        """Whether no run of the second half left memory, objects or KV blocks behind, but for small change."""
        blocks = {use.used_blocks for use in self.measurements}
        return self.bytes_per_run <= _BYTES_ALLOWED and self.objects_per_run <= _OBJECTS_ALLOWED and blocks == {0}

    def _growth(self, values: list[int]) -> float:
        """The median growth from run to run in the second half: one jump of an allocator is no leak."""
        half = values[len(values) // 2 :]
        steps = sorted(after - before for before, after in itertools.pairwise(half))
        return float(steps[(len(steps) - 1) // 2])

    def __str__(self) -> str:
        verdict = "Memory settles" if self.settles else "Memory does not settle"
        lines = [
            f"{verdict} over {len(self.measurements)} runs: {self.bytes_per_run:+,.0f} bytes and "
            f"{self.objects_per_run:+,.0f} Python objects a run at the end"
        ]
        for number, use in enumerate(self.measurements, start=1):
            lines.append(
                f"  after run {number}: {use.used_bytes / 1e6:,.1f} MB, {use.python_objects:,} objects, "
                f"{use.used_blocks} KV blocks"
            )
        return "\n".join(lines)


def check_leak(run: Callable[[], object], measure: Callable[[], MemoryUse], num_runs: int) -> LeakCheck:
    """Raises InvalidArgumentError for fewer than 4 runs."""
    if isinstance(num_runs, bool) or not isinstance(num_runs, int) or num_runs < 4:
        raise InvalidArgumentError("num_runs", num_runs, "an integer ≥ 4", "Half of the runs only warm caches.")
    measurements: list[MemoryUse] = []
    for _ in range(num_runs):
        run()
        measurements.append(measure())
    return LeakCheck(tuple(measurements))
