"""A scheduler without an executor: tests plan steps and collect them by hand."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

import numpy as np

from nanovllm import SamplingParams
from nanovllm.engine.batch import ScheduledBatch, StepResult
from nanovllm.engine.metrics import EngineMetrics
from nanovllm.engine.observer import CollectedStep, Shortage
from nanovllm.engine.request_tracker import track_requests
from nanovllm.engine.scheduler import Scheduler
from nanovllm.engine.scheduler_log import SchedulerLog
from nanovllm.engine.sequence import Sequence
from tests.engine.simulated_executor import make_config

TOKEN = 1  # what every step samples, unless a test says otherwise


class Driver:
    """A scheduler whose steps are launched and collected by hand."""

    def __init__(self, clock: Callable[[], float] = time.monotonic, **config: object) -> None:
        self.metrics = EngineMetrics()
        self.observers = track_requests([self.metrics, SchedulerLog()])
        self.scheduler = Scheduler(make_config(**config), self.observers, clock)
        self.max_model_len = self.scheduler.rows.token_ids.shape[1] - 1
        self.in_flight: deque[ScheduledBatch] = deque()
        self.num_added = 0

    def add(self, prompt_len: int, max_tokens: int = 40) -> Sequence:
        """A request whose prompt is its own: nothing is shared unless a test adds the same tokens."""
        first = 10 + self.num_added * 1000
        return self.add_tokens(list(range(first, first + prompt_len)), max_tokens)

    def add_tokens(self, prompt: list[int], max_tokens: int = 40) -> Sequence:
        seq_id, self.num_added = self.num_added, self.num_added + 1
        params = SamplingParams(max_tokens=max_tokens)
        sequence = Sequence.from_prompt(seq_id, f"r{seq_id}", prompt, params, max_model_len=self.max_model_len, seed=0)
        self.scheduler.add(sequence)
        return sequence

    def launch(self) -> ScheduledBatch | None:
        batch = self.scheduler.schedule()
        if batch is not None:
            self.in_flight.append(batch)
        self.check()
        return batch

    def collect(self, token: int = TOKEN, gpu_ms: float | None = None) -> list[Sequence]:
        batch = self.in_flight.popleft()
        token_ids = np.full(len(batch.sampled_rows), token, dtype=np.int32)
        ended = self.scheduler.update(batch, StepResult(token_ids, gpu_ms))
        self.observers.step_collected(CollectedStep(batch, 0.0, 0.0, gpu_ms, ended, self.scheduler.load))
        self.check()
        return ended

    def step(self, token: int = TOKEN) -> ScheduledBatch:
        batch = self.launch()
        assert batch is not None
        self.collect(token)
        return batch

    def preempt(self, sequence: Sequence) -> None:
        self.scheduler._preempt(sequence, Shortage(step=1, oldest=sequence, needed=1, free=0))

    def check(self) -> None:
        self.scheduler.block_manager.check_integrity(s.block_table for s in self.scheduler.rows.running())

    @property
    def num_free_blocks(self) -> int:
        return self.scheduler.block_manager.num_free_blocks


def fill_the_cache(num_waiting: int = 0, **config: object) -> tuple[Driver, list[Sequence]]:
    """Three sequences of a block each in a cache of three blocks, all about to need another."""
    driver = Driver(**{"num_blocks": 3, "block_size": 4, "max_num_seqs": 3, "max_model_len": 12, **config})
    sequences = [driver.add(4) for _ in range(3 + num_waiting)]
    return driver, sequences
