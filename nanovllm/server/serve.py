"""serve: runs the server in this process until a signal ends it. With several API processes, `supervisor` does.

The server listens at once, and answers 503 until the engine has started. The first SIGTERM or SIGINT lets the running
requests end; a second one ends the process at once.
"""

from __future__ import annotations

import asyncio
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from types import FrameType
from typing import Any

import uvicorn

from nanovllm.config import EngineConfig
from nanovllm.errors import NanoVLLMError
from nanovllm.logs import events
from nanovllm.logs.configuration import attached
from nanovllm.server.app import make_app
from nanovllm.server.http_protocol import HttpProtocol
from nanovllm.server.service import Engine, Service, make_engine
from nanovllm.server.settings import ServerSettings
from nanovllm.utils.garbage_collection import existing_objects_exempt
from nanovllm.utils.logger import setup_logger

logger = setup_logger(__name__)

_POLL_SECONDS = 0.05
_CLOSE_SECONDS = 3  # for clients to read the end of their answers


def serve(settings: ServerSettings, engine_args: EngineConfig) -> int:
    """Serves until a signal, and returns the exit status.

    0: a signal ended it, and the requests that ran have ended. 1: it cannot listen, the engine did not start, or it has
    died under `exit_on_death`. 128 + the signal's number: a second signal ended it.
    """
    service = Service(settings)
    server = HttpServer(service, partial(make_engine, engine_args, settings.data_parallel_size))
    try:
        server.run()
    except SystemExit:  # uvicorn has said why it cannot listen
        address = f"{settings.host}:{settings.port}"
        print(f"nanovllm serve: cannot listen at {address}. Choose another --port or --host.", file=sys.stderr)
        server.status, server.outcome = 1, "error"
    except OSError as error:  # of the certificate, or the folder of the socket
        problem = f"cannot listen: {error.strerror or error}. Check --uds, --ssl-certfile and --ssl-keyfile."
        print(f"nanovllm serve: {problem}", file=sys.stderr)
        server.status, server.outcome = 1, "error"
    finally:
        if server.engine is not None:
            server.engine.exit()
    events.server_stopped.log(logger, outcome=server.outcome, status=server.status)
    return server.status


class HttpServer(uvicorn.Server):
    """A uvicorn server with an engine, whose end it waits for."""

    def __init__(self, service: Service, make_engine: Callable[[], Engine]) -> None:
        settings = service.settings
        super().__init__(
            uvicorn.Config(
                make_app(service),
                host=settings.host,
                port=settings.port,
                uds=settings.uds,
                ssl_keyfile=settings.ssl_keyfile,
                ssl_certfile=settings.ssl_certfile,
                root_path=settings.root_path,
                http=HttpProtocol,
                ws="none",
                lifespan="off",
                log_config=None,
                log_level="warning",
                access_log=False,  # the middleware has one
                server_header=False,
                timeout_graceful_shutdown=_CLOSE_SECONDS,
            )
        )
        self.engine: Engine | None = None
        self.status = 0
        self.outcome = "clean"
        self._service, self._make_engine = service, make_engine
        self._num_signals = 0
        self._tasks: list[asyncio.Task[None]] = []  # kept, as the event loop does not keep them

    async def startup(self, sockets: Any = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._begin(self._start_engine())

    async def serve(self, sockets: Any = None) -> None:
        with attached(self._service.recent_events):
            await super().serve(sockets)

    def _begin(self, work: Any) -> None:
        self._tasks.append(asyncio.ensure_future(work))

    async def _start_engine(self) -> None:
        loop = asyncio.get_running_loop()
        started: asyncio.Future[Engine] = loop.create_future()

        def start() -> None:
            try:
                loop.call_soon_threadsafe(started.set_result, self._make_engine())
            except BaseException as error:
                loop.call_soon_threadsafe(started.set_exception, error)

        # A daemon thread: a signal ends the process while an engine starts.
        threading.Thread(target=start, name="nanovllm-start", daemon=True).start()
        try:
            self.engine = await started
        except NanoVLLMError as error:
            self._has_not_started(error)
            return
        except BaseException:
            self._end(1, "the engine did not start")
            raise
        self._service.start(self.engine)
        self._has_started()
        with existing_objects_exempt():
            while not self._service.is_dead:
                await asyncio.sleep(10 * _POLL_SECONDS)
        self._has_lost_engine()

    def _has_lost_engine(self) -> None:
        if self._service.settings.exit_on_death:
            self._end(1, "the engine has died")

    def _has_started(self) -> None:
        events.server_started.log(logger, model=self._service.model, address=self.address)

    def _has_not_started(self, error: NanoVLLMError) -> None:
        print(f"nanovllm serve: {error}", file=sys.stderr)
        self._end(1, "the engine did not start")

    def _has_begun_to_drain(self) -> None:
        service = self._service
        seconds = service.settings.drain_timeout
        events.server_draining.log(logger, num_unfinished=service.num_requests, threshold=seconds)

    @property
    def address(self) -> str:
        """The URL that the server listens at, or its socket."""
        return address_of(self._service.settings, self.servers[0].sockets[0])

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Acts on a signal. Called by Python between two instructions of the event loop."""
        self._num_signals += 1
        if self._num_signals == 1:
            asyncio.get_running_loop().call_soon_threadsafe(lambda: self._begin(self._drain()))
        else:
            self.force_exit = True
            self._end(128 + sig, f"a second {signal.Signals(sig).name}")

    async def _drain(self) -> None:
        """Waits for the running requests, aborts those that do not end in time, and ends the server."""
        service, seconds = self._service, self._service.settings.drain_timeout
        service.drain()
        self._has_begun_to_drain()
        if not await self._has_answered(seconds):
            await service.abort_all()
            await self._has_answered(_CLOSE_SECONDS)
        self._end(self.status, self.outcome)

    async def _has_answered(self, seconds: float) -> bool:
        """Waits until no request is left, for at most `seconds`. Returns whether that is so."""
        deadline = time.monotonic() + seconds
        while self._service.num_requests and time.monotonic() < deadline and not self.should_exit:
            await asyncio.sleep(_POLL_SECONDS)
        return not self._service.num_requests

    def _end(self, status: int, outcome: str) -> None:
        self.status, self.outcome, self.should_exit = status, outcome, True


def address_of(settings: ServerSettings, listener: socket.socket) -> str:
    """Returns the URL at which a server listens, or its Unix socket."""
    if settings.uds is not None:
        return f"unix:{settings.uds}"
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    return f"{'http' if settings.ssl_certfile is None else 'https'}://{host}:{listener.getsockname()[1]}"
