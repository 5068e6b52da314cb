"""Which decode steps are worth a line at INFO."""

from __future__ import annotations

import logging

from nanovllm.utils import env

__all__ = ["DecodeLogPolicy"]


class DecodeLogPolicy:
    """The level of each decode step's line: INFO at key moments, DEBUG for all others.

    Key moments are the first decode step, every `interval`-th (`NANOVLLM_LOG_DECODE_INTERVAL` by default), a batch
    size other than that of the decode step before, and a preemption. Its owner calls `reset` when the work has run
    out, so that the next generation's first decode step is a first one again.
    """

    def __init__(self, interval: int | None = None) -> None:
        self.interval = env.log_decode_interval() if interval is None else interval
        self._last_batch_size: int | None = None

    def level_for(self, step_index: int, batch_size: int, num_preempted: int) -> int:
        """Call once a decode step; `step_index` counts decode steps from 1, as the line shows it."""
        changed = batch_size != self._last_batch_size  # also the first: there was no size before
        self._last_batch_size = batch_size
        key_moment = changed or num_preempted > 0 or step_index % self.interval == 0
        return logging.INFO if key_moment else logging.DEBUG

    def reset(self) -> None:
        self._last_batch_size = None
