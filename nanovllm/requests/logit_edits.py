"""Converts a request's penalties, biases, bans and masks to the form that the device reads (`kernels.logit_edits`)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from nanovllm.config import MAX_BIAS_WORDS
from nanovllm.engine.batch import IntArray, LogitEdits
from nanovllm.errors import InvalidArgumentError
from nanovllm.kernels.columns import BIAS_WIDTH
from nanovllm.sampling_params import SamplingParams

_ALWAYS = 2**31 - 1  # longer than any sequence
_BAN = -1e29  # finite, unlike a mask's -inf: if bans and mask leave no token, one that the mask allows is drawn


class _TokenBias(NamedTuple):
    """A bias of one token, as `kernels.columns.TOKEN_BIAS` describes it."""

    token_id: int
    bias: float
    until_length: int = _ALWAYS
    ending: tuple[int, ...] = ()


def read_logit_edits(
    params: SamplingParams,
    num_prompt_tokens: int,
    end_ids: Iterable[int],
    bad_words: Iterable[tuple[int, ...]],
    vocab_size: int,
) -> LogitEdits:
    """Returns the logit edits that `params` ask for.

    end_ids: the tokens that end the output. bad_words: the token ids of each, none of them empty.
    Raises InvalidArgumentError when the edits do not fit on the device, or leave no token to sample.
    """
    biases = [_TokenBias(token, bias) for token, bias in (params.logit_bias or {}).items()]
    if params.min_tokens:
        until = min(num_prompt_tokens + params.min_tokens, _ALWAYS)  # an int32 on the device
        biases += [_TokenBias(token, _BAN, until) for token in end_ids]
    biases += [_TokenBias(word[-1], _BAN, ending=word[:-1]) for word in bad_words]
    banned = {item.token_id for item in biases if item.bias == _BAN and not item.ending}
    allowed = params.allowed_token_ids
    if len(banned) == vocab_size if allowed is None else banned.issuperset(allowed):
        field = "bad_words" if allowed is None else "allowed_token_ids"
        hint = "Allow more, or forbid less."
        raise InvalidArgumentError(
            field, getattr(params, field), "such that bad_words and min_tokens leave a token to draw", hint
        )
    words: list[int] = []
    endings: list[int] = []  # of all biases, one after another
    for item in biases:
        ending_start = BIAS_WIDTH * len(biases) + len(endings)
        bias_bits = int(np.float32(item.bias).view(np.int32))
        words += item.token_id, bias_bits, item.until_length, ending_start, len(item.ending)
        endings += item.ending
    words += endings
    if len(words) > MAX_BIAS_WORDS:
        raise InvalidArgumentError(
            "logit_bias" if len(params.logit_bias or ()) * 2 > len(biases) else "bad_words",
            f"{len(biases)} tokens to change",
            f"at most {MAX_BIAS_WORDS} int32 on the device, and takes {len(words)}: with logit_bias, bad_words and "
            f"min_tokens {BIAS_WIDTH} for each token and 1 for each further token of a bad word",
            "To forbid many tokens, give allowed_token_ids.",
        )
    return LogitEdits(
        num_prompt_tokens=num_prompt_tokens,
        penalties=(float(params.repetition_penalty), float(params.frequency_penalty), float(params.presence_penalty)),
        num_token_biases=len(biases),
        token_biases=tuple(words),
        mask=None if allowed is None else token_mask(allowed, vocab_size),
    )


def token_mask(token_ids: Iterable[int], vocab_size: int) -> IntArray:
    """Returns a mask that allows only these tokens, [ceil(vocab_size / 32)]: bit t % 32 of word t // 32 is token t."""
    bits = np.zeros(-(-vocab_size // 32) * 32, dtype=np.uint8)
    bits[list(token_ids)] = 1
    return np.packbits(bits, bitorder="little").view("<i4").astype(np.int32)
