"""A policy that gives prompts a random part of each step, and a random size of chunks."""

from __future__ import annotations

import random

from nanovllm.config import ResolvedConfig
from nanovllm.engine.prefill_policy import PrefillBudget, PrefillPolicy
from nanovllm.engine.row_table import RowArray, RowTable
from nanovllm.engine.sequence import Sequence


class RandomPolicy(PrefillPolicy):
    """sizes: how many tokens, decode rows included, many of the steps have."""

    def __init__(self, config: ResolvedConfig, seed: int, sizes: tuple[int, ...] = ()) -> None:
        super().__init__(config)
        self._random, self._sizes = random.Random(seed), sizes
        self.watermark = self._random.randrange(3)

    def budget(self, rows: RowTable, decode_rows: RowArray, prompt: Sequence, now: float) -> PrefillBudget:
        most = super().budget(rows, decode_rows, prompt, now).num_tokens
        sizes = [size - len(decode_rows) for size in self._sizes]
        drawn = self._random.choice([1, self._random.randint(1, max(most, 1)), *sizes])
        return PrefillBudget(min(max(drawn, 1), most), "drawn")

    def share(self, num_left: int, budget: int) -> None:
        self._credit = self._random.choice([0, self._random.randint(0, budget), budget])
