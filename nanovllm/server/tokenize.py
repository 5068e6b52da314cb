"""POST /tokenize, POST /detokenize, GET /tokenizer_info: the model's tokenizer over HTTP."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from nanovllm.errors import InvalidArgumentError
from nanovllm.server.chat import render
from nanovllm.server.errors import invalid
from nanovllm.server.protocol.chat import ChatCompletionRequest
from nanovllm.server.protocol.errors import RESPONSES
from nanovllm.server.protocol.tokenize import (
    DetokenizeAnswer,
    DetokenizeRequest,
    TokenizeAnswer,
    TokenizeRequest,
)
from nanovllm.server.responses import JsonResponse
from nanovllm.server.service import Service, service_of

router = APIRouter(responses=RESPONSES)


@router.post("/tokenize", responses={200: {"model": TokenizeAnswer}})
async def tokenize(request: Request, body: TokenizeRequest) -> Response:
    """Answers the tokens of a text or a conversation."""
    service = service_of(request)
    service.check_model(body.model)
    service.report_ignored(body.unknown_fields)
    if (body.prompt is None) == (body.messages is None):
        raise invalid("prompt", "Exactly one of prompt and messages must be given.")
    if body.prompt is not None:
        text, adds_special = body.prompt, body.add_special_tokens is not False
    else:
        text, adds_special = await _render(service, body), bool(body.add_special_tokens)
    tokenizer = service.tokenizer
    tokens = await service.in_thread(encode, tokenizer, text, adds_special)
    strings = tokenizer.convert_ids_to_tokens(tokens) if body.return_token_strs else None
    return JsonResponse(
        {"count": len(tokens), "max_model_len": service.max_model_len, "tokens": tokens, "token_strs": strings}
    )


async def _render(service: Service, body: TokenizeRequest) -> str:
    names = set(ChatCompletionRequest.model_fields).intersection(TokenizeRequest.model_fields)
    fields = {name: getattr(body, name) for name in names if getattr(body, name) is not None}
    return await render(service, ChatCompletionRequest(**fields))


def encode(tokenizer: Any, text: str, adds_special: bool) -> list[int]:
    """Returns the tokens of a text. Raises InvalidArgumentError if it cannot be encoded."""
    try:
        tokens: list[int] = tokenizer.encode(text, add_special_tokens=adds_special, verbose=False)
    except (TypeError, UnicodeError):
        raise InvalidArgumentError("prompt", text, "a text that can be encoded") from None
    return tokens


@router.post("/detokenize", responses={200: {"model": DetokenizeAnswer}})
async def detokenize(request: Request, body: DetokenizeRequest) -> Response:
    """Answers the text of tokens."""
    service = service_of(request)
    service.check_model(body.model)
    service.report_ignored(body.unknown_fields)
    vocab_size = service.engine.resolved.vocab_size
    if not all(0 <= token < vocab_size for token in body.tokens):
        raise invalid("tokens", f"tokens must be token ids from 0 to {vocab_size - 1}.")
    return JsonResponse({"prompt": await service.in_thread(service.tokenizer.decode, body.tokens)})


@router.get("/tokenizer_info")
async def tokenizer_info(request: Request) -> Response:
    """Answers what tokenizer_config.json says of the tokenizer, as clients that count tokens ask for it."""
    service = service_of(request)
    tokenizer = service.tokenizer
    return JsonResponse(
        {
            "tokenizer_class": type(tokenizer).__name__,
            "model_max_length": service.max_model_len,
            "vocab_size": len(tokenizer),
            "chat_template": tokenizer.chat_template,
            **{name: str(text) for name, text in tokenizer.special_tokens_map.items() if isinstance(text, str)},
        }
    )
