"""PrefillPolicy: how many prompt tokens a step computes, and which prompts they belong to."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from nanovllm.config import ResolvedConfig
from nanovllm.engine.batch import ScheduledBatch
from nanovllm.engine.row_table import RowArray, RowTable
from nanovllm.engine.sequence import Sequence
from nanovllm.engine.step_time_model import StepSize, StepTimeModel

# With the target "auto", a step with prompts may take this many times as long as one that only decodes, and
# at least `_SHORTEST` seconds. For a prompt that has waited, it may take a tenth of that time, up to `_MOST` times as
# long as otherwise: where prompts are most of the work, a queue would not get shorter with half of the device's time.
_MULTIPLE = 2.2
_SHORTEST = 12e-3
_WAIT_SHARE = 0.1
_MOST = 3
# Prompt tokens that a step may always compute beside decoding, whatever the target: prompts must make progress.
MIN_PREFILL_TOKENS = 64
# A prompt that needs more steps than this lets short prompts behind it go first, with a quarter of the tokens.
_PATIENCE = 4
_SHARE = 4
_LOOK_AHEAD = 100  # waiting sequences among which short prompts are looked for
# The part of the KV cache that stays free when a waiting sequence is admitted beside running ones, for their growth.
_WATERMARK = 0.05


@dataclass(frozen=True)
class PrefillBudget:
    """How many prompt tokens a step may compute, and what decides it."""

    num_tokens: int
    reason: str


class PrefillPolicy:
    """Decides what prompts get of a step. It changes when tokens come, never which.

    Decode rows come first: each has its token in every step. How many prompt tokens the step computes beside them
    decides how long they wait, and is limited by `max_prefill_tokens_beside_decode` and by a target for the step's
    time, `inter_token_latency_target_ms`, which is turned into tokens by what steps took so far.
    """

    def __init__(self, config: ResolvedConfig) -> None:
        self.max_num_batched_tokens = config.max_num_batched_tokens
        self.max_prefill_tokens_beside_decode = config.max_prefill_tokens_beside_decode
        target_ms = config.inter_token_latency_target_ms
        self._has_target = target_ms is not None
        self._target = target_ms / 1e3 if isinstance(target_ms, float) else None  # seconds; None: it adapts
        self.watermark = int(_WATERMARK * config.num_blocks)  # blocks
        self._times = StepTimeModel()
        self._in_flight: deque[tuple[StepSize, float]] = deque()  # each with when it was planned
        self._collected = 0.0  # when the last step was collected
        self._credit = 0  # prompt tokens of the step that short prompts may take before a long one

    def budget(self, rows: RowTable, decode_rows: RowArray, prompt: Sequence, now: float) -> PrefillBudget:
        """Returns how many prompt tokens the next step, planned at `now`, may compute beside `decode_rows`.

        prompt: the sequence to which the first of these tokens belong.
        """
        left = self.max_num_batched_tokens - len(decode_rows)
        limits = {"max_num_batched_tokens": left}
        if len(decode_rows) and self.max_prefill_tokens_beside_decode is not None:
            limits["max_prefill_tokens_beside_decode"] = self.max_prefill_tokens_beside_decode
        if len(decode_rows) and self._has_target:
            context = _context(rows, decode_rows)
            start = 0 if prompt.row is None else int(rows.num_computed[prompt.row])
            target = self._target or self._adapted_target(context, now - prompt.queued)
            num_tokens = self._times.num_prompt_tokens(context, start, target, left)
            limits["inter_token_latency_target_ms"] = max(num_tokens, MIN_PREFILL_TOKENS)
        reason = min(limits, key=limits.__getitem__)
        return PrefillBudget(limits[reason], reason)

    def _adapted_target(self, context: int, waited: float) -> float:
        """Returns how many seconds a step may take that decodes rows with this context."""
        usual = max(_MULTIPLE * self._times.seconds(StepSize(context)), _SHORTEST)
        return min(max(usual, _WAIT_SHARE * waited), _MOST * usual)

    def share(self, num_left: int, budget: int) -> None:
        """Begins a step of `budget` prompt tokens in which a prompt has `num_left` to compute.

        If it needs more than a few such steps, a share of them belongs to short prompts behind it. What these do not
        use is kept for later steps, up to a whole one.
        """
        self._credit = 0 if num_left <= _PATIENCE * budget else min(self._credit + budget // _SHARE, budget)

    def overtaking(self, waiting: Iterable[Sequence]) -> Sequence | None:
        """Returns the first waiting sequence that fits whole into what the step has for short prompts, or None."""
        for sequence in itertools.islice(waiting, _LOOK_AHEAD) if self._credit else ():
            whole_vocabulary = sequence.params.prompt_logprobs == -1  # its prompt may need several steps
            if len(sequence.token_ids) <= self._credit and not sequence.waits_for_grammar and not whole_vocabulary:
                return sequence
        return None

    def overtook(self, num_tokens: int) -> None:
        """Takes the tokens that were planned for the result of `overtaking`."""
        self._credit -= num_tokens

    def step_planned(self, batch: ScheduledBatch, rows: RowTable, now: float) -> None:
        """Takes the make-up of a step. now: seconds of the engine's clock."""
        if self._has_target:
            starts, lengths = batch.chunks["start"].astype(np.float64), batch.chunks["length"]
            num_pairs = float((lengths * (starts + lengths / 2)).sum())
            context = _context(rows, batch.decode_rows)
            self._in_flight.append((StepSize(context, batch.num_prefill_tokens, num_pairs), now))

    def step_collected(self, now: float, gpu_ms: float | None) -> None:
        """Takes the time of the oldest step in flight: on the GPU, or else since the step before it was collected."""
        if self._has_target:
            size, planned = self._in_flight.popleft()
            seconds = now - max(self._collected, planned) if gpu_ms is None else gpu_ms / 1e3
            self._times.observe(size, seconds)
            self._collected = now


def _context(rows: RowTable, decode_rows: npt.NDArray[np.integer[Any]]) -> int:
    """Returns how many tokens a step's decode rows read."""
    return int(rows.num_computed[decode_rows].sum())
