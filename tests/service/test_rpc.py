"""Channels and servers over loopback: a real gRPC server, its health, reflection, errors and trace context."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from twostroke_chassis.lifecycle import StartError, listen
from twostroke_chassis.rpc import RpcServer, connection_age, open_channel, reachable_endpoint, serve, status_of_error
from twostroke_chassis.tracing import call_metadata, in_trace, in_trace_of_call, traceparent_of
from twostroke_proto.v1 import worker_pb2, worker_pb2_grpc

SERVICE = "twostroke.v1.Worker"
GIVEN = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


class Echo(worker_pb2_grpc.WorkerServicer):
    """Answers with what it was sent; keeps the trace context of the last call."""

    traceparent = ""

    async def Connect(
        self, request_iterator: AsyncIterator[worker_pb2.RouterMessage], context: grpc.aio.ServicerContext
    ) -> AsyncIterator[worker_pb2.WorkerMessage]:
        async for message in request_iterator:
            yield worker_pb2.WorkerMessage(hello=worker_pb2.WorkerHello(worker_id=message.hello.router_id))

    async def Drain(
        self, request: worker_pb2.DrainRequest, context: grpc.aio.ServicerContext
    ) -> worker_pb2.DrainResponse:
        with in_trace_of_call(context):
            self.traceparent = traceparent_of()
        if request.grace_ms == 1:
            await context.abort(status_of_error(worker_pb2.ERROR_CODE_OVERLOADED), "no room")
        return worker_pb2.DrainResponse(cancelled=request.grace_ms)


async def start(echo: Echo, address: str = "127.0.0.1:0") -> RpcServer:
    register = [lambda server: worker_pb2_grpc.add_WorkerServicer_to_server(echo, server)]
    return await serve(address, register, [SERVICE], flag="--grpc", has_reflection=True)


@pytest.fixture
def echo() -> Echo:
    return Echo()


@pytest.fixture
async def server(echo: Echo, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[RpcServer]:
    for name in ("http_proxy", "https_proxy", "grpc_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    started = await start(echo)
    yield started
    await started.stop(0)


@pytest.fixture
async def channel(server: RpcServer) -> AsyncIterator[grpc.aio.Channel]:
    async with open_channel(server.endpoint) as opened:
        yield opened


async def test_calls_ignore_proxies_and_carry_the_trace_context(echo: Echo, channel: grpc.aio.Channel) -> None:
    stub = worker_pb2_grpc.WorkerStub(channel)
    request = worker_pb2.DrainRequest(grace_ms=7)
    assert (await stub.Drain(request, metadata=call_metadata(GIVEN), timeout=5)).cancelled == 7
    assert echo.traceparent == GIVEN
    with in_trace(None) as current:
        await stub.Drain(request, metadata=call_metadata(), timeout=5)
    assert echo.traceparent == current != GIVEN


async def test_large_messages_pass_both_ways(channel: grpc.aio.Channel) -> None:
    stub = worker_pb2_grpc.WorkerStub(channel)
    call = stub.Connect()
    big = "x" * (20 << 20)
    await call.write(worker_pb2.RouterMessage(hello=worker_pb2.RouterHello(router_id=big)))
    answer = await asyncio.wait_for(call.read(), 20)
    assert answer.hello.worker_id == big
    call.cancel()


async def test_an_error_has_its_status(channel: grpc.aio.Channel) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await worker_pb2_grpc.WorkerStub(channel).Drain(worker_pb2.DrainRequest(grace_ms=1), timeout=5)
    assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert refused.value.details() == "no room"


def test_every_error_code_has_a_status() -> None:
    statuses = {code: status_of_error(code) for code in worker_pb2.ErrorCode.values()}
    assert statuses.pop(worker_pb2.ERROR_CODE_UNSPECIFIED) is grpc.StatusCode.OK
    assert grpc.StatusCode.OK not in statuses.values()
    assert statuses[worker_pb2.ERROR_CODE_INVALID] is grpc.StatusCode.INVALID_ARGUMENT
    assert statuses[worker_pb2.ERROR_CODE_DRAINING] is grpc.StatusCode.UNAVAILABLE
    assert status_of_error(4711) is grpc.StatusCode.INTERNAL


async def test_health_follows_the_service(server: RpcServer, channel: grpc.aio.Channel) -> None:
    stub = health_pb2_grpc.HealthStub(channel)

    async def status(name: str) -> int:
        return int((await stub.Check(health_pb2.HealthCheckRequest(service=name), timeout=5)).status)

    assert {await status(name) for name in ("", SERVICE)} == {health_pb2.HealthCheckResponse.SERVING}
    await server.set_serving(False)
    assert {await status(name) for name in ("", SERVICE)} == {health_pb2.HealthCheckResponse.NOT_SERVING}
    with pytest.raises(grpc.aio.AioRpcError, match="NOT_FOUND"):
        await status("twostroke.v1.Nothing")


async def test_reflection_lists_and_describes(channel: grpc.aio.Channel) -> None:
    call = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo()
    await call.write(reflection_pb2.ServerReflectionRequest(list_services=""))
    listed = {service.name for service in (await call.read()).list_services_response.service}
    assert {SERVICE, "grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"} <= listed
    await call.write(reflection_pb2.ServerReflectionRequest(file_containing_symbol=SERVICE))
    described = (await call.read()).file_descriptor_response.file_descriptor_proto
    assert any(b"DrainRequest" in file for file in described)
    call.cancel()


async def test_a_port_in_use_is_one_line(server: RpcServer, echo: Echo) -> None:
    with pytest.raises(StartError) as refused:
        await start(echo, server.endpoint)
    assert str(refused.value) == f"--grpc {server.endpoint}: the port is in use by another process"
    with pytest.raises(StartError, match=r"--http .*: the port is in use by another process"):
        listen(server.endpoint, "--http")


async def test_an_address_of_another_machine_is_one_line(echo: Echo) -> None:
    with pytest.raises(StartError, match=r"--grpc 192\.0\.2\.1:7000: cannot listen: Cannot assign requested address"):
        await start(echo, "192.0.2.1:7000")
    with pytest.raises(StartError, match=r"--grpc no-such-host\.invalid:0: cannot listen: "):
        await start(echo, "no-such-host.invalid:0")


async def test_a_channel_finds_a_server_that_comes_back(echo: Echo) -> None:
    with listen("127.0.0.1:0", "--grpc") as taken:
        endpoint = f"127.0.0.1:{taken.getsockname()[1]}"
    async with open_channel(endpoint) as channel:
        stub = worker_pb2_grpc.WorkerStub(channel)

        async def drained() -> int:
            async with asyncio.timeout(5):
                while True:
                    with contextlib.suppress(grpc.aio.AioRpcError):
                        return int((await stub.Drain(worker_pb2.DrainRequest(grace_ms=3), timeout=1)).cancelled)
                    await asyncio.sleep(0.05)

        for _ in range(2):
            with pytest.raises(grpc.aio.AioRpcError, match="UNAVAILABLE"):
                await stub.Drain(worker_pb2.DrainRequest(), timeout=3)
            started = await start(echo, endpoint)
            assert await drained() == 3
            await started.stop(0)


async def test_a_connection_that_grew_old_is_left_and_its_running_call_goes_on() -> None:
    peers: list[str] = []

    class Named(Echo):
        async def Drain(
            self, request: worker_pb2.DrainRequest, context: grpc.aio.ServicerContext
        ) -> worker_pb2.DrainResponse:
            peers.append(context.peer())
            return worker_pb2.DrainResponse()

    servicer = Named()
    register = [lambda server: worker_pb2_grpc.add_WorkerServicer_to_server(servicer, server)]
    server = await serve("127.0.0.1:0", register, [SERVICE], options=connection_age(0.3, 60))
    async with open_channel(server.endpoint) as channel:
        stub = worker_pb2_grpc.WorkerStub(channel)
        stream = stub.Connect()
        await stream.write(worker_pb2.RouterMessage(hello=worker_pb2.RouterHello(router_id="first")))
        assert (await stream.read()).hello.worker_id == "first"
        async with asyncio.timeout(30):
            while len(set(peers)) < 2:
                await stub.Drain(worker_pb2.DrainRequest(), timeout=5, wait_for_ready=True)
                await asyncio.sleep(0.05)
        await stream.write(worker_pb2.RouterMessage(hello=worker_pb2.RouterHello(router_id="second")))
        assert (await stream.read()).hello.worker_id == "second"
        await stream.done_writing()
    await server.stop(0)


def test_without_an_age_connections_stay() -> None:
    assert connection_age(0, 60) == ()
    assert dict(connection_age(300, 1e9)) == {
        "grpc.max_connection_age_ms": 300_000,
        "grpc.max_connection_age_grace_ms": 2**31 - 1,
    }


def test_what_others_can_dial() -> None:
    assert reachable_endpoint("127.0.0.1:80") == "127.0.0.1:80"
    host, _, port = reachable_endpoint("0.0.0.0:80").rpartition(":")
    assert port == "80"
    assert host not in {"", "0.0.0.0"}
    assert socket.getaddrinfo(host.strip("[]"), 80)
