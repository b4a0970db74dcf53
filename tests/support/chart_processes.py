"""The containers of a rendered chart as processes of this machine, with the commands and variables it gives them."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from twostroke_cli.servers import etcd_command, redis_command

from tests.support.cluster import ONE_THREAD, free_port, wait_until
from tests.support.helm import Rendered

IP = "127.0.0.1"


@dataclass
class PodProcess:
    """A container that runs."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path

    def stop(self) -> int:
        """What the kubelet does: SIGTERM, and SIGKILL when the time is over."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()


class ChartProcesses:
    """Starts containers by the name of their pod; each container port has a free port of this machine."""

    def __init__(self, chart: Rendered, folder: Path, replaced: dict[str, str], secrets: dict[str, str]) -> None:
        """`replaced`: patterns of what means something only in a pod, and what it is here; `secrets`: by name."""
        self._chart, self._folder, self._replaced, self._secrets = chart, folder, replaced, secrets
        self.pythons: dict[str, Path] = {}
        """Interpreters by pod, where it is not this one."""
        self._ports: dict[tuple[str, int], int] = {}
        self.running: list[PodProcess] = []

    def port(self, name: str, container_port: int) -> int:
        """Where a container's port is on this machine."""
        return self._ports.setdefault((name, container_port), free_port())

    def variables(self, name: str) -> dict[str, str]:
        """A container's environment as Kubernetes makes it, in order, with $(NAME) of earlier ones expanded."""
        made: dict[str, str] = {}
        for variable, source in self._chart.env(name).items() if "env" in self._chart.container(name) else ():
            made[variable] = _expand(self._source(name, source), made)
        return {variable: self._here(value, name) for variable, value in made.items()}

    def arguments(self, name: str) -> list[str]:
        """A container's arguments, with variables expanded and addresses of this machine."""
        variables = self.variables(name)
        return [self._here(_expand(word, variables), name) for word in self._chart.container(name)["args"]]

    def start(self, name: str) -> PodProcess:
        """Starts a container."""
        log = self._folder / f"{name}.log"
        with log.open("wb") as out:
            process = subprocess.Popen(
                [*self._program(name), *self.arguments(name)],
                env={**self._inherited(name), **ONE_THREAD, **self.variables(name)},
                stdout=out,
                stderr=subprocess.STDOUT,
                cwd=self._folder,
                start_new_session=True,
            )
        self.running.append(PodProcess(name, process, log))
        return self.running[-1]

    def wait(self, condition: Any, seconds: float, what: str) -> None:
        """Waits; shows the logs if it was in vain."""
        try:
            wait_until(condition, seconds, what)
        except AssertionError as error:
            logs = "\n".join(f"--- {part.name}\n{part.log.read_text()[-3000:]}" for part in self.running)
            raise AssertionError(f"{error}\n{logs}") from None

    def ask(self, path: str, body: dict[str, Any] | None = None, key: str = "k3y") -> httpx.Response:
        """A question to the router; status 503 if nobody listens."""
        url, headers = f"http://{IP}:{self.port('router', 8000)}{path}", {"Authorization": f"Bearer {key}"}
        with httpx.Client(trust_env=False, timeout=30) as client:
            try:
                return client.post(url, json=body, headers=headers) if body else client.get(url, headers=headers)
            except httpx.TransportError:
                return httpx.Response(503)

    def stop(self) -> dict[str, int]:
        """Ends all, the last one first; exit statuses by name."""
        return {part.name: part.stop() for part in reversed(self.running)}

    def _inherited(self, name: str) -> dict[str, str]:
        """This process's environment; another interpreter finds its own packages."""
        return {key: value for key, value in os.environ.items() if key != "PYTHONPATH" or name not in self.pythons}

    def _program(self, name: str) -> list[str]:
        """The container's command; what the image has is found where this machine has it."""
        command = self._chart.container(name)["command"]
        if command[:3] == ["tini", "--", "python"]:
            return [str(self.pythons.get(name, sys.executable)), "-P", *command[3:]]
        binaries = {"etcd": etcd_command, "valkey-server": lambda folder, *_: redis_command(folder, 0)}
        return binaries[command[0]](self._folder, 0, 0)[:1]

    def _source(self, name: str, source: Any) -> str:
        if isinstance(source, str):
            return source
        if "secretKeyRef" in source:
            return self._secrets[source["secretKeyRef"]["name"]]
        fields = {"status.podIP": IP, "spec.nodeName": "node", "metadata.name": f"r-twostroke-{name}-0"}
        return fields[source["fieldRef"]["fieldPath"]]

    def _here(self, text: str, name: str) -> str:
        """Addresses of the cluster become addresses of this machine."""
        for pattern, value in self._replaced.items():
            text = re.sub(pattern, value, text)
        text = re.sub(r"(0\.0\.0\.0|\[::\]):(\d+)", lambda m: f"{m[1]}:{self.port(name, int(m[2]))}", text)
        peer = r"r-twostroke-(etcd|redis)(?:-\d+\.[a-z-]+)?:(\d+)"
        return re.sub(peer, lambda m: f"{IP}:{self.port(m[1], int(m[2]))}", text)


def _expand(text: str, variables: dict[str, str]) -> str:
    """$(NAME) of a variable, as Kubernetes does it; others stay as they are."""
    return re.sub(r"\$\((\w+)\)", lambda match: variables.get(match[1], match[0]), text)


def example_release(folder: Path, secrets_file: Path) -> ChartProcesses:
    """The CPU example on the tiny model of `folder/model`, with a password for Redis and API keys."""
    values = {
        "router": {"apiKeys": {"secretName": "keys"}},
        "redis": {"passwordSecret": {"name": "redis"}},
        "poolDefaults": {"grace": 5, "settings": {"threads": 1, "kv-cache-bytes": 16777216, "max-model-len": 512}},
    }
    in_pod = {
        r"/models/[^ ]+": str(folder / "model"),
        "/etc/twostroke/api-keys/keys": str(secrets_file),
        "/var/lib/etcd/data": str(folder / "etcd"),
        "^/tmp$": str(folder),
    }
    pods = ChartProcesses(Rendered("cpu.yaml", values), folder, in_pod, {"redis": "s3cret"})
    in_pod["^6379$"] = str(pods.port("redis", 6379))
    return pods
