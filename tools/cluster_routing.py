"""Three ways to choose the replica of a request, for tools/simulate_cluster.py."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from nanovllm.data_parallel.router import Router

POLICIES = ("random", "shortest queue", "prefix")


class Routing(Protocol):
    """Chooses a replica for each request, and is told when the request has ended."""

    def choose(self, hashes: Sequence[int]) -> int: ...

    def ended(self, replica: int) -> None: ...


class RandomRouting:
    """Any replica."""

    def __init__(self, num_replicas: int, seed: int = 0) -> None:
        self._num_replicas, self._rng = num_replicas, np.random.default_rng(seed)

    def choose(self, hashes: Sequence[int]) -> int:
        return int(self._rng.integers(self._num_replicas))

    def ended(self, replica: int) -> None:
        pass


class QueueRouting:
    """The server's router. uses_prefixes: False shows it no prefix, so that it chooses the shortest queue."""

    def __init__(self, router: Router, uses_prefixes: bool) -> None:
        self._router, self._uses_prefixes = router, uses_prefixes
        self.seconds, self.num_choices = 0.0, 0  # of computing time

    def choose(self, hashes: Sequence[int]) -> int:
        begun = time.thread_time()
        route = self._router.choose(hashes if self._uses_prefixes else ())
        self.seconds, self.num_choices = self.seconds + time.thread_time() - begun, self.num_choices + 1
        assert route is not None, "every replica is available"
        return route.replica

    def ended(self, replica: int) -> None:
        self._router.ended(replica)


def make_routing(policy: str, num_replicas: int, capacity: int) -> RandomRouting | QueueRouting:
    """capacity: tokens that a replica's cache holds."""
    if policy == "random":
        return RandomRouting(num_replicas)
    return QueueRouting(Router(num_replicas, capacity), uses_prefixes=policy == "prefix")
