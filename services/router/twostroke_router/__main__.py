"""`python -m twostroke_router`: text in, text out; no torch."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from functools import partial

import uvicorn
from starlette.applications import Starlette
from twostroke_chassis import rpc
from twostroke_chassis.lifecycle import Lifecycle, StartError, listen, run_service
from twostroke_chassis.membership import Membership
from twostroke_chassis.otlp import exporting
from twostroke_chassis.prefix_index import PrefixMirror
from twostroke_chassis.security import ApiKeys
from twostroke_chassis.settings import join_host_port
from twostroke_chassis.telemetry import RouterMetrics

from twostroke_router.admission import Admission
from twostroke_router.conclusion import Conclusions
from twostroke_router.dashboard import dashboard_routes
from twostroke_router.directory import Directory
from twostroke_router.frontend import Frontend
from twostroke_router.generation import Cluster, GenerationLimits
from twostroke_router.grpc_api import SERVICE, add_inference
from twostroke_router.http_api import build_app
from twostroke_router.placement import POLICIES
from twostroke_router.request_log import RequestLog
from twostroke_router.settings import RouterSettings
from twostroke_router.text import ModelFolderError, Text, load_text
from twostroke_router.vitals import Vitals

PROG = "twostroke-router"
_log = logging.getLogger(__name__)


class _HttpServer(uvicorn.Server):
    """uvicorn without its own signals: the process's lifecycle has them."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Captures none."""
        yield


def _http_server(app: Starlette, grace_s: float) -> _HttpServer:
    config = uvicorn.Config(
        app,
        http="httptools",
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        backlog=2048,
        timeout_keep_alive=75,
        timeout_graceful_shutdown=max(1, round(grace_s)),
    )
    return _HttpServer(config)


def _load_text(settings: RouterSettings) -> Text:
    try:
        return load_text(settings.model_dir)
    except ModelFolderError as error:
        raise StartError(f"--model-dir: {error}") from error


@asynccontextmanager
async def open_frontend(settings: RouterSettings, lifecycle: Lifecycle) -> AsyncIterator[Frontend]:
    """Everything behind the two surfaces; etcd must have answered once, workers may come later."""
    keys, text, name = ApiKeys.load(settings.api_keys_file), _load_text(settings), settings.served_name
    metrics = RouterMetrics(name, has_vllm_names=settings.vllm_metrics)
    dropped = metrics.stages.dropped
    async with (
        Membership(settings.etcd, settings.cluster) as membership,
        PrefixMirror(settings.redis, settings.cluster) as mirror,
        RequestLog(settings.redis, settings.cluster, partial(dropped, "explanations")) as log,
        exporting(settings, metrics.registry, dropped) as tracing,
    ):
        await membership.wait_ready(settings.wait)
        directory = Directory(membership, mirror, metrics.workers, name, settings.id)
        policy = POLICIES[settings.placement]
        admission = Admission(directory, policy, settings.max_live, settings.placement_wait)
        limits = GenerationLimits(settings.request_timeout, settings.reservation, settings.max_retries)
        metrics.cluster.requests_limit.set(settings.max_live)
        watch = lifecycle.spawn(directory.run(), "directory")
        vitals = lifecycle.spawn(Vitals(metrics.cluster, directory, membership, mirror).run(), "vitals")
        try:
            conclusions = Conclusions(settings.id, name, metrics, tracing, log.add)
            cluster = Cluster(text, directory, admission, metrics, limits, conclusions)
            yield Frontend(settings.id, name, cluster, keys, log)
        finally:
            watch.cancel()
            vitals.cancel()
            await directory.close()
            text.close()


async def serve(lifecycle: Lifecycle, settings: RouterSettings) -> None:
    """Serves until a signal, then lets running requests end."""
    with contextlib.closing(listen(settings.http, "--http")) as http_socket:
        async with open_frontend(settings, lifecycle) as frontend:
            grpc_server = await rpc.serve(
                settings.grpc,
                [lambda server: add_inference(server, frontend)],
                [SERVICE],
                flag="--grpc",
                has_reflection=True,
                options=rpc.connection_age(settings.max_connection_age, settings.request_timeout),
            )
            pages = dashboard_routes() if settings.dashboard else ()
            http_server = _http_server(build_app(frontend, settings.max_body_bytes, pages), settings.grace)
            http = asyncio.create_task(http_server.serve([http_socket]), name="http")
            await _until_started(http_server, http)
            lifecycle.ready({"http": _address(http_socket), "grpc": grpc_server.endpoint})
            await lifecycle.drain.wait()
            http_server.should_exit = True
            await asyncio.gather(http, grpc_server.stop(settings.grace))


async def _until_started(server: _HttpServer, serving: asyncio.Task[None]) -> None:
    while not server.started:
        if serving.done():
            serving.result()
            raise StartError("the HTTP server did not start")
        await asyncio.sleep(0.01)


def _address(bound: socket.socket) -> str:
    host, port = bound.getsockname()[:2]
    return join_host_port(host, port)


def main(argv: list[str] | None = None) -> int:
    """Runs a router; returns its exit status."""
    settings = RouterSettings.load(sys.argv[1:] if argv is None else argv, PROG)
    return run_service(PROG, settings, lambda lifecycle: serve(lifecycle, settings))


if __name__ == "__main__":
    sys.exit(main())
