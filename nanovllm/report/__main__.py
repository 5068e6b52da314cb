"""The command: `python -m nanovllm.report run.jsonl` writes a page, or answers one question in words."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from nanovllm.errors import InvalidArgumentError, NanoVLLMError
from nanovllm.report.answer import Answer, answer_request, answer_slowest
from nanovllm.report.answer_run import answer_summary
from nanovllm.report.answer_step import answer_step
from nanovllm.report.comparison import compare
from nanovllm.report.log_file import STANDARD_INPUT
from nanovllm.report.page import render
from nanovllm.report.summary import Summary, summarise
from nanovllm.report.watch import BY, Watch
from nanovllm.utils.argparse_utils import CommandParser

_PRINT_EVERY = 2.0  # seconds, with --follow
_EPILOG = """\
Make a log with NANOVLLM_LOG_FORMAT=json NANOVLLM_LOG_FILE=run.jsonl; NANOVLLM_LOG_LEVEL=DEBUG adds each step.
Exit status: 0, 1 if the request or the step is not in the log, 2 if the log cannot be read."""


def main(arguments: Sequence[str] | None = None, prog: str = "python -m nanovllm.report") -> int:
    """Writes the page or prints the answer. Returns the exit status; an error takes one line on standard error."""
    parsed = _parser(prog).parse_args(arguments)
    try:
        question = _question(parsed)
        if question is not None:
            return _answer(parsed, question)
        write_report(parsed.log, parsed.output, parsed.compare)
    except NanoVLLMError as error:
        print(f"{prog.removeprefix('python -m ')}: {error}", file=sys.stderr)
        return 2
    return 0


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = CommandParser(
        prog=prog,
        description="Draw a nanovllm JSON log as one self-contained HTML page, or answer one question about it.",
        epilog=_EPILOG,
    )
    parser.add_argument("log", type=Path, help="the log, one JSON object a line; - is standard input")
    parser.add_argument("-o", "--output", type=Path, help="the page (default report.html)")
    asked = parser.add_mutually_exclusive_group()
    asked.add_argument("--request", metavar="ID", help="say why this request took its time")
    asked.add_argument("--slowest", type=_positive, metavar="N", help="list the N slowest requests")
    asked.add_argument("--step", type=_positive, metavar="N", help="say what this step did")
    asked.add_argument("--summary", action="store_true", help="say what limited the run, with its figures")
    parser.add_argument(
        "--compare", type=Path, metavar="LOG", help="compare with the last engine of another log; with -o on the page"
    )
    parser.add_argument("--by", choices=BY, default="e2e", help="what --slowest sorts by (default %(default)s)")
    parser.add_argument("--json", action="store_true", help="print the answer as JSON")
    parser.add_argument("--follow", action="store_true", help="read on while the log grows")
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if not 1 <= value < 1 << 53:
        raise argparse.ArgumentTypeError("must be an integer ≥ 1")
    return value


_Question = Callable[[Summary], Answer]


def _question(parsed: argparse.Namespace) -> _Question | None:
    """Returns the function that answers the question, or None if the page is wanted."""
    if parsed.compare is not None and parsed.output is None:
        other = summarise(parsed.compare)
        return lambda summary: compare(summary, other)
    for asked, answer in (
        (parsed.request is not None, answer_request),
        (parsed.slowest is not None, answer_slowest),
        (parsed.step is not None, answer_step),
        (parsed.summary or parsed.json, answer_summary),
    ):
        if asked:
            return answer
    if parsed.follow:
        raise InvalidArgumentError("follow", True, "given with --request, --slowest, --step or --summary")
    return None


def _answer(parsed: argparse.Namespace, question: _Question) -> int:
    if parsed.output is not None:
        raise InvalidArgumentError("output", str(parsed.output), "left out where a question is asked")
    watch = Watch(parsed.request, parsed.step, parsed.by, parsed.slowest or 10)
    follower = _Follower(question, parsed.json)
    try:
        summary = summarise(parsed.log, watch, follower.read_on if parsed.follow else None)
    except KeyboardInterrupt:
        return 130
    return 0 if follower.show(summary) else 1


class _Follower:
    """Prints the answer to a question while the log grows."""

    def __init__(self, question: _Question, as_json: bool) -> None:
        self._question, self._as_json = question, as_json
        self._shown_at = -_PRINT_EVERY
        self._num_records = 0

    def read_on(self, summary: Summary) -> bool:
        """Returns whether the answer may still change. Prints the one of this moment if it covers the whole log."""
        if summary.is_answered:
            return False
        if summary.watch.request_id is not None or summary.watch.step is not None:
            return True
        is_due = time.monotonic() - self._shown_at >= _PRINT_EVERY
        if is_due and summary.runs and summary.counts.records > self._num_records:
            self.show(summary)
        return True

    def show(self, summary: Summary) -> bool:
        """Prints the answer. Returns whether there is one."""
        answer = self._question(summary)
        self._shown_at, self._num_records = time.monotonic(), summary.counts.records
        if self._as_json:
            print(json.dumps(answer.facts, ensure_ascii=False, allow_nan=False, default=str), flush=True)
        else:
            print("\n".join(answer.lines), file=sys.stdout if answer.found else sys.stderr, flush=True)
        return answer.found


def write_report(log: Path, output: Path | None, other: Path | None = None) -> None:
    """Reads `log` and writes the page. Raises InvalidArgumentError if one of the files cannot be read or written."""
    output = output or Path("report.html")
    if str(log) != STANDARD_INPUT and output.exists() and log.exists() and output.samefile(log):
        raise InvalidArgumentError("output", str(output), "another file than the log")
    summary = summarise(log)
    try:
        output.write_text(render(summary, None if other is None else summarise(other)), encoding="utf-8")
    except OSError as error:
        raise InvalidArgumentError("output", str(output), f"a file that can be written ({error.strerror})") from None
    counts = summary.counts
    broken = f", {counts.broken:,} of them broken" if counts.broken else ""
    print(f"{output}: {len(summary.runs)} engine(s), {counts.lines:,} lines{broken}")


if __name__ == "__main__":
    sys.exit(main())
