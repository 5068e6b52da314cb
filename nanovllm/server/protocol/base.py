"""What the requests of all families share."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from typing_extensions import TypedDict

TokenIds = list[int]


class ApiModel(BaseModel):
    """Base class of request bodies. Types are strict: no text for a number. Unknown fields are kept, and reported."""

    model_config = ConfigDict(strict=True, extra="allow", frozen=True, protected_namespaces=())

    @property
    def unknown_fields(self) -> dict[str, Any]:
        """The fields that the model does not declare."""
        return self.model_extra or {}


class StreamOptions(ApiModel):
    """What a stream has beside its text."""

    include_usage: bool | None = Field(None, description="End with a chunk that has the usage.")
    continuous_usage_stats: bool | None = Field(None, description="Every chunk has the usage so far.")


class JsonSchema(ApiModel):
    """The JSON schema of a response_format."""

    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | bool | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(ApiModel):
    """What the output must look like, in OpenAI's form, or as a structural tag in vLLM's."""

    type: str = Field(description="text, json_object, json_schema, or structural_tag with its fields beside")
    json_schema: JsonSchema | None = None


class GenerationRequest(ApiModel):
    """The sampling fields of /v1/completions and /v1/chat/completions: OpenAI's, and vLLM's extras."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    n: int | None = None
    best_of: int | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: TokenIds | None = None
    include_stop_str_in_output: bool | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    ignore_eos: bool | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    allowed_token_ids: TokenIds | None = None
    bad_words: list[str] | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool | None = None
    detokenize: bool | None = None
    speculate: bool | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: dict[str, Any] | None = None
    guided_json: str | dict[str, Any] | bool | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    add_special_tokens: bool | None = None
    cache_salt: Annotated[str, Field(min_length=1)] | None = None
    user: str | None = Field(None, description="No effect.")
    metadata: dict[str, Any] | None = Field(None, description="No effect.")

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with its usage."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def wants_continuous_usage(self) -> bool:
        """Whether each chunk has the usage."""
        return self.stream_options is not None and bool(self.stream_options.continuous_usage_stats)


class PromptTokensDetails(TypedDict):
    cached_tokens: int


class Usage(TypedDict):
    """The tokens of a request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


FinishReason = Literal["stop", "length", "tool_calls", "abort"]
