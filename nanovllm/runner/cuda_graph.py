"""DecodeGraphs: CUDA graphs of the decode step, one per batch size, each replayed with one launch.

A graph holds the whole step, from reading the rows' last tokens to appending the sampled ones. It is captured when its
size is first needed. A batch runs with the next larger size in `sizes`, padded with the null row.
"""

from __future__ import annotations

import bisect
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import TypeVar

import torch

from nanovllm.engine.batch import StepNeeds
from nanovllm.kernels.logprobs import SampledTokens
from nanovllm.layers.parallel import CurrentStep
from nanovllm.logs import events
from nanovllm.utils.logger import setup_logger

logger = setup_logger(__name__)

Result = TypeVar("Result")
DecodeStep = Callable[[torch.Tensor, StepNeeds], SampledTokens]  # takes rows [size] int32, samples a token for each


def graph_sizes(max_num_rows: int) -> list[int]:
    """Returns the batch sizes that get a graph, up to `max_num_rows`.

    They are 1, 2, 4, 8, then multiples of 8 up to 128, of 16 up to 256, of 32 up to 512 …, so that powers of two are
    among them: products in tiles have no unused tokens then.
    """
    sizes = {1, 2, 4, max_num_rows}
    size = 8
    while size < max_num_rows:
        sizes.add(size)
        size += max(8, 1 << size.bit_length() - 4)
    return sorted(size for size in sizes if size <= max_num_rows)


class GraphPool:
    """Captures CUDA graphs that share one memory pool, since only one runs at a time."""

    def __init__(self, device: torch.device, step: CurrentStep) -> None:
        """step: the one that runs, for the log."""
        self.device, self.step = device, step
        self.handle = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)
        self._is_first = True

    def capture(self, step: Callable[[], Result]) -> tuple[torch.cuda.CUDAGraph, Result]:
        """Returns a graph of `step`, and what it returned; a replay writes its tensors again.

        The first step also runs once before, so that libraries set up their handles and communicators. Kernels that
        are new to a later step are compiled and loaded while it is captured.
        """
        current = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(current)
        if self._is_first:
            with torch.cuda.stream(self._stream):
                step()
            self._is_first = False
        current.wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.handle, stream=self._stream):
            result = step()
        return graph, result


@dataclass(frozen=True)
class _Captured:
    graph: torch.cuda.CUDAGraph
    sampled: SampledTokens  # each replay writes its results here


class DecodeGraphs:
    """Captures and replays `decode_step`, with a graph for each pair of size and StepNeeds."""

    def __init__(self, pool: GraphPool, decode_step: DecodeStep, max_num_rows: int, null_row: int) -> None:
        self.pool = pool
        self._decode_step = decode_step
        self._null_row = null_row
        self.sizes = graph_sizes(max_num_rows)
        self._rows = torch.full((max_num_rows,), null_row, dtype=torch.int32, device=pool.device)  # the graphs' input
        self._held: torch.Tensor | None = None  # the rows that were copied there last
        self._captured: dict[tuple[int, StepNeeds], _Captured] = {}

    def replay(self, rows: torch.Tensor, needs: StepNeeds) -> SampledTokens:
        """Decodes `rows` [num_rows] int32, to which nothing writes later.

        Returns a token for each; the tensors are valid until the next replay.
        """
        size = self.sizes[bisect.bisect_left(self.sizes, len(rows))]
        captured = self._captured.get((size, needs))
        if captured is None:
            captured = self.capture(size, needs)
        if not self._holds(rows):
            self._held = None
            self._rows[: len(rows)] = rows
            self._rows[len(rows) : size] = self._null_row
            self._held = rows
        captured.graph.replay()
        return captured.sampled.first(len(rows))

    def _holds(self, rows: torch.Tensor) -> bool:
        """Returns whether `_rows` still has `rows`: the same memory, which is not reused while `_held` refers to it."""
        held = self._held
        return held is not None and held.data_ptr() == rows.data_ptr() and len(held) == len(rows)

    def capture_missing(self, needs: StepNeeds) -> Iterator[None]:
        """Captures the graphs that are missing, one for each item. The largest is first: others share its memory."""
        for size in reversed(self.sizes):
            if (size, needs) not in self._captured:
                self.capture(size, needs)
                yield

    def capture(self, size: int, needs: StepNeeds) -> _Captured:
        """Captures the step for `size` rows. It runs on the null row only, so that no sequence changes."""
        started = time.perf_counter()
        rows = self._rows[:size]
        self._held = None
        rows.fill_(self._null_row)
        captured = self._captured[size, needs] = _Captured(*self.pool.capture(lambda: self._decode_step(rows, needs)))
        elapsed_ms = (time.perf_counter() - started) * 1e3
        events.graph_captured.log(logger, size=size, elapsed_ms=elapsed_ms, **asdict(needs), **self.pool.step.fields)
        return captured
