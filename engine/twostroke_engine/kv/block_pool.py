"""`BlockPool`: who holds which KV block, and which blocks can be hit again. Torch-free; it moves no bytes.

A block is always in exactly one of three states:

    free        no references, no hash; its content means nothing
    referenced  one reference or more; it has a hash once it is full, computed and published
    cached      no references, hash kept: hit by `match` + `acquire`, or evicted by `allocate`, least recently used
                first

Promises are capacity without names: a reservation may hold `num_promised` blocks long before it knows which. Growth and
admissions take from `num_available`, which promises are subtracted from, so a promise can always be bound.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from twostroke_engine.kv.hashing import BlockHash
from twostroke_engine.messages import BlockEvents


class OutOfBlocks(Exception):
    """Fewer blocks are available than were asked for; nothing was taken."""


class BlockPool:
    """References, hashes and promises of a fixed number of KV blocks."""

    def __init__(self, num_blocks: int) -> None:
        if num_blocks < 1:
            raise ValueError(f"num_blocks must be positive, not {num_blocks}")
        self.num_blocks = num_blocks
        self.num_promised = 0
        self._references = [0] * num_blocks
        self._hashes: list[BlockHash | None] = [None] * num_blocks
        self._by_hash: dict[BlockHash, int] = {}
        self._free = list(range(num_blocks - 1, -1, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()
        self._news: dict[BlockHash, bool] = {}

    @property
    def num_free(self) -> int:
        """Blocks neither referenced nor cached."""
        return len(self._free)

    @property
    def num_cached(self) -> int:
        """Unreferenced blocks whose content can still be hit."""
        return len(self._cached)

    @property
    def num_referenced(self) -> int:
        """Blocks that someone holds."""
        return self.num_blocks - self.num_free - self.num_cached

    @property
    def num_available(self) -> int:
        """Blocks that growth may take: free or evictable, and promised to no one."""
        return self.num_free + self.num_cached - self.num_promised

    def match(self, hashes: Sequence[BlockHash]) -> tuple[int, ...]:
        """Blocks of the longest leading run of known hashes; takes no reference."""
        found: list[int] = []
        for block_hash in hashes:
            block_id = self._by_hash.get(block_hash)
            if block_id is None:
                break
            found.append(block_id)
        return tuple(found)

    def num_unreferenced(self, block_ids: Sequence[int]) -> int:
        """How much `acquire` of these blocks takes from `num_available`: those that no one holds yet."""
        return len({block_id for block_id in block_ids if not self._references[block_id]})

    def acquire(self, block_ids: Sequence[int]) -> None:
        """Takes one reference to each block, which must be referenced or cached.

        Raises:
            OutOfBlocks: the cached ones among them are needed to keep promises; no reference was taken.
        """
        if self.num_unreferenced(block_ids) > self.num_available:
            raise OutOfBlocks(f"{len(block_ids)} hit blocks, {self.num_available} available")
        for block_id in block_ids:
            if not self._references[block_id]:
                del self._cached[block_id]
            self._references[block_id] += 1

    def allocate(self, num_blocks: int) -> tuple[int, ...]:
        """Blocks with meaningless content, referenced once; evicts the least recently used where none is free.

        Raises:
            OutOfBlocks: fewer are available; none was taken.
        """
        if num_blocks > self.num_available:
            raise OutOfBlocks(f"{num_blocks} blocks wanted, {self.num_available} available")
        taken = tuple(self._free.pop() if self._free else self._evict() for _ in range(num_blocks))
        for block_id in taken:
            self._references[block_id] = 1
        return taken

    def release(self, block_ids: Sequence[int]) -> None:
        """Drops one reference to each block; at zero it becomes cached if it has a hash, else free.

        Give the deepest block of a sequence first: eviction then takes tails before heads.
        """
        for block_id in block_ids:
            if not self._references[block_id]:
                raise ValueError(f"block {block_id} is released more often than it was taken")
            self._references[block_id] -= 1
            if self._references[block_id]:
                continue
            if self._hashes[block_id] is None:
                self._free.append(block_id)
            else:
                self._cached[block_id] = None

    def publish(self, block_id: int, block_hash: BlockHash) -> None:
        """Says that a referenced block is full and computed: from now on it can be hit under this hash.

        If another block has the hash already, this one stays anonymous: block tables are never rewritten.
        """
        if not self._references[block_id]:
            raise ValueError(f"block {block_id} is published but no one holds it")
        if block_hash in self._by_hash:
            return
        if self._hashes[block_id] is not None:
            raise ValueError(f"block {block_id} is published under a second hash")
        self._hashes[block_id] = block_hash
        self._by_hash[block_hash] = block_id
        self._note(block_hash, stored=True)

    def retract(self, block_ids: Sequence[int]) -> None:
        """Takes the hashes of referenced blocks away: their content turned out to be wrong, and is never hit again."""
        for block_id in block_ids:
            if not self._references[block_id]:
                raise ValueError(f"block {block_id} is retracted but no one holds it")
            self._forget_hash(block_id)

    def promise(self, num_blocks: int) -> bool:
        """Sets capacity aside; False, and nothing is promised, if less is available."""
        if num_blocks > self.num_available:
            return False
        self.num_promised += num_blocks
        return True

    def withdraw(self, num_blocks: int) -> None:
        """Gives a promise back; to bind it, `acquire` and `allocate` in the same breath."""
        if not 0 <= num_blocks <= self.num_promised:
            raise ValueError(f"{num_blocks} promised blocks are withdrawn, {self.num_promised} are promised")
        self.num_promised -= num_blocks

    def take_events(self) -> BlockEvents | None:
        """Net changes of what can be hit since the last call; None if there are none."""
        if not self._news:
            return None
        stored = tuple(block_hash for block_hash, is_stored in self._news.items() if is_stored)
        removed = tuple(block_hash for block_hash, is_stored in self._news.items() if not is_stored)
        self._news.clear()
        return BlockEvents(stored=stored, removed=removed)

    def check(self) -> None:
        """Raises AssertionError unless every block is in exactly one state and the books agree."""
        free, cached = set(self._free), set(self._cached)
        held = {block_id for block_id, count in enumerate(self._references) if count}
        assert len(free) == len(self._free), "a block is free twice"
        assert free.isdisjoint(cached), "a block is free and cached"
        assert held.isdisjoint(free | cached), "a block is referenced and free or cached"
        assert len(free) + len(cached) + len(held) == self.num_blocks, "a block is lost"
        assert min(self._references) >= 0, "a negative number of references"
        assert all(self._hashes[block_id] is None for block_id in free), "a free block has a hash"
        assert all(self._hashes[block_id] is not None for block_id in cached), "a cached block has no hash"
        named = {block_hash: block_id for block_id, block_hash in enumerate(self._hashes) if block_hash is not None}
        assert named == self._by_hash, "the index of hashes disagrees with the blocks"
        assert 0 <= self.num_promised <= len(free) + len(cached), "more is promised than there is"

    def _evict(self) -> int:
        block_id, _ = self._cached.popitem(last=False)
        self._forget_hash(block_id)
        return block_id

    def _forget_hash(self, block_id: int) -> None:
        block_hash, self._hashes[block_id] = self._hashes[block_id], None
        if block_hash is not None:
            del self._by_hash[block_hash]
            self._note(block_hash, stored=False)

    def _note(self, block_hash: BlockHash, stored: bool) -> None:
        """Keeps the net change: what comes and goes between two reports is no news."""
        if self._news.pop(block_hash, stored) == stored:
            self._news[block_hash] = stored
