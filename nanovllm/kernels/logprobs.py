"""Log-probabilities of the tokens that were drawn and of the likeliest ones, from the logits as they come."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

_PART = 1 << 23  # logits whose log-softmax is in memory at a time


@dataclass(frozen=True)
class TokenLogprobs:
    """Of each sampled row. Ranks count from 1: one more than the tokens that are likelier."""

    sampled: torch.Tensor  # [num_rows] fp32
    ranks: torch.Tensor  # [num_rows] int32
    top_ids: torch.Tensor  # [num_rows, num_top] int32, likeliest first
    top: torch.Tensor  # [num_rows, num_top] fp32

    def tensors(self) -> tuple[torch.Tensor, ...]:
        return self.sampled, self.ranks, self.top_ids, self.top


@dataclass(frozen=True)
class SampledTokens:
    """What a step draws."""

    token_ids: torch.Tensor  # [num_rows] int32
    logprobs: TokenLogprobs | None = None  # where a row asked

    def tensors(self) -> tuple[torch.Tensor, ...]:
        return (self.token_ids, *(self.logprobs.tensors() if self.logprobs else ()))

    def first(self, num_rows: int) -> SampledTokens:
        return self.map(lambda tensor: tensor[:num_rows])

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> SampledTokens:
        logprobs = TokenLogprobs(*map(function, self.logprobs.tensors())) if self.logprobs else None
        return SampledTokens(function(self.token_ids), logprobs)


def token_logprobs(logits: torch.Tensor, token_ids: torch.Tensor, num_top: int) -> TokenLogprobs:
    """logits [num_rows, vocab_size], token_ids [num_rows] int32; num_top may be more than there are tokens."""
    size = max(_PART // logits.shape[1], 1)
    parts = [
        _logprobs_of_part(part, ids, min(num_top, logits.shape[1]))
        for part, ids in zip(logits.split(size), token_ids.split(size), strict=True)
    ]
    return TokenLogprobs(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))


def _logprobs_of_part(logits: torch.Tensor, token_ids: torch.Tensor, num_top: int) -> tuple[torch.Tensor, ...]:
    logprobs = logits.float().log_softmax(dim=-1)  # [num_rows, vocab_size]
    sampled = logprobs.gather(1, token_ids.long().unsqueeze(1))  # [num_rows, 1]
    ranks = (logprobs > sampled).sum(dim=1, dtype=torch.int32) + 1
    top, top_ids = logprobs.topk(num_top, dim=1)
    return sampled.squeeze(1), ranks, top_ids.int(), top
