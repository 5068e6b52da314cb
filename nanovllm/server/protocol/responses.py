"""OpenAI's Responses API: the body of requests to /v1/responses."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from nanovllm.sampling_params import MAX_LOGPROBS
from nanovllm.server.protocol.base import ApiModel

Item = dict[str, Any]


class TextFormat(ApiModel):
    """The form of the output: text, json_object or json_schema."""

    type: str
    name: str | None = None
    schema_: dict[str, Any] | bool | None = Field(None, alias="schema")
    description: str | None = None
    strict: bool | None = None


class TextConfig(ApiModel):
    """How the text of the output looks."""

    format: TextFormat | None = None
    verbosity: str | None = None


class ReasoningConfig(ApiModel):
    """effort: "none" for no reasoning. The model chooses how long it reasons."""

    effort: str | None = None
    summary: str | None = None


class ResponsesRequest(ApiModel):
    """The body of /v1/responses. Nothing is stored between requests."""

    model: str | None = None
    input: str | list[Item]
    instructions: str | None = None
    stream: bool | None = None
    max_output_tokens: int | None = Field(None, ge=1)
    temperature: float | None = None
    top_p: float | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    text: TextConfig | None = None
    reasoning: ReasoningConfig | None = None
    include: list[str] | None = None
    chat_template_kwargs: dict[str, Any] | None = Field(None, description="As in /v1/chat/completions.")
    background: bool | None = None
    conversation: Any = None
    previous_response_id: str | None = None
    prompt: Any = None
    service_tier: str | None = None
    store: bool | None = None
    truncation: str | None = None
    metadata: dict[str, Any] | None = Field(None, description="Returned as it is.")
    user: str | None = Field(None, description="No effect.")
    max_tool_calls: int | None = Field(None, description="No effect: it counts tools that a server runs.")
    prompt_cache_key: str | None = Field(None, description="No effect.")
    safety_identifier: str | None = Field(None, description="No effect.")
    stream_options: dict[str, Any] | None = Field(None, description="No effect.")
