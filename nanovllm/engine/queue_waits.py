"""QueueWaits: tells of requests that wait in the queue for long, and what they wait for."""

from __future__ import annotations

from collections.abc import Iterable

from nanovllm.config import ResolvedConfig
from nanovllm.engine.batch import ScheduledBatch
from nanovllm.engine.observer import CollectedStep, Delay, EngineObserver, EngineStart
from nanovllm.engine.row_table import RowTable
from nanovllm.engine.sequence import Sequence
from nanovllm.engine.statistics import Load
from nanovllm.utils import env

_TIMES = 4  # as long as a slow step: a queue moves when a request ends, not with each step


class QueueWaits(EngineObserver):
    """Calls `delayed` of `listener` once for each request that waits for long.

    Requests that an idle engine gets before its first step are a batch, and so are those that arrived no later than the
    first of them. Most of a batch is expected to wait.
    """

    def __init__(self, listener: EngineObserver) -> None:
        self._listener = listener
        self._limit = _TIMES * env.log_slow_seconds()
        self._resolved: ResolvedConfig | None = None
        self._is_running = False  # whether a step was planned since the engine was idle
        self._began = 0.0  # when the first request since then arrived
        self._waiting: dict[int, Sequence] = {}  # by seq_id, in order of arrival

    def engine_started(self, start: EngineStart) -> None:
        self._resolved = start.resolved

    def work_began(self, now: float) -> None:
        self._is_running, self._began = False, now

    def batch_scheduled(self, batch: ScheduledBatch, rows: RowTable) -> None:
        self._is_running = True

    def request_added(self, sequence: Sequence) -> None:
        if self._is_running and sequence.arrival > self._began:
            self._waiting[sequence.seq_id] = sequence

    def sequence_scheduled(self, sequence: Sequence, num_cached: int) -> None:
        self._waiting.pop(sequence.seq_id, None)

    def sequence_finished(self, sequence: Sequence) -> None:
        self._waiting.pop(sequence.seq_id, None)

    def engine_failed(self, error: BaseException, lost: Iterable[Sequence], goes_on: bool) -> None:
        for sequence in lost:
            self._waiting.pop(sequence.seq_id, None)

    def step_collected(self, step: CollectedStep) -> None:
        oldest = next(iter(self._waiting.values()), None)
        if oldest is None or step.collected - oldest.queued <= self._limit:
            return
        del self._waiting[oldest.seq_id]
        seconds, reason = step.collected - oldest.queued, self._reason(oldest, step.load)
        self._listener.delayed(Delay("queue", seconds, step.batch.step, oldest.request_id, reason, step.collected))

    def _reason(self, sequence: Sequence, load: Load) -> str:
        """Returns what `sequence` waits for, and which setting would change that. It is in `_waiting` no longer."""
        if sequence.waits_for_grammar:
            return "its grammar is being compiled"
        ahead = load.num_running + load.num_waiting - 1 - len(self._waiting)
        usage = load.used_blocks / load.num_blocks
        text = f"behind {ahead} request{'' if ahead == 1 else 's'}, the KV cache is {usage:.0%} full"
        max_num_seqs = None if self._resolved is None else self._resolved.max_num_seqs
        if load.num_running == max_num_seqs:
            return f"{text}: raise max_num_seqs from {max_num_seqs}"
        return f"{text}: raise num_kvcache_blocks or gpu_memory_utilization, or lower max_num_seqs"
