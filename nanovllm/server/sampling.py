"""From the fields of a request to SamplingParams."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nanovllm.compat.unsupported import REQUEST_ARGUMENTS, SAMPLING_FIELDS, Unsupported, without_effect
from nanovllm.sampling_params import RequestOutputKind, SamplingParams, StructuredOutputsParams
from nanovllm.server.errors import invalid
from nanovllm.server.protocol.base import GenerationRequest, ResponseFormat
from nanovllm.server.service import Service
from nanovllm.utils.arguments import Rule

# Fields that a request and SamplingParams share. A request may leave out each, or give null.
_SHARED = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "n",
    "seed",
    "stop",
    "stop_token_ids",
    "include_stop_str_in_output",
    "min_tokens",
    "ignore_eos",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "allowed_token_ids",
    "bad_words",
    "prompt_logprobs",
    "skip_special_tokens",
    "detokenize",
    "speculate",
)
_DEFAULTS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")  # of generation_config.json


def _only(*values: object) -> Rule:
    return Rule(" or ".join(map(repr, values)), lambda given: any(given is each or given == each for each in values))


_NONE = _only(None)
_OFF = _only(None, False)
_ANYTHING = Rule("any value", lambda value: True)
_TEXT_ALONE = "answers are text"
# Fields of OpenAI's and vLLM's requests without effect here: which values pass, and what the others ask for.
FIELDS: Mapping[str, Unsupported] = {
    **SAMPLING_FIELDS,
    "priority": REQUEST_ARGUMENTS["priority"],
    "audio": Unsupported(_NONE, _TEXT_ALONE, "audio"),
    "echo": Unsupported(_OFF, "the answer is a new message", "echo in a chat", "Use continue_final_message."),
    "modalities": Unsupported(_only(None, ["text"]), _TEXT_ALONE, "audio"),
    "service_tier": Unsupported(_only(None, "auto", "default"), "there is one tier", "other service tiers"),
    "store": Unsupported(_OFF, "nothing is stored", "stored answers"),
    "prediction": Unsupported(_NONE, "drafts come from the prompt and from outputs", "predicted outputs"),
    "web_search_options": Unsupported(_NONE, "the server reads no web pages", "web search"),
    "functions": Unsupported(_NONE, "tools has replaced it", "functions", "Use tools."),
    "function_call": Unsupported(_NONE, "tool_choice has replaced it", "function_call", "Use tool_choice."),
    "safety_identifier": Unsupported(_ANYTHING, "users are not told apart"),
    "prompt_cache_key": Unsupported(_ANYTHING, "the prefix cache serves all prompts; cache_salt separates them"),
    "prompt_cache_retention": Unsupported(_ANYTHING, "the prefix cache keeps what was used last"),
    "request_id": Unsupported(_ANYTHING, "the header X-Request-Id names a request"),
    "guided_decoding_backend": Unsupported(_ANYTHING, "xgrammar compiles grammars"),
    "guided_whitespace_pattern": Unsupported(_NONE, "grammars have their own white space", "other white space"),
    "thinking_token_budget": Unsupported(_NONE, "reasoning has no limit of its own", "a limit of the reasoning"),
    "prompt_embeds": Unsupported(_NONE, "prompts are texts or token ids", "embeddings as prompts"),
    "kv_transfer_params": Unsupported(_NONE, "keys and values stay in this engine", "moving the KV cache"),
    "vllm_xargs": Unsupported(_NONE, "no code reads them", "arguments of plugins"),
    "mm_processor_kwargs": Unsupported(_NONE, _TEXT_ALONE, "images, audio and video"),
}


def check_request(service: Service, body: GenerationRequest, endpoint: str) -> None:
    """Raises ApiError or InvalidArgumentError for another model, or a field that asks for what there is not."""
    service.check_model(body.model)
    service.report_ignored(without_effect(endpoint, body.unknown_fields, FIELDS))
    if body.best_of is not None and body.best_of != (body.n or 1):
        without_effect(endpoint, {"best_of": body.best_of}, FIELDS)
    if body.stream_options is not None and not body.stream:
        raise invalid("stream_options", "stream_options is for requests with stream=true.")


def make_params(
    service: Service, body: GenerationRequest, *, max_tokens: int | None, logprobs: int | None
) -> SamplingParams:
    """Returns the sampling parameters of a request. Raises InvalidArgumentError, which names the field."""
    values = {name: getattr(service.defaults, name) for name in _DEFAULTS}
    values |= {name: value for name in _SHARED if (value := getattr(body, name)) is not None}
    return SamplingParams(
        **values,
        max_tokens=max_tokens,
        logprobs=logprobs,
        logit_bias=None if body.logit_bias is None else _logit_bias(body.logit_bias),
        structured_outputs=structured_outputs(body),
        output_kind=RequestOutputKind.DELTA if body.stream else RequestOutputKind.FINAL_ONLY,
    )


def _logit_bias(given: Mapping[str, float]) -> dict[int, float]:
    for token in given:
        if not (token.isascii() and token.isdecimal()) or len(token) > 10:
            raise invalid("logit_bias", "logit_bias must be an object whose keys are token ids.")
    return {int(token): bias for token, bias in given.items()}


def structured_outputs(body: GenerationRequest) -> StructuredOutputsParams | None:
    """Returns what the output must look like; None for any text."""
    asked = [("response_format", _of_format(body.response_format))]
    asked += [(f"guided_{kind}", _given({kind: getattr(body, f"guided_{kind}")})) for kind in _GUIDED]
    asked += [("structured_outputs", _given(body.structured_outputs or {}))]
    wanted = [(name, fields) for name, fields in asked if fields]
    if len(wanted) > 1:
        raise invalid(wanted[1][0], f"{wanted[1][0]} cannot be given together with {wanted[0][0]}.")
    return StructuredOutputsParams(**wanted[0][1]) if wanted else None


def given_names(body: GenerationRequest) -> dict[str, str]:
    """Returns the fields of the body that fields of SamplingParams come from, where their names differ."""
    given = [kind for kind in _GUIDED if getattr(body, f"guided_{kind}") is not None]
    names = {f"structured_outputs.{kind}": f"guided_{kind}" for kind in given}
    if not names and body.response_format:
        names["structured_outputs.json"] = "response_format.json_schema.schema"
        names["structured_outputs.structural_tag"] = "response_format"
    return names


_GUIDED = ("json", "regex", "choice", "grammar")


def _given(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}


def _of_format(wanted: ResponseFormat | None) -> dict[str, Any]:
    if wanted is None or wanted.type == "text":
        return {}
    if wanted.type == "json_object":
        return {"json_object": True}
    if wanted.type == "structural_tag":
        return {"structural_tag": wanted.unknown_fields}
    if wanted.type != "json_schema":
        allowed = "'text', 'json_object', 'json_schema' or 'structural_tag'"
        raise invalid("response_format.type", f"response_format.type must be {allowed}.")
    if wanted.json_schema is None or wanted.json_schema.schema_ is None:
        raise invalid("response_format.json_schema", "response_format.json_schema must have a 'schema'.")
    return {"json": wanted.json_schema.schema_}
