"""Outputs of grammars without a model: random tokens that the grammar allows, in a hurry to end."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

END, VOCAB_SIZE = 509, 512
MAX_TOKENS = 600


class Walker:
    """Makes outputs in the tiny checkpoint's tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        import xgrammar

        info = xgrammar.TokenizerInfo.from_huggingface(tokenizer, vocab_size=VOCAB_SIZE, stop_token_ids=[END])
        special = set(tokenizer.all_special_ids)
        self.texts = [b"" if token in special else text for token, text in enumerate(info.decoded_vocab)]
        sizes: dict[str, Any] = {"vocab_size": VOCAB_SIZE, "stop_token_ids": [END]}
        info = xgrammar.TokenizerInfo(self.texts, xgrammar.VocabType.RAW, add_prefix_space=False, **sizes)
        self._compiler = xgrammar.GrammarCompiler(info, max_threads=1, cache_enabled=False)
        self._ends = {token for token, text in enumerate(self.texts) if text and set(text) <= set(b'"]}')}

    def compile(self, grammar: Any) -> Any:
        return self._compiler.compile_grammar(grammar)

    def walk(self, compiled: Any, draw: random.Random) -> str | None:
        """Returns one output, or None if it does not end in time. Raises AssertionError at a dead end."""
        import xgrammar

        matcher, mask, output = xgrammar.GrammarMatcher(compiled), np.zeros(VOCAB_SIZE // 32, np.int32), b""
        patience = draw.choice((0, 3, 30))
        for step in range(MAX_TOKENS):
            matcher.fill_next_token_bitmask(mask)
            allowed = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist()
            assert allowed, f"a dead end after {output!r}"
            if END in allowed and (len(allowed) == 1 or step >= patience or draw.random() < 0.2):
                return output.decode()
            ends = self._ends.intersection(allowed)
            hurry = step >= patience and ends and draw.random() < 0.7
            token = draw.choice(sorted(ends) if hurry else [each for each in allowed if each != END])
            assert matcher.accept_token(token)
            output += self.texts[token]
        return None
