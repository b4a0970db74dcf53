"""Which worker has which prefix cached: published to Redis by workers, mirrored from it by routers.

Truth lives in the workers, so everything in Redis may be lost at any time. A worker keeps the set of its hashes and
writes changes; whenever it cannot be sure of what Redis holds, it writes the whole set again. Each entry of the stream
has a number, so a router that missed one (an outage, a trimmed stream, an emptied Redis) reads that worker's set anew.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import msgspec
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from twostroke_chassis.backoff import Backoff
from twostroke_chassis.prefix_table import HASH_BYTES, PrefixTable, keys_of
from twostroke_chassis.tasks import end_task, start_task

_log = logging.getLogger(__name__)

STREAM_MAXLEN = 100_000
"""Entries kept in the stream, about; a router further behind reads the sets instead."""
SET_EXPIRY_S = 60
"""A worker's set outlives its last refresh by this much."""
_REFRESH_S = 15.0
_GATHER_S = 0.02
"""Changes of this time travel together."""
_ENTRY_HASHES = 4096
"""Most hashes in one stream entry, and in one SADD."""
_TIMEOUT_S = 3.0
_FIELD = b"change"
_BLOCK_MS = 1_000
"""Longest a read of the stream waits on the server; well below the time-out of the socket."""

_REDIS_ERRORS = (RedisError, OSError, TimeoutError)


class PrefixChange(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """An entry of the stream: what changed in one worker's cache."""

    worker: str
    epoch: int
    number: int
    """1, 2, 3 ... per worker and epoch; a gap means that entries were lost."""
    stored: tuple[bytes, ...] = ()
    removed: tuple[bytes, ...] = ()
    is_whole: bool = False
    """The worker's set was written anew: read it instead of applying changes."""


class _Keys:
    """Names in Redis."""

    def __init__(self, cluster: str) -> None:
        self.stream = f"twostroke:{cluster}:prefix"

    def set_of(self, worker_id: str, epoch: int) -> str:
        return f"{self.stream}:{worker_id}:{epoch}"

    def parse(self, key: bytes) -> tuple[str, int] | None:
        """Worker and epoch of a set's key."""
        worker_id, _, epoch = key.decode(errors="replace").removeprefix(self.stream + ":").rpartition(":")
        return (worker_id, int(epoch)) if worker_id and epoch.isdigit() else None


def _connect(redis_url: str) -> Redis:
    """A client that fails within seconds and never repeats a command by itself."""
    return Redis.from_url(
        redis_url, protocol=2, socket_timeout=_TIMEOUT_S, socket_connect_timeout=_TIMEOUT_S, retry=Retry(NoBackoff(), 0)
    )


class PrefixPublisher:
    """Tells routers what this worker has cached. `start` it in an event loop and call it from there."""

    def __init__(self, redis_url: str, cluster: str, worker_id: str, epoch: int, *, max_pending: int = 50_000) -> None:
        self._redis = _connect(redis_url)
        self._keys = _Keys(cluster)
        self._worker_id, self._epoch = worker_id, epoch
        self._set_key = self._keys.set_of(worker_id, epoch)
        self._max_pending = max_pending
        self._held: set[bytes] = set()
        self._pending: dict[bytes, bool] = {}
        self._is_in_doubt = True
        self._number = 0
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def start(self) -> None:
        """Begins to write in the background; Redis need not be there."""
        if self._task is None:
            self._task = start_task(self._run(), name="prefix-publisher")

    async def close(self) -> None:
        """Stops, and withdraws the set if Redis answers at once; otherwise it expires."""
        if self._task is not None:
            await end_task(self._task)
            self._task = None
            with contextlib.suppress(*_REDIS_ERRORS):
                async with asyncio.timeout(1.0):
                    await self._redis.delete(self._set_key)
        await self._redis.aclose()

    def stored(self, hashes: Iterable[bytes]) -> None:
        """These blocks can be hit from now on. Never blocks, never fails."""
        for block_hash in hashes:
            self._held.add(block_hash)
            self._pending[block_hash] = True
        self._changed()

    def removed(self, hashes: Iterable[bytes]) -> None:
        """These blocks can no longer be hit. Never blocks, never fails."""
        for block_hash in hashes:
            self._held.discard(block_hash)
            self._pending[block_hash] = False
        self._changed()

    def _changed(self) -> None:
        if len(self._pending) > self._max_pending:
            # Redis is away or slow. The set is known whole, so nothing is lost by forgetting the way to it.
            self._pending.clear()
            self._is_in_doubt = True
        self._wake.set()

    async def _run(self) -> None:
        backoff = Backoff()
        is_away = False
        while True:
            try:
                await self._write()
            except _REDIS_ERRORS as error:
                self._is_in_doubt = True
                if not is_away:
                    _log.warning("prefix index: Redis does not take writes (%s); going on without", _reason(error))
                is_away = True
                await backoff.sleep()
                continue
            if is_away:
                _log.info("prefix index: Redis is back")
            is_away = False
            backoff.reset()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_REFRESH_S):
                    await self._wake.wait()
            await asyncio.sleep(_GATHER_S)

    async def _write(self) -> None:
        """Brings Redis up to date, and refreshes the set's expiry."""
        self._wake.clear()
        if not self._is_in_doubt:
            changes, self._pending = self._pending, {}
            num_expected = len(self._held)
            if await self._write_changes(changes) != num_expected:
                _log.info("prefix index: Redis has lost this worker's set; writing all of it")
                self._is_in_doubt = True
        if self._is_in_doubt:
            self._pending = {}
            self._is_in_doubt = False
            await self._write_whole(tuple(self._held))

    async def _write_changes(self, changes: dict[bytes, bool]) -> int:
        """Writes changes to set and stream in one transaction; returns how large the set is then."""
        stored = [block_hash for block_hash, is_stored in changes.items() if is_stored]
        removed = [block_hash for block_hash, is_stored in changes.items() if not is_stored]
        async with self._redis.pipeline(transaction=True) as commands:
            for some in _batches(stored):
                commands.sadd(self._set_key, *some)
                self._append(commands, PrefixChange(**self._next(), stored=some))
            for some in _batches(removed):
                commands.srem(self._set_key, *some)
                self._append(commands, PrefixChange(**self._next(), removed=some))
            commands.expire(self._set_key, SET_EXPIRY_S)
            commands.scard(self._set_key)
            return int((await commands.execute())[-1])

    async def _write_whole(self, held: Sequence[bytes]) -> None:
        """Replaces the set in one transaction and tells mirrors to read it."""
        async with self._redis.pipeline(transaction=True) as commands:
            commands.delete(self._set_key)
            for some in _batches(held):
                commands.sadd(self._set_key, *some)
            commands.expire(self._set_key, SET_EXPIRY_S)
            self._append(commands, PrefixChange(**self._next(), is_whole=True))
            await commands.execute()

    def _next(self) -> dict[str, Any]:
        """What the next entry says of its origin."""
        self._number += 1
        return {"worker": self._worker_id, "epoch": self._epoch, "number": self._number}

    def _append(self, commands: Any, change: PrefixChange) -> None:
        entry = {_FIELD: msgspec.msgpack.encode(change)}
        commands.xadd(self._keys.stream, entry, maxlen=STREAM_MAXLEN, approximate=True)


@dataclass(slots=True)
class _Mirrored:
    """What is known of a worker's hashes: as of the entry `number` of its `epoch`."""

    epoch: int
    number: int | None
    """None: read from the set, which may be ahead of the stream; the next entry says."""


class PrefixMirror:
    """A local copy of what every worker has cached. `start` it in an event loop and ask it from there."""

    def __init__(self, redis_url: str, cluster: str) -> None:
        self._redis = _connect(redis_url)
        self._keys = _Keys(cluster)
        self._workers: dict[str, _Mirrored] = {}
        self.table = PrefixTable()
        """Every worker's blocks, by the worker's `slot`."""
        self._slots: dict[str, int] = {}
        self._unused_slots: list[int] = []
        self._task: asyncio.Task[None] | None = None
        self._is_connected = False

    async def __aenter__(self) -> Self:
        self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def start(self) -> None:
        """Begins to follow in the background; Redis need not be there."""
        if self._task is None:
            self._task = start_task(self._run(), name="prefix-mirror")

    async def close(self) -> None:
        """Stops."""
        if self._task is not None:
            await end_task(self._task)
            self._task = None
        await self._redis.aclose()

    @property
    def is_connected(self) -> bool:
        """Whether Redis answers; what is known stays usable when it does not."""
        return self._is_connected

    def slot(self, worker_id: str) -> int:
        """A worker's number in the table, until it is forgotten."""
        slot = self._slots.get(worker_id)
        if slot is None:
            slot = self._unused_slots.pop() if self._unused_slots else len(self._slots)
            self._slots[worker_id] = slot
        return slot

    def longest_match(self, worker_id: str, hashes: Sequence[bytes]) -> int:
        """How many leading blocks of a prompt a worker holds. Local: never waits, never fails."""
        slot = self._slots.get(worker_id)
        return 0 if slot is None else int(self.table.depths(keys_of(hashes), slot + 1)[slot])

    def num_hashes(self, worker_id: str) -> int:
        """How many blocks a worker is known to hold."""
        slot = self._slots.get(worker_id)
        return 0 if slot is None else self.table.num_held(slot)

    def forget(self, worker_id: str) -> None:
        """The worker has left. Should it come back, its next entry brings all of its hashes."""
        self._workers.pop(worker_id, None)
        slot = self._slots.pop(worker_id, None)
        if slot is not None:
            self.table.forget(slot)
            self._unused_slots.append(slot)

    async def _run(self) -> None:
        backoff = Backoff()
        is_away = False
        while True:
            try:
                position = await self._read_sets()
                self._is_connected = True
                if is_away:
                    _log.info("prefix index: Redis is back")
                is_away = False
                backoff.reset()
                while True:
                    position = await self._follow(position)
            except _REDIS_ERRORS as error:
                self._is_connected = False
                if not is_away:
                    _log.warning("prefix index: Redis does not answer (%s); placing by what is known", _reason(error))
                is_away = True
                await backoff.sleep()

    async def _read_sets(self) -> bytes:
        """Reads every worker's set; returns the stream's end as of just before, so that no change is missed."""
        last: Any = await self._redis.xrevrange(self._keys.stream, count=1)
        position: bytes = last[0][0] if last else b"0-0"
        async for key in self._redis.scan_iter(match=self._keys.stream + ":*", count=1000):
            origin = self._keys.parse(key)
            if origin is not None:
                await self._read_set(*origin, number=None)
        return position

    async def _read_set(self, worker_id: str, epoch: int, number: int | None) -> None:
        known = self._workers.get(worker_id)
        if known is not None and known.epoch > epoch:
            return
        hashes: Any = await self._redis.smembers(self._keys.set_of(worker_id, epoch))
        self._workers[worker_id] = _Mirrored(epoch, number)
        slot = self.slot(worker_id)
        self.table.forget(slot)
        self.table.add(slot, keys_of(_whole(hashes)))

    async def _follow(self, position: bytes) -> bytes:
        """Applies what the stream has after `position`; returns the new position."""
        answer: Any = await self._redis.xread({self._keys.stream: position}, count=500, block=_BLOCK_MS)
        for _, entries in answer:
            for entry_id, fields in entries:
                position = entry_id
                try:
                    change = msgspec.msgpack.decode(fields.get(_FIELD, b""), type=PrefixChange)
                except msgspec.MsgspecError as error:
                    _log.warning("prefix index: ignored entry %s: %s", entry_id.decode(errors="replace"), error)
                else:
                    await self._apply(change)
        return position

    async def _apply(self, change: PrefixChange) -> None:
        known = self._workers.get(change.worker)
        if known is not None and known.epoch > change.epoch:
            return
        is_next = known is not None and known.epoch == change.epoch and known.number in (None, change.number - 1)
        if known is None or not is_next or change.is_whole:
            await self._read_set(change.worker, change.epoch, change.number)
            return
        slot = self.slot(change.worker)
        self.table.add(slot, keys_of(_whole(change.stored)))
        self.table.remove(slot, keys_of(_whole(change.removed)))
        known.number = change.number


def _whole(hashes: Iterable[bytes]) -> list[bytes]:
    """Those that can be block hashes: Redis is open to whoever can reach it."""
    return [block_hash for block_hash in hashes if len(block_hash) == HASH_BYTES]


def _batches(hashes: Sequence[bytes]) -> Iterator[tuple[bytes, ...]]:
    for start in range(0, len(hashes), _ENTRY_HASHES):
        yield tuple(hashes[start : start + _ENTRY_HASHES])


def _reason(error: BaseException) -> str:
    """One short line for the log; redis-py's messages name the address, never the password."""
    return " ".join(str(error).split()) or type(error).__name__
