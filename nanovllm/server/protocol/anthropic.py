"""Anthropic's Messages API: the bodies of requests to /v1/messages and /v1/messages/count_tokens."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from nanovllm.server.protocol.base import ApiModel

# A block of content. `cache_control` in it has no effect: caching is automatic.
Block = dict[str, Any]


class AnthropicMessage(ApiModel):
    """One turn of the conversation. content: a text, or blocks of type text, tool_use, tool_result or thinking."""

    role: Literal["user", "assistant", "system"]
    content: str | list[Block]


class AnthropicTool(ApiModel):
    """A tool of the client. Tools that Anthropic runs have another `type`, and are not supported."""

    name: str
    description: str | None = None
    input_schema: dict[str, Any] | None = None
    type: str | None = None


class AnthropicToolChoice(ApiModel):
    """Whether the model calls tools. any: one or more of them. tool: the one called `name`."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class AnthropicThinking(ApiModel):
    """Whether the model reasons first. Its budget and display have no effect."""

    type: Literal["enabled", "adaptive", "disabled"]
    budget_tokens: int | None = None
    display: str | None = None


class AnthropicOutputFormat(ApiModel):
    """The JSON schema of the output."""

    type: Literal["json_schema"]
    schema_: dict[str, Any] | bool = Field(alias="schema")


class AnthropicOutputConfig(ApiModel):
    """The form of the output. effort: no effect."""

    format: AnthropicOutputFormat | None = None
    effort: str | None = None


class CountTokensRequest(ApiModel):
    """The body of /v1/messages/count_tokens: what of a request makes its prompt."""

    model: str | None = None
    messages: list[AnthropicMessage] = Field(min_length=1)
    system: str | list[Block] | None = None
    tools: list[AnthropicTool] | None = None
    tool_choice: AnthropicToolChoice | None = None
    thinking: AnthropicThinking | None = None
    output_config: AnthropicOutputConfig | None = None
    cache_control: dict[str, Any] | None = Field(None, description="No effect.")
    chat_template_kwargs: dict[str, Any] | None = Field(None, description="As in /v1/chat/completions.")
    mcp_servers: list[Any] | None = None


class MessagesRequest(CountTokensRequest):
    """The body of /v1/messages."""

    max_tokens: int
    stream: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    stop_sequences: list[str] | None = None
    metadata: dict[str, Any] | None = Field(None, description="No effect.")
    container: Any = None
    service_tier: str | None = Field(None, description="No effect.")
