"""What crosses between the consumers of `AsyncLLM` and the loop of its engine: commands one way, events the other.

A completion has a number, chosen by the consumers' side. Those of a request with n > 1 follow one another; its first
one is the number of the request. Which numbers are whose, if an engine has several clients: `routing`.
"""

from __future__ import annotations

import contextvars
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from nanovllm.engine.batch import IntArray
from nanovllm.engine.sequence import Sequence, TokenLogprob
from nanovllm.errors import InvalidArgumentError, NanoVLLMError
from nanovllm.outputs import CompletionOutput, FinishReason
from nanovllm.requests.detokenizer import StopStrings
from nanovllm.requests.preparation import PreparedRequest

# Commands


@dataclass(frozen=True)
class AddRequest:
    """Queue a request. context: of its consumer, with the current span if there is one."""

    number: int
    request_id: str
    prepared: PreparedRequest
    arrival: float  # seconds of `time.monotonic`, which the processes of a machine share
    is_streamed: bool  # False: its tokens are sent at its end only
    is_aborted: bool  # end it before it has begun
    context: contextvars.Context


@dataclass(frozen=True)
class AbortRequest:
    """End a request with the tokens that it has."""

    number: int
    request_id: str


@dataclass(frozen=True)
class DropRequest:
    """End a request without an output."""

    number: int
    request_id: str


@dataclass(frozen=True)
class RefuseRequest:
    """Report to the log and the metrics that a request was not allowed."""

    request_id: str
    error: InvalidArgumentError
    context: contextvars.Context
    client_request_id: str | None


@dataclass(frozen=True)
class DropClient:
    """End all requests of a client that has gone, without an output."""

    client: int


@dataclass(frozen=True)
class ResetPrefixCache:
    """Forget every cached prefix."""


@dataclass(frozen=True)
class StartProfile:
    """Record a profile into a folder."""

    question: int
    folder: str


@dataclass(frozen=True)
class StopProfile:
    """End the profile and write its files. The Answer has its tables."""

    question: int


@dataclass(frozen=True)
class AbortNamed:
    """End requests by their ids, whichever client asked for them. The Answer has how many there were.

    An id `ID` also stands for `ID-0`, `ID-1` and so on: a server's request has several prompts.
    """

    question: int
    request_ids: list[str]


Question: TypeAlias = "StartProfile | StopProfile | AbortNamed"  # an Answer follows
Command: TypeAlias = (
    "AddRequest | AbortRequest | DropRequest | DropClient | RefuseRequest | ResetPrefixCache | Question"
)

# Events


@dataclass(frozen=True)
class Logprobs:
    """The log-probabilities of several tokens, [num_tokens] each; the most likely tokens of all, one after another."""

    own: npt.NDArray[np.float64]
    ranks: IntArray
    num_top: IntArray
    top_ids: IntArray  # [sum of num_top]
    top: npt.NDArray[np.float32]  # [sum of num_top]

    @classmethod
    def pack(cls, rows: Seq[TokenLogprob]) -> Logprobs | None:
        """Returns the log-probabilities of `rows`; None if there are none."""
        if not rows:
            return None
        return cls(
            own=np.array([row.logprob for row in rows], dtype=np.float64),
            ranks=np.array([row.rank for row in rows], dtype=np.int32),
            num_top=np.array([len(row.top) for row in rows], dtype=np.int32),
            top_ids=np.concatenate([row.top_ids for row in rows]),
            top=np.concatenate([row.top for row in rows]),
        )

    def unpack(self) -> list[TokenLogprob]:
        ends = np.cumsum(self.num_top)[:-1]
        parts = zip(np.split(self.top_ids, ends), np.split(self.top, ends), strict=True)
        values = zip(self.own.tolist(), self.ranks.tolist(), parts, strict=True)
        return [TokenLogprob(own, rank, top_ids, top) for own, rank, (top_ids, top) in values]


@dataclass(frozen=True)
class CompletionEnd:
    """The final state of a sequence. stop_text: the text before a stop string that ended it."""

    token_ids: IntArray  # all of the output
    finish_reason: FinishReason
    stop_reason: int | str | None
    stop_text: str | None
    error: NanoVLLMError | None
    num_cached_tokens: int | None
    queued: float
    first_scheduled: float | None
    first_token: float | None
    last_token: float | None
    finished: float
    preempted_at: list[float]
    logprobs: Logprobs | None
    prompt_logprobs: Logprobs | None

    @classmethod
    def of(cls, sequence: Sequence, completion: CompletionOutput) -> CompletionEnd:
        """Returns the state of a sequence that has ended. completion: its output."""
        assert sequence.finished is not None, "it has ended"
        assert completion.finish_reason is not None, "it has ended"
        stop, reason = sequence.stop_strings, completion.stop_reason
        return cls(
            token_ids=sequence.output_token_ids,
            finish_reason=completion.finish_reason,
            stop_reason=reason,
            stop_text=stop.text if stop is not None and isinstance(reason, str) else None,
            error=sequence.error,
            num_cached_tokens=sequence.num_cached_tokens,
            queued=sequence.queued,
            first_scheduled=sequence.first_scheduled,
            first_token=sequence.first_token,
            last_token=sequence.last_token,
            finished=sequence.finished,
            preempted_at=sequence.preempted_at,
            logprobs=Logprobs.pack(sequence.logprobs),
            prompt_logprobs=Logprobs.pack(sequence.prompt_logprobs),
        )

    def apply(self, sequence: Sequence) -> None:
        """Gives this state to the consumers' own copy of the sequence."""
        prompt = sequence.token_ids[: sequence.num_prompt_tokens]
        sequence.token_ids = np.concatenate([prompt, self.token_ids])
        if isinstance(sequence.stop_strings, StopStrings) and self.stop_text is not None:
            sequence.stop_strings.text = self.stop_text
        sequence.logprobs = [] if self.logprobs is None else self.logprobs.unpack()
        sequence.prompt_logprobs = [] if self.prompt_logprobs is None else self.prompt_logprobs.unpack()
        for name in _COPIED:
            setattr(sequence, name, getattr(self, name))


_COPIED = (
    "finish_reason",
    "stop_reason",
    "error",
    "num_cached_tokens",
    "queued",
    "first_scheduled",
    "first_token",
    "last_token",
    "finished",
    "preempted_at",
)


@dataclass(frozen=True)
class RequestEnd:
    """A request has ended, with all its completions."""

    number: int
    completions: list[CompletionEnd]


@dataclass(frozen=True)
class StepNews:
    """What a step brought: one token for each completion that goes on, and the requests that ended.

    cached: num_cached_tokens of the completions that have their first token, by number.
    """

    numbers: npt.NDArray[np.int64]  # [num_tokens]
    token_ids: IntArray  # [num_tokens]
    scored: IntArray  # [num_scored], the indices of the tokens that have log-probabilities
    logprobs: Logprobs | None  # of these
    cached: list[tuple[int, int]]
    ended: list[RequestEnd]


@dataclass(frozen=True)
class RequestRefused:
    """The engine has not taken a request."""

    number: int
    error: BaseException


@dataclass(frozen=True)
class RequestsLost:
    """A step failed, and these requests are lost. goes_on: the engine takes others."""

    numbers: list[int]
    error: BaseException
    goes_on: bool


@dataclass(frozen=True)
class Answer:
    """What a question has led to: a text, or the error."""

    question: int
    text: str = ""
    error: BaseException | None = None


@dataclass(frozen=True)
class EngineEnded:
    """The engine has ended, and every request with it."""

    error: BaseException


Event: TypeAlias = "StepNews | RequestRefused | RequestsLost | Answer | EngineEnded"
