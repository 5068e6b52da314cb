"""ModelDrafter: decides for which rows a draft model drafts tokens, and which of these are verified."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from nanovllm.config import ResolvedConfig
from nanovllm.engine.batch import IntArray, ScheduledBatch, StepResult
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
_LONGEST_PAUSE = 32  # tokens between two trials


class ModelProposer:
    """Proposes what the draft model drafted for a sequence, while it has not grown since.

    A sequence whose drafts do not pay is given a trial now and then: one token is drafted, and compared with the one
    that is sampled. Each trial that fails doubles the pause before the next one, and each that succeeds halves it.
    """

    def __init__(self) -> None:
        self.num_wanted = 0  # tokens to draft after the next step of the sequence
        self._drafted: list[int] = []
        self._num_tokens = 0  # of the sequence, when they were drafted
        self._pause = 1
        self._next_trial = 0  # the number of tokens at which there is one

    def take(self, drafted: list[int], num_tokens: int) -> None:
        """Takes the tokens that the draft model drafted to follow the `num_tokens` of the sequence."""
        self._drafted, self._num_tokens = drafted, num_tokens

    def read(self, tokens: IntArray, limit: int) -> int:
        if self._drafted and len(tokens) > self._num_tokens:
            is_right = self._drafted[0] == int(tokens[self._num_tokens])
            self._pause = max(self._pause // 2, 1) if is_right else min(2 * self._pause, _LONGEST_PAUSE)
            self._next_trial = len(tokens) + self._pause - 1
            self._drafted = []
        return 0

    def propose(self, tokens: IntArray, limit: int) -> list[int]:
        return self._drafted[:limit] if len(tokens) == self._num_tokens else []

    def wants_trial(self, num_tokens: int) -> bool:
        """Returns whether a sequence of `num_tokens` tokens gets a trial; then there is no other before its result."""
        if num_tokens < self._next_trial:
            return False
        self._next_trial = num_tokens + _LONGEST_PAUSE
        return True


class ModelDrafter(Drafter):
    """Lets a draft model draft tokens after a step, and verifies them in the next one.

    The row of a sequence whose drafts pay is left out of the step that is planned before its drafts are read. A trial
    does not hold up its row.
    """

    def __init__(self, config: SpeculativeConfig, resolved: ResolvedConfig, observer: EngineObserver) -> None:
        super().__init__(config, resolved, observer)
        self._token_cost = resolved.draft_cost + _LAUNCH_COST

    def _make_proposer(self, sequence: Sequence) -> ModelProposer:
        return ModelProposer()

    def _length(self, share: float, num_rows: int, longest: int) -> int:
        return draft_length(share, num_rows, longest, overlaps=self._overlaps, token_cost=self._token_cost)

    def _speculates(self, state: DraftState, num_rows: int, longest: int) -> bool:
        proposer = _proposer(state)
        length = self._length(state.rate.share, num_rows, min(self._config.max_draft, longest))
        proposer.num_wanted = length or int(proposer.wants_trial(state.num_tokens))
        return length > 0

    def draft(self, rows: RowTable, decode_rows: RowArray, blocks: BlockManager, num_tokens: int) -> StepDrafts:
        drafts = super().draft(rows, decode_rows, blocks, num_tokens)
        if len(decode_rows) > MAX_DRAFTING_ROWS:
            return drafts
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

    def rounds(self, batch: ScheduledBatch, result: StepResult, rows: RowTable) -> Iterator[tuple[IntArray, RowArray]]:
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
