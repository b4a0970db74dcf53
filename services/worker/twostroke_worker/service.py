"""A worker process from its start to its end. Prefill and decode compose it with their end of KV transfers."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.metadata
import logging
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace
from typing import Any

import grpc.aio
from twostroke_chassis.lifecycle import Lifecycle, listen
from twostroke_chassis.membership import Membership, WorkerRecord, new_epoch
from twostroke_chassis.metrics_server import serving_metrics
from twostroke_chassis.otlp import exporting
from twostroke_chassis.prefix_index import PrefixPublisher
from twostroke_chassis.rpc import RpcServer, reachable_endpoint, serve
from twostroke_chassis.spans import NoTracing, Tracing
from twostroke_chassis.telemetry import WorkerMetrics
from twostroke_engine.messages import BlockEvents, EngineReady, StepReport
from twostroke_proto.v1 import worker_pb2_grpc

from twostroke_worker.connect import WorkerService
from twostroke_worker.dispatch import Dispatch
from twostroke_worker.engine_client import EngineClient
from twostroke_worker.ledger import Ledger
from twostroke_worker.settings import WorkerSettings
from twostroke_worker.spans import NoSpans, RequestSpans
from twostroke_worker.transfer_relay import Deliver, TransferRelay
from twostroke_worker.wire import LeaseHome, RequestLimits

log = logging.getLogger(__name__)

EXPIRY_INTERVAL_S = 1.0
STOP_GRACE_S = 1.0
"""For streams to end after the drain."""


@dataclass(frozen=True, slots=True)
class Composition:
    """What makes a worker one of a pool: its end of KV transfers."""

    relay: Callable[[Deliver], TransferRelay]
    sends_kv: bool = False
    receives_kv: bool = False
    services: tuple[str, ...] = ()
    """Full names of gRPC services that the relay adds."""


async def run_worker(lifecycle: Lifecycle, settings: WorkerSettings, composition: Composition) -> None:
    """Starts an engine, serves, registers, and drains when told."""
    listen(settings.listen, "--listen").close()  # a port in use is better told before minutes of loading
    epoch = new_epoch()
    config = settings.engine_config(epoch, sends_kv=composition.sends_kv, receives_kv=composition.receives_kv)
    async with contextlib.AsyncExitStack() as stack:
        engine = await EngineClient.start(config)
        stack.push_async_callback(engine.close)
        log.info("engine %d: %d blocks, contexts up to %d", engine.pid, *_size(engine.ready))
        relay = composition.relay(engine.send)
        publisher = PrefixPublisher(settings.redis, settings.cluster, settings.id, epoch)
        await stack.enter_async_context(publisher)
        metrics = WorkerMetrics(settings.id, settings.role, settings.served_name, has_vllm_names=settings.vllm_metrics)
        tracing = await stack.enter_async_context(exporting(settings, metrics.registry, metrics.dropped))
        dispatch = _make_dispatch(engine, settings, tracing)
        metrics.load = lambda: dispatch.load
        await stack.enter_async_context(_beside(lifecycle, _pump(engine, dispatch, relay, publisher), "engine"))
        await stack.enter_async_context(_beside(lifecycle, _expire(dispatch), "expiry"))
        server = await _serve(settings, composition, relay, WorkerService(settings.id, epoch, dispatch))
        stack.push_async_callback(server.stop, STOP_GRACE_S)
        stack.push_async_callback(relay.close)
        stack.callback(dispatch.end_streams)
        endpoint = reachable_endpoint(server.endpoint)
        dispatch.home = replace(dispatch.home, endpoint=endpoint)
        endpoints = {"grpc": endpoint, **stack.enter_context(serving_metrics(settings.metrics, metrics.registry))}
        membership = await stack.enter_async_context(Membership(settings.etcd, settings.cluster))
        await membership.wait_ready(settings.wait)
        await membership.register(_record(settings, engine.ready, endpoint, epoch))
        lifecycle.ready(endpoints)
        await lifecycle.drain.wait()
        await _drain(dispatch, membership, server, settings.grace)


def _size(ready: EngineReady) -> tuple[int, int]:
    return ready.num_blocks, ready.max_model_len


def _make_dispatch(engine: EngineClient, settings: WorkerSettings, tracing: Tracing) -> Dispatch:
    ready = engine.ready
    spans = NoSpans() if isinstance(tracing, NoTracing) else RequestSpans(tracing, settings.id)
    return Dispatch(
        engine.send,
        RequestLimits(vocab_size=ready.vocab_size, max_model_len=ready.max_model_len),
        LeaseHome(worker_id=settings.id, endpoint="", kv_fingerprint=ready.kv_spec.fingerprint()),
        Ledger(settings.resume_grace),
        spans,
    )


async def _serve(
    settings: WorkerSettings, composition: Composition, relay: TransferRelay, service: WorkerService
) -> RpcServer:
    def add_worker(server: grpc.aio.Server) -> None:
        worker_pb2_grpc.add_WorkerServicer_to_server(service, server)

    return await serve(settings.listen, [add_worker, relay.attach], ["twostroke.v1.Worker", *composition.services])


def _record(settings: WorkerSettings, ready: EngineReady, endpoint: str, epoch: int) -> WorkerRecord:
    return WorkerRecord(
        worker_id=settings.id,
        role="decode" if settings.role == "decode" else "prefill",
        endpoint=endpoint,
        epoch=epoch,
        model_name=settings.served_name,
        model_fingerprint=ready.model_fingerprint,
        kv_fingerprint=ready.kv_spec.fingerprint(),
        tokenizer_hash=ready.tokenizer_hash,
        block_size=ready.kv_spec.block_size,
        max_model_len=ready.max_model_len,
        channels=ready.channels,
        version=importlib.metadata.version("twostroke"),
    )


@contextlib.asynccontextmanager
async def _beside(lifecycle: Lifecycle, work: Any, name: str) -> AsyncIterator[None]:
    """Runs work beside the body; its failure ends the service, and it ends with the body."""
    task = lifecycle.spawn(work, name)
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait([task])


async def _pump(engine: EngineClient, dispatch: Dispatch, relay: TransferRelay, publisher: PrefixPublisher) -> None:
    """Hands every report of the engine on; ends with `EngineDied`."""
    async for message in engine:
        if isinstance(message, StepReport):
            for peer_message in message.peers:
                relay.send(peer_message)
            await dispatch.take_report(message)
            _publish(publisher, message.blocks)


def _publish(publisher: PrefixPublisher, events: BlockEvents | None) -> None:
    if events:
        publisher.removed(events.removed)
        publisher.stored(events.stored)


async def _expire(dispatch: Dispatch) -> None:
    while True:
        await asyncio.sleep(EXPIRY_INTERVAL_S)
        await dispatch.expire()


async def _drain(dispatch: Dispatch, membership: Membership, server: RpcServer, grace_s: float) -> None:
    """No router may choose this worker any more; then what runs may end."""
    dispatch.start_draining()
    await membership.unregister()
    await server.set_serving(False)
    cancelled = await dispatch.drain(grace_s)
    log.info("drained; %d requests did not end in time and were cancelled", cancelled)
