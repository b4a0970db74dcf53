"""Workers and watchers for the membership tests: a record, a short lease, and what a watch has seen."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from twostroke_chassis.membership import Joined, Left, Membership, WorkerRecord

from tests.support.servers import EtcdServer

TTL_S = 2
GRACE_S = 2.5


def record(worker_id: str, epoch: int = 1) -> WorkerRecord:
    return WorkerRecord(
        worker_id=worker_id,
        role="decode",
        endpoint="127.0.0.1:7000",
        epoch=epoch,
        model_name="tiny",
        model_fingerprint="m",
        kv_fingerprint="k",
        block_size=16,
        max_model_len=2048,
        channels=("collective",),
        version="1",
    )


class Observer:
    """What one watch has seen so far."""

    def __init__(self) -> None:
        self.changes: list[Joined | Left] = []

    def present(self) -> set[str]:
        there: set[str] = set()
        for change in self.changes:
            (there.add if isinstance(change, Joined) else there.discard)(change.record.worker_id)
        return there

    def left(self) -> list[str]:
        return [change.record.worker_id for change in self.changes if isinstance(change, Left)]

    async def until(self, condition: Callable[[], bool], seconds: float = 8) -> float:
        begin = time.monotonic()
        while not condition():
            assert time.monotonic() - begin < seconds, f"not within {seconds} s; seen: {self.changes}"
            await asyncio.sleep(0.02)
        return time.monotonic() - begin


@asynccontextmanager
async def observing(etcd_url: str, cluster: str) -> AsyncIterator[Observer]:
    observer = Observer()

    async def follow(membership: Membership) -> None:
        async for change in membership.watch():
            observer.changes.append(change)

    async with Membership(etcd_url, cluster, outage_grace_s=GRACE_S) as membership:
        task = asyncio.create_task(follow(membership))
        try:
            yield observer
            assert not task.done(), f"the watch ended: {task}"
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task


def member(etcd: EtcdServer, cluster: str) -> Membership:
    return Membership(etcd.url, cluster, ttl_s=TTL_S)
