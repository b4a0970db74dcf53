"""A service's process as its supervisor sees it: exit status, last line, ready file, log."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

SERVICE = """
import asyncio, logging, sys
from typing import ClassVar
from twostroke_chassis.lifecycle import *
from twostroke_chassis.settings import ServiceSettings

class Settings(ServiceSettings):
    role: ClassVar[str] = "demo"
    mode: str = "serve"

log = logging.getLogger("demo")

async def crash():
    await asyncio.sleep(0.05)
    raise FatalError("the engine has\\nended")

async def refuse():
    raise ConnectionRefusedError("nobody\\nthere")

async def main(lifecycle):
    mode = lifecycle.settings.mode
    if mode == "start-error":
        raise StartError("--model-dir x: not a model")
    if mode == "bug":
        raise ZeroDivisionError("oops")
    if mode == "wait":
        await wait_for("etcd at http://x", refuse, lifecycle.settings.wait)
    if mode == "background":
        lifecycle.spawn(crash(), "engine")
    lifecycle.ready({"grpc": "127.0.0.1:7000"})
    log.info("first\\nsecond")
    try:
        await lifecycle.drain.wait()
        await asyncio.sleep(0.2)
        log.info("drained")
    finally:
        log.info("cleaned up")

sys.exit(run_service("twostroke-demo", Settings.load(sys.argv[1:], "twostroke-demo"), main))
"""


@contextmanager
def running(tmp_path: Path, *flags: str) -> Iterator[subprocess.Popen[str]]:
    program = tmp_path / "service.py"
    program.write_text(SERVICE)
    command = [sys.executable, str(program), "--id", "demo-0", "--ready-file", str(tmp_path / "ready"), *flags]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        try:
            yield process
        finally:
            process.kill()


def ended(process: subprocess.Popen[str]) -> tuple[int, list[str]]:
    _, err = process.communicate(timeout=15)
    return process.returncode, err.splitlines()


def wait_for_file(path: Path, process: subprocess.Popen[str]) -> str:
    deadline = time.monotonic() + 15
    while not path.exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return path.read_text()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_ready_then_drained(tmp_path: Path, number: signal.Signals) -> None:
    (tmp_path / "ready").write_text("of an earlier process")
    with running(tmp_path) as process:
        while "earlier" in (content := wait_for_file_or_gone(tmp_path / "ready", process)):
            time.sleep(0.01)
        assert json.loads(content) == {
            "role": "demo",
            "id": "demo-0",
            "pid": process.pid,
            "endpoints": {"grpc": "127.0.0.1:7000"},
        }
        process.send_signal(number)
        process.send_signal(number)
        status, lines = ended(process)
    assert status == 0
    assert not list(tmp_path.glob("*ready*"))
    assert [line.rpartition("demo: ")[2] for line in lines if " demo: " in line] == [
        "first\\nsecond",
        "drained",
        "cleaned up",
    ]
    shape = re.compile(rf"\d{{4}}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{{3}}Z INFO    demo-0\[{process.pid}\] \S+: \S.*")
    assert all(shape.fullmatch(line) for line in lines), lines


def wait_for_file_or_gone(path: Path, process: subprocess.Popen[str]) -> str:
    """The ready file's content; a stale one is removed by the service at any moment."""
    while True:
        try:
            return wait_for_file(path, process)
        except FileNotFoundError:
            continue


def test_a_start_error_is_one_line_and_nothing_else(tmp_path: Path) -> None:
    with running(tmp_path, "--mode", "start-error") as process:
        assert ended(process) == (1, ["twostroke-demo: --model-dir x: not a model"])
    assert not (tmp_path / "ready").exists()


def test_a_dependency_that_stays_away(tmp_path: Path) -> None:
    with running(tmp_path, "--mode", "wait", "--wait", "0.5") as process:
        status, lines = ended(process)
    assert status == 1
    assert lines[0].endswith("waiting for etcd at http://x: nobody there")
    assert lines[1:] == ["twostroke-demo: etcd at http://x did not answer within 0.5 s (--wait): nobody there"]


def test_a_signal_ends_a_start_that_waits(tmp_path: Path) -> None:
    with running(tmp_path, "--mode", "wait") as process:
        assert process.stderr is not None
        assert "waiting for etcd" in process.stderr.readline()
        process.terminate()
        status, lines = ended(process)
    assert status == 0
    assert lines[-1].endswith("SIGTERM: stopping before the start was complete")


def test_a_defect_has_its_traceback_in_the_log_and_one_line_for_the_user(tmp_path: Path) -> None:
    with running(tmp_path, "--mode", "bug") as process:
        status, lines = ended(process)
    assert status == 1
    assert lines[-1] == "twostroke-demo: stopped by an unexpected ZeroDivisionError: oops (traceback in the log above)"
    assert "CRITICAL demo-0[" in lines[0]
    assert all(line.startswith("    ") for line in lines[1:-1])
    assert any("Traceback" in line for line in lines)


def test_a_background_failure_ends_the_service_after_its_cleanup(tmp_path: Path) -> None:
    with running(tmp_path, "--mode", "background") as process:
        status, lines = ended(process)
    assert status == 1
    assert lines[-1] == "twostroke-demo: the engine has ended"
    assert lines[-2].endswith("demo: cleaned up")


def test_a_ready_file_that_cannot_be_written(tmp_path: Path) -> None:
    with running(tmp_path, "--ready-file", str(tmp_path / "no" / "ready")) as process:
        status, lines = ended(process)
    assert status == 1
    assert lines[-1] == f"twostroke-demo: cannot write {tmp_path}/no/ready: No such file or directory"


def test_the_log_level_hides_what_is_less_severe(tmp_path: Path) -> None:
    with running(tmp_path, "--log-level", "error") as process:
        wait_for_file(tmp_path / "ready", process)
        process.terminate()
        assert ended(process) == (0, [])
