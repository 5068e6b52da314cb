"""DecodeLogPolicy: which decode steps get a line at INFO."""

from __future__ import annotations

import logging

from nanovllm.utils import env

__all__ = ["DecodeLogPolicy"]


class DecodeLogPolicy:
    """The level of each decode step's line: INFO at key moments, DEBUG for all others.

    Key moments are the first decode step, every `interval`-th one (default: `NANOVLLM_LOG_DECODE_INTERVAL`), a batch
    size that differs from the previous decode step's, and a preemption. The owner calls `reset` when no work is left,
    so that the first decode step of the next generation counts as a first one.
    """

    def __init__(self, interval: int | None = None) -> None:
        self.interval = env.log_decode_interval() if interval is None else interval
        self._last_batch_size: int | None = None

    def level_for(self, step_index: int, batch_size: int, num_preempted: int) -> int:
        """Returns the level of a decode step; called once for each. `step_index` counts from 1, as in the line."""
        changed = batch_size != self._last_batch_size  # true for the first step: there is no previous size
        self._last_batch_size = batch_size
        key_moment = changed or num_preempted > 0 or step_index % self.interval == 0
        return logging.INFO if key_moment else logging.DEBUG

    def reset(self) -> None:
        self._last_batch_size = None
