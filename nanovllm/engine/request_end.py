"""RequestEnd: how a request ended, and where its time went."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Literal

from nanovllm.engine.sequence import Sequence
from nanovllm.errors import InvalidArgumentError
from nanovllm.outputs import FinishReason
from nanovllm.utils import env
from nanovllm.utils.caller import Caller

Cause = Literal["eos", "stop", "length", "abort", "left", "refused", "failed"]
StallCause = Literal["preempted", "prefill", "grammar", "blocks", "idle", "host", "decode"]

COMPLETE: tuple[Cause, ...] = ("eos", "stop", "length")
_FIELDS_WITH_TEXT = ("prompt", "messages", "structured_outputs", "stop", "bad_words")  # errors quote what users wrote
# The label `finished_reason` of the metric request_success.
FINISHED_REASON: Mapping[Cause, str] = {
    "eos": "stop",
    "stop": "stop",
    "length": "length",
    "abort": "abort",
    "left": "abort",
    "refused": "error",
    "failed": "error",
}


def cause_of(sequence: Sequence) -> Cause:
    """Returns why a sequence ended."""
    if sequence.finish_reason == "length":
        return "length"
    if sequence.finish_reason == "stop":
        return "eos" if sequence.stop_reason is None else "stop"
    if sequence.error is not None:
        return "failed"
    return "left" if sequence.left else "abort"


@dataclass(frozen=True)
class Stall:
    """The longest time between two tokens of a completion.

    step: the step that returned the second token. reason: a phrase that explains `cause`.
    """

    seconds: float
    cause: StallCause
    step: int
    reason: str


@dataclass(frozen=True)
class Times:
    """How long a sequence spent in each state, in seconds. The states add up to the time from arrival to end.

    queue: before its first step. prefill: until its first token. decode: after it. preempted: without a row, between a
    preemption and the step that computes its tokens again.
    """

    queue: float
    prefill: float
    decode: float
    preempted: float
    to_first_token: float | None

    @classmethod
    def of(cls, sequence: Sequence, finished: float) -> Times:
        """Returns the times of a sequence that ended at `finished`."""
        scheduled = finished if sequence.first_scheduled is None else sequence.first_scheduled
        first = finished if sequence.first_token is None else sequence.first_token
        waits = list(zip_longest(sequence.preempted_at, sequence.resumed_at, fillvalue=finished))
        in_prefill = sum(max(min(end, first) - start, 0.0) for start, end in waits)
        in_decode = sum(max(end - max(start, first), 0.0) for start, end in waits)
        return cls(
            queue=scheduled - sequence.arrival,
            prefill=first - scheduled - in_prefill,
            decode=finished - first - in_decode,
            preempted=in_prefill + in_decode,
            to_first_token=None if sequence.first_token is None else first - sequence.arrival,
        )


@dataclass(frozen=True)
class CompletionEnd:
    """How one completion of a request ended."""

    seq_id: int
    cause: Cause
    finish_reason: FinishReason
    stop_reason: int | str | None
    finished: float  # seconds of the engine's clock
    decoding_seconds: float  # from the first token to the last; 0 with fewer than two
    times: Times
    num_output_tokens: int
    num_preemptions: int
    first_step: int | None  # None: it never ran
    last_step: int | None
    stall: Stall | None  # None: fewer than two tokens


@dataclass(frozen=True)
class RequestEnd:
    """How a request ended. With several completions, the one that ended last tells the times and the cause.

    error: why it failed or was refused. lost: a step failed, and took every request with it. streamed: its outputs were
    read while it ran. queued_behind: number of requests that waited when it arrived. kv_cache_usage: share of the KV
    cache in use then.
    """

    request_id: str
    arrival: float  # seconds of the engine's clock
    completions: tuple[CompletionEnd, ...]  # empty: it was refused
    error: BaseException | None = None
    lost: bool = False
    streamed: bool = False
    num_prompt_tokens: int | None = None  # None: it was refused
    num_cached_tokens: int = 0
    queued_behind: int = 0
    kv_cache_usage: float = 0.0
    caller: Caller = field(default_factory=Caller)  # who added it

    @property
    def is_error(self) -> bool:
        """Whether it failed or was refused."""
        return self.cause in ("failed", "refused")

    @property
    def end_to_end(self) -> float:
        """Seconds from arrival to the end; 0 if it was refused."""
        return 0.0 if self.last is None else self.last.finished - self.arrival

    @functools.cached_property
    def last(self) -> CompletionEnd | None:
        """The completion that ended last."""
        return max(self.completions, key=lambda each: each.finished, default=None)

    @functools.cached_property
    def cause(self) -> Cause:
        return "refused" if self.last is None else self.last.cause

    @functools.cached_property
    def stall(self) -> Stall | None:
        """The longest stall of all completions."""
        stalls = [each.stall for each in self.completions if each.stall is not None]
        return max(stalls, key=lambda stall: stall.seconds, default=None)

    @property
    def to_first_token(self) -> float | None:
        """Seconds from arrival to the first token of any completion."""
        times = [each.times.to_first_token for each in self.completions]
        return min((each for each in times if each is not None), default=None)

    @property
    def inter_token_latency(self) -> float | None:
        """Mean seconds from one token to the next of the same completion; None with fewer than two tokens."""
        num_gaps = sum(max(each.num_output_tokens - 1, 0) for each in self.completions)
        return sum(each.decoding_seconds for each in self.completions) / num_gaps if num_gaps else None

    @property
    def num_output_tokens(self) -> int:
        return sum(each.num_output_tokens for each in self.completions)


def error_text(error: BaseException | None) -> str:
    """Returns an error as text. It has no text of users unless NANOVLLM_LOG_PROMPTS is set."""
    if not isinstance(error, InvalidArgumentError):
        return repr(error)
    if env.log_prompts() or error.field.split(".")[0] not in _FIELDS_WITH_TEXT:
        return str(error)
    return f"{error.field} must be {error.allowed}. {error.hint}".rstrip()
