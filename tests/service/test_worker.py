"""A worker service as a router meets it: real process, real engine with a tiny model, real etcd and Redis."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
from twostroke_chassis.membership import Joined, Left, Membership
from twostroke_chassis.prefix_index import PrefixMirror
from twostroke_chassis.rpc import open_channel
from twostroke_engine.kv.hashing import block_hashes
from twostroke_proto.v1 import types_pb2, worker_pb2, worker_pb2_grpc

from tests.support.cluster import wait_until
from tests.support.servers import EtcdServer, RedisServer, free_port
from tests.support.tiny_model import make_tiny_llama
from tests.support.worker import RouterClient, WorkerProcess

pytestmark = pytest.mark.service

PROMPT = [5 + i % 250 for i in range(40)]
Spawn = Callable[..., WorkerProcess]


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """URLs of an etcd and a Redis for this module."""
    folder = tmp_path_factory.mktemp("servers")
    with EtcdServer(folder / "etcd") as etcd, RedisServer(folder / "redis") as redis:
        yield etcd.url, redis.url


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def spawn(servers: tuple[str, str], model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Spawn]:
    """Starts workers, and kills those that are left."""
    workers: list[WorkerProcess] = []

    def start(role: str, *flags: str) -> WorkerProcess:
        etcd, redis = servers
        common = ["--model-dir", str(model), "--dtype", "float32", "--num-blocks", "512", "--wait", "20"]
        folder = tmp_path_factory.mktemp(role)
        workers.append(WorkerProcess(role, folder, "--etcd", etcd, "--redis", redis, *common, *flags))
        return workers[-1]

    yield start
    for worker in workers:
        worker.__exit__()


@pytest.fixture(scope="module")
def decode_worker(spawn: Spawn) -> WorkerProcess:
    """A decode worker that the tests share (the last of them kills it); alone it is a colocated cluster."""
    return spawn("decode", "--id", "decode-shared", "--resume-grace", "2")


@pytest.fixture(scope="module")
def decode(decode_worker: WorkerProcess) -> str:
    """The shared decode worker's endpoint."""
    return decode_worker.endpoint()


@pytest.fixture(scope="module")
def prefill_worker(spawn: Spawn) -> WorkerProcess:
    """A prefill worker that the tests share; the last of them drain and kill it."""
    return spawn("prefill")


@pytest.fixture(scope="module")
def prefill(prefill_worker: WorkerProcess) -> str:
    """The shared prefill worker's endpoint."""
    return prefill_worker.endpoint()


async def run_whole(endpoint: str, name: str, **fields: Any) -> dict[int, list[int]]:
    """Tokens of a request that one worker runs to its end."""
    async with RouterClient(endpoint, f"router-{name}") as router:
        await router.submit(name, PROMPT, **fields)
        end = await router.ended(name)
        assert end.error == worker_pb2.ERROR_CODE_UNSPECIFIED, end.message
        return router.tokens[name]


# ---- one stream ------------------------------------------------------------------------------------------------------


async def test_a_request_runs_and_its_tokens_arrive(decode: str) -> None:
    async with RouterClient(decode, "whole") as router:
        assert router.worker_hello.worker_id == "decode-shared"
        assert router.worker_hello.epoch > 0
        await router.submit("whole", PROMPT, n=2, temperature=1.0, max_tokens=20)
        end = await router.ended("whole")
        assert end.error == worker_pb2.ERROR_CODE_UNSPECIFIED
        assert end.facts.prefill_s > 0
        assert [router.num_tokens("whole", choice) for choice in (0, 1)] == [20, 20]
        assert router.tokens["whole"][0] != router.tokens["whole"][1]
        assert set(router.finish["whole"].values()) == {types_pb2.FINISH_REASON_LENGTH}
        await router.until(router.is_idle)
        assert router.load.steps >= 20


async def test_the_first_message_must_be_a_hello_of_this_version(decode: str) -> None:
    async def status_of(first: worker_pb2.RouterMessage) -> grpc.StatusCode:
        async with open_channel(decode) as channel:
            call = worker_pb2_grpc.WorkerStub(channel).Connect()
            await call.write(first)
            with pytest.raises(grpc.aio.AioRpcError) as refusal:
                await call.read()
            return refusal.value.code()

    cancel = worker_pb2.RouterMessage(cancel=worker_pb2.Cancel(request_id="x"))
    assert await status_of(cancel) == grpc.StatusCode.INVALID_ARGUMENT
    nameless = worker_pb2.RouterMessage(hello=worker_pb2.RouterHello(version=1))
    assert await status_of(nameless) == grpc.StatusCode.INVALID_ARGUMENT
    newer = worker_pb2.RouterMessage(hello=worker_pb2.RouterHello(router_id="r", version=2))
    assert await status_of(newer) == grpc.StatusCode.FAILED_PRECONDITION


async def test_a_bad_request_ends_alone(decode: str) -> None:
    async with RouterClient(decode, "bad") as router:
        await router.submit("good", PROMPT, max_tokens=50)
        await router.submit("empty", [])
        await router.submit("unknown-token", [10**6])
        await router.submit("no-choice", PROMPT, n=0)
        await router.submit("nowhere", PROMPT, to=types_pb2.KVDestination(lease_id="l"))
        await router.reserve("no-time", PROMPT, ttl_ms=0)
        for name in ("empty", "unknown-token", "no-choice", "nowhere", "no-time"):
            assert (await router.ended(name)).error == worker_pb2.ERROR_CODE_INVALID, name
        assert (await router.ended("good")).error == worker_pb2.ERROR_CODE_UNSPECIFIED
        assert router.num_tokens("good") == 50


async def test_a_heartbeat_comes_each_second(decode: str) -> None:
    async with RouterClient(decode, "quiet") as router:
        await router.until(router.is_idle)
        before = router.num_updates
        await asyncio.sleep(2.5)
        assert 2 <= router.num_updates - before <= 5


async def test_cancel_ends_a_request_and_frees_its_blocks(decode: str) -> None:
    async with RouterClient(decode, "cancel") as router:
        await router.submit("long", PROMPT, n=2, max_tokens=1500)
        await router.until(lambda: router.num_tokens("long") >= 5)
        assert not router.is_idle()
        await router.cancel("long")
        await router.cancel("never-heard-of")
        assert (await router.ended("long")).error == worker_pb2.ERROR_CODE_CANCELLED
        await router.until(router.is_idle, 5)


async def test_what_was_computed_can_be_found_through_redis(decode: str, servers: tuple[str, str]) -> None:
    hashes = block_hashes(PROMPT, 16, cache_salt=b"published")
    async with PrefixMirror(servers[1], "default") as mirror:
        assert mirror.longest_match("decode-shared", hashes) == 0
        await run_whole(decode, "published", cache_salt=b"published")
        for _ in range(500):
            if mirror.longest_match("decode-shared", hashes) == len(hashes) == 2:
                return
            await asyncio.sleep(0.02)
        pytest.fail("not published within 10 s")


# ---- reconnecting ----------------------------------------------------------------------------------------------------


async def test_a_dropped_stream_resumes_without_losing_or_repeating_a_token(decode: str) -> None:
    fields: dict[str, Any] = {"n": 2, "temperature": 1.0, "max_tokens": 300}
    expected = await run_whole(decode, "undisturbed", **fields)
    router = RouterClient(decode, "resuming")
    await router.connect()
    await router.submit("r", PROMPT, **fields)
    for wanted in (20, 100):
        await router.until(lambda wanted=wanted: router.num_tokens("r") >= wanted)  # type: ignore[misc]
        await router.drop()
        await asyncio.sleep(0.1)  # steps go on meanwhile
        await router.connect()
        await router.submit("r", PROMPT, **fields)  # a duplicate: ignored
    assert (await router.ended("r")).error == worker_pb2.ERROR_CODE_UNSPECIFIED
    await router.drop()
    assert router.tokens["r"] == expected


async def test_an_end_that_came_while_disconnected_is_told_on_resume(decode: str) -> None:
    router = RouterClient(decode, "late")
    await router.connect()
    await router.submit("r", PROMPT, max_tokens=30)
    await router.until(lambda: router.num_tokens("r") >= 1)
    await router.drop()
    async with RouterClient(decode, "watching") as other:
        await other.until(other.is_idle)
    await router.connect()
    assert (await router.ended("r")).error == worker_pb2.ERROR_CODE_UNSPECIFIED
    assert router.num_tokens("r") == 30
    await router.drop()


async def test_resuming_a_request_that_the_worker_does_not_know_ends_it(decode: str) -> None:
    router = RouterClient(decode, "restarted")
    await router.connect(resume=["of-an-earlier-process"])
    end = await router.ended("of-an-earlier-process")
    assert end.error == worker_pb2.ERROR_CODE_INTERNAL
    assert "unknown request" in end.message
    await router.drop()


async def test_a_newer_stream_of_the_same_router_supersedes_the_older(decode: str) -> None:
    older, newer = RouterClient(decode, "twin"), RouterClient(decode, "twin")
    await older.connect(is_reading=False)
    await newer.connect()
    async with asyncio.timeout(5):
        while await older._call.read() is not grpc.aio.EOF:
            pass
    await newer.submit("r", PROMPT)
    assert (await newer.ended("r")).error == worker_pb2.ERROR_CODE_UNSPECIFIED
    await older.drop()
    await newer.drop()


async def test_requests_of_a_router_that_stays_away_are_cancelled(decode: str) -> None:
    router = RouterClient(decode, "gone")
    await router.connect()
    await router.submit("orphan", PROMPT, n=4, max_tokens=1900)
    await router.until(lambda: router.num_tokens("orphan") >= 1)
    await router.drop()
    async with RouterClient(decode, "other") as other:
        await other.until(lambda: other.load.running == 4)
        await other.until(other.is_idle, 5)


async def test_a_router_that_does_not_read_stalls_no_one(decode: str) -> None:
    slow = RouterClient(decode, "slow")
    await slow.connect(is_reading=False)
    # Some 4 MB of alternatives: more than the flow-control window.
    await slow.submit("slow", PROMPT, n=4, temperature=1.0, max_tokens=400, logprobs=200)
    async with RouterClient(decode, "fast") as fast:
        await fast.submit("fast", PROMPT, max_tokens=300)
        assert (await fast.ended("fast")).error == worker_pb2.ERROR_CODE_UNSPECIFIED
        assert fast.num_tokens("fast") == 300
        await fast.until(fast.is_idle)  # the slow router's request ended too, its tokens unread
    assert slow.num_updates == 0
    slow.start_reading()
    assert (await slow.ended("slow")).error == worker_pb2.ERROR_CODE_UNSPECIFIED
    assert [slow.num_tokens("slow", choice) for choice in range(4)] == [400] * 4
    await slow.drop()


# ---- the process -----------------------------------------------------------------------------------------------------


async def test_sigterm_unregisters_finishes_what_runs_and_exits_well(spawn: Spawn, servers: tuple[str, str]) -> None:
    worker = spawn("decode", "--id", "draining", "--channels", "tcp,collective")
    endpoint = worker.endpoint()
    async with Membership(servers[0], "default") as membership, RouterClient(endpoint, "r") as router:
        watch = membership.watch()
        async for change in watch:
            if isinstance(change, Joined) and change.record.worker_id == "draining":
                break
        assert change.record.endpoint == endpoint
        assert change.record.block_size == 16
        assert change.record.channels == ("tcp", "collective:gloo")
        await router.submit("running", PROMPT, n=4, max_tokens=600)
        await router.until(lambda: router.num_tokens("running") >= 1)
        worker.terminate()
        await router.until(lambda: router.load.draining)
        await router.submit("too-late", PROMPT)
        assert (await router.ended("too-late")).error == worker_pb2.ERROR_CODE_DRAINING
        async for change in watch:
            if isinstance(change, Left) and change.record.worker_id == "draining":
                break
        assert (await router.ended("running")).error == worker_pb2.ERROR_CODE_UNSPECIFIED
        assert router.num_tokens("running", 3) == 600
        assert await asyncio.to_thread(worker.exit_code) == 0, worker.log()


def test_sigterm_while_the_model_loads_ends_both_processes(spawn: Spawn) -> None:
    worker = spawn("prefill")
    service = psutil.Process(worker.process.pid)
    wait_until(lambda: bool(service.children()), 20, "an engine")
    engine = worker.engine()
    worker.terminate()
    assert worker.exit_code() == 0, worker.log()
    assert not engine.is_running()
    assert "Traceback" not in worker.log()


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--model-dir", "/nowhere/at-all"], "/nowhere/at-all"),
        (["--etcd", "http://127.0.0.1:1", "--wait", "0.5"], "etcd"),
        (["--block-size", "24"], "--block-size"),
        (["--listen", "127.0.0.1:PORT-IN-USE"], "in use"),
    ],
)
def test_a_start_that_fails_says_why_in_one_line(
    spawn: Spawn, servers: tuple[str, str], flags: list[str], expected: str
) -> None:
    port_in_use = servers[0].rpartition(":")[2]
    worker = spawn("decode", *[flag.replace("PORT-IN-USE", port_in_use) for flag in flags])
    assert worker.exit_code(30) == 1
    assert "Traceback" not in worker.log()
    own = [line for line in worker.log().splitlines() if line.startswith("twostroke-decode: ")]
    assert len(own) == 1
    assert expected in own[0]


# ---- a pair ----------------------------------------------------------------------------------------------------------


async def hand_off(prefill: str, decode: str, name: str, **fields: Any) -> dict[int, list[int]]:
    """Tokens of a request whose prompt one worker computes and whose rest the other, as a router runs it."""
    async with RouterClient(prefill, f"{name}-p") as first, RouterClient(decode, f"{name}-d") as rest:
        await rest.reserve(name, PROMPT, **fields)
        await rest.until(lambda: name in rest.reserved)
        destination = rest.reserved[name]
        assert destination.endpoint == decode
        await first.submit(name, PROMPT, to=destination, **fields)
        for router in (first, rest):
            end = await router.ended(name)
            assert end.error == worker_pb2.ERROR_CODE_UNSPECIFIED, end.message
            assert end.facts.kv_bytes > 0
            await router.until(router.is_idle, 5)
        return {choice: tokens + rest.tokens[name].get(choice, []) for choice, tokens in first.tokens[name].items()}


@pytest.mark.parametrize("sampling", [{}, {"n": 3, "temperature": 1.0}], ids=["greedy", "sampled"])
async def test_prefill_and_decode_give_the_tokens_of_a_colocated_run(
    prefill: str, decode: str, sampling: dict[str, Any]
) -> None:
    salt = bytes([len(sampling)])
    fields = {"max_tokens": 40, "cache_salt": b"pair" + salt, **sampling}
    together = await hand_off(prefill, decode, f"pair{len(sampling)}", **fields)
    alone = await run_whole(decode, f"colocated{len(sampling)}", **{**fields, "cache_salt": b"alone" + salt})
    assert together == alone
    assert all(len(tokens) == 40 for tokens in together.values())


async def test_a_reservation_cancelled_before_its_transfer_frees_everything(decode: str) -> None:
    async with RouterClient(decode, "reserving") as router:
        await router.reserve("reserved", PROMPT)
        await router.until(lambda: "reserved" in router.reserved)
        assert not router.is_idle()
        await router.cancel("reserved")
        assert (await router.ended("reserved")).error == worker_pb2.ERROR_CODE_CANCELLED
        await router.until(router.is_idle, 5)


async def test_prefill_for_a_decode_worker_that_is_not_there_ends_with_transfer(prefill: str) -> None:
    nowhere = types_pb2.KVDestination(
        worker_id="gone", endpoint=f"127.0.0.1:{free_port()}", lease_id="l", epoch=1, kv_fingerprint="?", ttl_ms=5000
    )
    async with RouterClient(prefill, "to-nowhere") as router:
        await router.submit("lost", PROMPT, to=nowhere)
        assert (await router.ended("lost")).error == worker_pb2.ERROR_CODE_TRANSFER
        await router.until(router.is_idle, 5)


# ---- ends: these use up the shared workers, so they come last --------------------------------------------------------


async def test_the_drain_call_cancels_what_does_not_end_in_time(prefill: str) -> None:
    async with RouterClient(prefill, "r") as router, open_channel(prefill) as channel:
        await router.submit("long", PROMPT, n=8, max_tokens=1900)
        await router.until(lambda: router.num_tokens("long") >= 1)
        answer = await worker_pb2_grpc.WorkerStub(channel).Drain(worker_pb2.DrainRequest(grace_ms=100))
        assert answer.cancelled == 1
        assert (await router.ended("long")).error == worker_pb2.ERROR_CODE_CANCELLED
        await router.until(router.is_idle, 5)
        assert router.load.draining


def test_when_the_engine_is_killed_the_service_says_so_and_exits(decode: str, decode_worker: WorkerProcess) -> None:
    decode_worker.engine().kill()
    assert decode_worker.exit_code() == 1
    last_line = decode_worker.log().splitlines()[-1]
    assert last_line == "twostroke-decode: the engine process was killed by signal 9"
    assert "Traceback" not in decode_worker.log()


def test_when_the_service_is_killed_its_engine_goes_too(prefill: str, prefill_worker: WorkerProcess) -> None:
    engine = prefill_worker.engine()
    assert "Traceback" not in prefill_worker.log()
    prefill_worker.process.kill()
    prefill_worker.process.wait()
    killed_s = time.monotonic()
    psutil.wait_procs([engine], timeout=10)
    assert not engine.is_running() or engine.status() == psutil.STATUS_ZOMBIE
    assert time.monotonic() - killed_s < 5
