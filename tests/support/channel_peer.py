"""One side of a channel in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from threading import Thread

import pytest
import torch
from twostroke_engine.transfer.channel import ChannelError, ChannelListener, KVChannel

ROOT = Path(__file__).parents[2]
SENDER = """
import sys, torch
from tests.support.channel_schemes import make_scheme
scheme = make_scheme(sys.argv[1], 5.0)
print("ready", flush=True)
endpoint, pair_id, num_bytes = sys.stdin.readline().split()
channel = scheme.connect(endpoint, pair_id)
channel.send(torch.arange(64, dtype=torch.uint8))
print("sending", flush=True)
channel.send(torch.full((int(num_bytes),), 7, dtype=torch.uint8))
print("sent", flush=True)
sys.stdin.readline()
"""
RECEIVER = """
import sys, torch
from tests.support.channel_schemes import make_scheme
listener = make_scheme(sys.argv[1], 20.0).listen()
print("ready", flush=True)
print(listener.endpoint("pair"), flush=True)
channel = listener.accept("pair")
channel.receive(torch.empty(64, dtype=torch.uint8))
print("received", flush=True)
sys.stdin.readline()
"""


class Peer:
    """One side of a channel in a process of its own."""

    def __init__(self, name: str, code: str = SENDER) -> None:
        paths = os.pathsep.join(map(str, [ROOT, ROOT / "engine", ROOT / "kernels"]))
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, name],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert self.line() == "ready"

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def tell(self, *words: object) -> None:
        assert self.process.stdin is not None
        print(*words, file=self.process.stdin, flush=True)

    def send_to(self, listener: ChannelListener, pair_id: str, num_bytes: int) -> KVChannel:
        """The receiving side of a pair whose sender is now in, or past, a message of so many bytes."""
        self.tell(listener.endpoint(pair_id), pair_id, num_bytes)
        channel = listener.accept(pair_id)
        first = torch.empty(64, dtype=torch.uint8)
        channel.receive(first)
        assert first.tolist() == list(range(64))
        assert self.line() == "sending"
        return channel

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()


def seconds_to_break(channel: KVChannel, num_bytes: int) -> float:
    begun_s = time.monotonic()
    with pytest.raises(ChannelError):
        channel.receive(torch.empty(num_bytes, dtype=torch.uint8))
    return time.monotonic() - begun_s


def check_works(sender: KVChannel, receiver: KVChannel) -> None:
    thread = Thread(target=sender.send, args=(torch.full((1000,), 9, dtype=torch.uint8),))
    thread.start()
    payload = torch.empty(1000, dtype=torch.uint8)
    receiver.receive(payload)
    thread.join()
    assert payload.tolist() == [9] * 1000
