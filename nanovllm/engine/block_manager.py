"""BlockManager: which sequences own which blocks of the KV cache, and which blocks hold a prefix that can be shared.

A block is in exactly one of three states:

    owned      reference count ≥ 1: in the block tables of that many sequences
    evictable  reference count 0, still registered under its prefix; the least recently released is reused first
    free       reference count 0, holds nothing

A full block is registered under a hash of its tokens and its parent's hash, so the hash depends on the whole prefix. A
hash alone is never trusted: a hit must also have the same tokens and the same parent block. By induction, the whole
prefix is then equal.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

import xxhash

from nanovllm.engine.batch import IntArray
from nanovllm.logs import events
from nanovllm.utils.logger import setup_logger

logger = setup_logger(__name__)

block_hash = xxhash.xxh3_64_intdigest  # of a block's tokens and, as its seed, of all blocks before


class BlockOwner(Protocol):
    """The sequence that blocks belong to, as log records name it."""

    seq_id: int
    request_id: str


@dataclass(frozen=True, eq=False)
class CachedBlock:
    """A registered block. Compared by identity, since an equal one may have replaced a parent."""

    block: int
    prefix_hash: int
    tokens: bytes  # after the salt in the first block of a prefix
    parent: CachedBlock | None


@dataclass(eq=False)
class BlockTable:
    """A sequence's blocks, in order. Each of the first `num_registered` is registered, or equals a registered one.

    salt: only tables with the same one share blocks.
    """

    blocks: list[int] = field(default_factory=list)
    num_registered: int = 0
    last_registered: CachedBlock | None = None
    salt: bytes = b""


class BlockManager:
    """Allocates blocks of `block_size` tokens, counts references to them, and shares prefixes.

    salt: everything besides the tokens that keys and values depend on, such as model and dtype.
    """

    def __init__(self, num_blocks: int, block_size: int, *, enable_prefix_caching: bool = True, salt: str = "") -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        self._root_hash = xxhash.xxh3_64_intdigest(salt.encode())
        self._reference_counts = [0] * num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))  # a stack: low numbers first
        self._evictable: OrderedDict[int, None] = OrderedDict()  # oldest first
        self._by_hash: dict[int, CachedBlock] = {}
        self._by_block: dict[int, CachedBlock] = {}

    @property
    def num_free_blocks(self) -> int:
        """Number of blocks that can be allocated now, evictable ones included."""
        return len(self._free) + len(self._evictable)

    @property
    def num_used_blocks(self) -> int:
        return self.num_blocks - self.num_free_blocks

    def blocks_for(self, num_tokens: int) -> int:
        """Returns the number of blocks that hold `num_tokens` tokens."""
        return -(-num_tokens // self.block_size)

    def allocate(
        self,
        owner: BlockOwner,
        step: int,
        token_ids: IntArray,
        *,
        salt: bytes = b"",
        share: bool = True,
        keep_free: int = 0,
    ) -> BlockTable | None:
        """Returns blocks for all of `token_ids`, or None when fewer than `keep_free` would be free after that.

        The longest registered prefix is shared: its blocks are the first `num_registered` of the table. The last token
        is never part of it, since a step computes logits only for tokens that it runs. step: the one that is planned,
        for the log. salt: that of the table. share: False shares nothing.
        """
        shared = self._match(token_ids, salt) if share else []
        num_blocks = self.blocks_for(len(token_ids))
        num_new = num_blocks - len(shared)
        revived = sum(cached.block in self._evictable for cached in shared) if self._evictable else 0
        if num_new > self.num_free_blocks - revived - keep_free:
            return None
        who: dict[str, Any] = {"seq_id": owner.seq_id, "request_id": owner.request_id, "step": step}
        events.blocks_allocating.log(logger, **who, num_blocks=num_blocks)
        table = BlockTable([cached.block for cached in shared], len(shared), shared[-1] if shared else None, salt)
        for block in table.blocks:
            self._reference_counts[block] += 1
            if revived:
                self._evictable.pop(block, None)
        for _ in range(num_new):
            self.append_block(table)
        free, used = self.num_free_blocks, self.num_used_blocks
        events.blocks_allocated.log(
            logger, **who, new=num_new, cache_hits=len(shared), free_blocks=free, used_blocks=used
        )
        return table

    def append_block(self, table: BlockTable) -> int:
        """Appends a block to `table` and returns it. The caller has checked `num_free_blocks`."""
        if self._free:
            block = self._free.pop()
        else:
            block, _ = self._evictable.popitem(last=False)
            self._forget(self._by_block[block])
        self._reference_counts[block] = 1
        table.blocks.append(block)
        return block

    def register(self, table: BlockTable, token_ids: IntArray) -> None:
        """Makes the full blocks of `token_ids` shareable.

        Call it once the step that writes them is scheduled. Steps run in order, and within a step each layer stores all
        keys and values before attention reads any, so a sequence that shares a block finds it written.
        """
        if not self.enable_prefix_caching:
            return
        first, end = table.num_registered, len(token_ids) // self.block_size
        for index, tokens in enumerate(tokens_of_blocks(token_ids, self.block_size, first, end, table.salt), first):
            parent = table.last_registered
            prefix_hash = block_hash(tokens, self._root_hash if parent is None else parent.prefix_hash)
            known = self._by_hash.get(prefix_hash)
            if known is None or known.tokens != tokens or known.parent is not parent:
                if known is not None:  # a hash collision, or a block that no prefix reaches since its parent is gone
                    self._forget(known)
                    if known.block in self._evictable:
                        del self._evictable[known.block]
                        self._free.append(known.block)
                known = CachedBlock(table.blocks[index], prefix_hash, tokens, parent)
                self._by_hash[prefix_hash] = known
                self._by_block[known.block] = known
            table.last_registered = known
            table.num_registered = index + 1

    def release(self, owner: BlockOwner, step: int, table: BlockTable) -> int:
        """Releases the blocks of `table`. Returns how many of them no sequence owns any more.

        step: the one that is planned, or was collected last, for the log.
        The last block is released first, so that a prefix is evicted after its continuations.
        """
        freed = 0
        for block in reversed(table.blocks):
            self._reference_counts[block] -= 1
            if self._reference_counts[block] == 0:
                freed += 1
                if block in self._by_block:
                    self._evictable[block] = None
                else:
                    self._free.append(block)
        total, free = len(table.blocks), self.num_free_blocks
        who: dict[str, Any] = {"seq_id": owner.seq_id, "request_id": owner.request_id, "step": step}
        events.blocks_freed.log(logger, **who, freed=freed, total=total, free_blocks=free)
        return freed

    def num_releasable(self, table: BlockTable) -> int:
        """Returns how many blocks of `table` have no other owner, which is what `release` would return."""
        return sum(self._reference_counts[block] == 1 for block in table.blocks)

    def reset_prefix_cache(self) -> None:
        """Forgets every prefix. Blocks in use stay with their owners but are not shared with further sequences."""
        self._by_hash.clear()
        self._by_block.clear()
        self._free.extend(self._evictable)
        self._evictable.clear()

    def check_integrity(self, tables: Iterable[BlockTable]) -> None:
        """Raises AssertionError unless every block is in exactly one state and has a reference per owner."""
        counts = [0] * self.num_blocks
        for table in tables:
            assert len(set(table.blocks)) == len(table.blocks), f"a block twice in one table: {table.blocks}"
            for block in table.blocks:
                counts[block] += 1
        assert counts == self._reference_counts, "reference counts differ from the block tables"
        free, evictable = set(self._free), set(self._evictable)
        assert len(free) == len(self._free), "a block is free twice"
        assert not free & evictable, "a block is free and evictable"
        owned = {block for block, count in enumerate(counts) if count}
        assert free | evictable | owned == set(range(self.num_blocks)), "a block is leaked"
        assert not owned & (free | evictable), "a block is owned and free"
        assert evictable <= set(self._by_block), "an evictable block is not registered"
        assert not free & set(self._by_block), "a free block is registered"
        by_block = {cached.block: cached for cached in self._by_hash.values()}
        assert by_block == self._by_block, "the two indices of registered blocks differ"

    def _match(self, token_ids: IntArray, salt: bytes) -> list[CachedBlock]:
        """Returns the registered blocks of the longest prefix of `token_ids`, the last token excluded."""
        if not self.enable_prefix_caching:
            return []
        shared: list[CachedBlock] = []
        parent: CachedBlock | None = None
        for tokens in tokens_of_blocks(token_ids, self.block_size, 0, (len(token_ids) - 1) // self.block_size, salt):
            cached = self._by_hash.get(block_hash(tokens, self._root_hash if parent is None else parent.prefix_hash))
            if cached is None or cached.tokens != tokens or cached.parent is not parent:
                break
            shared.append(cached)
            parent = cached
        return shared

    def _forget(self, cached: CachedBlock) -> None:
        del self._by_hash[cached.prefix_hash]
        del self._by_block[cached.block]


def tokens_of_blocks(token_ids: IntArray, block_size: int, first: int, end: int, salt: bytes) -> list[bytes]:
    """Returns the tokens of blocks `first` to before `end`, as bytes; block 0 begins with the salt."""
    tokens = token_ids[first * block_size : end * block_size].tobytes()
    size = block_size * token_ids.itemsize
    blocks = [tokens[start : start + size] for start in range(0, len(tokens), size)]
    if salt and blocks and not first:
        blocks[0] = salt + blocks[0]
    return blocks
