"""POST /abort, /reset_prefix_cache, /start_profile and /stop_profile: for development, behind `--dev`."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from nanovllm.async_llm import AsyncLLM
from nanovllm.data_parallel.engines import DataParallelLLM
from nanovllm.errors import InvalidStateError
from nanovllm.server.errors import ApiError
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


@router.post("/start_profile")
async def start_profile(request: Request) -> Response:
    """Records the engine's work with torch's profiler until /stop_profile."""
    try:
        await _only_engine(request).start_profile()
    except InvalidStateError:  # its text may have a path
        message = "No profile was started: one runs already, or a rank cannot record. POST /stop_profile ends it."
        raise ApiError(400, message, code="invalid_state") from None
    return Response(status_code=200)


@router.post("/stop_profile")
async def stop_profile(request: Request) -> Response:
    """Writes the profile. Answers its tables and the names of its files. folder: null if no option names it."""
    engine = _only_engine(request)
    try:
        table = await engine.stop_profile()
    except InvalidStateError:
        message = "No profile runs. POST /start_profile starts one."
        raise ApiError(400, message, code="invalid_state") from None
    ranks = range(engine.config.tensor_parallel_size)
    files = [f"profile_rank{rank}.{ending}" for rank in ranks for ending in ("json", "txt")]
    folder = (engine.config.profiler_config or {}).get("torch_profiler_dir")
    return JsonResponse({"folder": folder, "files": files, "table": table})


def _only_engine(request: Request) -> AsyncLLM:
    engine = service_of(request).engine
    if isinstance(engine, DataParallelLLM):
        raise ApiError(400, "A server with several replicas records no profile. Start one without data_parallel_size.")
    return engine
