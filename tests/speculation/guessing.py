"""Speculation with random drafts, right and wrong ones, so that schedules have all kinds of them."""

from __future__ import annotations

import random
from collections.abc import Callable

from nanovllm.config import EngineConfig, ResolvedConfig
from nanovllm.engine.batch import IntArray
from nanovllm.engine.observer import EngineObserver
from nanovllm.engine.sequence import Sequence
from nanovllm.engine.speculation import SpeculationFactory
from nanovllm.speculation.drafter import Drafter
from nanovllm.speculation.proposers import Proposer
from nanovllm.speculative_config import SpeculativeConfig

Truth = Callable[[list[int], int], list[int]]  # takes tokens, returns that many tokens that follow them


class Guesser:
    """Proposes what follows, but for some tokens that are wrong, or nothing."""

    def __init__(self, truth: Truth, rng: random.Random, vocab_size: int) -> None:
        self._truth, self._rng, self._vocab_size = truth, rng, vocab_size

    def read(self, tokens: IntArray, limit: int) -> int:
        return 0

    def propose(self, tokens: IntArray, limit: int) -> list[int]:
        if self._rng.random() < 0.3:
            return []
        right = self._truth(tokens.tolist(), self._rng.randint(1, limit))
        return [token if self._rng.random() < 0.8 else self._rng.randrange(self._vocab_size) for token in right]


class GuessingDrafter(Drafter):
    """Drafts whole proposals, whatever became of earlier ones."""

    def __init__(
        self, resolved: ResolvedConfig, observer: EngineObserver, truth: Truth, seed: int, max_draft: int
    ) -> None:
        super().__init__(SpeculativeConfig("ngram", num_speculative_tokens=max_draft), resolved, observer)
        self._truth, self._rng, self._vocab_size = truth, random.Random(seed), resolved.vocab_size

    def _make_proposer(self, sequence: Sequence) -> Proposer:
        return Guesser(self._truth, self._rng, self._vocab_size)

    def _length(self, share: float, num_rows: int, longest: int) -> int:
        return longest


def guessing(truth: Truth, seed: int, max_draft: int) -> SpeculationFactory:
    def make(config: EngineConfig, resolved: ResolvedConfig, observer: EngineObserver) -> GuessingDrafter:
        return GuessingDrafter(resolved, observer, truth, seed, max_draft)

    return make
