"""Router: chooses the replica of each request, by the prefix that it has cached and by the length of its queue.

    router = Router(num_replicas=4, capacity=100_000)
    route = router.choose(prefix_hashes(token_ids))
    ...
    router.ended(route.replica)

A queue is the number of unfinished requests. The router remembers, for each replica, the blocks of the prompts that it
has sent there, and forgets the least recently used ones beyond the replica's capacity. This index is an approximation:
it knows neither when blocks are computed nor what the replica evicts, and its blocks have a size of their own.

Sets of replicas are integers with a bit for each replica, so that a choice among a thousand takes microseconds.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from nanovllm.engine.batch import IntArray
from nanovllm.engine.block_manager import block_hash, tokens_of_blocks

BLOCK_SIZE = 64  # tokens
TOKENS_PER_REQUEST = 128  # cached tokens that make up for one more request in the queue
MAX_LEAD = 16  # requests that a queue may be longer than the shortest one because of a cached prefix
_MAX_BLOCKS = 512  # of a prompt that are looked up


@dataclass(frozen=True)
class Route:
    """Where a request goes. queue: the unfinished requests of the replica before this one."""

    replica: int
    num_cached_blocks: int
    queue: int


def prefix_hashes(token_ids: IntArray, salt: bytes = b"") -> list[int]:
    """Returns the hash of each block of a prompt that can be cached, made as those of the prefix cache are."""
    num_blocks = min((len(token_ids) - 1) // BLOCK_SIZE, _MAX_BLOCKS)
    hashes: list[int] = []
    parent = 0
    for tokens in tokens_of_blocks(token_ids, BLOCK_SIZE, 0, num_blocks, salt):
        parent = block_hash(tokens, parent)
        hashes.append(parent)
    return hashes


class Router:
    """Chooses among `num_replicas`, all available at first. capacity: tokens that a replica's cache holds.

    A request goes to the replica with the lowest cost: the length of its queue, minus one for each TOKENS_PER_REQUEST
    tokens of the prompt that it has cached, but at most MAX_LEAD. So a popular prefix cannot make a queue more than
    MAX_LEAD longer than the shortest one. Among equals, replicas take turns.
    """

    def __init__(self, num_replicas: int, capacity: int) -> None:
        self._num_replicas, self._capacity = num_replicas, capacity // BLOCK_SIZE
        self._queues = [0] * num_replicas
        self._by_queue: dict[int, int] = {0: (1 << num_replicas) - 1}  # replicas by the length of their queue
        self._available = (1 << num_replicas) - 1
        self._holders: dict[int, int] = {}  # replicas by the hash of a block that they have cached
        self._cached: list[OrderedDict[int, None]] = [OrderedDict() for _ in range(num_replicas)]  # oldest first
        self._turn = 0

    def choose(self, hashes: Sequence[int]) -> Route | None:
        """Chooses the replica of a request and adds it to its queue. Returns None if no replica is available.

        hashes: of the prompt's blocks; none: the shortest queue is chosen.
        """
        candidates, best = self._available, self._available
        if not candidates:
            return None
        lengths = sorted(self._by_queue)
        lowest, num_cached = self._shortest(candidates, lengths), 0
        for depth, key in enumerate(hashes, 1):
            candidates &= self._holders.get(key, 0)
            if not candidates:
                break
            cost = self._shortest(candidates, lengths) - min(depth * BLOCK_SIZE // TOKENS_PER_REQUEST, MAX_LEAD)
            if cost <= lowest:  # the longer prefix among equals
                lowest, num_cached, best = cost, depth, candidates
        queue = self._shortest(best, lengths)
        replica = self._in_turn(best & self._by_queue[queue])
        self._move(replica, queue + 1)
        self._remember(replica, hashes)
        return Route(replica, num_cached, queue)

    def ended(self, replica: int) -> None:
        """Removes a request from the queue of a replica."""
        self._move(replica, self._queues[replica] - 1)

    def queue(self, replica: int) -> int:
        """Returns the number of unfinished requests of a replica."""
        return self._queues[replica]

    def take_out(self, replica: int) -> None:
        """Sends no more requests to a replica, whose cache is lost. Its unfinished requests count until `ended`."""
        self._available &= ~(1 << replica)
        self.forget(replica)

    def put_back(self, replica: int) -> None:
        """Sends requests to a replica again."""
        self._available |= 1 << replica

    def forget(self, replica: int) -> None:
        """Forgets what a replica has cached."""
        while self._cached[replica]:
            self._evict(replica)

    def _shortest(self, replicas: int, lengths: Sequence[int]) -> int:
        """Returns the length of the shortest queue among `replicas`. lengths: of all queues, the shortest first."""
        return next(length for length in lengths if self._by_queue[length] & replicas)

    def _in_turn(self, replicas: int) -> int:
        """Returns the replica whose turn it is."""
        later = replicas >> self._turn << self._turn
        lowest_bit = (later or replicas) & -(later or replicas)
        replica = lowest_bit.bit_length() - 1
        self._turn = (replica + 1) % self._num_replicas
        return replica

    def _move(self, replica: int, length: int) -> None:
        """Changes the length of a queue."""
        bit, before = 1 << replica, self._queues[replica]
        self._by_queue[before] &= ~bit
        if not self._by_queue[before]:
            del self._by_queue[before]
        self._by_queue[length] = self._by_queue.get(length, 0) | bit
        self._queues[replica] = length

    def _remember(self, replica: int, hashes: Sequence[int]) -> None:
        """Counts the blocks as used now: the first one last, so that a prefix is forgotten after what continues it."""
        cached, bit = self._cached[replica], 1 << replica
        for key in reversed(hashes[: self._capacity]):
            if key in cached:
                cached.move_to_end(key)
            else:
                cached[key] = None
                self._holders[key] = self._holders.get(key, 0) | bit
        while len(cached) > self._capacity:
            self._evict(replica)

    def _evict(self, replica: int) -> None:
        key, _ = self._cached[replica].popitem(last=False)
        self._holders[key] &= ~(1 << replica)
        if not self._holders[key]:
            del self._holders[key]
