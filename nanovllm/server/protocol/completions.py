"""/v1/completions: its request and its answers."""

from __future__ import annotations

from typing import Any

from pydantic import Field
from typing_extensions import NotRequired, TypedDict

from nanovllm.server.protocol.base import FinishReason, GenerationRequest, TokenIds, Usage


class CompletionRequest(GenerationRequest):
    """A request to continue one or several prompts."""

    prompt: str | list[str] | TokenIds | list[TokenIds] = Field(description="Texts or token ids.")
    logprobs: int | None = None
    echo: bool | None = None


class CompletionLogprobs(TypedDict):
    """Log-probabilities, one entry a token. The first token of a prompt has none."""

    text_offset: list[int]
    token_logprobs: list[float | None]
    tokens: list[str]
    top_logprobs: list[dict[str, float] | None]


class CompletionChoice(TypedDict):
    """One completion, or what is new in it."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason | None
    stop_reason: int | str | None
    prompt_logprobs: NotRequired[list[dict[str, Any] | None] | None]
    token_ids: NotRequired[TokenIds]
    prompt_token_ids: NotRequired[TokenIds]


class Completion(TypedDict):
    """An answer, or a chunk of one."""

    id: str
    object: str
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None
