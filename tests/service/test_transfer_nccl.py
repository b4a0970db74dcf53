"""A pair over NCCL between two processes on one GPU; they pretend to be two hosts: NCCL wants a GPU per rank."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
SIDE = """
import sys, time, torch
from twostroke_engine.transfer.collective import CollectiveScheme
from twostroke_engine.transfer.device import device_side
from twostroke_engine.transfer.channel import ChannelError
side, endpoint = sys.argv[1:]
device = torch.device("cuda", 0)
scheme, turns = CollectiveScheme(device, "127.0.0.1", 20.0), device_side(device)
payload = torch.arange(1 << 20, dtype=torch.int32, device=device).view(torch.uint8)
if side == "send":
    channel = scheme.connect(endpoint, "pair")
    for _ in range(10):
        with turns.work(turns.mark()), turns.turn():
            channel.send(payload)
    sys.stdin.readline()
else:
    listener = scheme.listen()
    print(listener.endpoint("pair"), flush=True)
    channel = listener.accept("pair")
    for _ in range(10):
        found = torch.zeros_like(payload)
        with turns.work(turns.mark()), turns.turn():
            channel.receive(found)
        assert torch.equal(found, payload)
    print("equal", flush=True)
    begun = time.monotonic()
    try:
        channel.receive(found)
    except ChannelError as error:
        print("broken", time.monotonic() - begun, error, flush=True)
    assert torch.equal(payload, payload.clone())  # the device and the process live on
    print("alive", flush=True)
"""


def start(side: str, endpoint: str) -> subprocess.Popen[str]:
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT / "engine"), str(ROOT / "kernels")]),
        "NCCL_HOSTID": side,
        "NCCL_SOCKET_IFNAME": "lo",
        "NCCL_IB_DISABLE": "1",
    }
    command = [sys.executable, "-c", SIDE, side, endpoint]
    return subprocess.Popen(command, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA device")
def test_bytes_cross_and_a_killed_peer_leaves_the_process_alive() -> None:
    receiver = start("receive", "")
    assert receiver.stdout is not None
    sender = start("send", receiver.stdout.readline().strip())
    assert receiver.stdout.readline() == "equal\n"
    sender.kill()
    lines = receiver.communicate(timeout=60)[0].splitlines()
    assert lines[-1] == "alive"
    assert lines[0].startswith("broken")
    assert receiver.returncode == 0
