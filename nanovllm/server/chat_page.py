"""GET /: a page to chat with the model and to watch the engine. GET /events: the log events that it shows."""

from __future__ import annotations

import base64
import functools
import hashlib
import re
from dataclasses import asdict, dataclass
from importlib.resources import files

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from nanovllm.server.responses import JsonResponse
from nanovllm.server.service import service_of

router = APIRouter()


@dataclass(frozen=True)
class _Page:
    content: bytes
    headers: dict[str, str]


@router.head("/", include_in_schema=False)
@router.get("/", include_in_schema=False)
async def chat_page() -> Response:
    """Answers the chat page, one file without references to others."""
    page = _page()
    return Response(page.content, media_type="text/html", headers=page.headers)


@router.get("/events")
async def recent_events(request: Request) -> Response:
    """Answers the last events of the log that are about requests and steps, the oldest first."""
    service = service_of(request)
    latest = await service.in_thread(service.latest_events)  # asks another process, if there are several
    return JsonResponse({"events": [asdict(each) for each in latest]})


@functools.cache
def _page() -> _Page:
    content = files("nanovllm.server").joinpath("assets/chat.html").read_bytes()
    policy = {
        "default-src": "'none'",
        "script-src": _hash_of("script", content),
        "style-src": _hash_of("style", content),
        "img-src": "data:",  # the empty icon
        "connect-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
        "require-trusted-types-for": "'script'",  # the browser refuses innerHTML
    }
    headers = {
        "Content-Security-Policy": "; ".join(f"{name} {value}" for name, value in policy.items()),
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }
    return _Page(content, headers)


def _hash_of(tag: str, content: bytes) -> str:
    """Returns the source expression that allows the page's one element of this tag."""
    (text,) = re.findall(rf"<{tag}>(.*?)</{tag}>".encode(), content, re.DOTALL)
    return f"'sha256-{base64.b64encode(hashlib.sha256(text).digest()).decode()}'"
