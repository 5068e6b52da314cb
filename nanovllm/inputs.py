"""The forms of a prompt as typed dictionaries, under vLLM's names."""

from __future__ import annotations

from typing import TypeAlias, TypedDict


class _Common(TypedDict, total=False):
    cache_salt: str | None


class TextPrompt(_Common):
    """A prompt as text. cache_salt: the prefix cache shares blocks only between prompts with the same salt."""

    prompt: str


class _OptionalText(_Common, total=False):
    prompt: str | None


class TokensPrompt(_OptionalText):
    """A prompt as token ids. prompt: its text, for the output. cache_salt: as in TextPrompt."""

    prompt_token_ids: list[int]


PromptType: TypeAlias = "str | list[int] | TextPrompt | TokensPrompt"
