"""What a cluster on this machine consists of: every process, its command line, and how it says that it is ready."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from twostroke_cli.child import Endpoints, Part, Probe
from twostroke_cli.errors import CommandError
from twostroke_cli.models import ModelFolder
from twostroke_cli.ports import LOOPBACK, free_port
from twostroke_cli.servers import ServerNotFoundError, etcd_command, redis_command


@dataclass(frozen=True)
class ClusterPlan:
    """What `twostroke up` was asked for, every choice made."""

    model: ModelFolder
    http: str
    grpc: str
    run_dir: Path
    prefill: int = 1
    decode: int = 1
    etcd: str = ""
    """URL of an etcd that runs already; empty: start one."""
    redis: str = ""
    """URL of a Redis that runs already; empty: start one."""
    wait_s: float = 60.0
    grace_s: float = 30.0
    """How long requests in flight may take to end after a stop."""
    is_restarted: bool = True
    num_threads: int = 0
    """Of each worker; 0: the machine's share."""
    service_flags: tuple[str, ...] = ()
    worker_flags: tuple[str, ...] = ()
    router_flags: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.decode < 1:
            raise CommandError("--decode must be at least 1: without prefill workers the decode workers do everything")
        if self.prefill < 0:
            raise CommandError("--prefill must be at least 0; 0 is the colocated mode")


def usable_cores() -> int:
    """Cores that this process may use, a container's CPU quota counted."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        cores = min(cores, max(1, int(quota) // int(period)))
    return cores


def parts_of(plan: ClusterPlan) -> list[Part]:
    """Every process of the cluster. The order means nothing: each waits for the others."""
    parts: list[Part] = []
    etcd, redis = plan.etcd, plan.redis
    if not etcd:
        part, etcd = _etcd(plan.run_dir / "etcd")
        parts.append(part)
    if not redis:
        part, redis = _redis(plan.run_dir / "redis")
        parts.append(part)
    common = (
        "--etcd",
        etcd,
        "--redis",
        redis,
        "--wait",
        f"{plan.wait_s:g}",
        "--grace",
        f"{plan.grace_s:g}",
        *plan.service_flags,
    )
    parts.append(_service(plan, "router", 0, (*common, "--http", plan.http, "--grpc", plan.grpc, *plan.router_flags)))
    threads = plan.num_threads or max(1, usable_cores() // (plan.prefill + plan.decode))
    own = ("--listen", f"{LOOPBACK}:0", "--metrics", f"{LOOPBACK}:0", "--threads", str(threads))
    worker = (*common, *own, *plan.worker_flags)
    for role, count in (("prefill", plan.prefill), ("decode", plan.decode)):
        parts += [_service(plan, role, number, worker, threads) for number in range(count)]
    return parts


def _service(plan: ClusterPlan, role: str, number: int, flags: Sequence[str], threads: int = 1) -> Part:
    name = f"{role}-{number}"
    ready_file = plan.run_dir / "ready" / f"{name}.json"
    # -P: the folder that `up` was started in must not shadow a module.
    argv = (sys.executable, "-P", "-m", f"twostroke_{role}", "--id", name, "--ready-file", str(ready_file))
    model = ("--model-dir", str(plan.model.dir), "--model-name", plan.model.name)
    env = {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}
    return Part(role=role, id=name, argv=(*argv, *model, *flags), probe=_ready_file(ready_file), env=env)


def _etcd(data_dir: Path) -> tuple[Part, str]:
    port, peer_port = free_port(), free_port()
    argv = _found(lambda: etcd_command(data_dir, port, peer_port))
    part = Part(role="etcd", id="etcd", argv=tuple(argv), probe=_listens("client", port))
    return part, f"http://{LOOPBACK}:{port}"


def _redis(data_dir: Path) -> tuple[Part, str]:
    port = free_port()
    argv = _found(lambda: redis_command(data_dir, port))
    part = Part(role="redis", id="redis", argv=tuple(argv), probe=_listens("redis", port))
    return part, f"redis://{LOOPBACK}:{port}"


def _found(command: Callable[[], list[str]]) -> list[str]:
    try:
        return command()
    except ServerNotFoundError as error:
        raise CommandError(str(error)) from None


def _ready_file(path: Path) -> Probe:
    """Ready when the file that the service writes names the process."""

    async def probe(pid: int) -> Endpoints | None:
        return _endpoints_in(path, pid)

    return probe


def _endpoints_in(ready_file: Path, pid: int) -> Endpoints | None:
    try:
        content = json.loads(ready_file.read_text())
    except (OSError, ValueError):
        return None
    return dict(content["endpoints"]) if content.get("pid") == pid else None


def _listens(name: str, port: int) -> Probe:
    """Ready when the port takes a connection."""

    async def probe(pid: int) -> Endpoints | None:
        try:
            _, writer = await asyncio.open_connection(LOOPBACK, port)
        except OSError:
            return None
        writer.close()
        return {name: f"{LOOPBACK}:{port}"}

    return probe
