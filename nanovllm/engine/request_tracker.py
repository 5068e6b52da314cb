"""RequestTracker: follows each request from its arrival to its end, and tells the other observers how it ended."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from nanovllm.engine.batch import ScheduledBatch
from nanovllm.engine.observer import (
    CollectedStep,
    EngineObserver,
    EngineStart,
    Observers,
    Preemption,
    SampledStep,
)
from nanovllm.engine.queue_waits import QueueWaits
from nanovllm.engine.request_end import Cause, CompletionEnd, RequestEnd, Times, cause_of
from nanovllm.engine.row_table import RowTable
from nanovllm.engine.sequence import Sequence
from nanovllm.engine.stalls import Stalls
from nanovllm.utils.caller import Caller, active_span


def track_requests(observers: Iterable[EngineObserver]) -> Observers:
    """Returns `observers` as one observer, with the parts that call their `request_finished` and `delayed`."""
    observers = list(observers)
    listener = Observers(observers)
    stalls = Stalls(listener)
    tracker, queue_waits = RequestTracker(stalls, listener), QueueWaits(listener)
    return Observers([stalls, tracker, queue_waits, *observers], listener.engine_id)


@dataclass
class _Request:
    """An unfinished request: its sequences, and the engine's load at its arrival."""

    queued_behind: int
    kv_cache_usage: float
    sequences: list[Sequence] = field(default_factory=list)
    ended: dict[int, CompletionEnd] = field(default_factory=dict)  # by seq_id
    first_steps: dict[int, int] = field(default_factory=dict)  # by seq_id


class RequestTracker(EngineObserver):
    """Calls `request_finished` of `listener` once for each request, when all its completions have ended."""

    def __init__(self, stalls: Stalls, listener: EngineObserver) -> None:
        self._stalls, self._listener = stalls, listener
        self._clock = time.monotonic
        self._requests: dict[str, _Request] = {}
        self._waiting: dict[int, str] = {}  # the request of each waiting sequence, by seq_id
        self._num_waiting: Counter[str] = Counter()  # waiting sequences of each request
        self._kv_cache_usage = 0.0
        self._planned = self._collected = 0  # the last step that was planned, and that was collected
        self._rows: RowTable | None = None

    def engine_started(self, start: EngineStart) -> None:
        self._clock = start.clock

    def request_added(self, sequence: Sequence) -> None:
        name = sequence.whole_request_id
        if name not in self._requests:
            self._requests[name] = _Request(len(self._num_waiting), self._kv_cache_usage)
        self._requests[name].sequences.append(sequence)
        self._wait(sequence)

    def request_refused(self, request_id: str, error: BaseException, client_request_id: str | None = None) -> None:
        end = RequestEnd(
            request_id=request_id,
            arrival=self._clock(),
            completions=(),
            error=error,
            caller=Caller(active_span(), client_request_id),
            queued_behind=len(self._num_waiting),
            kv_cache_usage=self._kv_cache_usage,
        )
        self._listener.request_finished(end)

    def sequence_scheduled(self, sequence: Sequence, num_cached: int) -> None:
        self._run(sequence)
        request = self._requests.get(sequence.whole_request_id)
        if request is not None:
            request.first_steps.setdefault(sequence.seq_id, self._planned + 1)

    def sequence_preempted(self, sequence: Sequence, preemption: Preemption) -> None:
        self._wait(sequence)

    def batch_scheduled(self, batch: ScheduledBatch, rows: RowTable) -> None:
        self._planned, self._rows = batch.step, rows

    def tokens_sampled(self, step: SampledStep) -> None:
        self._collected = step.batch.step

    def step_collected(self, step: CollectedStep) -> None:
        self._kv_cache_usage = step.load.used_blocks / step.load.num_blocks

    def sequence_finished(self, sequence: Sequence) -> None:
        self._end(sequence, cause_of(sequence))

    def engine_failed(self, error: BaseException, lost: Iterable[Sequence], goes_on: bool) -> None:
        for sequence in lost:
            self._end(sequence, "failed" if isinstance(error, Exception) else "abort", error)
        self._requests.clear()  # what Ctrl-C broke off while it ended
        self._waiting.clear()
        self._num_waiting.clear()
        self._stalls.clear()
        self._collected = self._planned  # the steps in flight are lost
        self._kv_cache_usage, self._rows = 0.0, None

    def engine_exiting(self, unfinished: Iterable[Sequence]) -> None:
        for sequence in unfinished:
            self._end(sequence, "abort")

    def _wait(self, sequence: Sequence) -> None:
        name = sequence.whole_request_id
        self._waiting[sequence.seq_id] = name
        self._num_waiting[name] += 1

    def _run(self, sequence: Sequence) -> None:
        """Counts a sequence as waiting no longer, if it did."""
        name = self._waiting.pop(sequence.seq_id, None)
        if name is not None:
            self._num_waiting[name] -= 1
            if not self._num_waiting[name]:
                del self._num_waiting[name]

    def _end(self, sequence: Sequence, cause: Cause, error: BaseException | None = None) -> None:
        """Records how a sequence ended, and tells how its request did if it was the last one."""
        self._run(sequence)
        name = sequence.whole_request_id
        request = self._requests.setdefault(name, _Request(len(self._num_waiting), self._kv_cache_usage))
        if sequence not in request.sequences:  # Ctrl-C broke off `request_added`
            request.sequences.append(sequence)
        finished = self._clock() if sequence.finished is None else sequence.finished
        first_step = request.first_steps.get(sequence.seq_id)
        request.ended[sequence.seq_id] = CompletionEnd(
            seq_id=sequence.seq_id,
            cause=cause,
            finish_reason=sequence.finish_reason or "abort",
            stop_reason=sequence.stop_reason,
            finished=finished,
            decoding_seconds=self._decoding_seconds(sequence),
            times=Times.of(sequence, finished),
            num_output_tokens=self._num_output_tokens(sequence),
            num_preemptions=len(sequence.preempted_at),
            first_step=first_step,
            last_step=None if first_step is None else max(self._collected, first_step),
            stall=self._stalls.take(sequence.seq_id),
        )
        if len(request.ended) == len(request.sequences):
            del self._requests[name]
            self._listener.request_finished(_request_end(name, request, error))

    def _decoding_seconds(self, sequence: Sequence) -> float:
        """Returns the seconds from the first token to the last."""
        last = sequence.last_token
        if self._rows is not None and sequence.row is not None and self._rows.sequences[sequence.row] is sequence:
            last = float(self._rows.last_token[sequence.row])
        return 0.0 if last is None or sequence.first_token is None else last - sequence.first_token

    def _num_output_tokens(self, sequence: Sequence) -> int:
        """Returns the tokens so far. Those of a sequence that holds a row are in the row table."""
        num_tokens = len(sequence.token_ids)
        if self._rows is not None and sequence.row is not None:
            num_tokens = int(self._rows.num_tokens[sequence.row])
        return num_tokens - sequence.num_prompt_tokens


def _request_end(request_id: str, request: _Request, error: BaseException | None) -> RequestEnd:
    first, *_ = request.sequences
    errors = [each.error for each in request.sequences if each.error is not None]
    return RequestEnd(
        request_id=request_id,
        arrival=first.arrival,
        completions=tuple(request.ended[each.seq_id] for each in request.sequences),
        error=error if error is not None else errors[0] if errors else None,
        lost=error is not None,
        caller=first.caller,
        streamed=any(each.streamed for each in request.sequences),
        num_prompt_tokens=first.num_prompt_tokens,
        num_cached_tokens=first.num_cached_tokens or 0,
        queued_behind=request.queued_behind,
        kv_cache_usage=request.kv_cache_usage,
    )
