"""The options of `nanovllm serve`: those of the server and of its engine. Needs no package of the extra `server`."""

from __future__ import annotations

import argparse

from nanovllm.compat.unsupported import SERVER_ARGUMENTS, without_effect
from nanovllm.engine_args import AsyncEngineArgs, add_options, add_options_without_effect
from nanovllm.server.settings import ServerSettings
from nanovllm.utils import env
from nanovllm.utils.argparse_utils import FlexibleArgumentParser

DESCRIPTION = """\
Serve a model over HTTP, as the OpenAI API does.

    nanovllm serve tiny
    curl http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' \\
        -d '{"messages": [{"role": "user", "content": "What is 27 + 58?"}]}'

docs/serving.md describes the endpoints, and how to run the server behind a proxy or as a service.
"""


def make_parser(prog: str, exit_on_error: bool = True) -> FlexibleArgumentParser:
    """Returns the parser of `nanovllm serve`. Without exit_on_error, a mistake raises argparse.ArgumentError."""
    parser = FlexibleArgumentParser(prog=prog, description=DESCRIPTION, exit_on_error=exit_on_error)
    parser.add_argument("model", nargs="?", default=argparse.SUPPRESS, metavar="MODEL", help="the same as --model")
    add_options(parser.add_argument_group("Server"), ServerSettings)
    AsyncEngineArgs.add_cli_args(parser)
    add_options_without_effect(parser, "Options of vLLM's server without effect", SERVER_ARGUMENTS)
    return parser


def read_settings(args: argparse.Namespace) -> ServerSettings:
    """Takes the server's options out of a parsed command line. Raises InvalidArgumentError."""
    ignored = {name: vars(args).pop(name) for name in SERVER_ARGUMENTS if name in args}
    without_effect("nanovllm serve", ignored, SERVER_ARGUMENTS)
    given = {name: vars(args).pop(name) for name in ServerSettings.__dataclass_fields__}
    given["served_model_name"] = given["served_model_name"] or (args.model,)
    if not given["api_key"] and (key := env.api_key()) is not None:
        given["api_key"] = (key,)
    return ServerSettings(**given)
