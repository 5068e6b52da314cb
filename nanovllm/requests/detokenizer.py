"""Incremental text of an output: `Detokenizer` decodes tokens one after another, `StopStrings` looks for stop strings.

Only streams and requests with stop strings use them. Other outputs are decoded once, at the end.
"""

from __future__ import annotations

from typing import Any

_CONTEXT = 4  # tokens decoded again before the new ones, since a token's text may depend on those to its left
_REPLACEMENT = "\ufffd"  # stands for bytes that are not a character, or not a complete one yet
_MAX_HELD = 3  # an incomplete character at the end of the text decodes to at most this many replacements


class Detokenizer:
    """Decodes a growing list of tokens. Text that it has returned never changes, and ends with a whole character."""

    def __init__(self, tokenizer: Any, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._window: list[int] = []  # the newest tokens: those not fully shown, and `_CONTEXT` before them
        self._num_shown = 0  # characters of the window's text that were returned

    def add(self, *token_ids: int) -> str:
        """Returns the characters that these tokens complete; "" if the character needs more tokens."""
        self._window += token_ids
        text = decode(self._tokenizer, self._window, self._skip_special_tokens)
        num_held = min(len(text) - len(text.rstrip(_REPLACEMENT)), _MAX_HELD)
        new = text[self._num_shown : len(text) - num_held]
        self._num_shown += len(new)
        if not num_held:
            self._window = self._window[-_CONTEXT:]
            self._num_shown = len(decode(self._tokenizer, self._window, self._skip_special_tokens))
        return new


class StopStrings:
    """Watches the text of one output for stop strings."""

    def __init__(
        self, stop: tuple[str, ...], detokenizer: Detokenizer, include_stop: bool, min_tokens: int = 0
    ) -> None:
        self.text = ""
        self._stop = stop
        self._detokenizer = detokenizer
        self._include_stop = include_stop
        self._num_ignored = min_tokens  # tokens left in which stop strings do not count

    def add(self, token_id: int) -> str | None:
        """Returns the stop string that this token completes, the leftmost if there are several, and cuts `text` there.

        Returns None if it completes none.
        """
        known = len(self.text)
        self.text += self._detokenizer.add(token_id)
        starts = {stop: max(0, known + 1 - len(stop)) for stop in self._stop}  # must end in the new text
        found = [(at, stop) for stop, start in starts.items() if (at := self.text.find(stop, start)) >= 0]
        self._num_ignored -= 1
        if not found or self._num_ignored >= 0:
            return None
        at, stop = min(found, key=lambda match: match[0])
        self.text = self.text[: at + len(stop) if self._include_stop else at]
        return stop


def decode(tokenizer: Any, token_ids: list[int], skip_special_tokens: bool) -> str:
    """Returns the text of the tokens. Spaces are not cleaned up, since that could change text already shown."""
    text: str = tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False)
    return text
