"""What a request gives back."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, Literal

from nanovllm.errors import NanoVLLMError

FinishReason = Literal["stop", "length", "abort"]


@dataclass(frozen=True)
class Logprob:
    """A token's raw log-probability at a position, before temperature and whatever else changes logits.

    rank: 1 for the likeliest. decoded_token: None when the engine has no tokenizer.
    """

    logprob: float
    rank: int
    decoded_token: str | None


@dataclass(frozen=True)
class CompletionOutput:
    """One completion of a prompt.

    text: decoded tokens, without the end-of-sequence token or what else ended it (`include_stop_str_in_output` keeps
        that); "" with detokenize=False and when the engine has no tokenizer.
    token_ids: every generated token, the end-of-sequence token included, and all tokens of a stop string.
    finish_reason: "stop" (the model ended it), "length" (max_tokens or the model's length), "abort"; None: it goes on.
    logprobs: of each generated token {token id: Logprob}, its own first, then the likeliest; None if not asked for.
    cumulative_logprob: the sum over the generated tokens; None if logprobs were not asked for.
    stop_reason: the stop string, or the one of `stop_token_ids`, that ended it; None for all else.
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
    """When a request did what, in seconds of `time.monotonic()`; None where it did not get so far.

    Tokens have the time at which the host saw the step that brought them: one reading of the clock a step.
    """

    arrival: float  # add_request was called
    queued: float  # its prompt was read and checked
    first_scheduled: float | None
    first_token: float | None
    last_token: float | None
    finished: float
    num_output_tokens: int
    num_cached_tokens: int  # of the prompt, found in the prefix cache when first scheduled
    num_preemptions: int
    completions: tuple[RequestMetrics, ...] = ()  # with n > 1, of each; the above is then of all together

    @property
    def queue_time(self) -> float | None:
        """Seconds from the queue's end to its head."""
        return None if self.first_scheduled is None else self.first_scheduled - self.queued

    @property
    def time_to_first_token(self) -> float | None:
        """Seconds from arrival."""
        return None if self.first_token is None else self.first_token - self.arrival

    @property
    def inter_token_latency(self) -> float | None:
        """Mean seconds from one token to the next of the same completion; None below two tokens."""
        if self.completions:
            gaps = [max(each.num_output_tokens - 1, 0) for each in self.completions]
            means = [each.inter_token_latency or 0.0 for each in self.completions]
            return sum(map(operator.mul, means, gaps)) / sum(gaps) if any(gaps) else None
        if self.first_token is None or self.last_token is None or self.num_output_tokens < 2:
            return None
        return (self.last_token - self.first_token) / (self.num_output_tokens - 1)

    @property
    def end_to_end(self) -> float:
        """Seconds from arrival to the end."""
        return self.finished - self.arrival


@dataclass(frozen=True)
class RequestOutput:
    """A request's result. nano-vllm's form works on the same object: `output["text"]`, `output["token_ids"]`.

    prompt: the text that was given, None when the prompt was token ids.
    finished: False only in a stream, of an output that others of the same request follow.
    num_cached_tokens: prompt tokens whose keys and values were found in the prefix cache at first scheduling.
    metrics: None before the request has finished, and when it was refused.
    prompt_logprobs: of each prompt token {token id: Logprob}, its own first, then the likeliest; None for the first,
        which nothing precedes. In a stream, with the last output. None if not asked for.
    error: why it was refused or given up, with finish_reason "abort"; else None.
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
