"""Summary: a whole log, with one `Run` for each engine in it."""

from __future__ import annotations

import glob
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from nanovllm.errors import InvalidArgumentError
from nanovllm.report.log_file import STANDARD_INPUT, LineCounts, LogFile, Record
from nanovllm.report.run import Run
from nanovllm.report.watch import Watch

MOST_RUNS = 12  # engines shown from one file; each takes some hundred kilobytes


@dataclass
class Summary:
    path: Path
    counts: LineCounts
    watch: Watch = field(default_factory=Watch)
    runs: list[Run] = field(default_factory=list)
    num_left_out: int = 0  # engines after the first MOST_RUNS
    num_other_ranks: int = 0  # records of ranks above 0
    rank_files: list[Path] = field(default_factory=list)
    _current: dict[tuple[object, object], Run | None] = field(default_factory=dict)  # None: the engine is left out

    def take(self, record: Record) -> None:
        """Adds a record to the run of its process and its engine."""
        if record.get("rank") not in (None, 0):
            self.num_other_ranks += 1
            self.take_of_rank(record)
            return
        key = (_key(record.get("pid")), _key(record.get("engine_id")))
        run = self._current.get(key)
        if run is None and key not in self._current:
            run = self._nameless(record, key)
        begins = record["event"] == "engine.init" and (run is None or run.has_engine)
        if begins or (run is None and key not in self._current):
            run = None
            if len(self.runs) < MOST_RUNS:
                run = Run(len(self.runs) + 1, key[0], self.watch)
                self.runs.append(run)
            elif begins:
                self.num_left_out += 1
            self._current[key] = run
        if run is not None:
            run.take(record)

    def _nameless(self, record: Record, key: tuple[object, object]) -> Run | None:
        """Returns the run of a record if it, or the run, names no engine: a warning before the engine starts."""
        if key[1] is None:
            same = [run for run in self.runs if run.pid == key[0]]
            return same[-1] if same and record["event"] != "engine.init" else None
        run = self._current.get((key[0], None))
        if run is None or run.has_engine:
            return None
        self._current[key] = run
        return run

    def take_of_rank(self, record: Record) -> None:
        """Adds a record of a rank above 0 to the run that began last before it: its process is another one."""
        begun = [run for run in self.runs if run.began <= record["mono"]]
        if begun:
            begun[-1].take_of_rank(record)

    @property
    def has_ended(self) -> bool:
        """Whether every engine has written its last record."""
        return bool(self.runs) and all(run.statistics.covers_run for run in self.runs)

    @property
    def is_answered(self) -> bool:
        """Whether more of the log would not change the answer."""
        if self.watch.request_id is not None and any(run.requests.num_wanted for run in self.runs):
            return True
        step = self.watch.step
        return self.has_ended or (step is not None and any(run.story.last > step for run in self.runs))


def _key(value: object) -> object:
    return value if isinstance(value, int) else None


def summarise(path: Path, watch: Watch | None = None, at_end: Callable[[Summary], bool] | None = None) -> Summary:
    """Reads the log once, and the files of other ranks beside it.

    `at_end` is called where the log ends; if it returns True, reading goes on when the log has grown.
    Raises InvalidArgumentError if the log cannot be read.
    """
    log = LogFile(path)
    summary = Summary(path, log.counts, watch or Watch())
    for record in log.records(None if at_end is None else lambda: at_end(summary)):
        summary.take(record)
        if at_end is not None and str(path) == STANDARD_INPUT and summary.is_answered:
            break  # a pipe that stays open has no end
    for run in summary.runs:
        run.finish()
    if not summary.runs:
        hint = "Rank 0 logs every step, in the file without .rankN in its name."
        raise InvalidArgumentError("log", str(path), "the log of rank 0", hint)
    _read_other_ranks(summary)
    return summary


def _read_other_ranks(summary: Summary) -> None:
    if str(summary.path) == STANDARD_INPUT:
        return
    for path in sorted(summary.path.parent.glob(f"{glob.escape(summary.path.name)}.rank[0-9]*")):
        log = LogFile(path)
        try:
            for record in log.records():
                if record.get("rank") not in (None, 0):
                    summary.take_of_rank(record)
        except InvalidArgumentError:
            continue  # a file without a record
        summary.rank_files.append(path)
