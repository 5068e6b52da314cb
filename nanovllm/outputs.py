"""The outputs of requests, as users see them."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from nanovllm.errors import NanoVLLMError

FinishReason = Literal["stop", "length", "abort"]


@dataclass(frozen=True)
class Logprob:
    """A token's log-probability at a position, before temperature and everything else that changes logits.

    rank: 1 for the most likely token. decoded_token: None if the engine has no tokenizer.
    """

    logprob: float
    rank: int
    decoded_token: str | None


@dataclass(frozen=True)
class CompletionOutput:
    """One completion of a prompt.

    text: the decoded tokens, without the end-of-sequence token, stop string or stop token at the end
        (`include_stop_str_in_output` keeps the latter two); "" with detokenize=False or without a tokenizer.
    token_ids: all generated tokens, including the end-of-sequence token and all tokens of a stop string.
    finish_reason: "stop" (end-of-sequence token, stop string or stop token), "length" (max_tokens or the model's
        length), "abort"; None while it is unfinished.
    logprobs: for each generated token {token id: Logprob}, its own first, then those of the most likely tokens; None if
        not requested.
    cumulative_logprob: the sum over the generated tokens; None if logprobs were not requested.
    stop_reason: the stop string or stop token id that ended it; None in all other cases.
    """

    index: int
    text: str
    token_ids: list[int]
    finish_reason: FinishReason | None
    logprobs: list[dict[int, Logprob]] | None = None
    cumulative_logprob: float | None = None
    stop_reason: int | str | None = None


@dataclass(frozen=True)
class RequestMetrics:
    """Times of a request in seconds of `time.monotonic()`; None for what did not happen.

    The time of a token is when the host read the result of its step. The clock is read once per step.
    """

    arrival: float  # add_request was called
    queued: float  # its prompt was tokenised and checked
    first_scheduled: float | None
    first_token: float | None
    last_token: float | None
    finished: float
    num_output_tokens: int
    num_cached_tokens: int  # prompt tokens found in the prefix cache when first scheduled
    num_preemptions: int
    # With n > 1, the metrics of each completion; the fields above then cover all of them.
    completions: tuple[RequestMetrics, ...] = ()

    @property
    def queue_time(self) -> float | None:
        """Seconds spent in the queue."""
        return None if self.first_scheduled is None else self.first_scheduled - self.queued

    @property
    def time_to_first_token(self) -> float | None:
        """Seconds from arrival to the first token."""
        return None if self.first_token is None else self.first_token - self.arrival

    @property
    def inter_token_latency(self) -> float | None:
        """Mean seconds from one token to the next of the same completion; None with fewer than two tokens."""
        if self.completions:
            gaps = [max(each.num_output_tokens - 1, 0) for each in self.completions]
            means = [each.inter_token_latency or 0.0 for each in self.completions]
            return sum(map(operator.mul, means, gaps)) / sum(gaps) if any(gaps) else None
        if self.first_token is None or self.last_token is None or self.num_output_tokens < 2:
            return None
        return (self.last_token - self.first_token) / (self.num_output_tokens - 1)

    @property
    def end_to_end(self) -> float:
        """Seconds from arrival until the request finished."""
        return self.finished - self.arrival

    # vLLM's names of the above
    arrival_time = property(operator.attrgetter("arrival"))
    queued_ts = property(operator.attrgetter("queued"))
    first_scheduled_time = scheduled_ts = property(operator.attrgetter("first_scheduled"))
    first_token_time = first_token_ts = property(operator.attrgetter("first_token"))
    last_token_time = last_token_ts = property(operator.attrgetter("last_token"))
    finished_time = property(operator.attrgetter("finished"))
    time_in_queue = property(operator.attrgetter("queue_time"))
    first_token_latency = property(operator.attrgetter("time_to_first_token"))
    num_generation_tokens = property(operator.attrgetter("num_output_tokens"))


@dataclass(frozen=True)
class RequestOutput:
    """The output of a request. As in nano-vllm, `output["text"]` and `output["token_ids"]` read the first completion.

    prompt: the text of the prompt; None if it was given as token ids.
    finished: False only in a stream, while more outputs of the same request follow.
    num_cached_tokens: prompt tokens found in the prefix cache when the request was first scheduled.
    metrics: None until the request has finished, and if it was refused.
    prompt_logprobs: for each prompt token {token id: Logprob}, its own first, then those of the most likely tokens. The
        first token has None. In a stream, only the last output has them. None if not requested.
    error: why the request was refused or failed, with finish_reason "abort"; otherwise None.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    num_cached_tokens: int
    metrics: RequestMetrics | None
    error: NanoVLLMError | None = None
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None

    def __getitem__(self, key: str) -> Any:
        if key not in ("text", "token_ids"):
            raise KeyError(f"RequestOutput has the keys 'text' and 'token_ids', not {key!r}")
        return getattr(self.outputs[0], key)


def failed_output(
    request_id: str,
    error: NanoVLLMError,
    *,
    prompt: str | None,
    prompt_token_ids: Sequence[int] = (),
    num_completions: int = 1,
    num_cached_tokens: int = 0,
) -> RequestOutput:
    """Returns the output of a request that was refused or lost: no tokens, and the error."""
    return RequestOutput(
        request_id=request_id,
        prompt=prompt,
        prompt_token_ids=list(prompt_token_ids),
        outputs=[CompletionOutput(index, "", [], finish_reason="abort") for index in range(num_completions)],
        finished=True,
        num_cached_tokens=num_cached_tokens,
        metrics=None,
        error=error,
    )
