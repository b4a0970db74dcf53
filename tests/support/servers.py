"""A real etcd and a real Redis for one test, on free loopback ports: start, kill, restart, lose the data, freeze."""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Self

import pytest
from twostroke_cli.servers import etcd_command, redis_command


def free_port() -> int:
    """A loopback port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class _Server:
    """A server process with a data directory and ports that stay the same over restarts."""

    port: int

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._data = folder / "data"
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def command(self) -> list[str]:
        raise NotImplementedError

    def is_up(self) -> bool:
        """Whether it answers a request."""
        raise NotImplementedError

    def log(self) -> str:
        return (self._folder / "log").read_text(errors="replace")

    def start(self, seconds: float = 20) -> None:
        """Starts the process and returns when it answers."""
        assert self._process is None, "already running"
        self._data.mkdir(mode=0o700, parents=True, exist_ok=True)
        with (self._folder / "log").open("ab") as log:
            self._process = subprocess.Popen(self.command(), stdout=log, stderr=log, start_new_session=True)
        deadline = time.monotonic() + seconds
        while not self.is_up():
            assert self._process.poll() is None, f"exited with {self._process.returncode}:\n{self.log()}"
            assert time.monotonic() < deadline, f"not up within {seconds} s:\n{self.log()}"
            time.sleep(0.02)

    def kill(self) -> None:
        """Ends the process without a word (SIGKILL), frozen or not."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def restart(self, *, keep_data: bool) -> None:
        """Kills it, if it runs, and starts it on the same port."""
        self.kill()
        if not keep_data:
            shutil.rmtree(self._data)
        self.start()

    def freeze(self) -> None:
        """Stops it in its tracks: its port accepts, nothing answers."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Lets it go on."""
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def _exchange(self, request: bytes) -> bytes:
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=1) as connection:
                connection.sendall(request)
                return connection.recv(4096)
        except OSError:
            return b""


class EtcdServer(_Server):
    """A one-member etcd."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.port, self._peer_port = free_port(), free_port()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def command(self) -> list[str]:
        return [*etcd_command(self._data, self.port, self._peer_port), "--unsafe-no-fsync"]

    def is_up(self) -> bool:
        return b'"health":"true"' in self._exchange(b"GET /health HTTP/1.0\r\n\r\n")


class RedisServer(_Server):
    """A Redis that keeps nothing on disk: every restart is empty."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.port = free_port()

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}"

    def command(self) -> list[str]:
        return redis_command(self._data, self.port)

    def is_up(self) -> bool:
        return self._exchange(b"PING\r\n").startswith(b"+PONG")


@pytest.fixture
def etcd(tmp_path: Path) -> Iterator[EtcdServer]:
    """A running etcd with nothing in it."""
    with EtcdServer(tmp_path / "etcd") as server:
        yield server


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[RedisServer]:
    """A running Redis with nothing in it."""
    with RedisServer(tmp_path / "redis") as server:
        yield server
