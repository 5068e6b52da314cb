"""Router: the choice is within its bounds in every history, and what it remembers stays bounded."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanovllm.data_parallel.router import BLOCK_SIZE, MAX_LEAD, TOKENS_PER_REQUEST, Router, prefix_hashes
from tests.properties import examples

PROMPTS = [[family * 1000 + block for block in range(length)] for family in range(4) for length in (0, 1, 9, 40, 90)]

ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("choose"), st.sampled_from(PROMPTS)),
        st.tuples(st.just("end"), st.integers(0, 10_000)),
        st.tuples(st.sampled_from(["take_out", "put_back", "forget"]), st.integers(0, 6)),
    ),
    max_size=120,
)


@settings(max_examples=examples(400), deadline=None)
@given(ACTIONS, st.integers(1, 7), st.sampled_from([1, 30, 1000]))
def test_every_choice_is_within_the_bounds(
    actions: list[tuple[str, list[int] | int]], num_replicas: int, capacity: int
) -> None:
    """Against a model of queues and of everything that was ever sent to a replica."""
    router = Router(num_replicas, capacity * BLOCK_SIZE)
    queues, available = [0] * num_replicas, set(range(num_replicas))
    sent: list[set[int]] = [set() for _ in range(num_replicas)]
    running: list[int] = []
    for action, value in actions:
        if isinstance(value, list):
            route = router.choose(value)
            if not available:
                assert route is None
                continue
            assert route is not None
            assert route.replica in available
            assert route.queue == queues[route.replica]
            assert set(value[: route.num_cached_blocks]) <= sent[route.replica]
            lead = route.queue - min(queues[replica] for replica in available)
            assert lead <= min(route.num_cached_blocks * BLOCK_SIZE // TOKENS_PER_REQUEST, MAX_LEAD)
            queues[route.replica] += 1
            sent[route.replica].update(value)
            running.append(route.replica)
        elif action == "end" and running:
            replica = running.pop(value % len(running))
            router.ended(replica)
            queues[replica] -= 1
        elif action != "end" and value < num_replicas:
            getattr(router, action)(value)
            available = available | {value} if action == "put_back" else available
            available = available - {value} if action == "take_out" else available
            sent[value] = sent[value] if action == "put_back" else set()
        assert [router.queue(replica) for replica in range(num_replicas)] == queues
        assert all(len(cached) <= capacity for cached in router._cached)
        assert sum(map(len, router._cached)) == sum(mask.bit_count() for mask in router._holders.values())
        assert all(router._holders.values())


def test_an_idle_replica_with_the_prefix_is_chosen() -> None:
    router = Router(8, 1000 * BLOCK_SIZE)
    first = router.choose(PROMPTS[3])
    assert first is not None
    router.ended(first.replica)
    for _ in range(5):
        route = router.choose(PROMPTS[3])
        assert route is not None
        assert (route.replica, route.num_cached_blocks) == (first.replica, 40)
        router.ended(route.replica)


def test_the_longest_of_several_prefixes_is_chosen() -> None:
    router = Router(3, 1000 * BLOCK_SIZE)
    for replica, blocks in enumerate(([1, 2], [1, 2, 3, 4], [1])):
        router._remember(replica, blocks)
    route = router.choose([1, 2, 3, 4, 5])
    assert route is not None
    assert (route.replica, route.num_cached_blocks) == (1, 4)


@pytest.mark.parametrize("num_replicas", [2, 5, 64])
def test_a_popular_prefix_fills_all_replicas(num_replicas: int) -> None:
    router = Router(num_replicas, 1000 * BLOCK_SIZE)
    for _ in range(40 * num_replicas):
        assert router.choose(PROMPTS[4]) is not None
    queues = [router.queue(replica) for replica in range(num_replicas)]
    assert max(queues) - min(queues) <= MAX_LEAD + 1


def test_without_a_prefix_replicas_take_turns() -> None:
    router = Router(3, 1000 * BLOCK_SIZE)
    routes = [router.choose([]) for _ in range(6)]
    assert [route.replica for route in routes if route is not None] == [0, 1, 2, 0, 1, 2]


def test_a_replica_that_was_taken_out_has_no_cache_when_it_is_back() -> None:
    router = Router(2, 1000 * BLOCK_SIZE)
    assert router.choose(PROMPTS[3]) is not None
    router.take_out(0)
    router.ended(0)
    router.put_back(0)
    route = router.choose(PROMPTS[3])
    assert route is not None
    assert route.num_cached_blocks == 0


def test_hashes_are_those_of_whole_blocks_and_depend_on_salt_and_prefix() -> None:
    tokens = np.arange(2 * BLOCK_SIZE + 1, dtype=np.int32)
    hashes = prefix_hashes(tokens)
    assert len(hashes) == 2
    assert len(prefix_hashes(tokens[:-1])) == 1, "the last token is always computed"
    assert prefix_hashes(tokens[: BLOCK_SIZE + 4]) == hashes[:1]
    assert not set(hashes) & set(prefix_hashes(tokens, b"salt"))
    assert prefix_hashes(np.concatenate([tokens[BLOCK_SIZE:], tokens]))[:1] != hashes[1:]
    assert prefix_hashes(tokens[:0]) == prefix_hashes(tokens[:1]) == []
