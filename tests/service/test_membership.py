"""Membership against a real etcd that is well."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from twostroke_chassis.membership import Joined, Left, new_epoch

from tests.support.members import TTL_S, member, observing, record
from tests.support.servers import EtcdServer

pytestmark = [pytest.mark.service, pytest.mark.slow]


@pytest.fixture(scope="module")
def shared_etcd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdServer]:
    """One etcd for the tests that leave it alone; each uses a cluster name of its own."""
    with EtcdServer(tmp_path_factory.mktemp("etcd")) as server:
        yield server


async def test_a_watch_sees_those_already_there_then_changes(
    shared_etcd: EtcdServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("grpc_proxy", "http://127.0.0.1:9")
    async with member(shared_etcd, "a") as first, member(shared_etcd, "a") as second:
        await first.wait_ready(5)
        await first.register(record("d0"))
        async with observing(shared_etcd.url, "a") as observer:
            await observer.until(lambda: observer.changes == [Joined(record("d0"))])
            await second.register(record("d1"))
            await observer.until(lambda: observer.changes[1:] == [Joined(record("d1"))], 1)
            await first.unregister()
            await observer.until(lambda: observer.changes[2:] == [Left(record("d0"))], 1)


async def test_clusters_do_not_see_each_other_and_strangers_are_ignored(shared_etcd: EtcdServer) -> None:
    async with member(shared_etcd, "b") as mine, member(shared_etcd, "b2") as other, member(shared_etcd, "b") as raw:
        await raw._etcd.keys.put("/twostroke/b/workers/stray", b"\xc1 not msgpack")
        await other.register(record("theirs"))
        await mine.register(record("mine"))
        async with observing(shared_etcd.url, "b") as observer:
            await observer.until(lambda: observer.present() == {"mine"})
            await asyncio.sleep(0.2)
            assert observer.present() == {"mine"}


async def test_a_killed_process_leaves_when_its_lease_expires(shared_etcd: EtcdServer) -> None:
    program = (
        "import asyncio, sys; from tests.support.members import *\n"
        "async def main():\n"
        f"    await Membership(sys.argv[1], 'c', ttl_s={TTL_S}).register(record('victim'))\n"
        "    await asyncio.sleep(60)\n"
        "asyncio.run(main())"
    )
    root = Path(__file__).parents[2]
    paths = [str(root), *(path for path in sys.path if path.startswith(str(root)) and "site-packages" not in path)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    child = await asyncio.create_subprocess_exec(sys.executable, "-c", program, shared_etcd.url, env=environment)
    try:
        async with observing(shared_etcd.url, "c") as observer:
            await observer.until(lambda: observer.present() == {"victim"}, 20)
            await asyncio.sleep(TTL_S + 0.5)
            assert observer.left() == [], "a live process must be kept alive beyond its lease"
            child.kill()
            assert await observer.until(lambda: observer.left() == ["victim"]) <= TTL_S + 2
    finally:
        with contextlib.suppress(ProcessLookupError):
            child.kill()
        await child.wait()


async def test_a_successor_takes_the_id_over_at_once_and_the_old_process_does_not_fight(
    shared_etcd: EtcdServer,
) -> None:
    old, new = record("d0", epoch=new_epoch()), record("d0", epoch=new_epoch() + 1)
    async with member(shared_etcd, "d") as zombie, member(shared_etcd, "d") as successor:
        await zombie.register(old)
        async with observing(shared_etcd.url, "d") as observer:
            await observer.until(lambda: observer.changes == [Joined(old)])
            await successor.register(new)
            await observer.until(lambda: observer.changes[1:] == [Left(old), Joined(new)], 1)
            await asyncio.sleep(1.5)  # two beats of the old process: it sees that its key is another's
            await zombie.unregister()
            await asyncio.sleep(0.3)
            assert observer.changes[3:] == []


async def test_a_key_removed_by_hand_comes_back(shared_etcd: EtcdServer) -> None:
    async with member(shared_etcd, "e") as worker, observing(shared_etcd.url, "e") as observer:
        await worker.register(record("d0"))
        await observer.until(lambda: observer.present() == {"d0"})
        await worker._etcd.keys.delete("/twostroke/e/workers/d0")
        await observer.until(lambda: observer.left() == ["d0"], 1)
        await observer.until(lambda: observer.present() == {"d0"}, TTL_S + 1)
