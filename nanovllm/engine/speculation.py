"""Speculation: what the scheduler asks of speculative decoding. `nanovllm.speculation` implements it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from collections.abc import Sequence as Seq
from typing import NamedTuple

from nanovllm.config import EngineConfig, ResolvedConfig
from nanovllm.engine.batch import Chunk, RecordArray, ScheduledBatch, StepResult
from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.observer import EngineObserver
from nanovllm.engine.row_table import RowArray, RowTable


class Draft(NamedTuple):
    """One drafted token, an item of the batch's section `drafts` (`kernels.columns.DRAFTS`)."""

    row: int
    source: int
    offset: int
    position: int
    token_id: int


class StepDrafts(NamedTuple):
    """The drafts of a step, what the draft model drafts after it, and the entries of block tables that both need."""

    tokens: list[Draft]
    blocks: list[RecordArray]  # of BLOCKS, each [num_new]
    proposals: Seq[tuple[int, int]] = ()  # rows and numbers of tokens, longest first
    skips_draft_model: bool = False  # the draft model does not compute the step's tokens


NO_DRAFTS = StepDrafts([], [])


class Speculation:
    """Drafts nothing. The subclass in `nanovllm.speculation` guesses tokens that rows may sample next."""

    def watch(self, rows: RowTable) -> None:
        """Takes the tokens that rows got since the last call, and sets `RowTable.speculates`."""

    def forget_outputs(self) -> None:
        """Forgets the outputs of requests that have ended."""

    def draft(
        self, rows: RowTable, decode_rows: RowArray, chunks: Seq[Chunk], blocks: BlockManager, num_tokens: int
    ) -> StepDrafts:
        """Returns drafts of the rows of a step. num_tokens: how many drafted tokens the step may compute."""
        return NO_DRAFTS

    def rounds(self, batch: ScheduledBatch, result: StepResult, rows: RowTable) -> Iterable[tuple[RowArray, RowArray]]:
        """Yields the rows that get a token of a step, and where in the result it is; then those that get another one.

        The caller appends the tokens before it takes the next item, so that a row that ends gets no more.
        """
        return [(batch.sampled_rows, batch.sampled_tokens)]


SpeculationFactory = Callable[[EngineConfig, ResolvedConfig, EngineObserver], Speculation]


def no_speculation(config: EngineConfig, resolved: ResolvedConfig, observer: EngineObserver) -> Speculation:
    """Returns the Speculation of an engine that does not speculate."""
    return Speculation()
