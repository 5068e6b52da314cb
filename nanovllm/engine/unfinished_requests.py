"""UnfinishedRequests: everything an engine holds between `add_request` and the output that `step` returns."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Container
from dataclasses import dataclass

from nanovllm.engine.batch import ScheduledBatch, StepHandle
from nanovllm.engine.sequence import Sequence
from nanovllm.outputs import RequestOutput
from nanovllm.requests.parallel_sampling import ParallelSamplingTable


@dataclass(frozen=True)
class SubmittedStep:
    """A step that the executor runs and whose result is not collected yet."""

    batch: ScheduledBatch
    handle: StepHandle
    submitted: float  # seconds of the engine's clock


class UnfinishedRequests:
    """The sequences that have no output yet, the steps in flight, and the outputs that `step` has not returned yet."""

    def __init__(self) -> None:
        self.sequences: dict[str, Sequence] = {}  # by the request's id, or with n > 1 by the completion's
        self.parallel = ParallelSamplingTable()
        self.aborted: dict[str, Sequence] = {}  # aborted between steps; the next step builds their outputs
        self.steps: deque[SubmittedStep] = deque()  # oldest first
        self.outputs: list[RequestOutput] = []

    def __contains__(self, request_id: object) -> bool:
        return request_id in self.sequences or request_id in self.parallel

    def __bool__(self) -> bool:
        return bool(self.sequences or self.steps or self.outputs)

    def sequences_of(self, request_id: str) -> list[Sequence]:
        """Returns a request's unfinished sequences; [] when it is unknown."""
        return [self.sequences[name] for name in self.parallel.sequence_ids(request_id) if name in self.sequences]

    def running(self) -> list[Sequence]:
        """Returns the sequences that have not ended."""
        return [sequence for sequence in self.sequences.values() if sequence.finish_reason is None]

    def remove(self, request_id: str) -> None:
        """Forgets a request, so that it has no output."""
        for name in self.parallel.sequence_ids(request_id):
            self.sequences.pop(name, None)
            self.aborted.pop(name, None)
        self.parallel.forget(request_id)

    def take_outputs(self, request_ids: Container[str] | None) -> list[RequestOutput]:
        """Removes and returns the outputs of `request_ids`, or all of them for None."""
        outputs, self.outputs = self.outputs, []
        if request_ids is not None:
            self.outputs = [output for output in outputs if output.request_id not in request_ids]
            outputs = [output for output in outputs if output.request_id in request_ids]
        return outputs

    def drop_outputs(self, request_ids: Collection[str]) -> None:
        """Removes the outputs of `request_ids`."""
        self.outputs = [output for output in self.outputs if output.request_id not in request_ids]

    def clear(self) -> None:
        """Forgets all requests and steps, which a failed step cannot finish. Outputs that are built stay."""
        self.sequences.clear()
        self.parallel.clear()
        self.aborted.clear()
        self.steps.clear()
