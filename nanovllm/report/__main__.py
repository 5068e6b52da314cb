"""The command: `python -m nanovllm.report run.jsonl -o report.html`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from nanovllm.errors import InvalidArgumentError, NanoVLLMError
from nanovllm.report.page import render
from nanovllm.report.summary import summarise


def main(arguments: Sequence[str] | None = None, prog: str = "python -m nanovllm.report") -> int:
    """Writes the page. Returns exit status 0, or 2 after one line on standard error if that is not possible."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Draw a nanovllm JSON log as one self-contained HTML page.",
        epilog="Make a log with NANOVLLM_LOG_FORMAT=json NANOVLLM_LOG_FILE=run.jsonl NANOVLLM_LOG_LEVEL=DEBUG.",
    )
    parser.add_argument("log", type=Path, help="the log, one JSON object a line")
    parser.add_argument("-o", "--output", type=Path, default=Path("report.html"), help="the page (default %(default)s)")
    parsed = parser.parse_args(arguments)
    try:
        write_report(parsed.log, parsed.output)
    except NanoVLLMError as error:
        print(f"{prog.removeprefix('python -m ')}: {error}", file=sys.stderr)
        return 2
    return 0


def write_report(log: Path, output: Path) -> None:
    """Reads `log` and writes the page. Raises InvalidArgumentError if one of the files cannot be read or written."""
    if output.exists() and log.exists() and output.samefile(log):
        raise InvalidArgumentError("output", str(output), "another file than the log")
    summary = summarise(log)
    try:
        output.write_text(render(summary), encoding="utf-8")
    except OSError as error:
        raise InvalidArgumentError("output", str(output), f"a file that can be written ({error.strerror})") from None
    counts = summary.counts
    broken = f", {counts.broken:,} of them broken" if counts.broken else ""
    print(f"{output}: {len(summary.runs)} engine(s), {counts.lines:,} lines{broken}")


if __name__ == "__main__":
    sys.exit(main())
