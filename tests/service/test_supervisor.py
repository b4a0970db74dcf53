"""The supervisor with real processes: it restarts what dies, tells why a start failed, and leaves nothing behind."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from twostroke_cli.child import Child, Endpoints, Part
from twostroke_cli.errors import CommandError
from twostroke_cli.supervisor import RunDir, Supervisor

pytestmark = pytest.mark.slow

# Says that it is ready, starts a child of its own, and sleeps; ends at SIGTERM unless it is told to be stubborn.
SERVICE = """
import pathlib, signal, subprocess, sys, time
if "stubborn" in sys.argv: signal.signal(signal.SIGTERM, signal.SIG_IGN)
subprocess.Popen(["sleep", "600"])
pathlib.Path(sys.argv[1]).write_text("ready")
time.sleep(600)
"""
LONELY_SERVICE = "import pathlib, sys, time; pathlib.Path(sys.argv[1]).touch(); time.sleep(600)"
OWNER = """
import asyncio, pathlib, sys
from tests.service.test_supervisor import LONELY_SERVICE, part
from twostroke_cli.supervisor import RunDir, Supervisor
async def main():
    folder = pathlib.Path(sys.argv[1])
    with RunDir(folder / "run") as run_dir:
        supervisor = Supervisor([part(folder, code=LONELY_SERVICE)], run_dir, folder)
        await supervisor.start()
        await supervisor.wait()
asyncio.run(main())
"""
FAILS = "import sys; print('noise', file=sys.stderr); sys.exit('twostroke-router: --http 1:2: the port is in use')"


def part(folder: Path, name: str = "decode-0", role: str = "decode", *argv: str, code: str = SERVICE) -> Part:
    marker = folder / f"{name}.ready"

    async def probe(pid: int) -> Endpoints | None:
        return {"grpc": "127.0.0.1:1"} if marker.exists() else None

    return Part(role=role, id=name, argv=(sys.executable, "-c", code, str(marker), *argv), probe=probe)


def processes(run_dir: Path) -> list[dict[str, object]]:
    listed: list[dict[str, object]] = json.loads((run_dir / "cluster.json").read_text())["processes"]
    return listed


async def until(condition: Callable[[], bool], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.02)


async def test_start_and_orderly_stop(tmp_path: Path) -> None:
    events: list[str] = []
    strangers = set(psutil.Process().children(recursive=True))
    with RunDir(tmp_path / "run") as run_dir:
        supervisor = Supervisor([part(tmp_path), part(tmp_path, "router-0", "router")], run_dir, tmp_path)
        supervisor.on_event = lambda child, text: events.append(f"{child.part.id} {text}")
        await supervisor.start()
        assert {process["role"] for process in processes(run_dir.path)} == {"router", "decode"}
        assert all(process["endpoints"] == {"grpc": "127.0.0.1:1"} for process in processes(run_dir.path))
        family = set(psutil.Process().children(recursive=True)) - strangers
        assert len([process for process in family if process.name() == "sleep"]) == 2
        await supervisor.stop(grace_s=5)
        assert processes(run_dir.path) == []
    _, alive = psutil.wait_procs(family, timeout=5)
    assert alive == []
    assert any(event.startswith("router-0 ready at grpc=") for event in events)


async def test_what_dies_is_started_again_and_what_does_not_end_is_killed(tmp_path: Path) -> None:
    with RunDir(tmp_path / "run") as run_dir:
        supervisor = Supervisor([part(tmp_path, "decode-0", "decode", "stubborn")], run_dir, tmp_path)
        await supervisor.start()
        first = supervisor.children[0].pid
        assert first is not None
        os.kill(first, signal.SIGKILL)
        await until(lambda: supervisor.children[0].is_ready and supervisor.children[0].pid not in (None, first))
        assert supervisor.num_restarts == 1
        begin = time.monotonic()
        await supervisor.stop(grace_s=0.5)
        assert time.monotonic() - begin < 5
    assert not psutil.pid_exists(first)


async def test_without_restart_the_dead_stay_dead(tmp_path: Path) -> None:
    with RunDir(tmp_path / "run") as run_dir:
        supervisor = Supervisor([part(tmp_path)], run_dir, tmp_path, is_restarted=False)
        await supervisor.start()
        os.kill(supervisor.children[0].pid or 0, signal.SIGKILL)
        await asyncio.wait_for(supervisor.wait(), 10)
        assert processes(run_dir.path) == []
        await supervisor.stop(grace_s=1)


async def test_a_part_that_cannot_start_says_why(tmp_path: Path) -> None:
    with RunDir(tmp_path / "run") as run_dir:
        parts = [part(tmp_path), part(tmp_path, "router-0", "router", code=FAILS)]
        supervisor = Supervisor(parts, run_dir, tmp_path)
        with pytest.raises(CommandError, match=r"^twostroke-router: --http 1:2: the port is in use$"):
            await supervisor.start()
        await supervisor.stop(grace_s=5)
        assert processes(run_dir.path) == []
        missing = Part(role="etcd", id="etcd", argv=(str(tmp_path / "nowhere"),), probe=parts[0].probe)
        with pytest.raises(CommandError, match="cannot start etcd"):
            await Child(missing, run_dir.log(missing), True, lambda child, text: None).supervise()


def test_nothing_survives_the_supervisors_death(tmp_path: Path) -> None:
    if not sys.platform.startswith("linux"):
        pytest.skip("the kernel kills a dead parent's children on Linux only")
    script = f"import sys; sys.path[:0] = {sys.path!r}\n{OWNER}"
    owner = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], start_new_session=True)
    try:
        deadline = time.monotonic() + 20
        while not (tmp_path / "decode-0.ready").exists():
            assert owner.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        family = psutil.Process(owner.pid).children(recursive=True)
        assert len(family) == 1
    finally:
        owner.kill()
        owner.wait()
    _, alive = psutil.wait_procs(family, timeout=5)
    assert [process for process in alive if process.status() != psutil.STATUS_ZOMBIE] == []


def test_a_run_directory_belongs_to_one_cluster(tmp_path: Path) -> None:
    with RunDir(tmp_path / "run") as run_dir:
        (run_dir.path / "logs" / "old.log").touch()
        with pytest.raises(CommandError, match="another cluster"), RunDir(tmp_path / "run"):
            pass
    with RunDir(tmp_path / "run") as run_dir:
        assert list((run_dir.path / "logs").iterdir()) == []


def test_a_folder_of_someone_elses_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    with contextlib.suppress(CommandError), RunDir(tmp_path):
        pytest.fail("took a folder with logs that are not its own")
    assert (tmp_path / "logs").is_dir()
