"""Simulates up to 1,000 replicas behind one router: `python tools/simulate_cluster.py`.

Requests that begin with shared prefixes arrive at random, at the same rate for each replica. They are routed at random,
to the shortest queue, or by the server's own router, which also looks at the prefixes that a replica has cached. Up to
64 replicas, each one is the real engine on a simulated device (as in tools/simulate_load.py, with the same measured
step costs). Above that, the scheduler's rules are applied to all replicas at once in numpy (tools/batched_replicas.py);
the row "64, batched" shows how close that is. The same arguments give the same figures on every machine, except for
the microseconds that a choice takes.

    python tools/simulate_cluster.py --plot docs/img/cluster.svg    # the figures of docs/scaling.md, in some minutes
"""

from __future__ import annotations

import argparse
import heapq
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from nanovllm import SamplingParams
from nanovllm.config import EngineConfig
from nanovllm.data_parallel.router import prefix_hashes
from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.engine.observer import EngineObserver
from nanovllm.engine.sequence import Sequence
from nanovllm.requests.preparation import PreparedRequest
from tools.batched_replicas import BUDGET, ROWS, Served, simulate_batched
from tools.cluster_routing import POLICIES, QueueRouting, Routing, make_routing
from tools.cluster_traffic import Requests, Traffic
from tools.simulate_load import Clock, Device, SimulatedDevice, resolve

BLOCK_SIZE, NUM_BLOCKS = 16, 20_000  # about what an 8B model leaves of 80 GB
CAPACITY = BLOCK_SIZE * NUM_BLOCKS
LARGEST_EXACT = 64


class SimulatedReplica(EngineObserver):
    """A real engine on a simulated device, with a clock of its own."""

    def __init__(self, index: int, device: Device, served: Served, ended: list[tuple[float, int]]) -> None:
        self.index, self.clock = index, Clock()
        self._served, self._ended = served, ended
        resolved = resolve(
            num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE, max_num_seqs=ROWS, max_num_batched_tokens=BUDGET
        )
        config = EngineConfig("none", skip_tokenizer_init=True)
        self.engine = LLMEngine(config, lambda *_: SimulatedDevice(resolved, device, self.clock), [self], self.clock)

    def add(self, index: int, arrival: float, prepared: PreparedRequest) -> None:
        self.engine.enqueue(str(index), prepared, arrival)
        self._served.replicas[index] = self.index

    def first_token(self, sequence: Sequence) -> None:
        index = int(sequence.request_id)
        assert sequence.first_token is not None
        self._served.ttft[index] = sequence.first_token - sequence.arrival
        self._served.num_cached[index] = sequence.num_cached_tokens or 0

    def sequence_finished(self, sequence: Sequence) -> None:
        assert sequence.finished is not None
        self._served.finished[int(sequence.request_id)] = sequence.finished
        heapq.heappush(self._ended, (sequence.finished, self.index))


def simulate_exact(requests: Requests, routing: Routing, num_replicas: int, device: Device) -> Served:
    """Serves all requests. A choice sees the requests that have ended before it, and no others."""
    count = len(requests)
    zeros = np.zeros(count, np.int64)
    served = Served(np.full(count, np.nan), np.full(count, np.nan), zeros, zeros.copy())
    ended: list[tuple[float, int]] = []  # a heap: when, and on which replica
    replicas = [SimulatedReplica(index, device, served, ended) for index in range(num_replicas)]
    busy: list[tuple[float, int]] = []  # a heap: the clock of each replica that has requests

    def advance(until: float) -> None:
        while busy and busy[0][0] < until:
            _, number = heapq.heappop(busy)
            replica = replicas[number]
            replica.engine.step()
            if replica.engine.has_unfinished_requests():
                heapq.heappush(busy, (replica.clock.now, number))
        while ended and ended[0][0] <= until:
            routing.ended(heapq.heappop(ended)[1])

    for index, arrival in enumerate(requests.arrivals.tolist()):
        advance(arrival)
        tokens = requests.tokens(index)
        replica = replicas[routing.choose(prefix_hashes(tokens))]
        if not replica.engine.has_unfinished_requests():
            replica.clock.now = max(replica.clock.now, arrival)
            heapq.heappush(busy, (replica.clock.now, replica.index))
        replica.add(index, arrival, _prepared(tokens, int(requests.output_lens[index])))
    advance(float("inf"))
    return served


def _prepared(tokens: Any, num_output_tokens: int) -> PreparedRequest:
    params = SamplingParams(max_tokens=num_output_tokens, ignore_eos=True)
    return PreparedRequest(None, tokens, b"", params, None, None, None)


@dataclass(frozen=True)
class Run:
    """One simulation. rate: requests a second for each replica."""

    num_replicas: int
    policy: str
    rate: float
    seconds: float
    is_exact: bool
    seed: int

    @property
    def name(self) -> str:
        is_both = self.num_replicas == LARGEST_EXACT and not self.is_exact
        return f"{self.num_replicas}, batched" if is_both else str(self.num_replicas)


@dataclass(frozen=True)
class Outcome:
    """What a run gave, over the requests that arrived in its last two thirds. Times are seconds."""

    ttft_p50: float
    ttft_p99: float
    tokens_per_second: float  # output tokens of each replica, until the last arrival
    cached: float  # share of the prompt tokens
    largest_share: float  # requests of the replica that got most, in terms of the mean
    choice_us: float | None  # computing time of a choice


def simulate(run: Run) -> Outcome:
    """Runs one simulation, in a process of its own."""
    os.environ.setdefault("NANOVLLM_LOG_LEVEL", "ERROR")
    seconds = run.seconds * max(1, 8 // run.num_replicas)  # enough requests for quantiles
    requests = Traffic(run.num_replicas, run.rate, seconds, seed=run.seed).draw()
    routing = make_routing(run.policy, run.num_replicas, CAPACITY)
    if run.is_exact:
        served = simulate_exact(requests, routing, run.num_replicas, Device())
    else:
        served = simulate_batched(requests, routing, run.num_replicas, CAPACITY, BLOCK_SIZE, Device())
    begins, ends = seconds / 3, float(requests.arrivals[-1])
    measured = requests.arrivals >= begins
    lens = requests.prefix_lens[requests.prefixes] + requests.suffix_lens
    first = requests.arrivals + served.ttft
    decoding = served.finished - first
    in_time = np.clip(np.minimum(served.finished, ends) - np.maximum(first, begins), 0, None)
    tokens = requests.output_lens * np.divide(in_time, decoding, out=np.zeros_like(decoding), where=decoding > 0)
    counts = np.bincount(served.replicas[measured], minlength=run.num_replicas)
    is_timed = isinstance(routing, QueueRouting)
    return Outcome(
        *np.quantile(served.ttft[measured], [0.5, 0.99]).tolist(),
        tokens_per_second=float(tokens.sum()) / (ends - begins) / run.num_replicas,
        cached=float(served.num_cached[measured].sum() / lens[measured].sum()),
        largest_share=float(counts.max() / counts.mean()),
        choice_us=routing.seconds / routing.num_choices * 1e6 if is_timed else None,  # type: ignore[union-attr]
    )


def runs_of(sizes: list[int], rates: list[float], seconds: float, seed: int) -> list[Run]:
    kinds = [(size, size <= LARGEST_EXACT) for size in sizes]
    kinds += [(LARGEST_EXACT, False)] if LARGEST_EXACT in sizes else []
    return [
        Run(size, policy, rate, seconds, is_exact, seed)
        for rate in rates
        for size, is_exact in sorted(kinds, key=lambda kind: (kind[0], not kind[1]))
        for policy in POLICIES
    ]


def print_table(outcomes: dict[Run, Outcome]) -> None:
    print("req/s each   replicas      routing          TTFT p50, s      p99   tokens/s each   cached   largest", end="")
    print(" share   choice, us")
    for run, done in outcomes.items():
        choice = "-" if done.choice_us is None else f"{done.choice_us:.0f}"
        print(
            f"{run.rate:10g}   {run.name:11}   {run.policy:14}   {done.ttft_p50:11.3f}   {done.ttft_p99:6.2f}"
            f"   {done.tokens_per_second:13.0f}   {done.cached:6.1%}   {done.largest_share:13.2f}   {choice:>10}"
        )


def plot(outcomes: dict[Run, Outcome], path: Path) -> None:
    """Draws TTFT p99 and throughput over the number of replicas, a column for each rate. Needs matplotlib."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "nanovllm"  # the same file for the same figures
    from matplotlib import pyplot

    rates = list(dict.fromkeys(run.rate for run in outcomes))
    figure, axes = pyplot.subplots(2, len(rates), figsize=(5 * len(rates), 6.5), sharex=True, squeeze=False)
    for column, rate in enumerate(rates):
        for policy in POLICIES:
            points = [
                (run.num_replicas, done.ttft_p99, done.tokens_per_second)
                for run, done in outcomes.items()
                if (run.rate, run.policy) == (rate, policy) and run.is_exact == (run.num_replicas < LARGEST_EXACT)
            ]
            replicas, ttft, throughput = zip(*points, strict=True)
            axes[0][column].plot(replicas, ttft, marker="o", label=policy)
            axes[1][column].plot(replicas, throughput, marker="o", label=policy)
        axes[0][column].set(title=f"{rate:g} requests/s for each replica", xscale="log", yscale="log")
        axes[0][column].set_ylabel("TTFT p99, s")
        axes[1][column].set(xlabel="replicas", ylabel="output tokens/s of each replica")
        axes[1][column].set_ylim(bottom=0)
    axes[0][0].legend()
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--replicas", type=int, nargs="+", default=[1, 4, 16, 64, 256, 1000])
    add("--rates", type=float, nargs="+", default=[15.0, 30.0], help="requests a second for each replica")
    add("--seconds", type=float, default=6.0, help="in which requests arrive; eight times as long for one replica")
    add("--processes", type=int, default=2)
    add("--plot", type=Path, help="SVG file to write")
    add("--seed", type=int, default=0)
    args = parser.parse_args()
    runs = runs_of(sorted(args.replicas), args.rates, args.seconds, args.seed)
    with ProcessPoolExecutor(args.processes) as pool:
        longest_first = sorted(runs, key=lambda run: -run.num_replicas)
        futures = {run: pool.submit(simulate, run) for run in longest_first}
        outcomes = {run: futures[run].result() for run in runs}
    print_table(outcomes)
    if args.plot is not None:
        plot(outcomes, args.plot)


if __name__ == "__main__":
    main()
