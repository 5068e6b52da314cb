"""GET /health, /ping, /version, /load and /metrics: what monitors ask."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from nanovllm import __version__
from nanovllm.server.errors import ApiError
from nanovllm.server.exposition import CONTENT_TYPE, exposition
from nanovllm.server.responses import JsonResponse
from nanovllm.server.service import service_of

router = APIRouter()


@router.head("/health", include_in_schema=False)
@router.head("/ping", include_in_schema=False)
@router.get("/health")
@router.get("/ping")
async def health(request: Request) -> Response:
    """Answers 200 if requests can run, and else 503."""
    service = service_of(request)
    if service.is_dead:
        raise ApiError(503, "The engine has ended.", code="engine_dead")
    if service.state != "ready":
        raise ApiError(503, f"The server is {service.state}.", code=service.state)
    return Response(status_code=200)


@router.get("/version")
async def version() -> Response:
    """Answers the version of nanovllm."""
    return JsonResponse({"version": __version__})


@router.get("/load")
async def load(request: Request) -> Response:
    """Answers how many requests are being answered, this one not counted, and the state of several replicas."""
    return JsonResponse(service_of(request).load())


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    """Answers the metrics of each engine in Prometheus' text format."""
    service = service_of(request)
    snapshots = await service.in_thread(service.metrics)  # asks the engines' processes, and waits for their steps
    metrics = [
        metric
        for index, snapshot in enumerate(snapshots)
        for metric in snapshot.metrics(model_name=service.model, engine=str(index))
    ]
    return Response(exposition(metrics), media_type=CONTENT_TYPE)
