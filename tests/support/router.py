"""A real router process with a real etcd and Redis, and the scripted workers of a test."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio
from tokenizers import Tokenizer

from tests.support.scripted_worker import ScriptedWorker, Stage
from tests.support.servers import EtcdServer, RedisServer
from tests.support.tiny_model import TOKENIZER_SIZE, write_tiny_tokenizer

ANSWER = "the dog could do nothing more about it"


class Router:
    """A router process and its addresses."""

    def __init__(self, folder: Path, etcd: EtcdServer, redis: RedisServer, model: Path, *flags: str) -> None:
        self.etcd, self.redis, self.model = etcd, redis, model
        folder.mkdir(exist_ok=True)
        ready, self._log = folder / "ready.json", folder / "log"
        command = [sys.executable, "-m", "twostroke_router", "--model-dir", str(model), "--model-name", "tiny"]
        command += ["--etcd", etcd.url, "--redis", redis.url, "--http", "127.0.0.1:0", "--grpc", "127.0.0.1:0"]
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [*command, "--ready-file", str(ready), "--wait", "10", "--grace", "3", *flags], stdout=log, stderr=log
            )
        deadline = time.monotonic() + 30
        while not ready.exists():
            assert self.process.poll() is None, self.log()
            assert time.monotonic() < deadline, self.log()
            time.sleep(0.02)
        self.endpoints = json.loads(ready.read_text())["endpoints"]
        self.url = f"http://{self.endpoints['http']}"

    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def stop(self) -> int:
        self.process.terminate()
        return self.process.wait(timeout=20)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    write_tiny_tokenizer(folder)
    (folder / "config.json").write_text(json.dumps({"vocab_size": TOKENIZER_SIZE, "max_position_embeddings": 2048}))
    return folder


@pytest.fixture(scope="module")
def tokenizer(model: Path) -> Tokenizer:
    return Tokenizer.from_file(str(model / "tokenizer.json"))


@pytest.fixture(scope="module")
def router(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Iterator[Router]:
    folder = tmp_path_factory.mktemp("router")
    with EtcdServer(folder / "etcd") as etcd, RedisServer(folder / "redis") as redis:
        flags = ["--placement-wait", "2", "--request-timeout", "20", "--max-live", "8", "--max-body-bytes", "65536"]
        router = Router(folder / "process", etcd, redis, model, *flags)
        yield router
        assert router.stop() == 0, router.log()
        assert "Traceback" not in router.log()


@pytest_asyncio.fixture
async def http(router: Router) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=router.url, trust_env=False, timeout=30) as client:
        yield client


async def until(condition: Callable[[], bool], seconds: float = 5) -> None:
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110 - what is waited for is in another process
            await asyncio.sleep(0.01)


async def until_workers(http: httpx.AsyncClient, ready: set[str]) -> None:
    """Until these, and no others, are ready."""
    async with asyncio.timeout(10):
        while True:
            workers = (await http.get("/cluster")).json()["workers"]
            if {worker["id"] for worker in workers if worker["state"] == "ready"} == ready:
                return
            await asyncio.sleep(0.02)


class Pool:
    """A test's workers; each leaves at its end."""

    def __init__(self, router: Router, http: httpx.AsyncClient, tokenizer: Tokenizer) -> None:
        self._router, self._http = router, http
        self._stage = Stage()
        self._tokens = tokenizer.encode(ANSWER).ids
        self.workers: list[ScriptedWorker] = []

    async def add(self, role: str, worker_id: str, port: int = 0, **record: Any) -> ScriptedWorker:
        worker = ScriptedWorker(self._stage, role, worker_id, lambda request, choice: [*self._tokens, 2], **record)
        self.workers.append(worker)
        return await worker.start(self._router.etcd.url, port)

    async def pair(self) -> tuple[ScriptedWorker, ScriptedWorker]:
        prefill, decode = await self.add("prefill", "p0"), await self.add("decode", "d0")
        await self.settle()
        return prefill, decode

    async def settle(self) -> None:
        await until_workers(self._http, {worker.worker_id for worker in self.workers})

    async def close(self) -> None:
        for worker in self.workers:
            await worker.leave()
        await until_workers(self._http, set())


@pytest_asyncio.fixture
async def pool(router: Router, http: httpx.AsyncClient, tokenizer: Tokenizer) -> AsyncIterator[Pool]:
    pool = Pool(router, http, tokenizer)
    yield pool
    await pool.close()


def chat(**more: Any) -> dict[str, Any]:
    return {"model": "tiny", "messages": [{"role": "user", "content": "What is it?"}], "max_tokens": 200, **more}


def completion(**more: Any) -> dict[str, Any]:
    return {"model": "tiny", "prompt": "the dog", "max_tokens": 200, **more}


async def events(response: httpx.Response) -> list[str]:
    return [line.removeprefix("data: ") async for line in response.aiter_lines() if line.startswith("data: ")]
