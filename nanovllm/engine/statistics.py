"""Plain values that say what an engine has done so far, and how busy it is."""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass
class EngineStatistics:
    """Totals since the engine started. Times are wall times in seconds."""

    num_steps: int = 0
    num_prompt_tokens: int = 0  # computed in prefill, including those computed again after a preemption
    num_output_tokens: int = 0  # sampled, including those that a step in flight samples after a sequence has ended
    prefill_seconds: float = 0.0  # steps with at least one prefill chunk
    decode_seconds: float = 0.0  # all others
    num_preemptions: int = 0
    num_prefix_queries: int = 0  # tokens looked up in the prefix cache
    num_prefix_hits: int = 0  # of those, found
    num_drafts: int = 0  # of speculative decoding: how often a step had a draft of a sequence
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0  # of those, found to be right

    def since(self, earlier: EngineStatistics) -> EngineStatistics:
        """Returns the differences from `earlier`, an earlier copy."""
        return EngineStatistics(*(getattr(self, f.name) - getattr(earlier, f.name) for f in fields(self)))

    def copy(self) -> EngineStatistics:
        return self.since(EngineStatistics())


@dataclass(frozen=True)
class Load:
    """How busy the engine is at one moment."""

    num_running: int
    num_waiting: int
    used_blocks: int
    num_blocks: int
