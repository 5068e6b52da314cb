"""POST /abort and /reset_prefix_cache: for development, behind `--dev`."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from nanovllm.server.protocol.base import ApiModel
from nanovllm.server.protocol.errors import RESPONSES
from nanovllm.server.responses import JsonResponse
from nanovllm.server.service import service_of

router = APIRouter(responses=RESPONSES)


class AbortRequest(ApiModel):
    """The id of an answer, or several."""

    request_id: str | list[str]


@router.post("/abort")
async def abort(request: Request, body: AbortRequest) -> Response:
    """Ends running requests, whose answers then have finish_reason "abort"."""
    names = [body.request_id] if isinstance(body.request_id, str) else body.request_id
    return JsonResponse({"aborted": await service_of(request).abort(names)})


@router.post("/reset_prefix_cache")
async def reset_prefix_cache(request: Request) -> Response:
    """Forgets every cached prefix."""
    service_of(request).engine.reset_prefix_cache()
    return Response(status_code=200)
