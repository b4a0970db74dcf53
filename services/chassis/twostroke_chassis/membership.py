"""Who is alive: worker records in etcd, each under its process's lease, and a mirror of them.

The mirror is a difference of snapshots; etcd's watch only says when to look. So an event that was missed, a revision
that was compacted and an etcd that came back empty all heal in the same way. After an outage a record that is missing
gets a grace time to come back before its worker counts as gone: etcd losing its data is no news about workers.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
import time
from collections.abc import AsyncIterator
from types import TracebackType
from typing import Literal, Self
from urllib.parse import urlsplit

import grpc
import grpc.aio
import msgspec

_path = list(sys.path)
# etcd3aio puts its generated protobuf code in front of every other package's on sys.path; it is imported below, once.
from etcd3aio import EtcdError, prefix_range_end  # noqa: E402
from etcd3aio.kv import KVService  # noqa: E402
from etcd3aio.lease import LeaseService  # noqa: E402
from etcd3aio.watch import WatchService  # noqa: E402

sys.path[:] = _path

from twostroke_chassis.backoff import Backoff  # noqa: E402
from twostroke_chassis.lifecycle import wait_for  # noqa: E402
from twostroke_chassis.rpc import open_channel  # noqa: E402
from twostroke_chassis.tasks import end_task, start_task  # noqa: E402

_log = logging.getLogger(__name__)

LEASE_TTL_S = 5
"""A record outlives its process by this much."""
_CALL_S = 2.0
"""Longest wait for one etcd call; a frozen etcd must not hold a keep-alive until the lease is lost."""
_RESYNC_S = 1.0
"""A snapshot is taken at least this often: so an etcd that hangs is noticed before its leases can have expired."""

_ETCD_ERRORS = (EtcdError, grpc.aio.AioRpcError, TimeoutError)


class WorkerRecord(msgspec.Struct, frozen=True, kw_only=True):
    """What a worker says of itself; constant for the life of its process."""

    worker_id: str
    role: Literal["prefill", "decode"]
    endpoint: str
    """HOST:PORT of its gRPC server."""
    epoch: int
    """Differs for each process of a worker id, and grows; see `new_epoch`."""
    model_name: str
    model_fingerprint: str
    kv_fingerprint: str
    """Of the shape of its KV: equal where one worker's KV can be converted to the other's."""
    block_size: int
    max_model_len: int
    channels: tuple[str, ...] = ()
    """KV channels it can use, best first; a prefill and a decode worker can use those that both have, text for text."""
    version: str = ""
    tokenizer_hash: str = ""
    """Of tokenizer.json; empty if it has none."""


class Joined(msgspec.Struct, frozen=True):
    """A worker is there."""

    record: WorkerRecord


class Left(msgspec.Struct, frozen=True):
    """A worker is gone; `record` is the last that was known of it."""

    record: WorkerRecord


def new_epoch() -> int:
    """An epoch for this process: later processes get greater ones."""
    return time.time_ns() // 1000


class Membership:
    """This cluster's workers in etcd. Use it in one event loop; `close` it, or use it as a context manager."""

    def __init__(self, etcd_url: str, cluster: str, *, ttl_s: int = LEASE_TTL_S, outage_grace_s: float | None = None):
        self._url = etcd_url
        self._prefix = f"/twostroke/{cluster}/workers/"
        self._ttl_s = ttl_s
        self._outage_grace_s = 2.0 * ttl_s if outage_grace_s is None else outage_grace_s
        self._client: _Etcd | None = None
        self._keeper: asyncio.Task[None] | None = None
        self._lease_id = 0
        self._is_connected = False

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Unregisters and closes the connection; end the watches before."""
        await self.unregister()
        if self._client is not None:
            await self._client.channel.close()
            self._client = None

    @property
    def is_connected(self) -> bool:
        """Whether etcd answered the running `watch` last; what is known stays usable when it does not."""
        return self._is_connected

    async def wait_ready(self, seconds: float) -> None:
        """Returns when etcd answers; `StartError` if it does not within `seconds`."""
        await wait_for(f"etcd at {self._url}", self._ask, seconds, (ConnectionError,))

    async def _ask(self) -> None:
        try:
            await self._snapshot()
        except _ETCD_ERRORS as error:
            raise ConnectionError(_reason(error)) from error

    async def register(self, record: WorkerRecord) -> None:
        """Makes `record` known and keeps it so in the background, over every kind of outage, until `unregister`.

        Returns after the first attempt, whether or not it succeeded: a worker need not wait for etcd to serve. Call
        `wait_ready` before to insist.
        """
        if self._keeper is not None:
            raise RuntimeError("already registered")
        first_attempt = asyncio.Event()
        self._keeper = start_task(self._keep(record, first_attempt), name="membership-keep")
        self._keeper.add_done_callback(lambda _: first_attempt.set())
        await first_attempt.wait()

    async def unregister(self) -> None:
        """Withdraws the record at once; if etcd is away it expires by itself."""
        if self._keeper is None:
            return
        await end_task(self._keeper)
        self._keeper = None
        if self._lease_id:
            lease_id, self._lease_id = self._lease_id, 0
            with contextlib.suppress(*_ETCD_ERRORS):
                # Only a key that is still bound to this lease goes with it: a successor's stays.
                await self._etcd.leases.revoke(lease_id, timeout=_CALL_S, max_attempts=1)

    async def watch(self) -> AsyncIterator[Joined | Left]:
        """Yields the workers that are there, then every change, for ever; an outage of etcd is no change."""
        mirror = _Mirror(self._outage_grace_s)
        look = asyncio.Event()
        hints = start_task(self._hints(look, mirror), name="membership-watch")
        backoff = Backoff()
        try:
            while True:
                look.clear()
                try:
                    revision, records = await self._snapshot()
                except _ETCD_ERRORS as error:
                    self._is_connected = False
                    mirror.disturbed(time.monotonic(), _reason(error))
                    await backoff.sleep()
                    continue
                self._is_connected = True
                backoff.reset()
                for change in mirror.update(time.monotonic(), revision, records):
                    yield change
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(mirror.next_look_s(time.monotonic())):
                        await look.wait()
        finally:
            hints.cancel()

    @property
    def _etcd(self) -> _Etcd:
        if self._client is None:
            self._client = _Etcd(self._url)
        return self._client

    async def _snapshot(self) -> tuple[int, dict[str, WorkerRecord]]:
        """The store's revision and the records in it."""
        answer = await self._etcd.keys.get(
            self._prefix, range_end=prefix_range_end(self._prefix), timeout=_CALL_S, max_attempts=1
        )
        records = {}
        for pair in answer.kvs:
            try:
                record = msgspec.msgpack.decode(pair.value, type=WorkerRecord)
            except msgspec.MsgspecError as error:
                _log.warning("ignored %s: not a worker record: %s", pair.key.decode(errors="replace"), error)
            else:
                records[record.worker_id] = record
        return int(answer.header.revision), records

    async def _hints(self, look: asyncio.Event, mirror: _Mirror) -> None:
        """Sets `look` when the watch has news; tells `mirror` of a connection that broke."""
        backoff = Backoff()
        while True:
            is_first = True
            try:
                async with contextlib.aclosing(
                    self._etcd.watches.watch(self._prefix, prefix_range_end(self._prefix))  # type: ignore[type-var]
                ) as responses:
                    async for response in responses:
                        # A second "created" is the library's own reconnect: etcd may have lost everything meanwhile.
                        if response.created and not is_first:
                            mirror.disturbed(time.monotonic(), "the watch was interrupted")
                        is_first = False
                        backoff.reset()
                        look.set()
                        if response.canceled:
                            break
            except _ETCD_ERRORS as error:
                mirror.disturbed(time.monotonic(), _reason(error))
            look.set()
            await backoff.sleep()

    async def _keep(self, record: WorkerRecord, first_attempt: asyncio.Event) -> None:
        """Registers, beats, and begins again whenever the lease or the key is lost."""
        backoff = Backoff(max_s=1.0)
        is_trouble_told = False
        while True:
            try:
                if await self._put(record):
                    _log.info("registered in etcd as %s", record.worker_id)
                    is_trouble_told = False
                    first_attempt.set()
                    backoff.reset()
                    _log.warning("registration in etcd lost: %s; registering again", await self._beat(record))
            except _ETCD_ERRORS as error:
                level = logging.DEBUG if is_trouble_told else logging.WARNING
                _log.log(level, "cannot register in etcd at %s: %s; trying again", self._url, _reason(error))
                is_trouble_told = True
            first_attempt.set()
            await backoff.sleep()

    def _key(self, record: WorkerRecord) -> str:
        return self._prefix + record.worker_id

    async def _put(self, record: WorkerRecord) -> bool:
        """Writes the record under a lease; False if a later process holds the key."""
        if await self._is_superseded(record):
            _log.error("a later process is registered as %s; is --id given twice?", record.worker_id)
            return False
        lease = await self._etcd.leases.grant(self._ttl_s, timeout=_CALL_S, max_attempts=1)
        self._lease_id = int(lease.ID)
        await self._etcd.keys.put(
            self._key(record), msgspec.msgpack.encode(record), lease=lease.ID, timeout=_CALL_S, max_attempts=1
        )
        return True

    async def _is_superseded(self, record: WorkerRecord) -> bool:
        answer = await self._etcd.keys.get(self._key(record), timeout=_CALL_S, max_attempts=1)
        try:
            return any(
                msgspec.msgpack.decode(pair.value, type=WorkerRecord).epoch > record.epoch for pair in answer.kvs
            )
        except msgspec.MsgspecError:
            return False

    async def _beat(self, record: WorkerRecord) -> str:
        """Keeps the lease alive; returns why it no longer can."""
        lost_at = time.monotonic() + self._ttl_s
        pause_s = self._ttl_s / 3
        while True:
            await asyncio.sleep(pause_s)
            try:
                if await self._etcd.renew(self._lease_id) <= 0:
                    return "the lease has expired, or etcd has lost its data"
                answer = await self._etcd.keys.get(self._key(record), timeout=_CALL_S, max_attempts=1)
            except _ETCD_ERRORS as error:
                if time.monotonic() > lost_at:
                    return f"no answer for {self._ttl_s} s: {_reason(error)}"
                _log.info("etcd at %s: %s", self._url, _reason(error))
                pause_s = 0.2  # the lease is running out
                continue
            if [pair.lease for pair in answer.kvs] != [self._lease_id]:
                return "the key was removed or overwritten"
            lost_at = time.monotonic() + self._ttl_s
            pause_s = self._ttl_s / 3


class _Etcd:
    """etcd3aio's services over a channel of our own.

    Its client's channel obeys http_proxy, takes IP addresses only, and waits up to two minutes between attempts to
    connect. Its lease keep-alive hangs on a frozen etcd, and so does not tell that a lease is lost; `renew` does.
    """

    def __init__(self, url: str) -> None:
        self.channel = open_channel(urlsplit(url).netloc)
        self.keys = KVService(self.channel)
        self.leases = LeaseService(self.channel)
        self.watches = WatchService(self.channel, reconnect_backoff_seconds=0.1, max_reconnect_backoff_seconds=1.0)

    async def renew(self, lease_id: int) -> int:
        """Renews a lease; returns its new time to live, 0 if there is no such lease."""
        call = self.leases.keep_alive(lease_id)
        try:
            async with asyncio.timeout(_CALL_S):
                async for response in call:
                    return int(response.TTL)
            return 0
        finally:
            call.cancel()


class _Mirror:
    """What is known of the workers, and which of the missing ones still have time to come back."""

    def __init__(self, outage_grace_s: float) -> None:
        self._outage_grace_s = outage_grace_s
        self._known: dict[str, WorkerRecord] = {}
        self._missing_until: dict[str, float] = {}
        self._revision = 0
        self._calm_at = 0.0
        """Until then a record may be missing because of an outage."""

    def disturbed(self, now: float, why: str) -> None:
        """etcd was away: its next snapshots may lack records of workers that live."""
        if now >= self._calm_at:
            _log.warning("etcd: %s; keeping the %d workers known so far", why, len(self._known))
        self._calm_at = now + self._outage_grace_s

    def update(self, now: float, revision: int, records: dict[str, WorkerRecord]) -> list[Joined | Left]:
        """Takes a snapshot in; returns what changed."""
        if revision < self._revision:
            self.disturbed(now, "its data was lost")
        self._revision = revision
        changes: list[Joined | Left] = [Left(self._known.pop(worker_id)) for worker_id in self._gone(now, records)]
        for worker_id, record in sorted(records.items()):
            known = self._known.get(worker_id)
            if known == record:
                continue
            if known is not None:
                changes.append(Left(known))
            self._known[worker_id] = record
            changes.append(Joined(record))
        return changes

    def _gone(self, now: float, records: dict[str, WorkerRecord]) -> list[str]:
        """Workers whose record is missing and whose time to come back, if they had any, is over."""
        missing = sorted(self._known.keys() - records.keys())
        grace_s = self._outage_grace_s if now < self._calm_at else 0.0
        self._missing_until = {key: self._missing_until.get(key, now + grace_s) for key in missing}
        gone = [worker_id for worker_id, until in self._missing_until.items() if until <= now]
        for worker_id in gone:
            del self._missing_until[worker_id]
        return gone

    def next_look_s(self, now: float) -> float:
        """How long until the next snapshot at the latest."""
        return max(0.02, min([_RESYNC_S, *(until - now for until in self._missing_until.values())]))


def _reason(error: BaseException) -> str:
    """One short line for the log."""
    cause = error.__cause__ if isinstance(error, EtcdError) else error
    if not isinstance(cause, grpc.aio.AioRpcError):
        return str(error) or "no answer in time"
    # gRPC's own text repeats itself: "failed to connect to all addresses; last error: UNKNOWN: ipv4:...: the reason".
    return f"{cause.code().name}: {(cause.details() or '').rpartition(': ')[2]}"
