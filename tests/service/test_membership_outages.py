"""Membership against a real etcd that is killed, emptied, frozen and absent."""

from __future__ import annotations

import asyncio

import pytest
from twostroke_chassis.lifecycle import StartError
from twostroke_chassis.membership import Joined

from tests.support.members import GRACE_S, TTL_S, member, observing, record
from tests.support.servers import EtcdServer

pytestmark = [pytest.mark.service, pytest.mark.slow]


@pytest.mark.parametrize("keep_data", [True, False], ids=["with data", "empty"])
async def test_an_etcd_restart_is_no_news_and_all_goes_on_after_it(etcd: EtcdServer, keep_data: bool) -> None:
    async with member(etcd, "f") as worker, member(etcd, "f") as dying, observing(etcd.url, "f") as observer:
        await worker.register(record("d0"))
        await dying.register(record("d1"))
        await observer.until(lambda: observer.present() == {"d0", "d1"})
        # Revisions ahead of what the new store will reach: a watch resumed by revision would stay silent.
        for _ in range(50):
            await worker._etcd.keys.put("/elsewhere", b"")
        await asyncio.to_thread(etcd.kill)
        assert dying._keeper is not None
        dying._keeper.cancel()  # as if its process had died in the meantime
        await asyncio.sleep(0.5)
        assert observer.left() == []
        await asyncio.to_thread(etcd.restart, keep_data=keep_data)
        await observer.until(lambda: observer.left() == ["d1"], GRACE_S + TTL_S + 4)
        async with member(etcd, "f") as newcomer:
            await newcomer.register(record("d2"))
            await observer.until(lambda: observer.present() == {"d0", "d2"})
            _, stored = await newcomer._snapshot()
            assert stored == {"d0": record("d0"), "d2": record("d2")}
            assert observer.left() == ["d1"], "the worker that lived through the outage never left"
        await observer.until(lambda: observer.present() == {"d0"}, 2)


async def test_a_frozen_etcd_loses_no_worker(etcd: EtcdServer) -> None:
    async with member(etcd, "g") as worker, observing(etcd.url, "g") as observer:
        await worker.register(record("d0"))
        await observer.until(lambda: observer.present() == {"d0"})
        etcd.freeze()
        await asyncio.sleep(TTL_S + 1.5)
        etcd.thaw()
        await asyncio.sleep(GRACE_S + 0.5)
        assert observer.changes == [Joined(record("d0"))]
        assert (await worker._snapshot())[1] == {"d0": record("d0")}


async def test_etcd_may_come_later(etcd: EtcdServer) -> None:
    etcd.kill()
    async with member(etcd, "h") as worker, observing(etcd.url, "h") as observer:
        with pytest.raises(StartError, match=f"etcd at {etcd.url} did not answer within 0.5 s"):
            await worker.wait_ready(0.5)
        await worker.register(record("d0"))
        assert observer.changes == []
        ready = asyncio.create_task(worker.wait_ready(20))
        await asyncio.to_thread(etcd.start)
        await ready
        await observer.until(lambda: observer.present() == {"d0"})
