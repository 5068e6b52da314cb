"""/v1/chat/completions: its request and its answers."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field
from typing_extensions import NotRequired, TypedDict

from nanovllm.server.protocol.base import ApiModel, FinishReason, GenerationRequest, TokenIds, Usage


class ContentPart(ApiModel):
    """A part of a message. Only parts of type text are supported."""

    type: str
    text: str | None = None


class FunctionCall(ApiModel):
    """A function that the model has called. arguments: JSON text."""

    name: str
    arguments: str | dict[str, Any] | None = None


class MessageToolCall(ApiModel):
    """A tool call in the message of an assistant."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: FunctionCall


class ChatMessage(ApiModel):
    """A message of a conversation."""

    role: str
    content: str | list[ContentPart | str] | None = None
    name: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[MessageToolCall] | None = None
    tool_call_id: str | None = None


class FunctionDefinition(ApiModel):
    """A function that the model may call."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = Field(None, description="A JSON schema.")
    strict: bool | None = None


class Tool(ApiModel):
    """A tool that the model may call."""

    type: Literal["function"] = "function"
    function: FunctionDefinition


class FunctionName(ApiModel):
    name: str


class NamedTool(ApiModel):
    """A tool_choice that names the tool to call."""

    type: Literal["function"] = "function"
    function: FunctionName


class ChatCompletionRequest(GenerationRequest):
    """A request for the next message of a conversation."""

    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    documents: list[dict[str, Any]] | None = None
    reasoning_effort: str | None = Field(None, description="A variable of the chat template.")
    include_reasoning: bool | None = None


class TokenLogprob(TypedDict):
    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: NotRequired[list[TokenLogprob]]


class ChatLogprobs(TypedDict):
    """Log-probabilities of the tokens of a message, one entry a token."""

    content: list[TokenLogprob]


class ToolFunction(TypedDict):
    name: NotRequired[str]
    arguments: str


class ToolCallPart(TypedDict):
    """A tool call, or what is new in it."""

    index: NotRequired[int]
    id: NotRequired[str]
    type: NotRequired[str]
    function: ToolFunction


class MessagePart(TypedDict):
    """A message, or what is new in it."""

    role: NotRequired[str]
    content: NotRequired[str | None]
    reasoning: NotRequired[str | None]
    reasoning_content: NotRequired[str | None]
    tool_calls: NotRequired[list[ToolCallPart]]


class ChatChoice(TypedDict):
    """One message, or what is new in it (`delta`)."""

    index: int
    message: NotRequired[MessagePart]
    delta: NotRequired[MessagePart]
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None
    stop_reason: NotRequired[int | str | None]
    token_ids: NotRequired[TokenIds]


class ChatCompletion(TypedDict):
    """An answer, or a chunk of one."""

    id: str
    object: str
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage | None
    prompt_logprobs: NotRequired[list[dict[str, Any] | None] | None]
    prompt_token_ids: NotRequired[TokenIds]
