"""Log-probabilities of the drawn tokens and of the likeliest ones, from unedited logits."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

_PART = 1 << 23  # logits whose log-softmax is in memory at a time


@dataclass(frozen=True)
class TokenLogprobs:
    """Log-probabilities of a token in each row and of the likeliest. A rank is 1 plus the number of likelier tokens."""

    tokens: torch.Tensor  # [num_rows] fp32
    ranks: torch.Tensor  # [num_rows] int32
    top_ids: torch.Tensor  # [num_rows, num_top] int32, likeliest first
    top: torch.Tensor  # [num_rows, num_top] fp32

    def tensors(self) -> tuple[torch.Tensor, ...]:
        return self.tokens, self.ranks, self.top_ids, self.top

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> TokenLogprobs:
        return TokenLogprobs(*map(function, self.tensors()))

    @classmethod
    def join(cls, parts: Iterable[TokenLogprobs]) -> TokenLogprobs:
        return cls(*(torch.cat(tensors) for tensors in zip(*(part.tensors() for part in parts), strict=True)))


@dataclass(frozen=True)
class SampledTokens:
    """The tokens that a step draws, with their log-probabilities."""

    token_ids: torch.Tensor  # [num_rows] int32
    logprobs: TokenLogprobs | None = None  # if a row asked for them
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()  # one for each `PromptLogprobs` of the batch; none from a graph
    drafts: torch.Tensor | None = None  # [num_proposals, longest] int32, of a draft model; none from a graph

    def tensors(self) -> tuple[torch.Tensor, ...]:
        return (self.token_ids, *(self.logprobs.tensors() if self.logprobs else ()))

    def first(self, num_rows: int) -> SampledTokens:
        return self.map(lambda tensor: tensor[:num_rows])

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> SampledTokens:
        return SampledTokens(
            function(self.token_ids),
            self.logprobs.map(function) if self.logprobs else None,
            tuple(each.map(function) for each in self.prompt_logprobs),
            None if self.drafts is None else function(self.drafts),
        )


def token_logprobs(logits: torch.Tensor, token_ids: torch.Tensor, num_top: int) -> TokenLogprobs:
    """Returns the log-probabilities of one token in each row and of the `num_top` likeliest.

    logits [num_rows, vocab_size], token_ids [num_rows] int32; num_top may exceed vocab_size.
    """
    size = max(_PART // logits.shape[1], 1)
    parts = zip(logits.split(size), token_ids.split(size), strict=True)
    return TokenLogprobs.join(_logprobs_of_part(part, ids, min(num_top, logits.shape[1])) for part, ids in parts)


def _logprobs_of_part(logits: torch.Tensor, token_ids: torch.Tensor, num_top: int) -> TokenLogprobs:
    logprobs = logits.float().log_softmax(dim=-1)  # [num_rows, vocab_size]
    own = logprobs.gather(1, token_ids.long().clamp_(min=0).unsqueeze(1))  # [num_rows, 1]; INVALID_TOKEN reads any
    ranks = (logprobs > own).sum(dim=1, dtype=torch.int32) + 1
    top, top_ids = logprobs.topk(num_top, dim=1)
    return TokenLogprobs(own.squeeze(1), ranks, top_ids.int(), top)
