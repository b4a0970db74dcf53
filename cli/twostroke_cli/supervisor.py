"""Starts the processes of a cluster, keeps them alive, records them in `cluster.json`, and ends them in order."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from twostroke_cli.child import Child, Part
from twostroke_cli.errors import CommandError

CLUSTER_FILE = "cluster.json"
SUBFOLDERS = ("logs", "ready", "etcd", "redis")
SERVER_GRACE_S = 5.0
STOP_ORDER = (("router",), ("prefill", "decode"), ("redis", "etcd"))
"""The router first: it ends what runs with the workers' help. What it stands on last."""


class RunDir:
    """The folder of one run: logs, ready files, server data, `cluster.json`. Locked while a cluster runs in it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: IO[str] | None = None

    def __enter__(self) -> Self:
        """Takes the folder, or `CommandError`; what an earlier run left there is removed."""
        lock = self.path / "lock"
        try:
            if not lock.exists() and (foreign := [name for name in SUBFOLDERS if (self.path / name).exists()]):
                raise CommandError(f"--run-dir {self.path}: holds '{foreign[0]}', which no earlier run made")
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = lock.open("w")
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for name in SUBFOLDERS:
                shutil.rmtree(self.path / name, ignore_errors=True)
                (self.path / name).mkdir(mode=0o700)
        except BlockingIOError:
            raise CommandError(f"--run-dir {self.path}: another cluster runs there; name another folder") from None
        except OSError as error:
            raise CommandError(f"--run-dir {self.path}: {error.strerror or error}") from None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._lock is not None:
            self._lock.close()

    def log(self, part: Part) -> Path:
        """Where a process's output goes."""
        return self.path / "logs" / f"{part.id}.log"

    def write_cluster(self, content: object) -> None:
        """Replaces `cluster.json`: a reader sees the old one or the new one, whole."""
        draft = self.path / f".{CLUSTER_FILE}"
        draft.write_text(json.dumps(content, indent=1) + "\n")
        os.replace(draft, self.path / CLUSTER_FILE)


class Supervisor:
    """Runs parts until it is told to stop."""

    def __init__(self, parts: Sequence[Part], run_dir: RunDir, model_dir: Path, is_restarted: bool = True) -> None:
        self.on_event: Callable[[Child, str], None] = lambda child, text: None
        """Told what happens to a process, in words."""
        self.children = [Child(part, run_dir.log(part), is_restarted, self._changed) for part in parts]
        self._run_dir = run_dir
        self._model_dir = model_dir
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def num_restarts(self) -> int:
        """Restarts so far, of all processes."""
        return sum(child.num_restarts for child in self.children)

    def count(self, role: str) -> tuple[int, int]:
        """Ready processes of a role, and all of that role."""
        of_role = [child for child in self.children if child.part.role == role]
        return sum(child.is_ready for child in of_role), len(of_role)

    async def start(self) -> None:
        """Starts everything at once and waits until all of it is ready; `CommandError` if a part cannot start."""
        self._tasks = [asyncio.create_task(child.supervise(), name=child.part.id) for child in self.children]
        ready = asyncio.create_task(self._all_ready())
        try:
            pending: set[asyncio.Future[Any]] = set(self._tasks)
            while not ready.done() and pending:
                done, _ = await asyncio.wait({ready, *pending}, return_when=asyncio.FIRST_COMPLETED)
                for task in done & pending:
                    task.result()
                pending -= done
        finally:
            ready.cancel()

    async def _all_ready(self) -> None:
        for child in self.children:
            await child.was_ready.wait()

    async def wait(self) -> None:
        """Returns when no process is left to supervise; `CommandError` if one cannot be started again."""
        # Unlike gather, a cancelled wait leaves the tasks alone: `stop` needs them to see their processes end.
        done, _ = await asyncio.wait(self._tasks, return_when=asyncio.FIRST_EXCEPTION)
        for task in done:
            task.result()

    async def stop(self, grace_s: float) -> None:
        """Ends everything, the router first, giving requests in flight `grace_s` to end."""
        for roles in STOP_ORDER:
            grace = SERVER_GRACE_S if "etcd" in roles else grace_s
            await asyncio.gather(*(child.stop(grace) for child in self.children if child.part.role in roles))
        await self._reap()

    async def kill(self) -> None:
        """Ends everything now."""
        for child in self.children:
            child.abandon()
        await self._reap()

    async def _reap(self) -> None:
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._write()

    def _changed(self, child: Child, text: str) -> None:
        self._write()
        self.on_event(child, text)

    def _write(self) -> None:
        processes = [
            {
                "role": child.part.role,
                "id": child.part.id,
                "pid": child.pid,
                "endpoints": dict(child.endpoints),
                "restarts": child.num_restarts,
            }
            for child in self.children
            if child.pid is not None
        ]
        content = {"model_dir": str(self._model_dir), "processes": processes, "written_unix_s": round(time.time(), 3)}
        with contextlib.suppress(OSError):  # a full disk must not end the cluster
            self._run_dir.write_cluster(content)
