"""`BlockPool`: whatever happens, every block is in exactly one state, and promises can be kept."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from twostroke_engine.kv.block_pool import BlockPool, OutOfBlocks


def name(number: int) -> bytes:
    return number.to_bytes(16, "little")


class PoolMachine(RuleBasedStateMachine):
    """Random users of a small pool; a model of who holds what runs beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(8)
        self.held: Counter[int] = Counter()
        self.promised = 0
        self.known: set[bytes] = set()
        self.content: dict[int, int] = {}

    @rule(num_blocks=st.integers(0, 9))
    def allocate(self, num_blocks: int) -> None:
        available = self.pool.num_available
        if num_blocks > available:
            with pytest.raises(OutOfBlocks):
                self.pool.allocate(num_blocks)
            assert self.pool.num_available == available
            return
        taken = self.pool.allocate(num_blocks)
        assert len(set(taken)) == num_blocks
        assert not any(self.held[block] for block in taken), "a held block was given away"
        self.held.update(taken)
        for block in taken:
            self.content.pop(block, None)

    @rule(numbers=st.lists(st.integers(0, 5), max_size=4))
    def hit(self, numbers: list[int]) -> None:
        found = self.pool.match([name(number) for number in numbers])
        for block, number in zip(found, numbers, strict=False):
            assert self.content[block] == number, "a hit on other content"
        assert len(found) == len(numbers) or numbers[len(found)] not in self.content.values(), "a hit was missed"
        if self.pool.num_unreferenced(found) > self.pool.num_available:
            with pytest.raises(OutOfBlocks):
                self.pool.acquire(found)
            return
        self.pool.acquire(found)
        self.held.update(found)

    @precondition(lambda self: +self.held)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        block = data.draw(st.sampled_from(sorted(self.held.elements())))
        self.pool.release([block])
        self.held -= Counter([block])

    @precondition(lambda self: set(+self.held) - set(self.content))
    @rule(data=st.data(), number=st.integers(0, 5))
    def publish(self, data: st.DataObject, number: int) -> None:
        block = data.draw(st.sampled_from(sorted(set(+self.held) - set(self.content))))
        if not self.pool.match([name(number)]):
            self.content[block] = number
        self.pool.publish(block, name(number))

    @precondition(lambda self: +self.held)
    @rule(data=st.data())
    def retract(self, data: st.DataObject) -> None:
        block = data.draw(st.sampled_from(sorted(+self.held)))
        self.pool.retract([block])
        number = self.content.pop(block, None)
        assert number is None or not self.pool.match([name(number)])

    @rule(num_blocks=st.integers(0, 4))
    def promise(self, num_blocks: int) -> None:
        fits = num_blocks <= self.pool.num_available
        assert self.pool.promise(num_blocks) is fits
        self.promised += num_blocks * fits

    @precondition(lambda self: self.promised)
    @rule(data=st.data())
    def bind(self, data: st.DataObject) -> None:
        num_blocks = data.draw(st.integers(1, self.promised))
        self.pool.withdraw(num_blocks)
        self.promised -= num_blocks
        taken = self.pool.allocate(num_blocks)
        self.held.update(taken)
        for block in taken:
            self.content.pop(block, None)

    @rule()
    def take_events(self) -> None:
        events = self.pool.take_events()
        if events is not None:
            assert not set(events.stored) & self.known, "stored again"
            assert set(events.removed) <= self.known, "removed but never stored"
            self.known = (self.known - set(events.removed)) | set(events.stored)
        # What listeners believe is exactly what can be hit.
        assert self.known == {name(number) for number in range(6) if self.pool.match([name(number)])}

    @invariant()
    def books_agree(self) -> None:
        self.pool.check()
        assert self.pool.num_referenced == len(+self.held)
        assert self.pool.num_promised == self.promised
        assert self.pool.num_available >= 0


TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)


def test_eviction_takes_the_least_recently_used_and_tails_before_heads() -> None:
    pool = BlockPool(4)
    old, young = pool.allocate(2), pool.allocate(2)
    for block in (*old, *young):
        pool.publish(block, name(block))
    pool.release(old[::-1])
    pool.release(young[::-1])
    assert pool.allocate(3) == (old[1], old[0], young[1])
    assert pool.match([name(young[0])]) == (young[0],)


def test_free_blocks_go_before_cached_ones() -> None:
    pool = BlockPool(2)
    first, second = pool.allocate(2)
    pool.publish(first, name(1))
    pool.release([first, second])
    assert pool.allocate(1) == (second,)


def test_a_hash_names_one_block() -> None:
    pool = BlockPool(2)
    first, second = pool.allocate(2)
    pool.publish(first, name(1))
    pool.publish(second, name(1))
    pool.release([second])
    assert (pool.num_free, pool.match([name(1)])) == (1, (first,))


def test_promises_hold_against_hits_on_cached_blocks() -> None:
    pool = BlockPool(2)
    blocks = pool.allocate(2)
    pool.publish(blocks[0], name(1))
    pool.release(blocks)
    assert pool.promise(2)
    with pytest.raises(OutOfBlocks):
        pool.acquire(pool.match([name(1)]))
    pool.withdraw(2)
    pool.acquire([blocks[0]])
    assert pool.allocate(1) == (blocks[1],)


@pytest.mark.parametrize(
    "misuse",
    [
        lambda pool: pool.release([0]),
        lambda pool: pool.publish(0, name(1)),
        lambda pool: pool.retract([0]),
        lambda pool: pool.withdraw(1),
    ],
)
def test_misuse_is_an_error(misuse: Callable[[BlockPool], None]) -> None:
    with pytest.raises(ValueError, match=r"block|promised"):
        misuse(BlockPool(1))
