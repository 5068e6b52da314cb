"""WarmUp: compiles the kernels while the weights load. Both take long, and neither depends on the other."""

from __future__ import annotations

import queue
from collections.abc import Callable, Sequence
from contextlib import suppress
from threading import Thread

import numpy as np

from nanovllm.engine.batch import Chunk, OpenedRow, ScheduledBatch, StepHandle, StepNeeds
from nanovllm.kernels.matmul_units import counted_tokens
from nanovllm.sampling_params import MAX_LOGPROBS
from nanovllm.utils.env import num_usable_cores

_PROMPT_LEN = 16
_MAX_THREADS = 8

# Parts of a step that only some requests need run kernels of their own. How a token is chosen differs where tokens are
# truncated and where logits are edited.
_OPTIONAL_PARTS = (
    StepNeeds(truncates=True),
    StepNeeds(edits_logits=True),
    StepNeeds(truncates=True, edits_logits=True),
    StepNeeds(num_logprobs=MAX_LOGPROBS),
)


class WarmUp:
    """Runs small steps in background threads, on weights that may not be loaded yet; the results are discarded.

    Triton compiles a kernel when it is first launched, and lets other threads run meanwhile.
    submit: launches a step of a model runner whose rows, and a cache of the null block, are allocated.
    drafts: also compile what steps with drafts need. draft_model: also what a draft model needs. everything: also what
    only some requests need, such as top-k sampling and log-probabilities.
    """

    def __init__(
        self,
        submit: Callable[[ScheduledBatch], StepHandle],
        max_num_rows: int,
        *,
        drafts: bool = False,
        draft_model: bool = False,
        everything: bool = False,
    ) -> None:
        self._submit = submit
        self._batches: queue.SimpleQueue[ScheduledBatch] = queue.SimpleQueue()
        batches = _batches(max_num_rows, drafts=drafts, draft_model=draft_model, everything=everything)
        for batch in batches:
            self._batches.put(batch)
        self._threads = [
            Thread(target=self._run, daemon=True) for _ in range(min(len(batches), num_usable_cores(), _MAX_THREADS))
        ]
        for thread in self._threads:
            thread.start()

    def wait(self) -> None:
        """Waits until all steps have run."""
        for thread in self._threads:
            thread.join()

    def _run(self) -> None:
        while True:
            try:
                batch = self._batches.get_nowait()
            except queue.Empty:
                return
            with suppress(Exception):  # start-up's largest steps raise the same error again, and report it
                self._submit(batch).wait()


def _batches(max_num_rows: int, *, drafts: bool, draft_model: bool, everything: bool) -> Sequence[ScheduledBatch]:
    """Returns steps that together launch all kernels. Those that take longest to compile come first."""
    opened = OpenedRow(0, np.zeros(_PROMPT_LEN, dtype=np.int32), temperature=1.0, seed=0)
    prefill = ScheduledBatch.build(
        0,
        closed=[0],
        opened=[opened],
        blocks=[(0, 0, 0)],
        chunks=[Chunk(row=0, start=0, length=_PROMPT_LEN)],
        num_final_chunks=1,
    )
    # How products and attention are computed depends on the number of rows: by powers of two, or as tiles count them.
    sizes = sorted({min(counted_tokens(num_rows), max_num_rows) for num_rows in range(1, max_num_rows + 1)})
    decodes = [(size, StepNeeds()) for size in sizes]
    if everything:
        decodes += [(1, needs) for needs in _OPTIONAL_PARTS] + [(size, StepNeeds(shares_prefix=True)) for size in sizes]
    first = [prefill]
    if drafts:
        proposals = [(0, 1)] if draft_model else []
        draft = (max_num_rows - 1, 0, 0, 1, 0)
        first.append(ScheduledBatch.build(0, drafts=[draft], proposals=proposals, decode_rows=[0]))
    return [*first, *(ScheduledBatch.build(0, decode_rows=range(size), needs=needs) for size, needs in decodes)]
