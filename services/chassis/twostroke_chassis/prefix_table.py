"""`PrefixTable`: which workers hold which blocks, compact enough for tens of millions of blocks.

A block is known by 64 bits of its hash. A table of ten million then takes one block in about 10^12 for another, which
costs a placement some time, never a wrong byte. Beside each key stands the number of a *holder set*, a set of workers:
most blocks share a few sets, so each is kept once, as the bits of an integer.

Keys lie in buckets of eight slots. A key may be in either of two buckets and goes to the emptier one ("balanced
allocations": Azar, Broder, Karlin, Upfal, 1999), so that buckets fill evenly to more than nine tenths.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

Keys = npt.NDArray[np.uint64]
Depths = npt.NDArray[np.int32]
_Places = npt.NDArray[np.int64]

HASH_BYTES = 16

_SLOTS = 8
_MIN_BUCKETS = 128
_MAX_FILL = 0.8
_NOBODY = 0
_MIX = np.uint64(0x9E3779B97F4A7C15)
_HALF = np.uint64(32)


def keys_of(hashes: Sequence[bytes]) -> Keys:
    """Keys of block hashes of `HASH_BYTES` bytes, shape [blocks]: the first half of each."""
    return np.frombuffer(b"".join(hashes), dtype=np.uint64)[::2]


class _HolderSets:
    """Sets of workers by number; number 0 is the empty set. A set lives while a slot names it."""

    def __init__(self) -> None:
        self.bits = [0]
        self._numbers = {0: _NOBODY}
        self._uses = [0]
        self._unused: list[int] = []

    def number(self, bits: int) -> int:
        """The number of a set; a new one has no uses yet."""
        number = self._numbers.get(bits)
        if number is None:
            number = self._unused.pop() if self._unused else self._another()
            self.bits[number] = bits
            self._numbers[bits] = number
        return number

    def _another(self) -> int:
        self.bits.append(0)
        self._uses.append(0)
        return len(self.bits) - 1

    def used(self, number: int, more: int) -> None:
        """`more` slots name it, or fewer if negative; the last one to go ends it."""
        self._uses[number] += more
        if self._uses[number] == 0 and number != _NOBODY:
            del self._numbers[self.bits[number]]
            self.bits[number] = 0
            self._unused.append(number)


class PrefixTable:
    """Blocks and their holders. Workers are small numbers, which the caller gives out and uses again."""

    def __init__(self) -> None:
        self._sets = _HolderSets()
        self._num_blocks = 0
        self._allocate(_MIN_BUCKETS)

    def __len__(self) -> int:
        """Blocks that somebody holds."""
        return self._num_blocks

    @property
    def num_bytes(self) -> int:
        """Memory of keys and holders."""
        return self._keys.nbytes + self._holders.nbytes

    def num_held(self, worker: int) -> int:
        """Blocks that a worker holds; as slow as `forget`."""
        return len(self._slots_of(worker))

    def reserve(self, num_blocks: int) -> None:
        """Makes room for this many blocks at once: a table that grows is rewritten each time it doubles."""
        num_buckets = len(self._keys) // _SLOTS
        while num_buckets * _SLOTS * _MAX_FILL < num_blocks:
            num_buckets *= 2
        if num_buckets * _SLOTS > len(self._keys):
            self._grow(num_buckets)

    def add(self, worker: int, keys: Keys) -> None:
        """The worker holds these blocks."""
        keys = np.unique(keys)
        place = self._find(keys)
        bit = 1 << worker
        self._rewrite(place[place >= 0], lambda bits: bits | bit)
        missing = keys[place < 0]
        self.reserve(self._num_blocks + len(missing))
        alone = self._sets.number(bit)
        self._sets.used(alone, len(missing))
        self._num_blocks += len(missing)
        self._insert(missing, np.full(len(missing), alone, np.uint32))

    def remove(self, worker: int, keys: Keys) -> None:
        """The worker no longer holds these blocks."""
        place = self._find(np.unique(keys))
        others = ~(1 << worker)
        self._rewrite(place[place >= 0], lambda bits: bits & others)

    def forget(self, worker: int) -> None:
        """The worker holds nothing any more. A pass over the whole table: some 5 ns a slot."""
        others = ~(1 << worker)
        self._rewrite(self._slots_of(worker), lambda bits: bits & others)

    def depths(self, keys: Keys, num_workers: int) -> Depths:
        """How many leading blocks of a prompt each worker holds, shape [num_workers]."""
        depths = np.zeros(num_workers, np.int32)
        holding = (1 << num_workers) - 1
        for start, number in self._runs(keys):
            still = holding & self._sets.bits[number]
            if still != holding:
                depths[_members(holding ^ still, num_workers)] = start
                holding = still
                if not holding:
                    return depths
        depths[_members(holding, num_workers)] = len(keys)
        return depths

    def _runs(self, keys: Keys) -> list[tuple[int, int]]:
        """Where the holder set changes along a prompt, and to which."""
        if not len(keys):
            return []
        numbers = self._holder_sets(keys)
        starts = np.flatnonzero(numbers[1:] != numbers[:-1]) + 1
        return [(0, int(numbers[0])), *zip(starts.tolist(), numbers[starts].tolist(), strict=True)]

    # ---- slots -------------------------------------------------------------------------------------------------------

    def _allocate(self, num_buckets: int) -> None:
        self._keys = np.zeros(num_buckets * _SLOTS, np.uint64)
        self._holders = np.zeros(num_buckets * _SLOTS, np.uint32)
        self._mask = np.uint64(num_buckets - 1)

    def _buckets(self, keys: Keys) -> _Places:
        """The two buckets of each key, shape [keys, 2]."""
        buckets = np.empty((len(keys), 2), np.int64)
        buckets[:, 0] = keys & self._mask
        buckets[:, 1] = (keys * _MIX >> _HALF) & self._mask
        return buckets

    def _matches(self, keys: Keys) -> tuple[_Places, _Places]:
        """Which keys were found, as positions in `keys`, and the slot of each."""
        buckets = self._buckets(keys)
        is_it = self._keys.reshape(-1, _SLOTS).take(buckets, axis=0) == keys[:, None, None]
        at = np.flatnonzero(is_it)
        slots = buckets.ravel()[at // _SLOTS] * _SLOTS + at % _SLOTS
        found = at // (2 * _SLOTS)
        is_held = self._holders[slots] != _NOBODY  # what was removed leaves its key behind
        return found[is_held], slots[is_held]

    def _find(self, keys: Keys) -> _Places:
        """The slot of each key, -1 if nobody holds it; shape [keys]."""
        places = np.full(len(keys), -1, np.int64)
        found, slots = self._matches(keys)
        places[found] = slots
        return places

    def _holder_sets(self, keys: Keys) -> npt.NDArray[np.uint32]:
        """The number of each key's holder set, shape [keys]."""
        numbers = np.zeros(len(keys), np.uint32)
        found, slots = self._matches(keys)
        numbers[found] = self._holders[slots]
        return numbers

    def _slots_of(self, worker: int) -> _Places:
        has_it = np.array([bits >> worker & 1 for bits in self._sets.bits], np.bool_)
        return np.flatnonzero(has_it[self._holders])

    def _rewrite(self, places: _Places, change: Callable[[int], int]) -> None:
        """Changes the holder sets of slots."""
        old, inverse, counts = np.unique(self._holders[places], return_inverse=True, return_counts=True)
        new = [self._sets.number(change(self._sets.bits[number])) for number in old.tolist()]
        self._holders[places] = np.array(new, np.uint32)[inverse]
        for before, after, count in zip(old.tolist(), new, counts.tolist(), strict=True):
            self._sets.used(after, count)
            self._sets.used(before, -count)
            self._num_blocks -= count * (after == _NOBODY)

    def _insert(self, keys: Keys, numbers: npt.NDArray[np.uint32]) -> None:
        """Puts keys that are not there into free slots."""
        while len(keys):
            placed = self._insert_some(keys, numbers)
            keys, numbers = keys[~placed], numbers[~placed]
            if not placed.any():
                self._grow(2 * len(self._keys) // _SLOTS)

    def _insert_some(self, keys: Keys, numbers: npt.NDArray[np.uint32]) -> npt.NDArray[np.bool_]:
        """Puts as many as there is room for in the emptier bucket of each; says which."""
        buckets = self._buckets(keys)
        holders = self._holders.reshape(-1, _SLOTS)
        emptier = (holders[buckets] == _NOBODY).sum(axis=2).argmax(axis=1)
        bucket = buckets[np.arange(len(keys)), emptier].astype(np.int64)
        order = np.argsort(bucket, kind="stable")
        ordered = bucket[order]
        turn = np.arange(len(keys)) - np.searchsorted(ordered, ordered)
        is_free = holders[ordered] == _NOBODY
        is_its = is_free & (is_free.cumsum(axis=1) == turn[:, None] + 1)
        has_room = is_its.any(axis=1)
        slots = (ordered * _SLOTS + is_its.argmax(axis=1))[has_room]
        self._keys[slots] = keys[order][has_room]
        self._holders[slots] = numbers[order][has_room]
        placed = np.zeros(len(keys), np.bool_)
        placed[order[has_room]] = True
        return placed

    def _grow(self, num_buckets: int) -> None:
        used = np.flatnonzero(self._holders)
        keys, holders = self._keys[used], self._holders[used]
        self._allocate(num_buckets)
        self._insert(keys, holders)


def _members(bits: int, num_workers: int) -> npt.NDArray[np.intp]:
    """The workers of a set."""
    octets = np.frombuffer(bits.to_bytes((num_workers + 7) // 8, "little"), np.uint8)
    return np.flatnonzero(np.unpackbits(octets, bitorder="little"))
