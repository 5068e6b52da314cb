"""A leak check: repeats the same work and measures whether memory stops growing."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

from nanovllm.errors import InvalidArgumentError

# Growth per run that counts as none: allocators take pieces of this size now and then.
_BYTES_ALLOWED = 256 * 1024
_OBJECTS_ALLOWED = 20


@dataclass(frozen=True)
class MemoryUse:
    """Memory in use after a run, summed over ranks. used_bytes: torch's on a GPU, resident memory on a CPU."""

    used_bytes: int
    python_objects: int  # those that Python's garbage collector tracks
    used_blocks: int  # of the KV cache; 0 when no request is left


@dataclass(frozen=True)
class LeakCheck:
    """One `MemoryUse` per run. The first half of the runs warms caches; growth is measured over the second half."""

    measurements: tuple[MemoryUse, ...]

    @property
    def bytes_per_run(self) -> float:
        return self._growth([use.used_bytes for use in self.measurements])

    @property
    def objects_per_run(self) -> float:
        return self._growth([use.python_objects for use in self.measurements])

    @property
    def settles(self) -> bool:
        """Whether the runs of the second half left no KV blocks and only negligible memory and objects behind."""
        blocks = {use.used_blocks for use in self.measurements}
        return self.bytes_per_run <= _BYTES_ALLOWED and self.objects_per_run <= _OBJECTS_ALLOWED and blocks == {0}

    def _growth(self, values: list[int]) -> float:
        """Returns the median growth from run to run in the second half, so that one jump of an allocator is no leak."""
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
    """Calls `run` `num_runs` times, with `measure` after each. Raises InvalidArgumentError for fewer than 4 runs."""
    if isinstance(num_runs, bool) or not isinstance(num_runs, int) or num_runs < 4:
        raise InvalidArgumentError("num_runs", num_runs, "an integer ≥ 4", "Half of the runs only warm caches.")
    measurements: list[MemoryUse] = []
    for _ in range(num_runs):
        run()
        measurements.append(measure())
    return LeakCheck(tuple(measurements))
