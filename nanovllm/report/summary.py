"""Summary: a whole log, with one `Run` for each engine in it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from nanovllm.errors import InvalidArgumentError
from nanovllm.report.log_file import LineCounts, LogFile
from nanovllm.report.run import Run

MOST_RUNS = 12  # engines shown from one file; each takes some hundred kilobytes


@dataclass
class Summary:
    path: Path
    counts: LineCounts
    runs: list[Run] = field(default_factory=list)
    num_left_out: int = 0  # engines after the first MOST_RUNS
    num_other_ranks: int = 0  # records of ranks above 0


def summarise(path: Path) -> Summary:
    """Reads the log once. A second engine in a process begins a second run, since records name only their process.

    Raises InvalidArgumentError if the log cannot be read.
    """
    log = LogFile(path)
    summary = Summary(path, log.counts)
    current: dict[object, Run | None] = {}  # by process; None: the engine is left out
    for record in log.records():
        if record.get("rank") not in (None, 0):
            summary.num_other_ranks += 1
            continue
        pid = record.get("pid") if isinstance(record.get("pid"), int) else None
        run = current.get(pid)
        begins = record["event"] == "engine.init" and (run is None or run.has_engine)
        if begins or pid not in current:
            run = None
            if len(summary.runs) < MOST_RUNS:
                run = Run(len(summary.runs) + 1, pid)
                summary.runs.append(run)
            elif begins:
                summary.num_left_out += 1
            current[pid] = run
        if run is not None:
            run.take(record)
    for run in summary.runs:
        run.finish()
    if not summary.runs:
        hint = "Rank 0 logs every step, in the file without .rankN in its name."
        raise InvalidArgumentError("log", str(path), "the log of rank 0", hint)
    return summary
