"""`nanovllm serve`: the options of the HTTP server. The server is imported after they are parsed."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from nanovllm.engine_args import AsyncEngineArgs
from nanovllm.errors import InvalidArgumentError, NanoVLLMError
from nanovllm.server.options import make_parser, read_settings


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
