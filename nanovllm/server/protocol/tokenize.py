"""/tokenize, /detokenize and /tokenizer_info: their requests and answers, which are vLLM's."""

from __future__ import annotations

from typing import Any

from typing_extensions import TypedDict

from nanovllm.server.protocol.base import ApiModel, TokenIds
from nanovllm.server.protocol.chat import ChatMessage, Tool


class TokenizeRequest(ApiModel):
    """A request to tokenise a text (`prompt`) or a conversation (`messages`)."""

    model: str | None = None
    prompt: str | None = None
    messages: list[ChatMessage] | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: list[Tool] | None = None


class TokenizeAnswer(TypedDict):
    count: int
    max_model_len: int
    tokens: TokenIds
    token_strs: list[str] | None


class DetokenizeRequest(ApiModel):
    """A request for the text of tokens."""

    model: str | None = None
    tokens: TokenIds


class DetokenizeAnswer(TypedDict):
    prompt: str
