"""ModelDrafter: decides for which rows a draft model drafts tokens, and which of these are verified."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from collections.abc import Sequence as Seq

import numpy as np

from nanovllm.config import ResolvedConfig
from nanovllm.engine.batch import Chunk, IntArray, ScheduledBatch, StepResult
from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.observer import EngineObserver
from nanovllm.engine.row_table import RowArray, RowTable
from nanovllm.engine.sequence import Sequence
from nanovllm.engine.speculation import StepDrafts
from nanovllm.speculation.draft_length import draft_length
from nanovllm.speculation.drafter import Drafter, DraftState
from nanovllm.speculative_config import MAX_DRAFTING_ROWS, SpeculativeConfig

# What a token of the draft model takes beside reading its weights, as a share of a step: its kernels are short.
_LAUNCH_COST = 0.1
_DO_NOT_PAY = "drafts do not pay"
_MAX_TRIALS = 12  # tokens that are drafted of a sequence to see whether its drafts pay
_TRIALS_EARNED = 1 / 8  # with each step whose drafts pay


class ModelProposer:
    """Proposes what the draft model drafted for a sequence, while it has not grown since.

    For a sequence whose drafts do not pay, one token after each step is a trial: it is compared with the one that is
    sampled.
    """

    def __init__(self) -> None:
        self.num_wanted = 0  # tokens to draft after the next step of the sequence
        self.trials_left: float = _MAX_TRIALS
        self._drafted: list[int] = []
        self._num_tokens = 0  # of the sequence, when they were drafted

    def take(self, drafted: list[int], num_tokens: int) -> None:
        """Takes the tokens that the draft model drafted to follow the `num_tokens` of the sequence."""
        self._drafted, self._num_tokens = drafted, num_tokens

    def read(self, tokens: IntArray, limit: int) -> int:
        return 0

    def propose(self, tokens: IntArray, limit: int) -> list[int]:
        return self._drafted[:limit] if len(tokens) == self._num_tokens else []


class ModelDrafter(Drafter):
    """Lets a draft model draft tokens after a step, and verifies them in the next one.

    The row of a sequence whose drafts pay is left out of the step that is planned before its drafts are read. A trial
    does not hold up its row. When a sequence's drafts would not pay even if all its remaining trials were right, it has
    none until it ends. A step whose sequences all have no drafts does not run the draft model. The draft model's cache
    then lacks the step's tokens, which makes drafts worse, but changes no token.
    """

    max_idle_rows = MAX_DRAFTING_ROWS  # a trial is compared with the token after it, which takes no time

    def __init__(self, config: SpeculativeConfig, resolved: ResolvedConfig, observer: EngineObserver) -> None:
        super().__init__(config, resolved, observer)
        self._token_cost = resolved.draft_cost + _LAUNCH_COST

    def _make_proposer(self, sequence: Sequence) -> ModelProposer:
        return ModelProposer()

    def _length(self, share: float, num_rows: int, longest: int) -> int:
        return draft_length(share, num_rows, longest, overlaps=self._overlaps, token_cost=self._token_cost)

    def _speculates(self, sequence: Sequence, state: DraftState, num_rows: int, longest: int) -> bool:
        proposer = _proposer(state)
        longest = min(self._config.max_draft, longest)
        length = self._length(state.rate.share, num_rows, longest)
        if length > 0:
            proposer.trials_left = min(proposer.trials_left + _TRIALS_EARNED, _MAX_TRIALS)
        elif not self._may_pay(state, num_rows, longest):
            self._turn_off(sequence, _DO_NOT_PAY)
        elif state.proposal:
            proposer.trials_left -= 1
        proposer.num_wanted = max(length, 1)
        return length > 0

    def _may_pay(self, state: DraftState, num_rows: int, longest: int) -> bool:
        """Returns whether drafts of a sequence would pay if all the trials that are left were right."""
        return self._length(state.rate.after(_proposer(state).trials_left), num_rows, longest) > 0

    def _runs_draft_model(self, rows: RowTable, decode_rows: RowArray, chunks: Seq[Chunk]) -> bool:
        """Returns whether a step runs the draft model. If not, its sequences have no drafts any more."""
        num_rows = int(np.count_nonzero(rows.decoding))
        prompts = [rows.sequence(chunk.row) for chunk in chunks]
        for sequence in prompts:
            state = self._state_of(sequence)
            if state is not None and not self._may_pay(state, num_rows, self._config.max_draft):
                self._turn_off(sequence, _DO_NOT_PAY)
        computed = [*prompts, *map(rows.sequence, decode_rows.tolist())]
        drafting = [sequence for sequence in computed if self._states[sequence] is not None]
        if num_rows <= MAX_DRAFTING_ROWS:
            return bool(drafting)
        for sequence in drafting:
            self._turn_off(sequence, f"more than {MAX_DRAFTING_ROWS} sequences decode")
        return False

    def draft(
        self, rows: RowTable, decode_rows: RowArray, chunks: Seq[Chunk], blocks: BlockManager, num_tokens: int
    ) -> StepDrafts:
        drafts = super().draft(rows, decode_rows, chunks, blocks, num_tokens)
        if not self._runs_draft_model(rows, decode_rows, chunks):
            return drafts._replace(skips_draft_model=True)
        num_drafted = Counter(draft.source for draft in drafts.tokens)
        new_blocks, proposals = [*drafts.blocks], list[tuple[int, int]]()
        for row in decode_rows.tolist():
            state = self._states.get(rows.sequence(row))
            if state is None or not _proposer(state).num_wanted:
                continue
            most = int(rows.num_tokens[row] + rows.num_pending[row]) + num_drafted[row] + 1  # tokens after the step
            wanted = min(_proposer(state).num_wanted, int(rows.max_num_tokens[row]) - most - 1)
            _proposer(state).num_wanted = 0
            if wanted > 0:  # the last drafted token is not computed before it is verified
                wanted = min(wanted, self._make_room(rows, row, most + wanted - 1, blocks, new_blocks) - most + 1)
            if wanted > 0:
                proposals.append((row, wanted))
        proposals.sort(key=lambda proposal: -proposal[1])
        return StepDrafts(drafts.tokens, new_blocks, proposals)

    def rounds(self, batch: ScheduledBatch, result: StepResult, rows: RowTable) -> Iterator[tuple[RowArray, RowArray]]:
        yield from super().rounds(batch, result, rows)
        proposals = batch.section("proposals").tolist()
        if result.drafts is None:
            return
        for (row, num_tokens), drafted in zip(proposals, result.drafts.tolist(), strict=True):
            sequence = rows.sequences[row]
            if sequence is not None and not rows.stopped[row] and (state := self._states.get(sequence)) is not None:
                _proposer(state).take(drafted[:num_tokens], int(rows.num_tokens[row]))


def _proposer(state: DraftState) -> ModelProposer:
    assert isinstance(state.proposer, ModelProposer), "each sequence has the proposer that the drafter made"
    return state.proposer
