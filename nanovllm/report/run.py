"""Run: collects the figures of one engine, one record at a time."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from nanovllm.report.log_file import Record, count, number
from nanovllm.report.preemptions import Preemption, Preemptions
from nanovllm.report.quantiles import QuantileSketch, Timeline
from nanovllm.report.requests import Requests
from nanovllm.report.statistics import Rank, Statistics
from nanovllm.report.steps import SlowSteps, StepStory
from nanovllm.report.watch import Watch
from nanovllm.report.words import clock_text

_MOST_PROBLEMS = 20  # warnings and errors shown
_MOST_GENERATIONS = 20
_MOST_RANKS = 1023
_ENVELOPE = {"ts", "mono", "level", "logger", "event", "message", "pid", "rank", "engine_id"}
_ENVELOPE_OF_END = _ENVELOPE - {"mono"}
_SETTING_EVENTS = (
    "engine.versions",
    "engine.model",
    "engine.config",
    "engine.resolved",
    "engine.startup",
    "model.config",
    "model.weights",
    "attention.selected",
    "kv_cache.sizing",
    "kv_cache.config",
    "kv_cache.allocated",
    "speculation.statistics",  # of the last interval, or of the whole run once it has ended
)
_MEMORY_EVENTS = ("model.loaded", "kv_cache.memory", "generation.memory")
_SEQUENCE = re.compile(r"seq_(\d+)\(")
# The charts begin at the first event with one of these prefixes. Start-up has a chart of its own.
_ACTIVITY = ("request.", "generation.start", "batch.", "step.", "sequence.", "engine.statistics")


@dataclass(frozen=True)
class DecodeLine:
    """A `batch.decode` line. At INFO, the next line shows how many steps of this size there were."""

    at: float
    decode_step: int
    size: int


@dataclass(frozen=True)
class PrefillLine:
    """A `batch.prefill` line."""

    at: float
    step: int
    num_tokens: int


def _fields(record: Record) -> Record:
    """Returns the fields of an event, without those that every record has."""
    return {name: value for name, value in record.items() if name not in _ENVELOPE}


class Run:
    """One engine: the records of a process from `engine.init`, or the first one, to the next `engine.init`."""

    def __init__(self, index: int, pid: object, watch: Watch | None = None) -> None:
        self.number, self.pid = index, pid
        watch = watch or Watch()
        self.has_engine = False
        self.num_records = 0
        self.first_ts = self.last_ts = ""
        self.began = math.inf  # on the log's monotonic clock
        self.origin: float | None = None  # of the time axes, in the log's monotonic seconds
        self.end = 0.0
        self.timeline = Timeline()
        self.slow_steps = SlowSteps()
        self.step_times: dict[str, QuantileSketch] = {}
        self.token_gaps = QuantileSketch()
        self.requests = Requests(watch)
        self.preemptions = Preemptions()
        self.statistics = Statistics()
        self.ranks: dict[int, Rank] = {0: Rank()}
        self.story = StepStory(watch.step)
        self.outcome: Record | None = None  # the fields of `engine.exit`
        self.settings: dict[str, Record] = {}  # by event, from start-up
        self.generations: list[Record] = []
        self.problems: list[str] = []
        self.num_problems = 0
        self.num_steps = self.num_prefill_steps = self.num_prefill_tokens = self.num_output_tokens = 0
        self.num_step_jumps = self.num_failures = 0
        self.most_running = 0  # sequences of a decode step
        self.largest_mixed_prefill = 0  # prompt tokens of a step that decoded as well
        self.line_prompt_tokens = self.line_decode_tokens = 0  # estimated from INFO lines
        self.peak_blocks = self.num_blocks = 0
        self.start: datetime | None = None  # wall-clock time at 0 of the log's monotonic clock
        self._last_step = 0
        self._last_done = 0.0
        self._last_decode_line: DecodeLine | None = None
        self._open_prefill: PrefillLine | None = None  # its step may not have ended

    @property
    def duration(self) -> float:
        """Seconds from the first activity to the last record."""
        return 0.0 if self.origin is None else max(self.end - self.origin, 0.0)

    @property
    def num_preemptions(self) -> int:
        return self.preemptions.num

    def moment(self, at: float | None) -> str | None:
        """Returns a time on the log's monotonic clock as the time of day; None for None."""
        return None if at is None else clock_text(self.start, at)

    def setting(self, name: str) -> Any:
        """Returns a setting as the engine resolved it, or as it was given; None if the log has none."""
        for event in ("engine.resolved", "kv_cache.config", "engine.config"):
            if name in self.settings.get(event, {}):
                return self.settings[event][name]
        return None

    def number_setting(self, name: str) -> float | None:
        """Returns a setting that is a number; None if the log has none."""
        return number({name: self.setting(name)}, name)

    @property
    def at_debug(self) -> bool:
        return self.num_steps > 0

    def take(self, record: Record) -> None:
        """Adds a record. Fields of unexpected types are ignored."""
        event: str = record["event"]
        self.num_records += 1
        self.began = min(self.began, record["mono"])
        if event not in (
            "rule",
            "engine.versions",
        ):  # before the start of the next engine they are not part of this one
            self.end = max(self.end, record["mono"])
        self.last_ts = str(record.get("ts", ""))
        if self.start is None:
            self.start = _wall_clock(record)
        self.first_ts = self.first_ts or self.last_ts
        if self.origin is None and event.startswith(_ACTIVITY):
            self.origin = record["mono"]
            self._last_done = 0.0
        if record.get("level") in ("WARNING", "ERROR", "CRITICAL"):
            self.num_problems += 1
            if len(self.problems) < _MOST_PROBLEMS:
                self.problems.append(f"{record['level']}: {str(record.get('message', event))[:500]}")
        self.story.take(record)
        handler = _HANDLERS.get(event)
        if handler is not None:
            handler(self, record)

    def _at(self, record: Record) -> float:
        return float(record["mono"]) - (self.origin or 0.0)

    # Start-up

    def _init(self, record: Record) -> None:
        self.has_engine = True

    def _setting(self, record: Record) -> None:
        self.settings[record["event"]] = _fields(record)

    # Steps

    def _step_done(self, record: Record) -> None:
        at, step, wall_ms = self._at(record), count(record, "step"), number(record, "wall_ms") or 0.0
        gpu_ms = number(record, "gpu_ms")
        prefill, outputs = count(record, "num_prefill_tokens"), count(record, "num_output_tokens")
        decodes = count(record, "num_decode_seqs")
        # With several steps in flight, the wall time of a step begins while the previous one is running.
        began = max(self._last_done, at - wall_ms / 1e3)
        if self.num_steps and step != self._last_step + 1:
            self.num_step_jumps += 1
        elif self.num_steps:
            self.token_gaps.add((at - self._last_done) * 1e3, weight=decodes)
        self._last_step, self._last_done = step, at
        self.num_steps += 1
        self.num_prefill_steps += prefill > 0
        self.num_prefill_tokens += prefill
        self.num_output_tokens += outputs
        timeline = self.timeline
        timeline.spread(began, at, "prompt", prefill)
        timeline.spread(began, at, "output", outputs)
        timeline.add(at, "prefill_in_step", prefill)
        timeline.add(at, "decode_in_step", decodes)
        timeline.add(at, "step_ms", wall_ms)
        if gpu_ms is not None:
            timeline.add(at, "gpu_ms", gpu_ms)
        timeline.add(at, "running", count(record, "num_running"))
        timeline.add(at, "waiting", count(record, "num_waiting"))
        self.num_blocks = count(record, "num_blocks") or self.num_blocks
        used = count(record, "used_blocks")
        self.line_prompt_tokens = self.line_decode_tokens = 0  # the exact figures are known
        self.peak_blocks = max(self.peak_blocks, used)
        if self.num_blocks:
            timeline.add(at, "kv_use", used / self.num_blocks)
        kind = str(record.get("kind"))
        if kind in ("prefill", "decode", "mixed"):
            self.step_times.setdefault(kind, QuantileSketch()).add(wall_ms)
        self.slow_steps.done(record, at)

    def _prefill_line(self, record: Record) -> None:
        self.slow_steps.scheduled(count(record, "step"))
        self._end_prefill(self._at(record))
        tokens = count(record, "batched_tokens")
        self.line_prompt_tokens += tokens
        self._open_prefill = PrefillLine(self._at(record), count(record, "step"), tokens)
        self.timeline.add(self._at(record), "line_prompt_in_step", tokens)
        sequences = record.get("seqs")
        for text in sequences if isinstance(sequences, list) else []:
            match = _SEQUENCE.match(str(text))
            if match is not None:
                self._scheduled(int(match[1]), record)

    def _decode_line(self, record: Record) -> None:
        self.slow_steps.scheduled(count(record, "step"))
        line = DecodeLine(self._at(record), count(record, "decode_step"), count(record, "size"))
        self.most_running = max(self.most_running, line.size)
        if self._open_prefill is not None and self._open_prefill.step != count(record, "step"):
            self._end_prefill(line.at)
        elif self._open_prefill is not None:
            self.largest_mixed_prefill = max(self.largest_mixed_prefill, self._open_prefill.num_tokens)
        last, self._last_decode_line = self._last_decode_line, line
        self.timeline.add(line.at, "line_decode", line.size)
        if last is not None and line.decode_step > last.decode_step:
            # Each change of size has a line, so all steps in between had the size of the last line.
            steps = line.decode_step - last.decode_step
            self.line_decode_tokens += steps * last.size
            self.timeline.spread(last.at, line.at, "line_output", steps * last.size)

    def _end_prefill(self, at: float) -> None:
        """Ends the open prefill, if any, at the line of the next step: it took no longer than that."""
        if self._open_prefill is not None:
            self.timeline.spread(self._open_prefill.at, at, "line_prompt", self._open_prefill.num_tokens)
        self._open_prefill = None

    def finish(self) -> None:
        """Completes the figures after the last record."""
        self._end_prefill(self.duration)

    def _captured(self, record: Record) -> None:
        if self.origin is None:
            return  # at start-up: no step waits for it
        self.slow_steps.event(
            f"a CUDA graph for batch size {count(record, 'size')} was captured in {count(record, 'elapsed_ms')} ms"
        )

    def _preempted(self, record: Record) -> None:
        preemption = Preemption.of(record)
        self.preemptions.add(preemption, int(self.number_setting("num_blocks") or 0))
        self.requests.preempted(preemption)
        self.timeline.add(self._at(record), "preempted", 1)
        self.slow_steps.planning_event(
            f"seq_{preemption.seq_id} was preempted ({preemption.num_tokens:,} tokens to compute again)"
        )

    # Requests

    def _added(self, record: Record) -> None:
        self.requests.added(record)

    def _allocated(self, record: Record) -> None:
        self._scheduled(count(record, "seq_id"), record)

    def _scheduled(self, seq_id: int, record: Record) -> None:
        self.requests.scheduled(seq_id, record["mono"])
        self.preemptions.resumed(seq_id)

    def _finished(self, record: Record) -> None:
        life = self.requests.finished({name: value for name, value in record.items() if name not in _ENVELOPE_OF_END})
        for preemption in life.preemptions:
            self.preemptions.resumed(preemption.seq_id)
        origin = self.origin or 0.0
        if life.first_scheduled is not None and life.num_prompt_tokens:
            self.timeline.add(
                life.first_scheduled - origin, "hit_rate", life.num_cached_tokens / life.num_prompt_tokens
            )
        if life.first_token is not None:
            self.timeline.add(life.first_token - origin, "ttft_ms", life.seconds("ttft_s") * 1e3)
        if number(record, "itl_s") is not None:
            self.timeline.add(self._at(record), "itl_ms", life.seconds("itl_s") * 1e3)
            self.timeline.add(self._at(record), "stall_ms", life.seconds("longest_stall_s") * 1e3)
        if self.at_debug and record.get("stall_cause") == "preempted":  # the steps' times do not show such a gap
            self.token_gaps.add(life.seconds("longest_stall_s") * 1e3)

    # The rest

    def _statistics(self, record: Record) -> None:
        self.statistics.add(record)
        if record.get("final") is True:  # rates over the whole run belong to no moment
            return
        names = {
            "prompt_tokens_per_second": "stat_prompt",
            "generation_tokens_per_second": "stat_output",
            "kv_cache_usage": "stat_kv_use",
            "peak_kv_cache_usage": "stat_kv_peak",
            "num_running": "stat_running",
            "num_waiting": "stat_waiting",
        }
        if number(record, "num_prefix_queries") != 0:  # nothing looked up: there is no rate
            names["prefix_cache_hit_rate"] = "stat_hit_rate"
        for field, name in names.items():
            value = number(record, field)
            if value is not None:
                self.timeline.add(self._at(record), name, value)

    def _generation(self, record: Record) -> None:
        self._end_prefill(self._at(record))
        if len(self.generations) < _MOST_GENERATIONS:
            self.generations.append({**record, "at": self._at(record)})

    def _failed(self, record: Record) -> None:
        self.num_failures += 1
        self.requests.lost()
        if record.get("level") == "INFO":  # Ctrl-C
            self.problems.append(f"interrupted: {str(record.get('message', ''))[:500]}")

    def _memory(self, record: Record) -> None:
        self.rank(record).memory[record["event"]] = _fields(record)

    def _communicated(self, record: Record) -> None:
        self.rank(record).communicated(record)

    def _exited(self, record: Record) -> None:
        self.outcome = _fields(record)

    def rank(self, record: Record) -> Rank:
        """Returns what is known of the record's rank."""
        return self.ranks.setdefault(min(count(record, "rank"), _MOST_RANKS), Rank())

    def take_of_rank(self, record: Record) -> None:
        """Adds a record of a rank above 0: its memory and its messages. Rank 0 logs all the rest."""
        if record["event"] in _MEMORY_EVENTS:
            self._memory(record)
        elif record["event"] == "communication":
            self._communicated(record)
        self.story.take(record)


def _wall_clock(record: Record) -> datetime | None:
    try:
        return datetime.fromisoformat(str(record.get("ts")).replace("Z", "+00:00")) - timedelta(seconds=record["mono"])
    except (ValueError, OverflowError):
        return None


_HANDLERS: dict[str, Callable[[Run, Record], Any]] = {
    "engine.init": Run._init,
    **dict.fromkeys(_SETTING_EVENTS, Run._setting),
    "step.done": Run._step_done,
    "batch.prefill": Run._prefill_line,
    "batch.decode": Run._decode_line,
    "graph.captured": Run._captured,
    "sequence.preempted": Run._preempted,
    "request.added": Run._added,
    "blocks.allocated": Run._allocated,
    "request.finished": Run._finished,
    "engine.exit": Run._exited,
    "communication": Run._communicated,
    **dict.fromkeys(_MEMORY_EVENTS, Run._memory),
    "engine.statistics": Run._statistics,
    "generation.complete": Run._generation,
    "engine.error": Run._failed,
    "engine.interrupted": Run._failed,
}
