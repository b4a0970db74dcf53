"""`twostroke up`: a cluster on this machine, from its start to the last process's end."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

from twostroke_cli.child import Child
from twostroke_cli.client import RouterClient
from twostroke_cli.errors import CommandError
from twostroke_cli.plan import ClusterPlan, parts_of
from twostroke_cli.screen import Screen
from twostroke_cli.supervisor import RunDir, Supervisor

FAILED_START_GRACE_S = 3.0
KILL_AFTER_GRACE_S = 5.0
"""A service ends by itself when its grace is over; only one that does not is killed."""
READY_POLL_S = 0.1
STATUS_EVERY_S = 1.0


class Interrupted(Exception):
    """A signal asked for the end."""


class StopSignals:
    """The first SIGINT, SIGTERM or SIGHUP asks for an orderly end, the second for the end."""

    def __init__(self) -> None:
        self.stop = asyncio.Event()
        self.kill = asyncio.Event()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            asyncio.get_running_loop().add_signal_handler(number, self._on_signal)

    def _on_signal(self) -> None:
        (self.kill if self.stop.is_set() else self.stop).set()

    async def unless_stopped(self, work: Coroutine[Any, Any, Any]) -> None:
        """Runs `work` to its end, or cancels it and raises `Interrupted` on the first signal."""
        await _first(work, self.stop)
        if self.stop.is_set():
            raise Interrupted


@asynccontextmanager
async def running_cluster(
    plan: ClusterPlan, signals: StopSignals, on_event: Callable[[Child, str], None]
) -> AsyncIterator[Supervisor]:
    """A cluster that serves requests while the body runs, and of which nothing is left afterwards."""
    with RunDir(plan.run_dir) as run_dir:
        supervisor = Supervisor(parts_of(plan), run_dir, plan.model.dir, plan.is_restarted)
        supervisor.on_event = on_event
        grace_s = FAILED_START_GRACE_S
        try:
            await signals.unless_stopped(_start(supervisor, plan))
            grace_s = plan.grace_s + KILL_AFTER_GRACE_S
            yield supervisor
        finally:
            await _first(supervisor.stop(grace_s), signals.kill)
            await supervisor.kill()


def run_cluster(plan: ClusterPlan, screen: Screen) -> None:
    """Runs a cluster until a signal comes, in an event loop of its own."""
    asyncio.run(_up(plan, screen))


async def _up(plan: ClusterPlan, screen: Screen) -> None:
    signals = StopSignals()
    screen.event(f"starting {plan.prefill} prefill and {plan.decode} decode, model {plan.model.name}")
    with contextlib.suppress(Interrupted):
        async with running_cluster(
            plan, signals, lambda child, text: screen.event(f"{child.part.id} {text}")
        ) as cluster:
            _greet(plan, screen)
            status = asyncio.create_task(_show_status(plan, cluster, screen))
            try:
                await signals.unless_stopped(cluster.wait())
                raise CommandError("every process has ended, and none is to be restarted")
            finally:
                status.cancel()
                screen.status("")
                if signals.stop.is_set():
                    screen.event(f"draining: requests in flight have {plan.grace_s:.0f} s; once more kills")
    screen.event("stopped")


async def _start(supervisor: Supervisor, plan: ClusterPlan) -> None:
    """Starts the processes and waits until a request would be served."""
    await supervisor.start()
    client, deadline = RouterClient(plan.http), time.monotonic() + plan.wait_s
    while not await client.is_ready():
        if time.monotonic() > deadline:
            raise CommandError(f"the router saw no worker within {plan.wait_s:.0f} s; see {plan.run_dir / 'logs'}")
        await asyncio.sleep(READY_POLL_S)


async def _first(work: Coroutine[Any, Any, Any], event: asyncio.Event) -> None:
    """Runs `work` until it ends or the event is set, whichever comes first; raises what `work` raises."""
    task, waiter = asyncio.create_task(work), asyncio.create_task(event.wait())
    try:
        await asyncio.wait({task, waiter}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        waiter.cancel()
        if not task.done():
            task.cancel()
            await asyncio.wait({task})
    if not task.cancelled():
        task.result()


def _greet(plan: ClusterPlan, screen: Screen) -> None:
    mode = "colocated" if not plan.prefill else f"{plan.prefill} prefill, {plan.decode} decode"
    screen.line()
    screen.line(f"Twostroke is up: {plan.model.name}, {mode}")
    screen.line(f"  OpenAI API  http://{plan.http}/v1")
    screen.line(f"  live page   http://{plan.http}/")
    screen.line(f"  gRPC        {plan.grpc}")
    screen.line(f"  logs        {plan.run_dir / 'logs'}")
    screen.line(f"  try         twostroke chat --http {plan.http}   (Ctrl-C here drains and stops)")
    screen.line()


async def _show_status(plan: ClusterPlan, supervisor: Supervisor, screen: Screen) -> None:
    """Keeps the status line fresh."""
    client, since = RouterClient(plan.http), time.monotonic()
    while screen.is_terminal:
        pools = " ".join(
            f"{role} {ready}/{total}"
            for role in ("router", "prefill", "decode", "etcd", "redis")
            for ready, total in [supervisor.count(role)]
            if total
        )
        restarts = f"  restarts {supervisor.num_restarts}" if supervisor.num_restarts else ""
        screen.status(f"up {time.monotonic() - since:.0f} s  {await _load(client)}  {pools}{restarts}")
        await asyncio.sleep(STATUS_EVERY_S)


async def _load(client: RouterClient) -> str:
    """How busy the workers are, in words."""
    try:
        workers = (await client.cluster())["workers"]
    except (CommandError, KeyError):
        return "router does not answer"
    running = sum(worker["load"].get("running", 0) for worker in workers)
    waiting = sum(worker["load"].get("waiting", 0) for worker in workers)
    total = sum(worker["blocks"].get("total", 0) for worker in workers)
    leased = sum(worker["blocks"].get("leased", 0) for worker in workers)
    return f"run {running} wait {waiting} KV {100 * leased / total if total else 0:.0f} %"
