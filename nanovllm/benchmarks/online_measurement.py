"""measure: runs a plan on one engine, whichever it is."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from typing import Any

from nanovllm.benchmarks.online import OnlineRun, StreamingEngine, replay
from nanovllm.benchmarks.online_settings import OnlinePlan
from nanovllm.benchmarks.online_summary import RunSummary, rows_of, summarize_run
from nanovllm.benchmarks.settings import Say, WorkloadError

Finished = Callable[[RunSummary, list[dict[str, Any]]], None]  # gets a run's figures and its requests


async def measure(engine: StreamingEngine, name: str, plan: OnlinePlan, finished: Finished, say: Say) -> None:
    """Warms `engine` up, then runs each rate and seed. Raises WorkloadError if no warm-up request succeeds."""
    started = time.perf_counter()
    for seed in range(2):
        warm_up = OnlineRun(plan.traffic.warm_up(plan.warm_up, seed))
        await replay(engine, warm_up)
    if all(record.error for record in warm_up.records):
        raise WorkloadError(f"{name} completed no request of the warm-up: {warm_up.records[0].error}")
    say(f"{name}: warm-up with twice {plan.warm_up} requests at once took {time.perf_counter() - started:.1f} s")
    for rate, seed in itertools.product(plan.rates, plan.seeds):
        run = OnlineRun(plan.traffic.draw(rate, seed))
        try:
            await replay(engine, run)
        finally:  # also for what an interrupt leaves
            if run.records:
                summary = summarize_run(name, rate, seed, run, plan.bounds)
                finished(summary, rows_of(summary, run))
            say(f"{name}, {rate:g} requests/s, seed {seed}: {len(run.records):,} requests in {run.seconds:.1f} s")
