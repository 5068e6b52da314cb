"""The reasoning parser: separates `<think>…</think>` from the content while the text streams."""

from __future__ import annotations

import enum

from nanovllm.server.markers import start_of_partial
from nanovllm.server.parsing import Delta

_OPEN, _CLOSE = "<think>", "</think>"


class _State(enum.Enum):
    START = enum.auto()  # a `<think>` here opens the block
    REASONING = enum.auto()
    CONTENT = enum.auto()


class ReasoningParser:
    """Turns text into reasoning and content. Any split of the text into pieces gives the same two.

    A block counts only at the start of the text, after white space; tags elsewhere are content. Line breaks next to a
    tag belong to the tag. A block that is never closed is reasoning to its end.

    prompt: the text of the prompt. The block is open from the start if the prompt ends with `<think>`, and cannot come
        if it ends with `</think>`, as Qwen3's template writes with enable_thinking=False.
    continued: with continue_final_message, the message that the model continues.
    """

    def __init__(self, prompt: str = "", continued: str = "") -> None:
        self._text = ""  # not given out yet
        self._after_tag = False  # the line breaks that come next belong to a tag
        self._state = _State.START
        end = prompt.rstrip()
        if end.endswith(_OPEN) or continued.rfind(_OPEN) > continued.rfind(_CLOSE):
            self._enter(_State.REASONING, "")
        elif end.endswith(_CLOSE):
            self._enter(_State.CONTENT, "")
        elif continued:
            self._state = _State.CONTENT

    def feed(self, text: str) -> list[Delta]:
        """Returns what is known after the next piece of text. Only what may be part of a tag waits."""
        self._text += text
        deltas: list[Delta] = []
        if self._state is _State.START:
            self._read_start()
        self._drop_line_breaks()
        if self._state is _State.REASONING:
            before, tag, after = self._text.partition(_CLOSE)
            if tag:
                reasoning = before.rstrip("\n")
                self._enter(_State.CONTENT, after)
            else:
                waiting = start_of_partial(self._text, _CLOSE, "\n")
                reasoning, self._text = self._text[:waiting], self._text[waiting:]
            if reasoning:
                deltas.append(Delta(reasoning=reasoning))
        if self._state is _State.CONTENT:
            deltas += self._rest()
        return deltas

    def finish(self) -> list[Delta]:
        """Returns what waited, at the end of the text."""
        return self._rest()

    def _read_start(self) -> None:
        text = self._text.lstrip()
        if text.startswith(_OPEN):
            self._enter(_State.REASONING, text[len(_OPEN) :])
        elif not _OPEN.startswith(text):
            self._state = _State.CONTENT

    def _enter(self, state: _State, text: str) -> None:
        self._state, self._text, self._after_tag = state, text, True
        self._drop_line_breaks()

    def _drop_line_breaks(self) -> None:
        if self._after_tag:
            self._text = self._text.lstrip("\n")
            self._after_tag = not self._text

    def _rest(self) -> list[Delta]:
        text, self._text = self._text, ""
        if not text:
            return []
        return [Delta(reasoning=text) if self._state is _State.REASONING else Delta(content=text)]
