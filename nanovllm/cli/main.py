"""Chooses the subcommand. Each one is a module of this package, which is imported when it is called.

A new subcommand is one file, with `main(arguments, prog) -> int`, and one line in COMMANDS.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Callable, Mapping, Sequence

from nanovllm import __version__
from nanovllm.utils.argparse_utils import CommandParser

COMMANDS: Mapping[str, str] = {  # each a module of this package
    "serve": "serve a model over HTTP, as the OpenAI API does",
    "chat": "talk to a model in the terminal",
    "generate": "answer the requests in a file of JSON lines",
    "bench": "measure the engine with offline workloads, and compare it",
    "report": "answer a question about a JSON log, or draw it as a page",
    "version": "print the version",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a subcommand and returns its exit status. `arguments` defaults to those of the process."""
    return without_broken_pipe(lambda: run(arguments))


def without_broken_pipe(run: Callable[[], int]) -> int:
    """Returns what `run` returns; 1, without a message, if the reader of standard output leaves, as `head` does."""
    try:
        try:
            return run()
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python writes at its end
        return 1


def run(arguments: Sequence[str] | None) -> int:
    """Runs a subcommand and returns its exit status."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    name = given[0] if given and given[0] in COMMANDS else parse_command(given)
    command: Callable[[Sequence[str], str], int] = importlib.import_module(f"nanovllm.cli.{name}").main
    return command(given[1:], f"nanovllm {name}")


def parse_command(arguments: Sequence[str]) -> str:
    """Returns the name of the subcommand. Exits after --help or --version, and for anything else with an error."""
    listing = "\n".join(f"  {name:<10}{about}" for name, about in COMMANDS.items())
    parser = CommandParser(
        prog="nanovllm",
        usage="nanovllm [-h] [--version] COMMAND ...",
        description=f"An LLM inference engine.\n\ncommands:\n{listing}",
        epilog="nanovllm COMMAND --help explains a command's options.",
    )
    parser.add_argument("command", choices=list(COMMANDS), metavar="COMMAND", help=argparse.SUPPRESS)
    parser.add_argument("--version", action="version", version=f"nanovllm {__version__}", help="print the version")
    name: str = parser.parse_args(arguments).command
    return name
