"""`nanovllm generate`: answers the requests in a file, JSON lines in, JSON lines out."""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Sequence
from contextlib import ExitStack

from nanovllm.engine_args import AsyncEngineArgs
from nanovllm.errors import NanoVLLMError
from nanovllm.utils.argparse_utils import FlexibleArgumentParser

DESCRIPTION = """\
Answer the requests in a file, and write the answers in the same order.

    nanovllm generate tiny -i requests.jsonl -o answers.jsonl
    echo '{"prompt": "27 + 58 =", "temperature": 0}' | nanovllm generate tiny

A line is the body of a request as `nanovllm serve` takes it, with "prompt" or "messages", and its answer is the body of
the server's answer. A line of OpenAI's batch files, with "custom_id", "url" and "body", gets a line of OpenAI's output
files. The exit status is 1 if a request failed.
"""


def main(arguments: Sequence[str], prog: str) -> int:
    """Answers the requests. Returns 2, with one line on standard error, if a file or a package is missing."""
    args = parse_arguments(arguments, prog)
    try:
        from nanovllm.async_llm import AsyncLLM
        from nanovllm.server.app import make_app
        from nanovllm.server.batch_file import answer_lines
        from nanovllm.server.service import Service
        from nanovllm.server.settings import ServerSettings

        with ExitStack() as stack:
            lines = sys.stdin.buffer if args.input == "-" else stack.enter_context(open(args.input, "rb"))
            output = sys.stdout.buffer if args.output == "-" else stack.enter_context(open(args.output, "wb"))
            engine = stack.enter_context(AsyncLLM.from_engine_args(AsyncEngineArgs.from_cli_args(args)))

            def write(answer: bytes) -> None:
                output.write(answer)
                output.flush()

            names = tuple(args.served_model_name or [args.model])
            app = make_app(Service(ServerSettings(served_model_name=names), engine))
            return min(asyncio.run(answer_lines(app, lines, write, 2 * args.max_num_seqs)), 1)
    except BrokenPipeError:  # the reader of the answers has left
        raise
    except ImportError as error:
        print(f"{prog}: {error}. It needs the extra: pip install '.[server]'", file=sys.stderr)
    except (NanoVLLMError, OSError) as error:
        print(f"{prog}: {error}", file=sys.stderr)
    return 2


def parse_arguments(arguments: Sequence[str], prog: str) -> argparse.Namespace:
    """Returns the parsed options. Exits with status 2 for a mistake in them."""
    parser = FlexibleArgumentParser(prog=prog, description=DESCRIPTION)
    parser.add_argument("model", nargs="?", default=argparse.SUPPRESS, metavar="MODEL", help="the same as --model")
    files = parser.add_argument_group("Files")
    files.add_argument("-i", "--input", default="-", metavar="FILE", help="requests (default: standard input)")
    files.add_argument("-o", "--output", default="-", metavar="FILE", help="answers (default: standard output)")
    files.add_argument(
        "--served-model-name", nargs="+", metavar="NAME", help='values that "model" may have (default: the model\'s)'
    )
    args: argparse.Namespace = AsyncEngineArgs.add_cli_args(parser).parse_args(arguments)
    return args
