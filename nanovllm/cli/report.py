"""`nanovllm report`: answers a question about a JSON log or draws it, as `python -m nanovllm.report` does."""

from __future__ import annotations

from collections.abc import Sequence

from nanovllm.report import __main__ as report


def main(arguments: Sequence[str], prog: str) -> int:
    """Returns the exit status of `python -m nanovllm.report`."""
    return report.main(arguments, prog)
