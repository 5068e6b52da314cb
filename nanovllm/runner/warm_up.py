"""WarmUp: compiles the kernels while the weights load. Both take long, and neither depends on the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from threading import Thread

import numpy as np

from nanovllm.engine.batch import Chunk, OpenedRow, ScheduledBatch, StepHandle

_PROMPT_LEN = 16


class WarmUp:
    """Runs small steps in background threads, on weights that may not be loaded yet; the results are discarded.

    Triton compiles a kernel when it is first launched, and lets other threads run meanwhile.
    submit: launches a step of a model runner whose rows, and a cache of the null block, are allocated.
    """

    def __init__(self, submit: Callable[[ScheduledBatch], StepHandle], max_num_seqs: int) -> None:
        opened = OpenedRow(0, np.zeros(_PROMPT_LEN, dtype=np.int32), temperature=1.0, seed=0)
        prefill = ScheduledBatch.build(
            0, opened=[opened], chunks=[Chunk(row=0, start=0, length=_PROMPT_LEN)], num_final_chunks=1
        )
        # Attention over one sequence and over many are different kernels.
        decodes = [ScheduledBatch.build(0, decode_rows=range(rows)) for rows in (1, max_num_seqs)]
        self._submit = submit
        self._threads = [Thread(target=self._run, args=(batches,), daemon=True) for batches in ([prefill], decodes)]
        for thread in self._threads:
            thread.start()

    def wait(self) -> None:
        """Waits until all steps have run."""
        for thread in self._threads:
            thread.join()

    def _run(self, batches: Sequence[ScheduledBatch]) -> None:
        with suppress(Exception):  # start-up's largest steps raise the same error again, and report it
            for batch in batches:
                self._submit(batch).wait()
