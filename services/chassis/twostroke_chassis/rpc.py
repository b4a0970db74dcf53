"""gRPC between and into services: channels, servers, health, and what an error is called on the wire."""

from __future__ import annotations

import math
import os
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import grpc
import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from twostroke_proto.v1 import worker_pb2

from twostroke_chassis.lifecycle import StartError, cannot_listen
from twostroke_chassis.settings import join_host_port, split_host_port

MAX_MESSAGE_BYTES = 64 << 20
"""A prompt of a million tokens is 3 to 5 MB; a resume of many streams at once is the largest message."""

_Options = tuple[tuple[str, int], ...]
_MAX_MS = 2**31 - 1

_COMMON_OPTIONS: _Options = (
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
)

CHANNEL_OPTIONS: _Options = (
    *_COMMON_OPTIONS,
    # Not below 10 s: etcd and gRPC servers with default settings close connections that ping more often than each 5 s.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.enable_http_proxy", 0),
    # Channels to one endpoint share a connection by default: closing or freezing one would touch the others.
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 1_000),
    ("grpc.max_reconnect_backoff_ms", 1_000),
)

SERVER_OPTIONS: _Options = (
    *_COMMON_OPTIONS,
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    # With it on, a second server on a port in use starts without an error, and gets half of the connections.
    ("grpc.so_reuseport", 0),
)


def connection_age(max_age_s: float, grace_s: float) -> _Options:
    """Server options that send clients away after a while, so that those that stay connected spread over servers.

    A client told to go connects again by itself and makes its next calls there; calls that run may end here.

    Args:
        max_age_s: age at which a connection takes no new call, 10 % more or less; 0: any age.
        grace_s: how long calls that run then may take; after it they are broken off.
    """
    if not max_age_s:
        return ()
    ages = {"grpc.max_connection_age_ms": max_age_s, "grpc.max_connection_age_grace_ms": grace_s}
    return tuple((name, min(_MAX_MS, math.ceil(age_s * 1000))) for name, age_s in ages.items())


STATUS_OF_ERROR: dict[int, grpc.StatusCode] = {
    worker_pb2.ERROR_CODE_UNSPECIFIED: grpc.StatusCode.OK,
    worker_pb2.ERROR_CODE_CANCELLED: grpc.StatusCode.CANCELLED,
    worker_pb2.ERROR_CODE_INVALID: grpc.StatusCode.INVALID_ARGUMENT,
    worker_pb2.ERROR_CODE_OVERLOADED: grpc.StatusCode.RESOURCE_EXHAUSTED,
    worker_pb2.ERROR_CODE_DEADLINE: grpc.StatusCode.DEADLINE_EXCEEDED,
    worker_pb2.ERROR_CODE_TRANSFER: grpc.StatusCode.UNAVAILABLE,
    worker_pb2.ERROR_CODE_NUMERIC: grpc.StatusCode.INTERNAL,
    worker_pb2.ERROR_CODE_DRAINING: grpc.StatusCode.UNAVAILABLE,
    worker_pb2.ERROR_CODE_INTERNAL: grpc.StatusCode.INTERNAL,
}
"""The gRPC status a client sees for an error of ours."""


def status_of_error(code: int) -> grpc.StatusCode:
    """The gRPC status for a `worker.proto` ErrorCode; a code of a later version is INTERNAL."""
    return STATUS_OF_ERROR.get(code, grpc.StatusCode.INTERNAL)


def open_channel(endpoint: str) -> grpc.aio.Channel:
    """A channel to HOST:PORT inside the cluster. It connects when first used, and again by itself."""
    return grpc.aio.insecure_channel(f"dns:///{endpoint}", options=CHANNEL_OPTIONS)


@dataclass(frozen=True)
class RpcServer:
    """A gRPC server that listens."""

    server: grpc.aio.Server
    endpoint: str
    """HOST:PORT it is bound to, with the real port."""
    health: health.aio.HealthServicer
    services: tuple[str, ...]

    async def set_serving(self, is_serving: bool) -> None:
        """Sets what the health service says of every service here, and of the server as a whole."""
        status = health_pb2.HealthCheckResponse.SERVING if is_serving else health_pb2.HealthCheckResponse.NOT_SERVING
        for name in ("", *self.services):
            await self.health.set(name, status)

    async def stop(self, grace_s: float) -> None:
        """Takes no new call and waits for running ones, at most `grace_s`."""
        await self.health.enter_graceful_shutdown()
        await self.server.stop(grace_s)


async def serve(
    address: str,
    register: Sequence[Callable[[grpc.aio.Server], None]],
    services: Sequence[str],
    *,
    flag: str = "--listen",
    has_reflection: bool = False,
    options: _Options = (),
) -> RpcServer:
    """Starts a gRPC server on HOST:PORT (port 0 picks one), with health, and reflection if asked for.

    Args:
        address: where to listen.
        register: each adds a servicer, as in `lambda server: add_WorkerServicer_to_server(servicer, server)`.
        services: full names of those services, for health and reflection; health says SERVING at once.
        flag: named in the error if the address cannot be bound.
        has_reflection: lets clients like grpcurl list and describe the services.
        options: of the server, beside `SERVER_OPTIONS`.

    Raises:
        StartError: the address cannot be bound.
    """
    server = grpc.aio.server(options=(*SERVER_OPTIONS, *options))
    for add in register:
        add(server)
    checks = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(checks, server)
    if has_reflection:
        names = (*services, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, server)
    endpoint = _bind(server, address, flag)
    await server.start()
    started = RpcServer(server, endpoint, checks, tuple(services))
    await started.set_serving(True)
    return started


def _bind(server: grpc.aio.Server, address: str, flag: str) -> str:
    host, port = split_host_port(address)
    try:
        bound = server.add_insecure_port(join_host_port(host, port))
    except RuntimeError:
        raise _why_not(host, port, flag) from None
    if bound == 0:
        raise _why_not(host, port, flag)
    return join_host_port(host, bound)


def _why_not(host: str, port: int, flag: str) -> StartError:
    """gRPC only says that it failed; the system says why."""
    address = join_host_port(host, port)
    try:
        for family, kind, protocol, _, where in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
            with socket.socket(family, kind, protocol) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(where)
                probe.listen(1)
    except OSError as error:
        return cannot_listen(address, flag, error)
    return StartError(f"{flag} {address}: cannot listen")


def reachable_endpoint(endpoint: str) -> str:
    """What others can dial for a server bound to `endpoint`: a wildcard host becomes this machine's address."""
    host, port = split_host_port(endpoint)
    if host not in {"0.0.0.0", "::"}:
        return endpoint
    name = os.environ.get("POD_IP") or socket.gethostname()
    try:
        return join_host_port(socket.getaddrinfo(name, port, type=socket.SOCK_STREAM)[0][4][0], port)  # type: ignore[arg-type]
    except OSError:
        return join_host_port(name, port)
