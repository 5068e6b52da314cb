"""`nanovllm version`: prints the version."""

from __future__ import annotations

from collections.abc import Sequence

from nanovllm import __version__
from nanovllm.utils.argparse_utils import CommandParser


def main(arguments: Sequence[str], prog: str) -> int:
    """Prints `nanovllm` and its version."""
    CommandParser(prog=prog, description="Print the version of nanovllm.").parse_args(arguments)
    print(f"nanovllm {__version__}")
    return 0
