"""GrammarMatcher: which tokens may come next, so that an output fits its schema, regex, choice or grammar."""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from nanovllm.engine.batch import IntArray
from nanovllm.errors import InvalidArgumentError
from nanovllm.sampling_params import StructuredOutputsParams


class GrammarMatcher:
    """Follows one output through its grammar.

    mask: [ceil(vocab_size / 32)] int32; bit t % 32 of word t // 32 is 1 where token t may come next.
    """

    def __init__(self, matcher: Any, params: StructuredOutputsParams, vocab_size: int) -> None:
        self._matcher = matcher
        self._params = params
        self.mask: IntArray = np.zeros(-(-vocab_size // 32), dtype=np.int32)
        self._last_word = 2 ** (vocab_size % 32) - 1 or -1  # xgrammar leaves bits past the vocabulary set
        self._num_tokens = 0
        if not self._fill():
            raise ValueError("no text fits it")

    def accept(self, token_id: int) -> InvalidArgumentError | None:
        """Takes the output's next token. Returns an error if the grammar allows no token after it, else None."""
        self._num_tokens += 1
        if self._matcher.accept_token(token_id) and self._fill():
            return None
        return grammar_error(self._params, f"no token may follow the first {self._num_tokens} of this output")

    def _fill(self) -> bool:
        """Updates the mask. Returns whether it allows any token."""
        self._matcher.fill_next_token_bitmask(self.mask)
        self.mask[-1] &= self._last_word
        return bool(self.mask.any())


def grammar_error(params: StructuredOutputsParams, why: object) -> InvalidArgumentError:
    """Returns the error for a grammar that cannot be used. why: the reason, such as an error of xgrammar."""
    reason = re.sub(r"\[\d\d:\d\d:\d\d\] \S+: (?:Check failed: .*? is false: )?", "", str(why)).strip().rstrip(".")
    reason = reason if len(reason) <= 400 else f"{reason[:200]} … {reason[-200:]}"
    kind = params.kind
    return InvalidArgumentError(
        f"structured_outputs.{kind}", getattr(params, kind), f"what xgrammar can follow: {reason}"
    )
