"""The command line's client of a router's HTTP port."""

from __future__ import annotations

import json
import os
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx

from twostroke_cli.errors import CommandError
from twostroke_cli.ports import LOOPBACK, split_address

API_KEY_VARIABLE = "TWOSTROKE_API_KEY"
Message = Mapping[str, str]


@dataclass(frozen=True)
class Answer:
    """What came back for a question."""

    text: str
    finish_reason: str
    usage: Mapping[str, Any] = field(default_factory=dict)
    explain: Mapping[str, Any] = field(default_factory=dict)
    """Where each part ran and how long it took: the `twostroke` object."""


class RouterClient:
    """Asks one router. Proxies of the environment are not for it: the router is named by its address."""

    def __init__(self, http: str) -> None:
        host, port = split_address(http, "--http")
        host = LOOPBACK if host in ("0.0.0.0", "::") else host  # where it listens is not where it is reached
        self.address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        key = os.environ.get(API_KEY_VARIABLE)
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}

    async def is_ready(self) -> bool:
        """Whether the router has workers to serve a request."""
        try:
            async with self._open(timeout_s=5) as http:
                return (await http.get("/ready")).status_code == 200
        except CommandError:
            return False

    async def cluster(self) -> dict[str, Any]:
        """The router's view of the cluster: `GET /cluster`."""
        return await self.get("/cluster")

    async def model(self) -> str:
        """The name of the model that is served."""
        return str((await self.get("/v1/models"))["data"][0]["id"])

    async def stream_chat(self, messages: Sequence[Message], on_text: Callable[[str], None], **params: Any) -> Answer:
        """Asks for the next turn of a conversation; `on_text` hears every piece as it comes."""
        body = {"messages": list(messages), "stream": True, "stream_options": {"include_usage": True}, **params}
        explain = {"X-Twostroke-Explain": "1"}
        async with (
            self._open(timeout_s=600) as http,
            http.stream("POST", "/v1/chat/completions", json=body, headers=explain) as response,
        ):
            await self._raise_for(response)
            return await _collect(response.aiter_lines(), on_text)

    async def get(self, path: str) -> dict[str, Any]:
        """The JSON object at a path."""
        async with self._open(timeout_s=10) as http:
            response = await http.get(path)
            await self._raise_for(response)
            return dict(response.json())

    async def text(self, path: str) -> str:
        """What is at a path."""
        async with self._open(timeout_s=10) as http:
            response = await http.get(path)
            await self._raise_for(response)
            return response.text

    async def _raise_for(self, response: httpx.Response) -> None:
        if response.is_success:
            return
        await response.aread()
        try:
            message = response.json()["error"]["message"]
        except (ValueError, KeyError, TypeError):
            message = response.text[:200] or response.reason_phrase
        raise CommandError(f"http://{self.address}: {message} (status {response.status_code})")

    @asynccontextmanager
    async def _open(self, timeout_s: float) -> AsyncIterator[httpx.AsyncClient]:
        timeout = httpx.Timeout(timeout_s, connect=5)
        try:
            async with httpx.AsyncClient(
                base_url=f"http://{self.address}", headers=self._headers, timeout=timeout, trust_env=False
            ) as http:
                yield http
        except httpx.ConnectError:
            raise CommandError(f"no cluster answers at http://{self.address}; `twostroke up` starts one") from None
        except httpx.HTTPError as error:
            raise CommandError(f"http://{self.address}: {error or type(error).__name__}") from None
        except json.JSONDecodeError as error:
            raise CommandError(f"http://{self.address}: not a Twostroke router: {error}") from None


async def _collect(lines: AsyncIterator[str], on_text: Callable[[str], None]) -> Answer:
    """Reads server-sent events to their end."""
    pieces: list[str] = []
    finish = ""
    usage: Mapping[str, Any] = {}
    explain: Mapping[str, Any] = {}
    async for line in lines:
        if not line.startswith("data:"):
            continue
        data = line.removeprefix("data:").strip()
        if data == "[DONE]":
            return Answer("".join(pieces), finish, usage, explain)
        event = json.loads(data)
        if "error" in event:
            raise CommandError(str(event["error"].get("message", event["error"])))
        for choice in event.get("choices", ()):
            if text := choice["delta"].get("content"):
                pieces.append(text)
                on_text(text)
            finish = choice.get("finish_reason") or finish
        usage, explain = event.get("usage") or usage, event.get("twostroke") or explain
    raise CommandError("the answer broke off: the connection to the router ended")
