"""A real Prometheus and promtool, from PATH or from Debian's package, which is unpacked without being installed."""

from __future__ import annotations

import fcntl
import json
import shutil
import subprocess
import tarfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any, Self

import httpx
import pytest
import yaml

from tests.support.servers import free_port

ROOT = Path(__file__).resolve().parents[2]
RULES = ROOT / "deploy" / "prometheus"
CACHE = ROOT / ".run" / "cache" / "prometheus"
NAMES = ("prometheus", "promtool")


class NotToBeHadError(Exception):
    """Neither installed nor downloadable; says why."""


@cache
def binaries() -> dict[str, str]:
    """Where prometheus and promtool are; downloads them once for all runs.

    Raises:
        NotToBeHadError: they are not on PATH and apt cannot get them.
    """
    installed = {name: path for name in NAMES if (path := shutil.which(name))}
    if len(installed) == len(NAMES):
        return installed
    unpacked = {name: CACHE / "usr" / "bin" / name for name in NAMES}
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # tests may run side by side
        if not all(path.exists() for path in unpacked.values()):
            _unpack()
    return {name: str(path) for name, path in unpacked.items()}


def _unpack() -> None:
    for name in ("apt-get", "dpkg-deb"):
        if shutil.which(name) is None:
            raise NotToBeHadError(f"neither prometheus nor {name} is on PATH")
    got = subprocess.run(
        ["apt-get", "download", "prometheus"], cwd=CACHE, capture_output=True, text=True, timeout=120, check=False
    )
    packages = sorted(CACHE.glob("prometheus_*.deb"))
    if got.returncode or not packages:
        raise NotToBeHadError(f"apt-get download prometheus: {got.stderr.strip().splitlines()[-1:]}")
    files = subprocess.run(["dpkg-deb", "--fsys-tarfile", packages[-1]], capture_output=True, timeout=60, check=True)
    with tarfile.open(fileobj=BytesIO(files.stdout)) as archive:
        for name in NAMES:
            archive.extract(f"./usr/bin/{name}", CACHE, filter="data")
    packages[-1].unlink()


def binary(name: str) -> str:
    """prometheus or promtool; skips the test where it is not to be had."""
    try:
        return binaries()[name]
    except NotToBeHadError as error:
        pytest.skip(f"no Prometheus here: {error}")


def promtool(*arguments: str | Path) -> str:
    """Runs promtool, which must succeed; returns what it says."""
    done = subprocess.run(
        [binary("promtool"), *map(str, arguments)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


def rules_of(file: str) -> list[dict[str, Any]]:
    """Every rule of one of our files."""
    groups = yaml.safe_load((RULES / file).read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


class PrometheusServer:
    """A Prometheus with one configuration, on a free loopback port, until the end of a block."""

    def __init__(self, folder: Path, config: dict[str, Any]) -> None:
        self._folder = folder
        self._config = config
        self._process: subprocess.Popen[bytes] | None = None
        self.url = f"http://127.0.0.1:{free_port()}"
        self._client = httpx.Client(base_url=self.url, timeout=30, trust_env=False)

    def __enter__(self) -> Self:
        config = self._folder / "prometheus.yaml"
        config.write_text(yaml.safe_dump(self._config))
        command = [binary("prometheus"), f"--config.file={config}", f"--storage.tsdb.path={self._folder / 'data'}"]
        command += [f"--web.listen-address={self.url.removeprefix('http://')}", "--storage.tsdb.retention.time=1d"]
        with (self._folder / "prometheus.log").open("wb") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log)
        deadline = time.monotonic() + 30
        while not self._is_ready():
            assert self._process.poll() is None, self.log()
            assert time.monotonic() < deadline, self.log()
            time.sleep(0.05)
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def log(self) -> str:
        """What it has to say."""
        return (self._folder / "prometheus.log").read_text(errors="replace")[-4000:]

    def _is_ready(self) -> bool:
        try:
            return self._client.get("/-/ready").status_code == 200
        except httpx.HTTPError:
            return False

    def api(self, path: str, **parameters: str) -> Any:
        """`data` of an answer of its API, which must be a success."""
        answer = self._client.get(f"/api/v1/{path}", params=parameters).json()
        assert answer["status"] == "success", f"{parameters}: {answer}"
        return answer["data"]

    def query(self, expr: str) -> list[dict[str, Any]]:
        """An instant query's series."""
        result = self.api("query", query=expr)
        if result["resultType"] == "scalar":
            return [{"metric": {}, "value": result["result"]}]
        found: list[dict[str, Any]] = result["result"]
        return found

    def firing(self) -> set[str]:
        """Names of the alerts that fire now."""
        alerts = self.api("alerts")["alerts"]
        return {alert["labels"]["alertname"] for alert in alerts if alert["state"] == "firing"}


@contextmanager
def running_prometheus(
    folder: Path, targets: dict[str, list[str]], rule_files: list[Path]
) -> Iterator[PrometheusServer]:
    """A Prometheus that scrapes every second; `targets` is addresses by job."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "global": {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"},
        "rule_files": [str(path) for path in rule_files],
        "scrape_configs": [
            {"job_name": job, "static_configs": [{"targets": addresses, "labels": {"namespace": "test"}}]}
            for job, addresses in targets.items()
        ],
    }
    with PrometheusServer(folder, config) as server:
        yield server


def write_rules(path: Path, rules: list[dict[str, Any]]) -> Path:
    """A rule file with these rules in one group."""
    path.write_text(json.dumps({"groups": [{"name": "test", "rules": rules}]}))
    return path
