"""DecodeLogPolicy: which decode steps get a line at INFO, and which of these lines the console's summary shows."""

from __future__ import annotations

import logging

from nanovllm.utils import env

__all__ = ["DecodeLogPolicy"]

_SUMMARY_INTERVAL = 50


class DecodeLogPolicy:
    """The level of each decode step's line: INFO at key moments, DEBUG for all others.

    Key moments are the first decode step, every `interval`-th one (default: `NANOVLLM_LOG_DECODE_INTERVAL`), a batch
    size that differs from the previous decode step's, and a preemption. The summary has the first step, every
    `summary_interval`-th one (default: 50, or the variable where it is set) and preemptions. The owner calls `reset`
    when no work is left, so that the first decode step of the next generation counts as a first one.
    """

    def __init__(self, interval: int | None = None) -> None:
        self.interval = env.log_decode_interval() if interval is None else interval
        of_variable = env.log_decode_interval.is_set or interval is not None
        self.summary_interval = self.interval if of_variable else _SUMMARY_INTERVAL
        self._last_batch_size: int | None = None

    def level_for(self, step_index: int, batch_size: int, num_preempted: int) -> int:
        """Returns the level of a decode step; called once for each. `step_index` counts from 1, as in the line."""
        changed = batch_size != self._last_batch_size  # true for the first step: there is no previous size
        self._last_batch_size = batch_size
        key_moment = changed or num_preempted > 0 or step_index % self.interval == 0
        return logging.INFO if key_moment else logging.DEBUG

    def in_summary(self, step_index: int, num_preempted: int) -> bool:
        """Returns whether the console's summary shows the step."""
        return step_index == 1 or num_preempted > 0 or step_index % self.summary_interval == 0

    def reset(self) -> None:
        self._last_batch_size = None
