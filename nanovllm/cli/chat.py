"""`nanovllm chat`: a conversation in the terminal, with a model in this process or a server."""

from __future__ import annotations

import argparse
import json
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from typing import Any, TypeAlias

from nanovllm.engine_args import EngineArgs
from nanovllm.errors import NanoVLLMError
from nanovllm.utils import env
from nanovllm.utils.argparse_utils import FlexibleArgumentParser

DESCRIPTION = """\
Talk to a model in the terminal: one in this process, or one that a server has.

    nanovllm chat tiny
    nanovllm chat --url http://127.0.0.1:8000

A line is a message. /clear begins a new conversation, /exit or Ctrl-D ends, Ctrl-C stops an answer.
"""

Message: TypeAlias = "dict[str, str]"
Answer: TypeAlias = "Callable[[list[Message]], Iterator[str]]"  # a conversation → the pieces of the next message


def main(arguments: Sequence[str], prog: str) -> int:
    """Talks until the input ends. Exit status 1, with one line on standard error, when the engine does not start."""
    args = parse_arguments(arguments, prog)
    env.log_level.set_default("WARNING")
    try:
        with ExitStack() as stack:
            answer = _remote(args) if args.url is not None else _local(args, stack)
            _talk(answer, args.system)
    except (NanoVLLMError, OSError) as error:
        print(f"{prog}: {error}", file=sys.stderr)
        return 1
    return 0


def parse_arguments(arguments: Sequence[str], prog: str) -> argparse.Namespace:
    """Returns the parsed options. Exits with status 2 for a mistake in them."""
    parser = FlexibleArgumentParser(prog=prog, description=DESCRIPTION)
    parser.add_argument("model_tag", nargs="?", metavar="MODEL", help="the same as --model; of a server, its first")
    chat = parser.add_argument_group("Chat")
    add = chat.add_argument
    add("--url", help="address of a server with the OpenAI API (default: a model in this process)")
    add("--api-key", default=env.api_key(), metavar="KEY", help="key of the server (default: NANOVLLM_API_KEY)")
    add("--system", metavar="TEXT", help="the system prompt (default: none)")
    add("--max-tokens", type=int, metavar="N", help="tokens of an answer (default: as many as the model has)")
    add("--temperature", type=float, metavar="X", help="0 is greedy (default: the checkpoint's)")
    args = EngineArgs.add_cli_args(parser).parse_args(arguments)
    if args.url is not None and not args.url.startswith(("http://", "https://")):
        parser.error(f"argument --url: {args.url!r} does not begin with http:// or https://")
    if args.model_tag is not None:
        args.model = args.model_tag
    return args


def _talk(answer: Answer, system: str | None) -> None:
    begin: list[Message] = [] if system is None else [{"role": "system", "content": system}]
    messages = list(begin)
    while True:
        try:
            text = input("> " if sys.stdin.isatty() else "")
        except (EOFError, KeyboardInterrupt):
            return
        if text.strip() == "/exit":
            return
        if text.strip() == "/clear":
            messages = list(begin)
        elif text.strip():
            messages.append({"role": "user", "content": text})
            reply = ""
            with suppress(KeyboardInterrupt):
                for piece in answer(messages):
                    reply += piece
                    print(piece, end="", flush=True)
            print()
            messages.append({"role": "assistant", "content": reply})


def _local(args: argparse.Namespace, stack: ExitStack) -> Answer:
    from nanovllm.llm import LLM

    llm: LLM = stack.enter_context(LLM.from_engine_args(EngineArgs.from_cli_args(args)))

    def answer(messages: list[Message]) -> Iterator[str]:
        params = llm.get_default_sampling_params()
        params.max_tokens = args.max_tokens
        if args.temperature is not None:
            params.temperature = args.temperature
        for output in llm.stream_chat(messages, params):
            if output.error is not None:
                raise output.error
            yield output.outputs[0].text

    return answer


def _remote(args: argparse.Namespace) -> Answer:
    url = f"{args.url.rstrip('/').removesuffix('/v1')}/v1/chat/completions"
    headers = {"Content-Type": "application/json"}
    if args.api_key is not None:
        headers["Authorization"] = f"Bearer {args.api_key}"
    fields = {"model": args.model_tag, "max_tokens": args.max_tokens, "temperature": args.temperature}
    given = {name: value for name, value in fields.items() if value is not None}

    def answer(messages: list[Message]) -> Iterator[str]:
        body = json.dumps({**given, "messages": messages, "stream": True}).encode()
        try:
            with urllib.request.urlopen(urllib.request.Request(url, body, headers)) as response:
                yield from _pieces(response)
        except urllib.error.HTTPError as error:
            raise OSError(f"{url} answers {error.code}: {error.read(1000).decode(errors='replace')}") from None
        except urllib.error.URLError as error:
            raise OSError(f"{url} cannot be reached: {error.reason}. `nanovllm serve` starts a server.") from None

    return answer


def _pieces(lines: Any) -> Iterator[str]:
    """Yields the content in a stream of server-sent events."""
    for line in lines:
        data = line.strip().removeprefix(b"data:").strip()
        if data and data != b"[DONE]":
            chunk = json.loads(data)
            if "error" in chunk:
                raise OSError(chunk["error"]["message"])
            for choice in chunk["choices"]:
                yield choice["delta"].get("content") or ""
