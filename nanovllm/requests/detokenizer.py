"""Incremental text of an output: `Detokenizer` decodes tokens one after another, `StopStrings` looks for stop strings.

Only streams and requests with stop strings use them. Other outputs are decoded once, at the end.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from nanovllm.requests.stop_search import StopMatcher, StopSearch

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_CONTEXT = 4  # tokens decoded again before the new ones, since a token's text may depend on those to its left
_MAX_WINDOW = 16  # tokens after which the window is cut to its context
_REPLACEMENT = "\ufffd"  # stands for bytes that are not a character, or not a complete one yet


class Detokenizer:
    """Decodes a growing list of tokens. The returned texts, joined, begin the text of all tokens decoded at once.

    It decodes a window of the newest tokens. Two things at its end may still change, and are held back:

    - The bytes of a character that needs more tokens. They decode to one replacement, and are at most three, so the
      context has all of them.
    - Tokens that stand for one byte each, such as `<0xE2>`. A tokenizer with byte fallback decodes a run of them at
      once, and to replacements alone if the run is not valid UTF-8. They wait for the token that ends the run.

    With a byte-level tokenizer, tokens of whole characters need no window: `TokenTexts` has their texts.
    """

    def __init__(self, tokenizer: Any, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._texts = token_texts(tokenizer, skip_special_tokens)
        self._window: list[int] = []
        self._bytes: list[int] = []  # the run of byte tokens after the window
        self._num_shown = 0  # characters of the window's text that were returned

    def add(self, *token_ids: int) -> str:
        """Returns the characters that these tokens complete; "" if the character needs more tokens."""
        if self._texts is not None and not self._window:
            texts = [text for token_id in token_ids if (text := self._texts[token_id]) is not None]
            if len(texts) == len(token_ids):
                return "".join(texts)
        known = len(self._window)
        for token_id in token_ids:
            if self._is_byte(token_id):
                self._bytes.append(token_id)
            elif not self._bytes:
                self._window.append(token_id)
            elif self._has_text(token_id):  # a skipped token does not end the run
                self._window += [*self._bytes, token_id]
                self._bytes.clear()
        if len(self._window) == known:
            return ""
        text = self._decode(self._window)
        new = text[self._num_shown : len(text) - text.endswith(_REPLACEMENT)]
        self._num_shown += len(new)
        if self._texts is not None and self._num_shown == len(text):
            self._window.clear()
            self._num_shown = 0
        elif len(self._window) > _MAX_WINDOW:
            self._cut_window()
        return new

    def end(self) -> str:
        """Returns the rest of the text, when no token follows."""
        return self._decode(self._window + self._bytes)[self._num_shown :]

    def _cut_window(self) -> None:
        context: list[int] = []
        for token_id in reversed(self._window):
            if len(context) == _CONTEXT:
                break
            if self._has_text(token_id):
                context.append(token_id)
        self._window = context[::-1]
        text = self._decode(self._window)
        self._num_shown = len(text) - text.endswith(_REPLACEMENT)

    def _is_byte(self, token_id: int) -> bool:
        token = self._tokenizer.convert_ids_to_tokens(token_id)  # None for an unknown id; some tokenizers give bytes
        return isinstance(token, str) and len(token) == 6 and token.startswith("<0x") and token.endswith(">")

    def _has_text(self, token_id: int) -> bool:
        """Returns whether decoding shows the token. Two of them are decoded: the first one may lose its space."""
        return self._decode([token_id, token_id]) != ""

    def _decode(self, token_ids: list[int]) -> str:
        return decode(self._tokenizer, token_ids, self._skip_special_tokens)


class TokenTexts(dict[int, "str | None"]):
    """The texts of tokens, by id, for a tokenizer that joins the bytes of its tokens. None: not whole characters.

    After a whole character, such a token adds the same text wherever it stands. Ids are looked up when they are needed.
    """

    def __init__(self, backend: Tokenizer, skip_special_tokens: bool) -> None:
        super().__init__()
        self._backend, self._skip_special_tokens = backend, skip_special_tokens

    def __missing__(self, token_id: int) -> str | None:
        text: str = self._backend.decode([token_id], skip_special_tokens=self._skip_special_tokens)
        self[token_id] = None if _REPLACEMENT in text else text
        return self[token_id]


_TOKEN_TEXTS: WeakKeyDictionary[Any, dict[bool, TokenTexts]] = WeakKeyDictionary()  # by tokenizer


def token_texts(tokenizer: Any, skip_special_tokens: bool) -> TokenTexts | None:
    """Returns the texts of a tokenizer's tokens; None if it does not join the bytes of its tokens."""
    kind: type = type(tokenizer)
    if not _decodes_in_backend(kind):
        return None
    from tokenizers.decoders import ByteLevel

    backend = tokenizer.backend_tokenizer
    if not isinstance(backend.decoder, ByteLevel):
        return None
    known = _TOKEN_TEXTS.setdefault(tokenizer, {})
    return known.setdefault(skip_special_tokens, TokenTexts(backend, skip_special_tokens))


class StopStrings:
    """Watches the text of one output for stop strings."""

    def __init__(self, search: StopSearch, detokenizer: Detokenizer, include_stop: bool, min_tokens: int = 0) -> None:
        self.search = search
        self.text = ""  # the output up to the stop string, once one is found
        self._matcher = StopMatcher(search)
        self._detokenizer = detokenizer
        self._include_stop = include_stop
        self._num_ignored = min_tokens  # tokens left in which stop strings do not count
        self._pieces: list[str] = []  # of the text

    def add(self, token_id: int) -> str | None:
        """Returns the stop string that this token completes, the leftmost if there are several, and sets `text`.

        Returns None if it completes none.
        """
        self._num_ignored -= 1
        return self._watch(self._detokenizer.add(token_id))

    def end(self) -> str | None:
        """Returns the stop string in text that waited for more tokens, when none follows, and sets `text`; or None."""
        return self._watch(self._detokenizer.end())

    def _watch(self, text: str) -> str | None:
        self._pieces.append(text)
        found = self._matcher.add(text)
        if found is None or self._num_ignored >= 0:
            return None
        self.text = "".join(self._pieces)[: found.start + len(found.stop) * self._include_stop]
        return found.stop


def decode(tokenizer: Any, token_ids: list[int], skip_special_tokens: bool) -> str:
    """Returns the text of the tokens. Spaces are not cleaned up, since that could change text already shown."""
    text: str
    kind: type = type(tokenizer)
    if _decodes_in_backend(kind):
        text = tokenizer.backend_tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens)
    else:
        text = tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False)
    return text


@functools.lru_cache
def _decodes_in_backend(kind: type) -> bool:
    """Returns whether `decode` of a tokenizer is that of its backend, which alone takes a third of the time."""
    modules = [getattr(getattr(kind, name, None), "__module__", "") for name in ("decode", "_decode")]
    has_own = not all(module.startswith("transformers.tokenization_utils") for module in modules)
    return hasattr(kind, "backend_tokenizer") and not has_own
