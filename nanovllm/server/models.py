"""GET /v1/models, and what this server has not: POST /v1/embeddings."""

from __future__ import annotations

import time

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from nanovllm.server.errors import ApiError
from nanovllm.server.protocol.errors import RESPONSES
from nanovllm.server.protocol.models import ModelCard, ModelList
from nanovllm.server.responses import JsonResponse
from nanovllm.server.service import Service, service_of

router = APIRouter(responses=RESPONSES)


@router.get("/v1/models", responses={200: {"model": ModelList}})
async def list_models(request: Request) -> Response:
    """Lists the names of the model."""
    service = service_of(request)
    cards = [_card(service, name) for name in service.settings.served_model_name]
    return JsonResponse({"object": "list", "data": cards})


@router.get("/v1/models/{name:path}", responses={200: {"model": ModelCard}})
async def get_model(request: Request, name: str) -> Response:
    """Describes the model under one of its names."""
    service = service_of(request)
    service.check_model(name)
    return JsonResponse(_card(service, name))


def _card(service: Service, name: str) -> ModelCard:
    return {
        "id": name,
        "object": "model",
        "created": int(time.time()),
        "owned_by": "nanovllm",
        "root": service.model,
        "parent": None,
        "max_model_len": service.max_model_len,
    }


@router.post("/v1/embeddings", include_in_schema=False)
async def create_embeddings() -> Response:
    """Answers that there are none."""
    raise ApiError(400, "This model generates text: it has no embeddings.", param="model", code="not_supported")
