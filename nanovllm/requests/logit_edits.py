"""Logit edits of a request (penalties, biases, bans, masks) in the form the device reads (`kernels.logit_edits`)."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from nanovllm.config import MAX_BIAS_WORDS
from nanovllm.engine.batch import IntArray, LogitEdits
from nanovllm.errors import InvalidArgumentError
from nanovllm.kernels.columns import BIAS_WIDTH
from nanovllm.sampling_params import SamplingParams

_ALWAYS = 2**31 - 1
_BAN = -1e29  # finite, and the mask's is not: where both leave nothing, a token that the mask allows is drawn


def read_logit_edits(
    params: SamplingParams,
    num_prompt_tokens: int,
    end_ids: Iterable[int],
    bad_words: Iterable[tuple[int, ...]],
    vocab_size: int,
) -> LogitEdits:
    """Returns what `params` ask for. end_ids: tokens that end the output. bad_words: as tokens, none of them empty.

    Raises InvalidArgumentError when they do not fit on the device, or leave no token to sample.
    """
    edits: list[tuple[int, float, int, tuple[int, ...]]]  # token, what is added to it, until which length, behind what
    edits = [(token, bias, _ALWAYS, ()) for token, bias in (params.logit_bias or {}).items()]
    if params.min_tokens:
        edits += [(token, _BAN, num_prompt_tokens + params.min_tokens, ()) for token in end_ids]
    edits += [(word[-1], _BAN, _ALWAYS, word[:-1]) for word in bad_words]
    banned = {token for token, value, _, behind in edits if value == _BAN and not behind}
    allowed = params.allowed_token_ids
    if len(banned) == vocab_size if allowed is None else banned.issuperset(allowed):
        field = "bad_words" if allowed is None else "allowed_token_ids"
        hint = "Allow more, or forbid less."
        raise InvalidArgumentError(
            field, getattr(params, field), "such that bad_words and min_tokens leave a token to draw", hint
        )
    words: list[int] = []
    behind_words: list[int] = []
    for token, value, until, behind in edits:
        start = BIAS_WIDTH * len(edits) + len(behind_words)
        words += token, int(np.float32(value).view(np.int32)), until, start, len(behind)
        behind_words += behind
    words += behind_words
    if len(words) > MAX_BIAS_WORDS:
        raise InvalidArgumentError(
            "logit_bias" if len(params.logit_bias or ()) * 2 > len(edits) else "bad_words",
            f"{len(edits)} tokens to change",
            f"at most {MAX_BIAS_WORDS} int32 on the device, and takes {len(words)}: with logit_bias, bad_words and "
            f"min_tokens {BIAS_WIDTH} for each token and 1 for each further token of a bad word",
            "To forbid many tokens, give allowed_token_ids.",
        )
    return LogitEdits(
        num_prompt_tokens,
        (float(params.repetition_penalty), float(params.frequency_penalty), float(params.presence_penalty)),
        len(edits),
        tuple(words),
        None if allowed is None else token_mask(allowed, vocab_size),
    )


def token_mask(token_ids: Iterable[int], vocab_size: int) -> IntArray:
    """Returns the mask that allows only these tokens: [ceil(vocab_size / 32)], bit t % 32 of word t // 32 for t."""
    bits = np.zeros(-(-vocab_size // 32) * 32, dtype=np.uint8)
    bits[list(token_ids)] = 1
    return np.packbits(bits, bitorder="little").view("<i4").astype(np.int32)
