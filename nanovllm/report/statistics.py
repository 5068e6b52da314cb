"""Statistics: the figures of a whole run from `engine.statistics`, and what each rank says of memory and messages."""

from __future__ import annotations

from dataclasses import dataclass, field

from nanovllm.report.log_file import Record, count, number
from nanovllm.report.words import plural, time_text

_SUMS = (
    "num_steps", "num_prompt_tokens", "num_output_tokens", "num_prefix_queries", "num_prefix_hits", "preemptions",
    "wall_s", "device_s",
)  # fmt: skip
_PEAKS = {"peak_kv_cache_usage": "peak_kv_cache_at", "peak_waiting": "peak_waiting_at"}
_SLOWEST = "slowest_step"
_MOMENTS = {
    "model.loaded": "after the weights",
    "kv_cache.memory": "with the KV cache",
    "generation.memory": "after the last generation",
}
_SIZES = ("resident", "allocated", "reserved", "peak", "free")


class Statistics:
    """The last `engine.statistics` of a run covers all of it. Until it is there, those of the intervals are joined."""

    def __init__(self) -> None:
        self.final: Record | None = None
        self._joined: Record = {}

    def add(self, record: Record) -> None:
        if record.get("final") is True:
            self.final = record
            return
        joined = self._joined
        for name in _SUMS:
            value = number(record, name)
            if value is not None:
                joined[name] = joined.get(name, 0) + value
        for name, at in _PEAKS.items():
            value = number(record, name)
            if value is not None and value > joined.get(name, -1.0):
                joined[name], joined[at] = value, number(record, at)
        slowest = number(record, "slowest_step_ms")
        if slowest is not None and slowest > joined.get("slowest_step_ms", 0.0):
            joined.update({name: value for name, value in record.items() if name.startswith(_SLOWEST)})

    @property
    def covers_run(self) -> bool:
        return self.final is not None

    def figures(self) -> Record:
        """Returns the fields of `engine.statistics` over the run; fewer without one."""
        return self._joined if self.final is None else self.final

    def hit_rate(self) -> float | None:
        """Returns the share of looked-up prompt tokens that the prefix cache had; None if none was looked up."""
        figures = self.figures()
        queries = number(figures, "num_prefix_queries")
        return count(figures, "num_prefix_hits") / queries if queries else None


@dataclass
class Messages:
    """The `communication` events of one kind."""

    num: int = 0
    elapsed_ms: float = 0.0
    wait_ms: float | None = None
    move_ms: float | None = None
    slowest_ms: float = 0.0
    slowest_step: int | None = None

    @property
    def text(self) -> str:
        wait = "" if self.wait_ms is None else f", {time_text(self.wait_ms / 1e3)} of it waiting"
        return f"{plural(self.num, 'message')}, {time_text(self.elapsed_ms / 1e3)} in all{wait}"


@dataclass
class Rank:
    """What one rank logged of itself."""

    memory: dict[str, Record] = field(default_factory=dict)  # by event; the last one
    messages: dict[str, Messages] = field(default_factory=dict)  # by operation

    def memory_texts(self) -> dict[str, str]:
        """Returns the sizes of the memory, by the moment at which they were measured."""
        return {
            _MOMENTS.get(event, event): ", ".join(
                f"{name} {value / 1e9:.2f} GB"
                for name in _SIZES
                if (value := number(record, f"{name}_bytes")) is not None
            )
            for event, record in self.memory.items()
        }

    def communicated(self, record: Record) -> None:
        operation = str(record.get("operation", ""))[:60]
        messages = self.messages.get(operation)
        if messages is None:
            if len(self.messages) >= 50:
                return
            messages = self.messages[operation] = Messages()
        elapsed = number(record, "elapsed_ms") or 0.0
        messages.num += 1
        messages.elapsed_ms += elapsed
        for name in ("wait_ms", "move_ms"):
            value = number(record, name)
            if value is not None:
                setattr(messages, name, (getattr(messages, name) or 0.0) + value)
        if elapsed > messages.slowest_ms:
            step = number(record, "step")
            messages.slowest_ms, messages.slowest_step = elapsed, None if step is None else int(step)
