"""Explanations of the latest requests, for every router of the cluster to read.

A router keeps its own in a ring and writes them to Redis in the background; a request never waits for that. A question
is answered from both: whatever Redis lacks, because it is away or a moment behind, this router's ring may have.

In Redis: a sorted set of tenants and request ids by their end, and a hash from those to entries. Both hold
`MAX_ENTRIES` at most, and those of `LIFE_S` at most.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterable
from types import TracebackType
from typing import Any, Self, TypeVar

import msgspec
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from twostroke_chassis.backoff import Backoff
from twostroke_chassis.tasks import end_task, start_task

from twostroke_router.explanation import Entry, Explanation

_log = logging.getLogger(__name__)
_T = TypeVar("_T")

MAX_ENTRIES = 10_000
LIFE_S = 900.0
MAX_LISTED = 1_000
_MAX_PENDING = 5_000
"""What waits for a Redis that is away; the oldest are dropped, and stay in the ring."""
_GATHER_S = 0.1
"""Entries of this time travel together."""
_MAX_BATCH = 500
_WRITE_S = 3.0
_ASK_S = 1.0
_ERRORS = (RedisError, OSError, TimeoutError)

_encode = msgspec.msgpack.Encoder().encode
_decoder: msgspec.msgpack.Decoder[Entry] = msgspec.msgpack.Decoder(Entry)


class Ring:
    """The latest entries of this router, newest last."""

    def __init__(self, max_entries: int = MAX_ENTRIES, life_s: float = LIFE_S) -> None:
        self._max_entries = max_entries
        self._life_s = life_s
        self._entries: OrderedDict[str, Entry] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def add(self, entry: Entry) -> None:
        """Takes an entry; the same id again replaces the earlier one."""
        key = _key(entry)
        self._entries.pop(key, None)
        self._entries[key] = entry
        if len(self._entries) > self._max_entries:
            self._entries.popitem(last=False)

    def get(self, key: str, now_unix_s: float) -> Entry | None:
        """One entry that is not too old."""
        entry = self._entries.get(key)
        return entry if entry is not None and self._is_fresh(entry, now_unix_s) else None

    def latest(self, now_unix_s: float) -> Iterable[Entry]:
        """Entries, the last one that was added first."""
        for entry in reversed(self._entries.values()):
            if self._is_fresh(entry, now_unix_s):
                yield entry

    def _is_fresh(self, entry: Entry, now_unix_s: float) -> bool:
        return now_unix_s - _ended_unix_s(entry) < self._life_s


class RequestLog:
    """Writes and reads explanations. Use it as a context manager, in one event loop."""

    def __init__(self, redis_url: str, cluster: str, dropped: Callable[[int], None] = lambda count: None) -> None:
        self._redis = Redis.from_url(
            redis_url, protocol=2, socket_timeout=_WRITE_S, socket_connect_timeout=_ASK_S, retry=Retry(NoBackoff(), 0)
        )
        self._order = f"twostroke:{cluster}:requests"
        self._entries = f"twostroke:{cluster}:requests:entries"
        self._dropped = dropped
        self._ring = Ring()
        self._pending: OrderedDict[str, Entry] = OrderedDict()
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self._task = start_task(self._run(), name="request-log")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._task is not None:
            await end_task(self._task)
        if self._pending:
            await _within(_ASK_S, self._write())
        await self._redis.aclose()

    def add(self, entry: Entry) -> None:
        """Keeps an entry here, and for the others. Never waits, never fails."""
        self._ring.add(entry)
        self._pending[_key(entry)] = entry
        if len(self._pending) > _MAX_PENDING:
            self._pending.popitem(last=False)
            self._dropped(1)
        self._wake.set()

    # ---- questions ---------------------------------------------------------------------------------------------------

    async def get(self, request_id: str, tenant: str | None) -> Explanation | None:
        """One request of a tenant (None: of whoever may ask without a key); None if it is not known."""
        key = key_of(tenant or "", request_id)
        entry = self._ring.get(key, time.time())
        if entry is None:
            raw = await _within(_ASK_S, self._redis.hget(self._entries, key))
            entry = _decoded(raw) if raw else None
        return entry.explanation if entry is not None else None

    async def latest(self, limit: int, tenant: str | None) -> list[Explanation]:
        """The latest requests of all routers, newest first; one tenant's, or all."""
        found = {_key(entry): entry for entry in self._ring.latest(time.time())}
        found |= {_key(entry): entry for entry in await self._of_all(limit, tenant)}
        seen = [entry.explanation for entry in found.values() if _may_see(entry, tenant)]
        return sorted(seen, key=lambda each: each.arrived_unix_s, reverse=True)[:limit]

    async def _of_all(self, limit: int, tenant: str | None) -> list[Entry]:
        return await _within(_ASK_S, self._read(limit, tenant)) or []

    async def _read(self, limit: int, tenant: str | None) -> list[Entry]:
        """Enough of the newest entries in Redis for `limit` of a tenant's."""
        found: list[Entry] = []
        for start in range(0, MAX_ENTRIES, MAX_LISTED):
            ids: list[Any] = await self._redis.zrange(self._order, start, start + MAX_LISTED - 1, desc=True)
            if not ids:
                break
            entries = [_decoded(raw) for raw in await self._redis.hmget(self._entries, ids) if raw]
            found += [entry for entry in entries if entry is not None and _may_see(entry, tenant)]
            if len(found) >= limit:
                break
        return found

    # ---- the writer --------------------------------------------------------------------------------------------------

    async def _run(self) -> None:
        backoff, is_away = Backoff(), False
        while True:
            await self._wake.wait()
            await asyncio.sleep(_GATHER_S)
            try:
                await self._write()
            except _ERRORS as error:
                if not is_away:
                    _log.warning("Redis: %s; explanations of requests stay in this router", error)
                is_away = True
                await backoff.sleep()
            else:
                is_away = False
                backoff.reset()

    async def _write(self) -> None:
        """Writes what waits, then cuts the log to size."""
        while batch := list(self._pending.items())[:_MAX_BATCH]:
            async with self._redis.pipeline(transaction=True) as pipe:
                pipe.zadd(self._order, {key: _ended_unix_s(entry) for key, entry in batch})
                pipe.hset(self._entries, mapping={key: _encode(entry) for key, entry in batch})
                for name in (self._order, self._entries):
                    pipe.expire(name, int(LIFE_S))
                await pipe.execute()
            for key, entry in batch:
                if self._pending.get(key) is entry:  # else it was replaced meanwhile
                    del self._pending[key]
            await self._cut()
        self._wake.clear()

    async def _cut(self) -> None:
        too_old = await self._redis.zrangebyscore(self._order, "-inf", time.time() - LIFE_S)
        too_many = await self._redis.zrange(self._order, 0, -MAX_ENTRIES - 1)
        if gone := {*too_old, *too_many}:
            async with self._redis.pipeline(transaction=True) as pipe:
                pipe.zrem(self._order, *gone)
                pipe.hdel(self._entries, *gone)
                await pipe.execute()


def key_of(tenant: str, request_id: str) -> str:
    """What an entry is kept under: tenants may use the same ids."""
    return f"{tenant}/{request_id}"


def _key(entry: Entry) -> str:
    return key_of(entry.tenant, entry.explanation.request_id)


def _ended_unix_s(entry: Entry) -> float:
    return entry.explanation.arrived_unix_s + (entry.explanation.e2e_s or 0.0)


def _may_see(entry: Entry, tenant: str | None) -> bool:
    return tenant is None or entry.tenant == tenant


def _decoded(raw: Any) -> Entry | None:
    """An entry of Redis; None if a later version wrote it."""
    try:
        return _decoder.decode(raw)
    except msgspec.MsgspecError:
        return None


async def _within(seconds: float, work: Awaitable[_T]) -> _T | None:
    """The result, or None if Redis does not give one in time."""
    try:
        async with asyncio.timeout(seconds):
            return await work
    except _ERRORS as error:
        _log.debug("Redis: %s", error)
        return None
