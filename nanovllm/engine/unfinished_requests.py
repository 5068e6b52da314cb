"""UnfinishedRequests: everything an engine holds between `enqueue` and the output that `step` returns.

Requests arrive and are discarded in any thread, at any time, and Ctrl-C may stop either at any line. Each therefore
leaves one note, and the next step acts on it. Only a step changes the scheduler, and a step that breaks off loses all
requests that had started.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass

from nanovllm.engine.batch import ScheduledBatch, StepHandle
from nanovllm.engine.sequence import Sequence
from nanovllm.engine.turns import Call
from nanovllm.errors import StepFailedError
from nanovllm.outputs import RequestOutput, failed_output
from nanovllm.requests.parallel_sampling import ParallelSampling
from nanovllm.sampling_params import StructuredOutputsParams


@dataclass(frozen=True)
class SubmittedStep:
    """A step that the executor runs and whose result is not collected yet."""

    batch: ScheduledBatch
    handle: StepHandle
    submitted: float  # seconds of the engine's clock


@dataclass(eq=False)
class Request:
    """A request and its sequences, one for each completion."""

    request_id: str
    sequences: list[Sequence]
    parallel: ParallelSampling | None  # None for a single completion
    grammar: StructuredOutputsParams | None
    is_discarded: bool = False  # its id is free again, and its output dropped

    @property
    def names(self) -> dict[str, Request]:
        """Returns this request under its id and under those of its sequences."""
        if self.parallel is None:
            return {self.request_id: self}
        return dict.fromkeys([self.request_id, *(sequence.request_id for sequence in self.sequences)], self)

    def add(self, output: RequestOutput) -> RequestOutput | None:
        """Takes the output of one completion. Returns the request's output once all have ended, else None."""
        return output if self.parallel is None else self.parallel.add(output)

    def failed(self, error: BaseException) -> RequestOutput:
        """Returns the output of a request that a failed step has lost."""
        first = self.sequences[0]
        return failed_output(
            self.request_id,
            StepFailedError.after(error),
            prompt=first.prompt,
            prompt_token_ids=first.prompt_token_ids,
            num_completions=len(self.sequences),
            num_cached_tokens=first.num_cached_tokens or 0,
        )


class UnfinishedRequests:
    """The requests that have no output yet, the steps in flight, and the outputs that `step` has not returned yet."""

    def __init__(self) -> None:
        self.lock = threading.RLock()  # of adding and discarding; a garbage collection may discard while it is held
        self.calls: list[Call] = []
        self._arrived: dict[str, Request] = {}  # by all their names, and not started
        self._discarded: deque[Request] = deque()
        self._aborted: deque[Sequence] = deque()
        self._outputs: dict[str, RequestOutput] = {}
        # Changed by steps only:
        self._started: dict[str, Request] = {}  # by all their names
        self.steps: deque[SubmittedStep] = deque()  # oldest first

    def __contains__(self, request_id: object) -> bool:
        return isinstance(request_id, str) and (self.find(request_id) is not None or request_id in self._outputs)

    def __bool__(self) -> bool:
        return bool(self._arrived or self._started or self.steps or self._outputs)

    @property
    def is_draining(self) -> bool:
        """Whether only discarded requests and steps in flight are left."""
        left = not self._arrived and all(request.is_discarded for request in list(self._started.values()))
        return left and bool(self._started or self.steps)

    def find(self, name: str) -> Request | None:
        """Returns the request with this id, its own or a completion's; None when it is unknown or discarded."""
        for requests in (self._arrived, self._started):
            request = requests.get(name)
            if request is not None and not request.is_discarded:
                return request
        return None

    def sequences_of(self, name: str) -> list[Sequence]:
        """Returns the unfinished sequences of a request or a completion; [] when it is unknown."""
        request = self.find(name)
        if request is None:
            return []
        wanted = request.sequences
        if name != request.request_id:
            wanted = [sequence for sequence in wanted if sequence.request_id == name]
        return [sequence for sequence in wanted if sequence.finish_reason is None]

    def requests(self) -> list[Request]:
        """Returns the requests in order of arrival."""
        return list(dict.fromkeys([*self._started.values(), *self._arrived.values()]))

    def running(self) -> list[Sequence]:
        """Returns the sequences that have not ended."""
        return [each for request in self.requests() for each in request.sequences if each.finish_reason is None]

    # Called in any thread

    def add(self, request: Request) -> None:
        """Lets the next step start a request. The caller holds the lock."""
        self._arrived.update(request.names)

    def abort(self, name: str) -> None:
        """Lets the next step end a request, or one of its completions, with the tokens that it has."""
        self._aborted.extend(self.sequences_of(name))

    def discard(self, request_ids: Iterable[str]) -> None:
        """Frees ids, drops their outputs, and lets the next step end their sequences."""
        with self.lock:
            for request_id in list(request_ids):
                request = self.find(request_id)
                if request is not None and request.request_id == request_id:
                    self._discarded.append(request)
                    request.is_discarded = True
                    for name in request.names:
                        self._arrived.pop(name, None)
                self._outputs.pop(request_id, None)

    def take_outputs(self, request_ids: Container[str] | None) -> list[RequestOutput]:
        """Removes and returns the outputs of `request_ids`; None: all that no call waits for."""
        if not self._outputs:
            return []
        wanted = [name for name in list(self._outputs) if self._is_wanted_by(name, request_ids)]
        return [output for name in wanted if (output := self._outputs.pop(name, None)) is not None]

    def _is_wanted_by(self, request_id: str, request_ids: Container[str] | None) -> bool:
        if request_ids is not None:
            return request_id in request_ids
        return not any(request_id in call.request_ids for call in list(self.calls))

    # Called by steps only

    @property
    def has_changes(self) -> bool:
        """Whether requests wait to be started, discarded or aborted."""
        ended = [call for call in self.calls if not call.running.locked()]
        return bool(ended or self._arrived or self._discarded or self._aborted)

    def take_changes(self) -> tuple[list[Request], list[Request]]:
        """Returns the requests to end, which are forgotten, and the requests to start, which count as started."""
        discarded: list[Request] = []
        with self.lock:  # both at once, because an id may be discarded and then used again
            for call in [call for call in self.calls if not call.running.locked()]:
                self.discard(call.request_ids)
                self.calls.remove(call)
            while self._discarded:
                request = self._discarded.popleft()
                self._outputs.pop(request.request_id, None)  # the step before may have built it meanwhile
                if self._started.get(request.request_id) is request:
                    self._remove(request)
                    discarded.append(request)
            arrived = [request for request in dict.fromkeys(self._arrived.values()) if not request.is_discarded]
            for request in arrived:
                self._started.update(request.names)
            self._arrived.clear()
        return discarded, arrived

    def take_aborted(self) -> list[Sequence]:
        """Removes and returns the sequences to abort."""
        return [self._aborted.popleft() for _ in range(len(self._aborted))]

    def is_live(self, sequence: Sequence) -> bool:
        """Returns whether the sequence is the scheduler's, and has not ended."""
        request = self._started.get(sequence.request_id)
        return sequence.finish_reason is None and request is not None and sequence in request.sequences

    def started_sequences(self) -> Iterator[Sequence]:
        """Yields the sequences that have started and not ended, those of several completions more than once."""
        started = self._started.values()
        return (each for request in started for each in request.sequences if each.finish_reason is None)

    def finish(self, sequence: Sequence, output: RequestOutput) -> None:
        """Takes the output of a sequence. Removes its request once all have ended."""
        request = self._started[sequence.request_id]
        whole = request.add(output)
        if whole is not None:
            if not request.is_discarded:
                self._outputs[request.request_id] = whole
            self._remove(request)

    def lose(self, error: BaseException, request_ids: Container[str] | None) -> None:
        """Forgets the steps in flight and all requests that have started.

        request_ids: those of the caller, to which the error is raised. The others get an output with the error.
        """
        for request in dict.fromkeys(self._started.values()):
            if not request.is_discarded and not self._is_wanted_by(request.request_id, request_ids):
                self._outputs[request.request_id] = request.failed(error)
        with self.lock:
            for name, request in self._started.items():
                if self._arrived.get(name) is request:  # `take_changes` broke off
                    del self._arrived[name]
        self._started.clear()
        self.steps.clear()

    def clear(self) -> None:
        """Forgets everything."""
        for container in (self._arrived, self._discarded, self._aborted, self._outputs, self._started, self.steps):
            container.clear()

    def _remove(self, request: Request) -> None:
        for name in request.names:
            if self._started.get(name) is request:
                del self._started[name]
