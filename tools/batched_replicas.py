"""simulate_batched: many replicas at once in numpy, for tools/simulate_cluster.py.

The scheduler's rules for a KV cache that is large enough: every running row decodes in every step, waiting prompts are
computed beside them, oldest first, up to the budget of a step, and a request is in the step after the one that is
queued when it arrives. Which prefixes a replica has cached follows from a least-recently-used list of whole prompts.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from nanovllm.data_parallel.router import BLOCK_SIZE
from tools.cluster_routing import Routing
from tools.cluster_traffic import Requests
from tools.simulate_load import Device

WINDOW = 0.004  # seconds in which requests are routed, before the replicas go on
ROWS = 128
BUDGET = 16384  # prompt tokens in a step


@dataclass(frozen=True)
class Served:
    """What happened to each request. Times are seconds; NaN if it has not come so far."""

    ttft: npt.NDArray[np.float64]
    finished: npt.NDArray[np.float64]
    replicas: npt.NDArray[np.int64]
    num_cached: npt.NDArray[np.int64]


class CachedPrompts:
    """The prefixes that a replica has cached, least recently used first, with their tokens."""

    def __init__(self, capacity: int) -> None:
        self._capacity, self._total = capacity, 0
        self._tokens: OrderedDict[int, int] = OrderedDict()

    def use(self, key: int, num_tokens: int) -> bool:
        """Returns whether the tokens were cached. They are from now on."""
        is_hit = key in self._tokens
        if is_hit:
            self._tokens.move_to_end(key)
        else:
            self._tokens[key] = num_tokens
            self._total += num_tokens
        while self._total > self._capacity:
            self._total -= self._tokens.popitem(last=False)[1]
        return is_hit


class BatchedReplicas:
    """The rows of all replicas as arrays [num_replicas, ROWS]. A free row has request -1."""

    def __init__(self, num_replicas: int, device: Device, requests: Requests) -> None:
        shape = num_replicas, ROWS
        self.device, self.requests = device, requests
        self.clock = np.zeros(num_replicas)
        self.request = np.full(shape, -1, np.int32)
        self.to_prefill = np.zeros(shape, np.int32)
        self.context = np.zeros(shape, np.int32)
        self.to_decode = np.zeros(shape, np.int32)
        self.num_busy = np.zeros(num_replicas, np.int64)  # busy rows
        self.waiting: list[deque[tuple[int, int]]] = [deque() for _ in range(num_replicas)]
        self.new: list[list[tuple[int, int]]] = [[] for _ in range(num_replicas)]  # in the step after the next one
        self.ttft, self.finished = np.full(len(requests), np.nan), np.full(len(requests), np.nan)

    def add(self, replica: int, index: int, num_cached: int) -> None:
        """Adds a request. The step after the running one is planned already, except on an idle replica."""
        arrival, waiting = self.requests.arrivals[index], self.waiting[replica]
        if not self.num_busy[replica]:
            self.clock[replica] = max(self.clock[replica], arrival)
            waiting.append((index, num_cached))
            self._admit(replica)
        elif arrival < self.clock[replica]:  # the running step ends then
            waiting.append((index, num_cached))
        else:
            self.new[replica].append((index, num_cached))

    def advance(self, end: float) -> list[tuple[float, int]]:
        """Runs all steps that begin before `end`. Returns when a request ended, and its replica, for each that did."""
        ended: list[tuple[float, int]] = []
        while len(due := np.flatnonzero((self.clock < end) & (self.num_busy > 0))):
            self._step(due, ended)
        return ended

    def _step(self, due: npt.NDArray[np.int64], ended: list[tuple[float, int]]) -> None:
        busy, waits = self.request[due] >= 0, self.to_prefill[due]
        decodes = busy & (waits == 0)
        planned = self._planned(due, waits)
        context = (self.context[due] * decodes).sum(1)
        tokens = planned.sum(1)
        self.clock[due] += (
            self.device.constant + self.device.prompt_token * tokens + self.device.context_token * context
        )
        left = waits - planned
        self.to_prefill[due] = left
        first = (planned > 0) & (left == 0)
        samples = decodes | first
        self.context[due] += samples
        self.to_decode[due] -= samples
        for at, row in zip(*np.nonzero(first), strict=True):
            index = self.request[due[at], row]
            self.ttft[index] = self.clock[due[at]] - self.requests.arrivals[index]
        for at, row in zip(*np.nonzero(samples & (self.to_decode[due] == 0)), strict=True):
            replica = int(due[at])
            self.finished[self.request[replica, row]] = self.clock[replica]
            self.request[replica, row] = -1
            self.num_busy[replica] -= 1
            ended.append((float(self.clock[replica]), replica))
        for replica in due:
            self._admit(int(replica))
            if self.new[replica]:
                self.waiting[replica] += self.new[replica]
                self.new[replica].clear()
                if not self.num_busy[replica]:
                    self._admit(int(replica))

    def _planned(self, due: npt.NDArray[np.int64], waits: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
        """Returns the prompt tokens of each row in the step, the oldest requests first."""
        planned = waits.copy()
        for at in np.flatnonzero(waits.sum(1) > BUDGET):
            order = np.argsort(self.request[due[at]], kind="stable")
            before = np.cumsum(waits[at][order]) - waits[at][order]
            planned[at][order] = np.clip(BUDGET - before, 0, waits[at][order])
        return planned

    def _admit(self, replica: int) -> None:
        waiting = self.waiting[replica]
        if not waiting:
            return
        for row in np.flatnonzero(self.request[replica] < 0)[: len(waiting)]:
            index, num_cached = waiting.popleft()
            length = int(self.requests.prefix_lens[self.requests.prefixes[index]] + self.requests.suffix_lens[index])
            self.request[replica, row] = index
            self.to_prefill[replica, row] = length - num_cached
            self.context[replica, row] = length
            self.to_decode[replica, row] = self.requests.output_lens[index]
            self.num_busy[replica] += 1


def simulate_batched(
    requests: Requests, routing: Routing, num_replicas: int, capacity: int, block_size: int, device: Device
) -> Served:
    """Serves all requests. Those of one window are routed before the replicas take its steps.

    capacity: tokens that a replica's cache holds, in blocks of `block_size`.
    """
    replicas = BatchedReplicas(num_replicas, device, requests)
    caches = [CachedPrompts(capacity) for _ in range(num_replicas)]
    chosen, cached = np.zeros(len(requests), np.int64), np.zeros(len(requests), np.int64)
    index, now = 0, 0.0
    while index < len(requests) or replicas.num_busy.any():
        now += WINDOW
        while index < len(requests) and requests.arrivals[index] < now:
            prefix = int(requests.prefixes[index])
            shared = int(requests.prefix_lens[prefix]) // block_size * block_size
            own = int(requests.suffix_lens[index])
            hashes = [prefix << 16 | block for block in range(shared // BLOCK_SIZE)]
            hashes += [(1 << 62) + (index << 12) + block for block in range(own // BLOCK_SIZE)]
            replica = chosen[index] = routing.choose(hashes)
            cached[index] = shared if caches[replica].use(prefix, shared) else 0
            caches[replica].use(-1 - index, own + int(requests.output_lens[index]))
            replicas.add(int(replica), index, int(cached[index]))
            index += 1
        for _, replica in replicas.advance(now):
            routing.ended(replica)
    return Served(replicas.ttft, replicas.finished, chosen, cached)
