"""Sends requests when they are due and measures each one: when its tokens arrive, or how it fails.

The engine is anything with the method of `StreamingEngine`. Times are those of the running event loop's clock.
"""

from __future__ import annotations

import asyncio
import itertools
import math
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from nanovllm.benchmarks.arrivals import OnlineRequest

_LONGEST_ERROR = 300  # characters


class StreamingEngine(Protocol):
    """Completes requests for the benchmark, with every output as long as the request asks for."""

    def stream(self, request: OnlineRequest) -> AsyncIterator[int | None]:
        """Yields at each delta the number of output tokens so far; None if only the last delta tells the number."""


@dataclass(frozen=True)
class RequestRecord:
    """What one request met. Times are seconds; TTFT and latency begin when the request is sent."""

    index: int
    at: float  # when it was due, after the start of the run
    lateness: float  # of the load generator: how long after that it was sent
    prompt_len: int
    output_len: int  # tokens that it asked for
    num_output_tokens: int  # tokens that arrived
    ttft: float | None  # None: no token arrived
    latency: float  # until the last token, or until it failed
    longest_gap: float  # between two deltas
    error: str | None
    gaps: list[float] = field(repr=False)  # before each token except those of the first delta

    @property
    def mean_itl(self) -> float:
        """Mean time between tokens; 0 for an output of one delta."""
        return sum(self.gaps) / len(self.gaps) if self.gaps else 0.0


@dataclass(frozen=True)
class Bounds:
    """What a request must meet to count for goodput, in milliseconds."""

    ttft_ms: float
    itl_ms: float  # mean over the request

    def met_by(self, record: RequestRecord) -> bool:
        """Returns whether the request was completed within both bounds."""
        if record.error is not None or record.ttft is None:
            return False
        return record.ttft * 1e3 <= self.ttft_ms and record.mean_itl * 1e3 <= self.itl_ms


@dataclass
class OnlineRun:
    """One run over some requests. It grows while the run goes on, so an interrupted run keeps what it has."""

    requests: Sequence[OnlineRequest]
    records: list[RequestRecord] = field(default_factory=list)  # of requests that ended, in the order of their ends
    seconds: float = 0.0  # from the start until the last request ended


async def replay(engine: StreamingEngine, run: OnlineRun) -> None:
    """Sends each request when it is due and returns when all have ended. A request that fails stops no other."""
    loop = asyncio.get_running_loop()
    start = loop.time()

    async def measured(request: OnlineRequest) -> None:
        record = await _measure(engine, request, start + request.at)
        run.records.append(record)
        run.seconds = loop.time() - start

    tasks = []
    try:
        for request in run.requests:
            await asyncio.sleep(max(0.0, start + request.at - loop.time()))
            tasks.append(asyncio.create_task(measured(request)))
        await asyncio.gather(*tasks)
    finally:  # after an interrupt; else all have ended
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _measure(engine: StreamingEngine, request: OnlineRequest, due: float) -> RequestRecord:
    """Runs one request to its end."""
    clock = asyncio.get_running_loop().time
    deltas: list[tuple[float, int | None]] = []
    error = None
    sent = clock()
    try:
        async for num_tokens in engine.stream(request):
            deltas.append((clock(), num_tokens))
    except Exception as problem:  # concerns this request alone; whatever it is, it counts as a failure
        error = f"{type(problem).__name__}: {problem}"[:_LONGEST_ERROR]
    arrivals = token_arrivals(deltas)
    num_tokens = sum(count for _, count in arrivals)
    if error is None and num_tokens != request.output_len:
        error = f"It ended after {num_tokens} of {request.output_len} tokens."
    times = [time for time, _ in arrivals]
    waits = [later - earlier for earlier, later in itertools.pairwise(times)]
    return RequestRecord(
        index=request.index,
        at=request.at,
        lateness=sent - due,
        prompt_len=len(request.prompt),
        output_len=request.output_len,
        num_output_tokens=num_tokens,
        ttft=times[0] - sent if times else None,
        latency=(times[-1] if times and error is None else clock()) - sent,
        longest_gap=max(waits, default=0.0),
        error=error,
        gaps=[wait / count for wait, (_, count) in zip(waits, arrivals[1:], strict=True) for _ in range(count)],
    )


def token_arrivals(deltas: Sequence[tuple[float, int | None]]) -> list[tuple[float, int]]:
    """Returns the time of each delta that brought tokens, and how many.

    deltas: times, and the number of tokens so far. If only the last one has it, the others share it equally.
    """
    unknown = [time for time, total in deltas if total is None]
    known = [(time, total) for time, total in deltas if total is not None]
    if unknown and len(known) == 1:
        final = known[0][1]
        known = [(time, math.ceil(final * index / len(unknown))) for index, time in enumerate(unknown, start=1)]
    arrivals, before = [], 0
    for time, total in known:
        if total > before:
            arrivals.append((time, total - before))
            before = total
    return arrivals
