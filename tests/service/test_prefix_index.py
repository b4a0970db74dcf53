"""The prefix index against a real Redis that is killed, emptied, frozen and absent."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable
from hashlib import blake2b

import pytest
from redis.asyncio import Redis
from twostroke_chassis.prefix_index import SET_EXPIRY_S, PrefixMirror, PrefixPublisher
from twostroke_chassis.prefix_table import keys_of

from tests.support.servers import RedisServer

pytestmark = pytest.mark.service


def hashes(start: int, end: int) -> list[bytes]:
    return [blake2b(str(number).encode(), digest_size=16).digest() for number in range(start, end)]


async def until(condition: Callable[[], bool], seconds: float = 6) -> None:
    begin = time.monotonic()
    while not condition():
        assert time.monotonic() - begin < seconds, f"not within {seconds} s"
        await asyncio.sleep(0.02)


def publisher(redis: RedisServer, worker_id: str = "d0", epoch: int = 1, **options: int) -> PrefixPublisher:
    return PrefixPublisher(redis.url, "c", worker_id, epoch, **options)


def mirror(redis: RedisServer) -> PrefixMirror:
    return PrefixMirror(redis.url, "c")


async def test_a_mirror_follows_and_a_late_one_catches_up(redis: RedisServer) -> None:
    prompt = hashes(0, 10)
    async with publisher(redis) as first, publisher(redis, "d1") as second, mirror(redis) as early:
        first.stored(prompt[:6])
        second.stored(prompt[:2])
        second.stored(prompt[3:])
        await until(lambda: early.longest_match("d0", prompt) == 6 and early.longest_match("d1", prompt) == 2)
        second.stored(prompt[2:3])
        first.removed(prompt[4:5])
        async with mirror(redis) as late:
            await until(lambda: all(m.longest_match("d0", prompt) == 4 for m in (early, late)))
            await until(lambda: all(m.longest_match("d1", prompt) == 10 for m in (early, late)))
            assert late.num_hashes("d0") == early.num_hashes("d0") == 5
        assert early.longest_match("d0", hashes(20, 25)) == 0
        assert early.longest_match("d0", []) == 0
        assert early.longest_match("unknown", prompt) == 0


async def test_the_last_of_several_changes_of_a_block_counts(redis: RedisServer) -> None:
    block, other = hashes(0, 1), hashes(1, 2)
    async with publisher(redis) as worker, mirror(redis) as router:
        worker.stored(block)
        worker.removed(block)
        worker.removed(other)
        worker.stored(other)
        await until(lambda: router.longest_match("d0", other) == 1)
        assert router.longest_match("d0", block) == 0


async def test_what_redis_holds(redis: RedisServer) -> None:
    async with Redis.from_url(redis.url) as client:
        async with publisher(redis) as worker, mirror(redis) as router:
            worker.stored(hashes(0, 9000))
            await until(lambda: router.num_hashes("d0") == 9000)
            assert set(await client.smembers("twostroke:c:prefix:d0:1")) == set(hashes(0, 9000))
            assert 0 < await client.ttl("twostroke:c:prefix:d0:1") <= SET_EXPIRY_S
            assert await client.xlen("twostroke:c:prefix") >= 1
        assert not await client.exists("twostroke:c:prefix:d0:1"), "a worker that ends in order withdraws its set"


async def test_a_new_process_of_a_worker_starts_empty_and_the_old_one_is_ignored(redis: RedisServer) -> None:
    prompt = hashes(0, 4)
    async with publisher(redis, epoch=1) as old, mirror(redis) as router:
        old.stored(prompt)
        await until(lambda: router.longest_match("d0", prompt) == 4)
        async with publisher(redis, epoch=2) as new:
            await until(lambda: router.longest_match("d0", prompt) == 0)
            new.stored(prompt[:1])
            await until(lambda: router.longest_match("d0", prompt) == 1)
            old.stored(hashes(4, 5))
            async with mirror(redis) as late:
                await until(lambda: late.longest_match("d0", prompt) == 1)
            await asyncio.sleep(0.2)
            assert router.longest_match("d0", prompt) == 1


async def test_a_forgotten_worker_comes_back_whole(redis: RedisServer) -> None:
    prompt = hashes(0, 4)
    async with publisher(redis) as worker, mirror(redis) as router:
        worker.stored(prompt[:3])
        await until(lambda: router.longest_match("d0", prompt) == 3)
        router.forget("d0")
        assert router.longest_match("d0", prompt) == 0
        worker.stored(prompt[3:])
        await until(lambda: router.longest_match("d0", prompt) == 4)


async def test_entries_lost_from_the_stream_are_made_good(redis: RedisServer) -> None:
    prompt = hashes(0, 6)
    async with publisher(redis) as worker, mirror(redis) as router, Redis.from_url(redis.url) as client:
        worker.stored(prompt[:2])
        await until(lambda: router.longest_match("d0", prompt) == 2)
        worker.stored(prompt[2:4])
        await until(lambda: router.longest_match("d0", prompt) == 4)
        # As if the stream had been trimmed before the mirror read its last entry.
        known = router._workers["d0"]
        assert known.number is not None
        known.number -= 1
        router.table.remove(router.slot("d0"), keys_of(prompt[2:4]))
        worker.stored(prompt[4:])
        await until(lambda: router.longest_match("d0", prompt) == 6)
        # A Redis emptied under living connections: noticed at the worker's next write.
        await client.flushall()
        worker.removed(prompt[5:])
        await until(lambda: router.longest_match("d0", prompt) == 5)
        assert set(await client.smembers("twostroke:c:prefix:d0:1")) == set(prompt[:5])


async def test_redis_killed_and_restarted_empty(redis: RedisServer) -> None:
    prompt = hashes(0, 8)
    async with publisher(redis) as worker, mirror(redis) as router:
        worker.stored(prompt[:4])
        await until(lambda: router.longest_match("d0", prompt) == 4)
        redis.kill()
        worker.stored(prompt[4:6])
        await until(lambda: not router.is_connected)
        assert router.longest_match("d0", prompt) == 4, "what is known stays usable"
        await asyncio.to_thread(redis.start)
        await until(lambda: router.longest_match("d0", prompt) == 6)
        worker.stored(prompt[6:])
        await until(lambda: router.longest_match("d0", prompt) == 8)
        async with mirror(redis) as late:
            await until(lambda: late.longest_match("d0", prompt) == 8)


async def test_whatever_happens_mirror_and_worker_agree_in_the_end(redis: RedisServer) -> None:
    prompt = hashes(0, 60)
    draw = random.Random(7)
    async with publisher(redis, max_pending=20) as worker, mirror(redis) as router:
        held: set[bytes] = set()
        for step in range(400):
            some = draw.sample(prompt, draw.randint(1, 6))
            if draw.random() < 0.6:
                worker.stored(some)
                held |= set(some)
            else:
                worker.removed(some)
                held -= set(some)
            if step % 20 == 0:
                await asyncio.sleep(0.05)
            if step in (150, 300):
                await asyncio.to_thread(redis.restart, keep_data=False)

        def expected(start: int) -> int:
            return next((number for number, block in enumerate(prompt[start:]) if block not in held), 60 - start)

        await until(lambda: all(router.longest_match("d0", prompt[start:]) == expected(start) for start in range(60)))
        assert router.num_hashes("d0") == len(held)


async def test_a_frozen_redis_blocks_nobody(redis: RedisServer) -> None:
    async with publisher(redis, max_pending=1000) as worker, mirror(redis) as router:
        worker.stored(hashes(0, 10))
        await until(lambda: router.num_hashes("d0") == 10)
        redis.freeze()
        try:
            slowest = 0.0
            for start in range(10, 20_000, 100):
                begin = time.monotonic()
                worker.stored(hashes(start, start + 100)[:90])
                router.longest_match("d0", hashes(0, 10))
                slowest = max(slowest, time.monotonic() - begin)
                await asyncio.sleep(0)
            assert slowest < 0.5
            assert len(worker._pending) <= 1000, "bounded however long Redis is away"
            await until(lambda: not router.is_connected)
            assert router.num_hashes("d0") == 10
        finally:
            redis.thaw()
        await until(lambda: router.num_hashes("d0") == len(worker._held) == 10 + 200 * 90, 10)


async def test_redis_may_come_later_and_closing_without_it_is_quick(redis: RedisServer) -> None:
    redis.kill()
    async with publisher(redis) as worker, mirror(redis) as router:
        worker.stored(hashes(0, 3))
        await asyncio.sleep(0.3)
        await asyncio.to_thread(redis.start)
        await until(lambda: router.num_hashes("d0") == 3)
        redis.freeze()
        begin = time.monotonic()
    redis.thaw()
    assert time.monotonic() - begin < 3
