"""Pages of the KV cache: a model of the cache decides what must be shared, and nothing else ever is."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from nanovllm.engine import block_manager
from nanovllm.engine.block_manager import BlockManager, BlockTable
from tests.properties import examples


def ids(*token_ids: int) -> np.ndarray:
    return np.array(token_ids, dtype=np.int32)


@dataclass
class Caller:
    seq_id: int
    request_id: str = ""

    def __post_init__(self) -> None:
        self.request_id = f"request-{self.seq_id}"


@dataclass(eq=False)
class Entry:
    """What the model knows of a shareable block."""

    block: int
    prefix: tuple[int, ...]
    parent: Entry | None


@dataclass(eq=False)
class Owner:
    tokens: list[int]
    table: BlockTable
    last: Entry | None
    num_registered: int


@dataclass
class CacheModel:
    """The cache as it should be, by whole prefixes: no hashes, no counts."""

    num_blocks: int
    block_size: int
    owners: dict[int, Owner] = field(default_factory=dict)
    entries: dict[tuple[int, ...], Entry] = field(default_factory=dict)
    free: set[int] = field(default_factory=set)
    evictable: list[int] = field(default_factory=list)  # oldest first
    written: dict[int, tuple[int, ...]] = field(default_factory=dict)  # block → the prefix that its content ends

    def num_free(self) -> int:
        return self.num_blocks - len({block for owner in self.owners.values() for block in owner.table.blocks})

    def prefix(self, tokens: list[int], index: int) -> tuple[int, ...]:
        return tuple(tokens[: (index + 1) * self.block_size])

    def hits(self, tokens: list[int]) -> list[Entry]:
        found: list[Entry] = []
        for index in range((len(tokens) - 1) // self.block_size):
            entry = self.entries.get(self.prefix(tokens, index))
            if entry is None or entry.parent is not (found[-1] if found else None):
                break
            found.append(entry)
        return found

    def hand_out(self, block: int) -> None:
        self.written.pop(block, None)
        if self.free:
            self.free.remove(block)  # a prefix is evicted only when no other block is left
            return
        assert block == self.evictable.pop(0), "not the least recently used prefix was evicted"
        self.entries = {prefix: entry for prefix, entry in self.entries.items() if entry.block != block}

    def register(self, owner: Owner, end: int) -> None:
        for index in range(owner.num_registered, end // self.block_size):
            prefix = self.prefix(owner.tokens, index)
            self.written[owner.table.blocks[index]] = prefix
            entry = self.entries.get(prefix)
            if entry is None or entry.parent is not owner.last:  # its parent was evicted: nobody could reach it
                if entry is not None and entry.block in self.evictable:
                    self.evictable.remove(entry.block)
                    self.free.add(entry.block)
                entry = self.entries[prefix] = Entry(owner.table.blocks[index], prefix, owner.last)
            owner.last, owner.num_registered = entry, index + 1

    def release(self, seq_id: int) -> int:
        owner = self.owners.pop(seq_id)
        others = {block for other in self.owners.values() for block in other.table.blocks}
        freed = [block for block in reversed(owner.table.blocks) if block not in others]
        shareable = {entry.block for entry in self.entries.values()}
        self.evictable += [block for block in freed if block in shareable]
        self.free.update(block for block in freed if block not in shareable)
        return len(freed)


class BlockManagerMachine(RuleBasedStateMachine):
    """Random life of a cache with the integrity check after every rule."""

    exact = True  # the hash tells all prefixes apart, so that the model knows every hit

    @initialize(num_blocks=st.integers(1, 10), block_size=st.integers(1, 3), caching=st.booleans())
    def start(self, num_blocks: int, block_size: int, caching: bool) -> None:
        self.manager = BlockManager(num_blocks, block_size, enable_prefix_caching=caching)
        self.model = CacheModel(num_blocks, block_size, free=set(range(num_blocks)))
        self.caching = caching
        self.next_id = 0

    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=12))
    def allocate(self, tokens: list[int]) -> None:
        model = self.model
        expected = model.hits(tokens) if self.caching else []
        num_blocks = -(-len(tokens) // model.block_size)
        revived = sum(entry.block in model.evictable for entry in expected)
        fits = num_blocks - len(expected) <= model.num_free() - revived
        before = self.manager.num_free_blocks
        table = self.manager.allocate(Caller(self.next_id), 7, ids(*tokens))
        if table is None:
            assert not fits or not self.exact
            assert self.manager.num_free_blocks == before
            return
        assert fits or not self.exact
        assert len(table.blocks) == num_blocks
        assert table.num_registered * model.block_size < len(tokens), "no token is left to compute"
        shared = table.blocks[: table.num_registered]
        for index, block in enumerate(shared):
            assert model.written[block] == model.prefix(tokens, index), "a shared block holds another prefix"
        if self.exact:
            assert shared == [entry.block for entry in expected]
            model.evictable = [block for block in model.evictable if block not in shared]
            for block in table.blocks[len(shared) :]:
                model.hand_out(block)
        else:
            for block in table.blocks[len(shared) :]:
                model.written.pop(block, None)
        owner = Owner(tokens, table, expected[-1] if expected else None, table.num_registered)
        model.owners[self.next_id] = owner
        self.next_id += 1

    @precondition(lambda self: self.model.owners and self.manager.num_free_blocks)
    @rule(data=st.data())
    def append_block(self, data: st.DataObject) -> None:
        owner = self.model.owners[data.draw(st.sampled_from(sorted(self.model.owners)))]
        block = self.manager.append_block(owner.table)
        assert owner.table.blocks[-1] == block
        if self.exact:
            self.model.hand_out(block)
        else:
            self.model.written.pop(block, None)

    @precondition(lambda self: self.model.owners)
    @rule(data=st.data(), more=st.lists(st.integers(0, 1), max_size=4))
    def compute(self, data: st.DataObject, more: list[int]) -> None:
        """A sequence grows into the blocks it has, and what is computed of it becomes shareable."""
        owner = self.model.owners[data.draw(st.sampled_from(sorted(self.model.owners)))]
        room = len(owner.table.blocks) * self.model.block_size - len(owner.tokens)
        owner.tokens += more[:room]
        end = data.draw(st.integers(1, len(owner.tokens)))
        self.manager.register(owner.table, ids(*owner.tokens[:end]))
        if self.exact and self.caching:
            self.model.register(owner, end)
            assert owner.table.num_registered == owner.num_registered
        for index in range(end // self.model.block_size):
            self.model.written[owner.table.blocks[index]] = self.model.prefix(owner.tokens, index)

    @precondition(lambda self: self.model.owners)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        seq_id = data.draw(st.sampled_from(sorted(self.model.owners)))
        table = self.model.owners[seq_id].table
        releasable = self.manager.num_releasable(table)
        assert self.manager.release(Caller(seq_id), 8, table) == releasable == self.model.release(seq_id)

    @rule()
    def reset(self) -> None:
        self.manager.reset_prefix_cache()
        self.model.entries.clear()
        self.model.free.update(self.model.evictable)
        self.model.evictable.clear()

    @invariant()
    def integrity(self) -> None:
        if not hasattr(self, "manager"):
            return
        self.manager.check_integrity(owner.table for owner in self.model.owners.values())
        assert self.manager.num_free_blocks == self.model.num_free()
        assert self.manager.num_used_blocks == self.model.num_blocks - self.model.num_free()


class WeakHashMachine(BlockManagerMachine):
    """The same with a hash of three values, which tells almost nothing apart: fewer hits, never a wrong one."""

    exact = False

    def __init__(self) -> None:
        super().__init__()
        self.weak = patch.object(block_manager.xxhash, "xxh3_64_intdigest", lambda data, seed=0: (sum(data) + seed) % 3)
        self.weak.start()

    def teardown(self) -> None:
        self.weak.stop()


_SETTINGS = settings(max_examples=examples(200), stateful_step_count=40, deadline=None)
TestAgainstTheModel = BlockManagerMachine.TestCase
TestAgainstTheModel.settings = _SETTINGS
TestWeakHash = WeakHashMachine.TestCase
TestWeakHash.settings = _SETTINGS


def hold(manager: BlockManager, seq_id: int, *tokens: int) -> BlockTable:
    """Allocates for `tokens` and registers them as computed."""
    table = manager.allocate(Caller(seq_id), 7, ids(*tokens))
    assert table is not None
    manager.register(table, ids(*tokens))
    return table


def num_hits(manager: BlockManager, *tokens: int) -> int:
    """Blocks that a new sequence would share."""
    table = manager.allocate(Caller(99), 7, ids(*tokens))
    assert table is not None
    manager.release(Caller(99), 8, table)
    return table.num_registered


def num_cached(manager: BlockManager, *prefix: int) -> int:
    """Blocks of `prefix` in the cache, without counting as a use of them."""
    return len(manager._match(ids(*prefix, 0), b""))


@pytest.fixture(params=["constant", "blind to the parent"])
def bad_hash(request: pytest.FixtureRequest) -> Iterator[None]:
    functions: dict[str, Callable[..., int]] = {
        "constant": lambda data, seed=0: 0,
        "blind to the parent": lambda data, seed=0: sum(data),
    }
    with patch.object(block_manager.xxhash, "xxh3_64_intdigest", functions[request.param]):
        yield


@pytest.mark.usefixtures("bad_hash")
def test_equal_tokens_under_another_parent_are_not_shared() -> None:
    manager = BlockManager(16, 2)
    hold(manager, 0, 1, 2, 9, 9, 5)
    assert num_hits(manager, 9, 9, 5) == 0  # the second block's tokens, at the start
    hold(manager, 1, 3, 4, 7, 7, 5)
    assert num_hits(manager, 3, 4, 9, 9, 5) <= 1  # its own first block, then the other prompt's second


@pytest.mark.usefixtures("bad_hash")
def test_a_collision_gives_the_place_to_the_newer_block_and_loses_none() -> None:
    manager = BlockManager(2, 2)
    tables = [hold(manager, seq_id, first, second) for seq_id, (first, second) in enumerate([(1, 2), (2, 1)])]
    manager.check_integrity(tables)
    for seq_id, table in enumerate(tables):
        manager.release(Caller(seq_id), 8, table)
    manager.check_integrity([])
    assert manager.num_free_blocks == 2
    assert num_hits(manager, 2, 1, 0) == 1
    assert num_hits(manager, 1, 2, 0) == 0


def test_a_full_prefix_hit_leaves_the_last_block_to_compute() -> None:
    manager = BlockManager(16, 4)
    hold(manager, 0, *range(8))
    assert num_hits(manager, *range(8)) == 1
    assert num_hits(manager, *range(9)) == 2


def test_oldest_is_evicted_first_and_tails_before_heads() -> None:
    manager = BlockManager(6, 1)
    first, second = hold(manager, 0, 10, 11, 12), hold(manager, 1, 20, 21, 22)
    manager.release(Caller(1), 8, second)
    manager.release(Caller(0), 8, first)
    taken = BlockTable()
    for cached, prompt in [(2, (20, 21, 22)), (1, (20, 21)), (0, (20,))]:
        manager.append_block(taken)
        assert manager.num_used_blocks == len(taken.blocks)
        assert num_cached(manager, *prompt) == cached
        assert num_cached(manager, 10, 11, 12) == 3
    manager.append_block(taken)
    assert num_cached(manager, 10, 11, 12) == 2


def test_a_prefix_can_be_shared_again_after_its_head_was_evicted() -> None:
    manager = BlockManager(4, 1)
    first, second = manager.allocate(Caller(0), 7, ids(1)), manager.allocate(Caller(1), 7, ids(1, 2))
    assert first is not None
    assert second is not None
    manager.register(first, ids(1))
    manager.register(second, ids(1, 2))  # its own first block is a double: the second hangs below the first's
    manager.release(Caller(0), 8, first)
    filler = BlockTable()
    manager.append_block(filler)
    manager.append_block(filler)
    assert num_cached(manager, 1, 2) == 0
    manager.release(Caller(2), 8, filler)
    hold(manager, 3, 1, 2)
    assert num_cached(manager, 1, 2) == 2


def test_a_hit_makes_a_prefix_young_again() -> None:
    manager = BlockManager(4, 1)
    for seq_id, token in enumerate((1, 2)):
        manager.release(Caller(seq_id), 8, hold(manager, seq_id, token))
    assert num_hits(manager, 1, 0) == 1
    taken = BlockTable()
    manager.append_block(taken)
    manager.append_block(taken)  # neither holds a prefix
    manager.append_block(taken)
    assert num_cached(manager, 2) == 0
    assert num_cached(manager, 1) == 1


def test_without_prefix_caching_nothing_is_shared() -> None:
    manager = BlockManager(8, 2, enable_prefix_caching=False)
    hold(manager, 0, 1, 2, 3, 4)
    assert num_hits(manager, 1, 2, 3, 4, 5) == 0


def test_reset_forgets_prefixes_and_keeps_blocks_in_use() -> None:
    manager = BlockManager(8, 2)
    running, ended = hold(manager, 0, 1, 2, 3), hold(manager, 1, 5, 6, 7)
    manager.release(Caller(1), 8, ended)
    manager.reset_prefix_cache()
    manager.check_integrity([running])
    assert manager.num_used_blocks == 2
    assert num_hits(manager, 1, 2, 3) == num_hits(manager, 5, 6, 7) == 0


def test_the_salt_separates_models() -> None:
    hashes = set()
    for salt in ("qwen3|bfloat16", "qwen3|float16", ""):
        entry = hold(BlockManager(4, 2, salt=salt), 0, 1, 2).last_registered
        assert entry is not None
        hashes.add(entry.prefix_hash)
    assert len(hashes) == 3


def test_the_integrity_check_sees_each_kind_of_damage() -> None:
    def damaged(damage: Callable[[BlockManager, BlockTable], object]) -> None:
        manager = BlockManager(4, 2)
        manager.release(Caller(0), 8, hold(manager, 0, 1, 2, 3))
        table = hold(manager, 1, 4, 5, 6)
        manager.check_integrity([table])
        damage(manager, table)
        with pytest.raises(AssertionError):
            manager.check_integrity([table])

    damaged(lambda manager, table: table.blocks.pop())  # leaked
    damaged(lambda manager, table: table.blocks.append(table.blocks[0]))  # owned twice
    damaged(lambda manager, table: manager._free.append(table.blocks[0]))  # owned and free
    damaged(lambda manager, table: manager._free.append(manager._free[0]))  # free twice
    damaged(lambda manager, table: manager._free.pop())  # in no state
    damaged(lambda manager, table: manager._evictable.clear())
    damaged(lambda manager, table: manager._by_block.clear())
    damaged(lambda manager, table: manager._by_hash.clear())


def test_lines(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, logger="nanovllm.engine.block_manager")
    manager = BlockManager(8, 2)
    hold(manager, 0, 1, 2, 3)
    table = hold(manager, 1, 1, 2, 4, 5, 6)
    assert manager.allocate(Caller(2), 7, ids(*range(20))) is None  # says nothing: nothing happened
    manager.release(Caller(1), 8, table)
    assert caplog.messages == [
        "Allocating blocks for seq_id=0, num_blocks=2",
        "Allocated blocks for seq_id=0: new=2, cache_hits=0, free_blocks=6, used_blocks=2",
        "Allocating blocks for seq_id=1, num_blocks=3",
        "Allocated blocks for seq_id=1: new=2, cache_hits=1, free_blocks=4, used_blocks=4",
        "Deallocated blocks for seq_id=1: freed=2/3, free_blocks=6",
    ]
    assert [record.event for record in caplog.records] == [
        *["blocks.allocating", "blocks.allocated"] * 2,
        "blocks.freed",
    ]
    who = {"seq_id": 1, "request_id": "request-1"}
    allocated = {"new": 2, "cache_hits": 1, "free_blocks": 4, "used_blocks": 4}
    assert [record.fields for record in caplog.records[2:]] == [
        {**who, "step": 7, "num_blocks": 3},
        {**who, "step": 7, **allocated},
        {**who, "step": 8, "freed": 2, "total": 3, "free_blocks": 6},
    ]


def test_only_tables_with_the_same_salt_share_blocks() -> None:
    manager, tokens = BlockManager(num_blocks=16, block_size=2), ids(1, 2, 3, 4, 5)

    def num_shared(salt: bytes) -> int:
        table = manager.allocate(Caller(0), 7, tokens, salt=salt)
        assert table is not None
        manager.register(table, tokens)
        return sum(manager._reference_counts[block] > 1 for block in table.blocks)

    assert [num_shared(salt) for salt in (b"", b"a", b"b", b"a", b"", b"ab")] == [0, 0, 0, 2, 2, 0]
