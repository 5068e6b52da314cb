"""`nanovllm report`: draws a JSON log as an HTML page, as `python -m nanovllm.report` does."""

from __future__ import annotations

from collections.abc import Sequence

from nanovllm.report import __main__ as report


def main(arguments: Sequence[str], prog: str) -> int:
    """Writes the page. Exit status 2 when it cannot be written."""
    return report.main(arguments, prog)
