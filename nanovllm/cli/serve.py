"""`nanovllm serve`: the options of the HTTP server. The server is imported after they are parsed."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from nanovllm.compat.unsupported import SERVER_ARGUMENTS, without_effect
from nanovllm.engine_args import AsyncEngineArgs, add_options, add_options_without_effect
from nanovllm.errors import InvalidArgumentError, NanoVLLMError
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


def main(arguments: Sequence[str], prog: str) -> int:
    """Serves until a signal. Returns 2, with one line on standard error, if an option or a package is missing."""
    args = make_parser(prog).parse_args(arguments)
    try:
        settings = read_settings(args)
        engine_args = AsyncEngineArgs.from_cli_args(args)
        if settings.api_server_count > 1 and engine_args.engine_process is False:
            raise InvalidArgumentError("engine_process", False, "left out or true with several API processes")
    except NanoVLLMError as error:
        print(f"{prog}: {error}", file=sys.stderr)
        return 2
    try:
        if settings.api_server_count > 1:
            from nanovllm.server.supervisor import supervise as serve
        else:
            from nanovllm.server.serve import serve
    except ImportError as error:
        print(f"{prog}: {error}. The server needs the extra: pip install '.[server]'", file=sys.stderr)
        return 2
    return serve(settings, engine_args)


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
