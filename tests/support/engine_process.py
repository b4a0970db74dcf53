"""An engine process, spawned and spoken to as its service does."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import msgspec
from twostroke_engine.config import EngineConfig
from twostroke_engine.framing import frame, read_frame
from twostroke_engine.messages import InboxMessage, OutboxMessage, RequestUpdate, StepReport

ROOT = Path(__file__).parents[2]
UNINSTALLED = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT / "engine"), str(ROOT / "kernels")])}
"""GPU machines may have torch and nothing of ours installed."""

_decoder: msgspec.msgpack.Decoder[OutboxMessage] = msgspec.msgpack.Decoder(OutboxMessage)


class Child:
    """A spawned engine process and this side of its socket."""

    def __init__(self, environment: Mapping[str, str] | None = None) -> None:
        self.socket, theirs = socket.socketpair()
        self.socket.settimeout(60)
        with theirs:
            fd = theirs.fileno()
            command = [sys.executable, "-m", "twostroke_engine.process", "--fd", str(fd)]
            self.process = subprocess.Popen(
                command, pass_fds=(fd,), stderr=subprocess.PIPE, env=UNINSTALLED | (environment or {})
            )

    def send(self, message: InboxMessage | EngineConfig) -> None:
        self.socket.sendall(frame(message))

    def receive(self) -> OutboxMessage:
        payload = read_frame(self.socket)
        assert payload is not None, "the stream ended"
        return _decoder.decode(payload)

    def until_end(self, request_id: str) -> list[RequestUpdate]:
        updates: list[RequestUpdate] = []
        while not any(update.end for update in updates):
            report = self.receive()
            assert isinstance(report, StepReport)
            updates += [update for update in report.requests if update.request_id == request_id]
        return updates

    def stop(self) -> None:
        self.socket.close()
        self.process.kill()
        self.process.communicate()

    def exit_code(self) -> int:
        return self.process.wait(timeout=20)
