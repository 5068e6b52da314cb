"""Stalls: keeps the longest time between two tokens of each sequence, and what the engine did in it."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from nanovllm.engine.batch import ScheduledBatch
from nanovllm.engine.observer import (
    CollectedStep,
    Delay,
    EngineObserver,
    EngineStart,
    Preemption,
    SampledStep,
)
from nanovllm.engine.request_end import Stall, StallCause
from nanovllm.engine.row_table import RowArray, RowTable
from nanovllm.engine.sequence import Sequence
from nanovllm.utils import env

_MAX_NAMES = 8  # requests that a reason names
_SAME = 1e-6  # seconds below which two times count as equal


@dataclass(frozen=True)
class _Reason:
    cause: StallCause
    step: int
    text: str


class Stalls(EngineObserver):
    """Follows the running sequences in arrays indexed by row, so that a step costs a few array operations.

    Each array holds values of the sequence `_seq_ids[row]`. A sequence that gives its row to another one, because it
    was preempted, has its values in `_kept` until it runs again.
    """

    def __init__(self, listener: EngineObserver) -> None:
        self._listener = listener  # its `delayed` is called
        self._slow_seconds = env.log_slow_seconds()
        self._clock = time.monotonic
        self._seq_ids: npt.NDArray[np.int64] = np.empty(0, dtype=np.int64)
        self._longest: npt.NDArray[np.float64] = np.empty(0)  # seconds
        self._reasons: npt.NDArray[np.object_] = np.empty(0, dtype=np.object_)
        self._rows: dict[int, int] = {}  # by seq_id: the row with its values
        self._admitted: set[int] = set()  # sequences with a row that have no token from it yet
        self._kept: dict[int, tuple[float, _Reason | None]] = {}
        self._preemptions: dict[int, list[str]] = {}  # by seq_id: the reasons since its last token
        self._collected: float | None = None  # when the previous step was collected
        self._left_at: float | None = None  # when the loop ended a step; None: it has planned another one since
        self._outside = 0.0  # seconds from there to the next plan, since the previous step was collected

    def engine_started(self, start: EngineStart) -> None:
        self._clock = start.clock
        self._collected = self._left_at = start.clock()

    def step_collected(self, step: CollectedStep) -> None:
        self._left_at = self._clock()

    def batch_scheduled(self, batch: ScheduledBatch, rows: RowTable) -> None:
        if self._left_at is not None:
            self._outside += self._clock() - self._left_at
            self._left_at = None

    def sequence_scheduled(self, sequence: Sequence, num_cached: int) -> None:
        self._admitted.add(sequence.seq_id)

    def sequence_preempted(self, sequence: Sequence, preemption: Preemption) -> None:
        shortage = preemption.shortage
        whom = "its own next token" if shortage.oldest is sequence else shortage.oldest.request_id
        reason = f"for {whom} (needed {shortage.needed} blocks, {shortage.free} free)"
        self._preemptions.setdefault(sequence.seq_id, []).append(reason)

    def tokens_sampled(self, step: SampledStep) -> None:
        rows, sampled, gaps = step.rows, step.sampled, step.gaps
        if len(self._seq_ids) != len(rows.sequences):
            self._longest = np.zeros(len(rows.sequences))
            self._reasons = np.empty(len(rows.sequences), dtype=np.object_)
            self._seq_ids = np.full(len(rows.sequences), -1, dtype=np.int64)  # last: Ctrl-C may come between
        elapsed, self._collected = 0.0 if self._collected is None else step.now - self._collected, step.now
        outside, self._outside = self._outside, 0.0
        if self._admitted:
            for index in np.flatnonzero(self._seq_ids[sampled] != rows.seq_id[sampled]).tolist():
                self._take_row(rows, int(sampled[index]), float(gaps[index]), step.batch.step)
        longer = gaps > self._longest[sampled]
        any_longer = bool(np.count_nonzero(longer))
        if any_longer:
            stalled = sampled[longer]
            self._longest[stalled] = gaps[longer]
            self._reasons[stalled] = _reason(step, elapsed, outside)
            skipped = stalled[gaps[longer] > elapsed + _SAME]
            if len(skipped):
                self._explain_skipped(rows, skipped, step.batch.step)
        if elapsed > self._slow_seconds or (any_longer and gaps.max() > self._slow_seconds):
            self._tell_delay(step, elapsed, outside)

    def take(self, seq_id: int) -> Stall | None:
        """Returns the longest stall of a sequence that has ended, and forgets the sequence."""
        seconds, reason = self._values(seq_id)
        self._rows.pop(seq_id, None)
        self._admitted.discard(seq_id)
        self._preemptions.pop(seq_id, None)
        return None if reason is None else Stall(seconds, reason.cause, reason.step, reason.text)

    def clear(self) -> None:
        """Forgets every sequence."""
        for container in (self._rows, self._admitted, self._kept, self._preemptions):
            container.clear()

    def _values(self, seq_id: int) -> tuple[float, _Reason | None]:
        row = self._rows.get(seq_id)
        if row is None:
            return self._kept.pop(seq_id, (0.0, None))
        return float(self._longest[row]), self._reasons[row]

    def _take_row(self, rows: RowTable, row: int, gap: float, step: int) -> None:
        """Makes the arrays follow the sequence that now holds `row`. gap: before its token of this step."""
        before, seq_id = int(self._seq_ids[row]), int(rows.seq_id[row])
        if self._rows.get(before) == row:
            del self._rows[before]
            self._kept[before] = float(self._longest[row]), self._reasons[row]
        self._longest[row], self._reasons[row] = self._values(seq_id)
        self._seq_ids[row], self._rows[seq_id] = seq_id, row
        self._admitted.discard(seq_id)
        preemptions = self._preemptions.pop(seq_id, None)
        if preemptions is not None and gap > self._longest[row]:
            self._longest[row] = gap
            self._reasons[row] = _Reason("preempted", step, "preempted " + ", then ".join(preemptions))

    def _tell_delay(self, step: SampledStep, elapsed: float, outside: float) -> None:
        """Tells the listener of a slow step or a long wait. Time in which the caller ran no step does not count."""
        kind: Literal["step", "wait"] = "step"
        seconds, name = elapsed - outside, None
        reason = _reason(step, seconds, outside=0.0)
        if len(step.gaps):
            index = int(step.gaps.argmax())
            gap, row = float(step.gaps[index]), int(step.sampled[index])
            name = step.rows.sequence(row).request_id if gap > 0 else None
            if gap > elapsed + _SAME:  # it took no part in the steps before
                kind, seconds = "wait", gap
                reason = self._reasons[row] if gap == self._longest[row] else reason
        if seconds > self._slow_seconds:
            self._listener.delayed(Delay(kind, seconds, step.batch.step, name, reason.text, step.now))

    def _explain_skipped(self, rows: RowTable, skipped: RowArray, step: int) -> None:
        """Sets the reasons of rows that took no part in the previous step."""
        with_grammar = rows.has_grammar[skipped]
        if with_grammar.any():
            text = "its grammar had to accept a token before the next one"
            self._reasons[skipped[with_grammar]] = _Reason("grammar", step, text)
        if not with_grammar.all():
            text = "no KV block was free for its next token"
            self._reasons[skipped[~with_grammar]] = _Reason("blocks", step, text)


def _reason(step: SampledStep, elapsed: float, outside: float) -> _Reason:
    """Returns what the engine did in the `elapsed` seconds since the previous step was collected."""
    batch = step.batch
    if outside > elapsed / 2:
        return _Reason("idle", batch.step, f"the caller ran no step for {outside:.3f}s")
    if len(batch.chunks):
        names = ", ".join(step.rows.sequence(row).request_id for row in batch.chunks["row"][:_MAX_NAMES].tolist())
        more = f" and {len(batch.chunks) - _MAX_NAMES} more" if len(batch.chunks) > _MAX_NAMES else ""
        text = f"step {batch.step} computed {batch.num_prefill_tokens} prompt tokens of {names}{more}"
        return _Reason("prefill", batch.step, text)
    if step.gpu_ms is not None and step.gpu_ms / 1e3 < elapsed / 2:
        text = f"the device computed for {step.gpu_ms:.1f} of {elapsed * 1e3:.1f}ms"
        return _Reason("host", batch.step, text)
    return _Reason("decode", batch.step, f"step {batch.step} decoded {len(batch.decode_rows)} sequences")
