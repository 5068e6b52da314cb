"""Sequence: the tokens and the state of one completion of a request."""

from __future__ import annotations

import enum
import functools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt

from nanovllm.engine.batch import NO_LOGPROBS, IntArray, LogitEdits, PromptLogprobs, StepLogprobs
from nanovllm.engine.block_manager import BlockTable
from nanovllm.errors import NanoVLLMError
from nanovllm.outputs import FinishReason, RequestMetrics
from nanovllm.sampling_params import SamplingParams
from nanovllm.utils.caller import Caller

ALL_LOGPROBS = 2**30  # larger than any vocabulary


class SequenceStatus(enum.Enum):
    """WAITING → PREFILLING → DECODING → FINISHED, with PREEMPTED on the way back to WAITING."""

    WAITING = enum.auto()
    PREFILLING = enum.auto()
    DECODING = enum.auto()
    PREEMPTED = enum.auto()  # still holds its row and blocks, until no step in flight writes them
    FINISHED = enum.auto()


class StopStringMatcher(Protocol):
    """Watches the text of one output for stop strings (implemented in `requests.detokenizer`)."""

    text: str  # the output up to the stop string, once one is found

    def add(self, token_id: int) -> str | None:
        """Takes the next token. Returns the stop string that it completes, or None."""
        ...

    def end(self) -> str | None:
        """Returns the stop string in text that waited for more tokens, when none follows, or None."""
        ...


class GrammarState(Protocol):
    """Follows one output through its grammar (implemented in `requests.grammar_matcher`)."""

    mask: IntArray  # [ceil(vocab_size / 32)]: bit t % 32 of word t // 32 is 1 where token t may come next

    def accept(self, token_id: int) -> None:
        """Takes the next token. The sequence waits until the mask after it is known."""
        ...


@dataclass(frozen=True)
class TokenLogprob:
    """A token's log-probability and rank, and those of the most likely tokens."""

    logprob: float
    rank: int
    top_ids: IntArray  # [num_top]
    top: npt.NDArray[np.float32]  # [num_top]


def num_asked(logprobs: int | None) -> int:
    """Returns how many of the most likely tokens a parameter `logprobs` asks for, or NO_LOGPROBS."""
    return NO_LOGPROBS if logprobs is None else ALL_LOGPROBS if logprobs == -1 else logprobs


def token_logprobs(step: StepLogprobs, num_top: int, rows: Iterable[int] | None = None) -> Iterator[TokenLogprob]:
    """Yields the log-probabilities of `rows` of a step (None: all), each with the `num_top` most likely tokens."""
    for row in range(len(step.tokens)) if rows is None else rows:
        top_ids, top = step.top_ids[row, :num_top].copy(), step.top[row, :num_top].copy()
        yield TokenLogprob(float(step.tokens[row]), int(step.ranks[row]), top_ids, top)


@dataclass(eq=False)
class Sequence:
    """A request inside the engine; with n > 1, one of its completions.

    While it holds a row, its current tokens are in the scheduler's `RowTable`. `token_ids` holds those known when it
    took the row; it is updated when the sequence is preempted or ends.
    """

    seq_id: int  # in order of arrival; the lower one has priority
    request_id: str
    prompt: str | None  # None if it was given as token ids
    params: SamplingParams
    token_ids: IntArray  # prompt, then output
    num_prompt_tokens: int
    max_num_tokens: int  # prompt and output together, at most max_model_len
    seed: int
    status: SequenceStatus = SequenceStatus.WAITING
    row: int | None = None
    block_table: BlockTable = field(default_factory=BlockTable)
    cache_salt: bytes = b""  # its prefix is shared only with sequences that have the same one
    logprobs: list[TokenLogprob] = field(default_factory=list)  # of each output token, if asked for
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)  # of each prompt token but the first
    num_prompt_logprobs: int = 0  # how many of these are computed or in flight
    num_cached_tokens: int | None = None  # prefix-cache hits when first scheduled
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    stop_strings: StopStringMatcher | None = None
    logit_edits: LogitEdits | None = None  # None: its logits are not changed
    waits_for_grammar: bool = False  # for the mask after its last token; at first, for the grammar to be compiled
    grammar: GrammarState | None = None  # of structured outputs
    error: NanoVLLMError | None = None  # why it ended with finish_reason "abort", if it failed
    left: bool = False  # ended since its caller left
    streamed: bool = False  # its tokens are read while it runs
    caller: Caller = field(default_factory=Caller)  # who added it
    parent_id: str | None = None  # with n > 1, the id of the request whose completion it is
    # Seconds of the engine's clock
    arrival: float = 0.0
    queued: float = 0.0
    first_scheduled: float | None = None
    first_token: float | None = None
    last_token: float | None = None  # while it holds a row, the row table has the current value
    finished: float | None = None
    preempted_at: list[float] = field(default_factory=list)
    resumed_at: list[float] = field(default_factory=list)  # of each preemption, once it has a row again

    @functools.cached_property
    def prompt_token_ids(self) -> list[int]:
        token_ids: list[int] = self.token_ids[: self.num_prompt_tokens].tolist()
        return token_ids

    @property
    def whole_request_id(self) -> str:
        """The id of the request that it completes; with n > 1 its own `request_id` is another one."""
        return self.parent_id or self.request_id

    @property
    def output_token_ids(self) -> IntArray:
        return self.token_ids[self.num_prompt_tokens :]

    @property
    def needs_prompt_logprobs(self) -> bool:
        """Whether log-probabilities of prompt tokens are wanted that no step has planned yet."""
        return self.params.prompt_logprobs is not None and self.num_prompt_logprobs < self.num_prompt_tokens - 1

    def plan_prompt_logprobs(self, start: int, end: int, row: int, num_planned: int) -> PromptLogprobs | None:
        """Returns which log-probabilities a chunk of tokens `start` to before `end` has to return; None if none.

        They count as planned from now on. num_planned: number of tokens in the step's chunks before this one.
        """
        first, last = max(start, self.num_prompt_logprobs), min(end, self.num_prompt_tokens - 1)
        if not self.needs_prompt_logprobs or first >= last:  # not asked for, or computed again after a preemption
            return None
        self.num_prompt_logprobs = last
        return PromptLogprobs(
            chunk_token=num_planned + first - start,
            row=row,
            position=first,
            num_tokens=last - first,
            num_top=num_asked(self.params.prompt_logprobs),
        )

    @property
    def watches_tokens(self) -> bool:
        """Whether `stops_at` must see every token."""
        return self.grammar is not None or self.stop_strings is not None or self.params.stop_token_ids is not None

    def stops_at(self, token_id: int) -> bool:
        """Takes the next token. Returns whether a stop token or a stop string ends the sequence there.

        The scheduler checks the end-of-sequence token and the length itself.
        """
        if token_id in (self.params.stop_token_ids or ()):
            self.stop_reason = token_id
        elif self.stop_strings is not None:
            self.stop_reason = self.stop_strings.add(token_id)
        if self.grammar is not None and self.stop_reason is None:
            self.grammar.accept(token_id)
        return self.stop_reason is not None

    def metrics(self) -> RequestMetrics:
        """Returns the times and counts of a sequence that has ended."""
        assert self.finished is not None, f"seq_id={self.seq_id} goes on"
        return RequestMetrics(
            arrival=self.arrival,
            queued=self.queued,
            first_scheduled=self.first_scheduled,
            first_token=self.first_token,
            last_token=self.last_token,
            finished=self.finished,
            num_output_tokens=len(self.output_token_ids),
            num_cached_tokens=self.num_cached_tokens or 0,
            num_preemptions=len(self.preempted_at),
        )

    @classmethod
    def from_prompt(
        cls,
        seq_id: int,
        request_id: str,
        prompt_token_ids: list[int] | IntArray,
        params: SamplingParams,
        *,
        max_model_len: int,
        seed: int,
        prompt: str | None = None,
    ) -> Sequence:
        """Returns a waiting sequence. seed: used if `params` has none."""
        token_ids = np.asarray(prompt_token_ids, dtype=np.int32)
        limit = max_model_len if params.max_tokens is None else len(token_ids) + params.max_tokens
        return cls(
            seq_id=seq_id,
            request_id=request_id,
            prompt=prompt,
            params=params,
            token_ids=token_ids,
            num_prompt_tokens=len(token_ids),
            max_num_tokens=min(limit, max_model_len),
            seed=seed if params.seed is None else params.seed,
        )
