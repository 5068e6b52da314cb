"""Step 3: the scheduler's decisions, read from the engine's JSON log.

Six requests meet an engine that is too small for them on purpose: three rows, 11 blocks, 32 tokens a step. The log
says which requests were admitted, split into chunks, kept waiting (and for what), preempted and finished; this script
only reads it.

    python examples/learn/step3_scheduler_trace.py
    python examples/learn/step3_scheduler_trace.py --keep run.jsonl --report report.html
    python examples/learn/step3_scheduler_trace.py --log run.jsonl       a log of your own

A log of your own: NANOVLLM_LOG_FORMAT=json NANOVLLM_LOG_LEVEL=DEBUG NANOVLLM_LOG_FILE=run.jsonl, on a GPU with
NANOVLLM_OVERLAP=0 besides, so that the log of one step ends before that of the next begins.

Read along: nanovllm/engine/scheduler.py, nanovllm/logs/events.py and LOGGING.md.
"""

from __future__ import annotations

import json
import logging
import os
import random
import re
import tempfile
import textwrap
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from _drawing import LETTERS, WIDTH, bar, begin, heading, lesson_parser, say, table, title

Record = dict[str, Any]

# Prompt tokens and output tokens of each request; F's prompt begins as A's does.
REQUESTS = ((40, 30), (20, 50), (70, 20), (8, 60), (50, 30), (48, 12))


@dataclass
class Step:
    """The records from the end of the previous step to the end of this one."""

    done: Record
    records: list[Record] = field(default_factory=list)

    @property
    def is_plain(self) -> bool:
        """True if no request was admitted, preempted, finished or prefilled."""
        dull = {"batch.decode", "batch.postprocess", "step.done"}
        told = ("batch.", "blocks.allocated", "sequence.")
        return all(r["event"] in dull for r in self.records if r["event"].startswith(told))


def main() -> None:
    parser = lesson_parser(__doc__)
    parser.add_argument("--log", type=Path, metavar="FILE", help="read this log instead of making one")
    parser.add_argument("--keep", type=Path, metavar="FILE", help="keep the log that is made")
    parser.add_argument("--report", type=Path, metavar="FILE.html", help="write nanovllm.report's page of it, too")
    parser.add_argument("--lines", type=int, default=400, help="of the trace, at most (default %(default)s)")
    args = begin(parser)
    if args.log and args.keep:
        parser.error("--keep is for a log that is made here: leave it out with --log")
    if args.keep and args.keep.exists():
        parser.error(f"{args.keep} exists: the log would be added to it. Give another name, or delete it")

    title("Step 3: the scheduler's decisions, from the JSON log")
    with tempfile.TemporaryDirectory() as folder:
        log = args.log or args.keep or Path(folder) / "run.jsonl"
        if args.log is None:
            make_log(log)
        tell(log, args.lines, args.report)


def make_log(log: Path) -> None:
    """Runs the requests with a log at DEBUG, in a file alone."""
    # A handler that takes the records keeps the console silent.
    logging.getLogger("nanovllm").addHandler(logging.NullHandler())
    os.environ |= {"NANOVLLM_LOG_FILE": str(log), "NANOVLLM_LOG_FORMAT": "json", "NANOVLLM_LOG_LEVEL": "DEBUG"}
    from _engine import open_engine

    from nanovllm import SamplingParams

    draw = random.Random(0)
    prompts = [[draw.randrange(250) for _ in range(length)] for length, _ in REQUESTS]
    prompts[5][:32] = prompts[0][:32]
    engine, _ = open_engine(max_model_len=128, num_kvcache_blocks=11, max_num_seqs=3, max_num_batched_tokens=32)
    with engine:
        for name, prompt, (_, max_tokens) in zip(LETTERS, prompts, REQUESTS, strict=False):
            params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
            engine.add_request(name, prompt, params)
        while engine.has_unfinished_requests():
            engine.step()


def tell(log: Path, max_lines: int, report: Path | None) -> None:
    from nanovllm.report.__main__ import write_report
    from nanovllm.report.log_file import LogFile
    from nanovllm.report.summary import summarise

    records: list[Record] = []
    for record in LogFile(log).records():
        if record["event"] == "engine.init":  # the last engine's
            records.clear()
        records.append(record)

    heading("1. What a log is made of")
    done = next((record for record in records if record["event"] == "step.done"), None)
    if done is None:
        raise SystemExit(f"{log} has no step in it. Make a log with NANOVLLM_LOG_LEVEL=DEBUG.")
    say(
        f"{len(records)} records of one engine: each a JSON object on a line, with an event's name and its fields. One:"
    )
    print()
    print(textwrap.fill(json.dumps(done), WIDTH - 2, initial_indent="  ", subsequent_indent="  "))
    print()
    settings = next((record for record in records if record["event"] == "engine.resolved"), {})
    rows, budget = settings.get("max_num_seqs"), settings.get("max_num_batched_tokens")
    say(
        f"The engine says what it has: max_num_seqs={rows}, max_num_batched_tokens={budget}, "
        f"{settings.get('num_blocks')} blocks of {settings.get('block_size')} tokens."
    )

    heading("2. Step by step")
    print("  + comes in   > computes a prompt   - gives its blocks back   = ended   ? waits, and for what\n")
    trace = Trace({record["seq_id"]: record["request_id"] for record in records if record["event"] == "request.added"})
    lines = trace.lines(steps_of(records), rows, budget)
    print("\n".join(lines[:max_lines]))
    if len(lines) > max_lines:
        print(f"  … and {len(lines) - max_lines} lines more (--lines)")

    heading("3. Each request, from arrival to end")
    run = summarise(log).runs[-1]
    cells = []
    for life in run.requests.drawn()[:30]:
        waited, first, whole = (
            f"{1e3 * (end - life.arrival):.0f}" if end is not None else "-"
            for end in (life.first_scheduled, life.first_token, life.finished)
        )
        counts = life.num_prompt_tokens, life.num_cached_tokens, life.output_len
        cells.append((life.request_id, *counts, waited, first, whole, life.preemptions))
    headers = ["request", "prompt", "found in cache", "output", "waited ms", "first token ms", "end ms", "preempted"]
    table(headers, cells)
    print()
    say(
        f"{run.num_steps} steps, {run.num_prefill_tokens} prompt tokens computed, {run.num_output_tokens} tokens "
        f"sampled, {run.num_preemptions} preemption(s); at most {run.peak_blocks} of {run.num_blocks} blocks in use."
    )
    if run.num_preemptions:
        say(
            "A preempted request keeps its tokens and loses their keys and values. They are computed again, for the "
            "answer and the prompt alike, unless they are still in the prefix cache."
        )
    if report is not None:
        print()
        write_report(log, report)
    print("\n  The same log as a page with charts: python -m nanovllm.report run.jsonl -o report.html")


def steps_of(records: list[Record]) -> list[Step]:
    steps: list[Step] = []
    since: list[Record] = []
    for record in records:
        since.append(record)
        if record["event"] == "step.done":
            steps.append(Step(record, since))
            since = []
    if steps:
        steps[-1].records += since
    return steps


class Trace:
    """Turns the records of a step into sentences. `names`: the request id of each sequence number."""

    def __init__(self, names: dict[int, str]) -> None:
        self.names = names
        self.admitted: set[int] = set()
        self.reason = ""

    def lines(self, steps: list[Step], rows: int | None, budget: int | None) -> list[str]:
        lines: list[str] = []
        plain: list[Step] = []
        for step in steps:
            reason = self.why_waiting(step, rows, budget)
            if step.is_plain and reason in ("", self.reason):
                plain.append(step)
                continue
            lines += plain_lines(plain)
            plain = []
            lines.append(step_line(step))
            lines += [f"{'':13}{sentence}" for record in step.records for sentence in self.sentences(record, budget)]
            if reason not in ("", self.reason):
                lines.append(f"{'':13}? {reason}")
            self.reason = reason or self.reason
        return lines + plain_lines(plain)

    def sentences(self, record: Record, budget: int | None) -> list[str]:
        name = self.names.get(record.get("seq_id", -1), "?")
        match record["event"]:
            case "blocks.allocated":
                again = record["seq_id"] in self.admitted
                self.admitted.add(record["seq_id"])
                hits = f" and {record['cache_hits']} found in the prefix cache" if record["cache_hits"] else ""
                what = "is back, to be computed again" if again else "is admitted"
                return [f"+ {name} {what}: {record['new']} new block(s){hits}; {record['free_blocks']} left"]
            case "batch.prefill":
                return [f"> {sentence}" for sentence in self.chunks(record, budget)]
            case "sequence.preempted":
                lost = f"{record['num_tokens']} tokens to compute again"
                return [f"- {name}, the youngest, is preempted: gives {record['freed']} block(s) back; {lost}"]
            case "sequence.finished":
                return [f"= {name} ended after {record['output_len']} tokens ({record['reason']})"]
        return []

    def chunks(self, record: Record, budget: int | None) -> list[str]:
        left, sentences = record["batched_tokens"], []
        for text in record["seqs"]:
            match = re.match(r"seq_(\d+)\(len=(\d+),cached=(\d+)\)", text)
            if match is None:  # "… 4 more"
                continue
            seq_id, length, start = map(int, match.groups())
            count = min(left, length - start)
            left -= count
            name, end = self.names.get(seq_id, "?"), start + count
            if end < length:
                ending = "the step's tokens are spent, the rest follows" if budget is not None else "the rest follows"
            else:
                ending = "complete: it samples a token in this step"
            sentences.append(f"{name}: tokens {start} … {end - 1} of {length}; {ending}")
        return sentences

    def why_waiting(self, step: Step, rows: int | None, budget: int | None) -> str:
        done = step.done
        if not done["num_waiting"]:
            return ""
        who = f"{done['num_waiting']} waiting"
        if any(record["event"] == "sequence.finished" for record in step.records):
            return ""  # there is room from the next step on
        if done["num_running"] == rows:
            return f"{who} for a row: all {rows} are taken"
        if done["num_prefill_tokens"] + done["num_decode_seqs"] == budget:
            return f"{who} for tokens: the step has no more than {budget}"
        return f"{who} for blocks: {done['num_blocks'] - done['used_blocks']} are free, and the first needs more"


def step_line(step: Step) -> str:
    done = step.done
    blocks = f"{bar(done['used_blocks'], done['num_blocks'], 14):<14} {done['used_blocks']}/{done['num_blocks']} blocks"
    load = f"{done['num_running']} running, {done['num_waiting']} waiting"
    what = f"{done['num_prefill_tokens']} prompt tokens + {done['num_decode_seqs']} decode"
    return f"  step {done['step']:>4}  {done['kind']:<8}{what:<28}{blocks:<30}{load}"


def plain_lines(steps: list[Step]) -> list[str]:
    if not steps:
        return []
    if len(steps) == 1:
        return [step_line(steps[0])]
    first, last = steps[0].done, steps[-1].done
    return [
        f"  steps {first['step']} … {last['step']}: decode, nothing to decide; blocks {first['used_blocks']} → "
        f"{last['used_blocks']}"
    ]


if __name__ == "__main__":
    main()
