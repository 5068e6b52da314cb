"""build_app: the HTTP server as an application of Ray Serve."""

from __future__ import annotations

import argparse
import inspect
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import asdict
from typing import Any

import xxhash
from fastapi import FastAPI
from ray import serve
from ray.serve import Application

from nanovllm.config import EngineConfig
from nanovllm.engine_args import AsyncEngineArgs
from nanovllm.errors import EngineDeadError, InvalidArgumentError, NanoVLLMError, UnknownArgumentError
from nanovllm.logs.configuration import attached
from nanovllm.server.app import make_app
from nanovllm.server.options import make_parser, read_settings
from nanovllm.server.service import Service, make_engine
from nanovllm.server.settings import ServerSettings
from nanovllm.utils.argparse_utils import option_texts
from nanovllm.utils.garbage_collection import existing_objects_exempt

_DEPLOYMENT_OPTIONS = inspect.signature(serve.deployment).parameters.keys() - {"_func_or_class", "version"}
# Serve listens, starts processes, and replaces a replica whose engine has died.
_NOT_HERE = ["host", "port", "uds", "ssl_keyfile", "ssl_certfile", "root_path", "api_server_count", "exit_on_death"]
_NO_LIMIT = 10**9  # so that requests wait in the queue of an engine, and not in Serve's proxies
_HEALTH_CHECK_SECONDS = 1.0  # Serve replaces a replica after three failures
_EXIT_SECONDS = 10.0  # for Serve to see that no request is left, and for the engine to end


def build_app(args: Mapping[str, Any]) -> Application:
    """Returns an application whose replicas each run the server with an engine of their own.

        serve.run(build_app({"model": "Qwen/Qwen3-8B", "tensor_parallel_size": 2, "num_replicas": 4}))

    args: by their names, the options of `nanovllm serve`, and those of `serve.deployment`, such as `num_replicas`,
    `autoscaling_config` and `ray_actor_options`. Values may be texts, as `serve run` passes them. A replica asks Ray
    for the GPUs of its engines, unless `device` is "cpu" or `ray_actor_options` has `num_gpus`.
    Raises NanoVLLMError for an option that is unknown or has a value that is not allowed.
    """
    given = {name: _read(args[name]) for name in args.keys() & _DEPLOYMENT_OPTIONS}
    settings, engine_args = _read_options({name: value for name, value in args.items() if name not in given})

    def make_replica() -> FastAPI:
        return _replica_app(settings, engine_args)

    deployment = serve.deployment(**_deployment_options(given, settings, engine_args))
    return deployment(serve.ingress(make_replica)(LLMServer)).bind()


class LLMServer:
    """A replica. `serve.ingress` makes `app` when the replica starts, and ends it when no request is left."""

    app: FastAPI

    def check_health(self) -> None:
        """Raises EngineDeadError when the engine has died, so that Serve replaces the replica."""
        if self.app.state.service.is_dead:
            raise EngineDeadError("The engine of this replica has ended.")


def _replica_app(settings: ServerSettings, engine_args: AsyncEngineArgs) -> FastAPI:
    """Starts an engine. Returns the application that answers with it, and ends it with its lifespan."""
    # With equal seeds, the first requests of all replicas would draw the same tokens.
    replica = serve.get_replica_context().replica_tag
    seed = xxhash.xxh3_64_intdigest(replica.encode(), seed=engine_args.seed) >> 1
    engine = make_engine(EngineConfig(**{**asdict(engine_args), "seed": seed}), settings.data_parallel_size)
    service = Service(settings, engine)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        try:
            with attached(service.recent_events), existing_objects_exempt():
                yield
        finally:
            engine.exit()

    return make_app(service, lifespan)


def _read_options(args: Mapping[str, Any]) -> tuple[ServerSettings, AsyncEngineArgs]:
    for name in _NOT_HERE:
        if name in args:
            hint = "Ray Serve listens, and starts and replaces processes. See its http_options."
            raise InvalidArgumentError(name, args[name], "left out", hint)
    parser = make_parser("build_app", exit_on_error=False)
    known = [option.lstrip("-").replace("-", "_") for option in parser.known_options]
    for name in args:
        if name not in known:
            raise UnknownArgumentError("build_app", name, [*known, *_DEPLOYMENT_OPTIONS])
    try:
        parsed = parser.parse_args(option_texts(args))
    except argparse.ArgumentError as error:
        raise NanoVLLMError(f"build_app: {error}") from None
    return read_settings(parsed), AsyncEngineArgs.from_cli_args(parsed)


def _read(value: Any) -> Any:
    """Returns the value of an option of `serve.deployment`, which may be text."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _deployment_options(
    given: Mapping[str, Any], settings: ServerSettings, engine_args: AsyncEngineArgs
) -> dict[str, Any]:
    """Returns the options of the deployment: those given, and ours for the others."""
    num_engines = settings.data_parallel_size
    options: dict[str, Any] = {
        "max_ongoing_requests": _NO_LIMIT,
        "health_check_period_s": _HEALTH_CHECK_SECONDS,
        "graceful_shutdown_timeout_s": settings.drain_timeout + _EXIT_SECONDS,
        **given,
    }
    if engine_args.device != "cpu":
        num_gpus = num_engines * engine_args.tensor_parallel_size
        options["ray_actor_options"] = {"num_gpus": num_gpus, **(options.get("ray_actor_options") or {})}
    autoscaling = options.get("autoscaling_config", {} if options.get("num_replicas") == "auto" else None)
    if isinstance(autoscaling, Mapping):
        target = num_engines * engine_args.max_num_seqs  # above that, requests wait
        options["autoscaling_config"] = {"target_ongoing_requests": target, **autoscaling}
    return options
