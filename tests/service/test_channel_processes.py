"""A channel whose other side is a process that dies or stops: an error in time, and nothing left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from threading import Thread

import pytest
import torch
from twostroke_engine.transfer.channel import ChannelError, ChannelListener, ChannelScheme, KVChannel

from tests.support.channel_schemes import NETWORKED, join, make_scheme

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
NUM_BYTES = 64 << 20
"""More than sockets and rings hold: its sender is in the middle of it until a receiver comes."""
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


@pytest.fixture
def peers(name: str) -> Iterator[list[Peer]]:
    started = [Peer(name), Peer(name)]
    yield started
    for peer in started:
        peer.end()


@pytest.fixture(params=NETWORKED)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def scheme(name: str) -> ChannelScheme:
    return make_scheme(name, 2.0)


@pytest.fixture
def listener(scheme: ChannelScheme) -> Iterator[ChannelListener]:
    made = scheme.listen()
    yield made
    made.close()


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


def test_a_peer_killed_in_mid_segment_breaks_its_own_pair_at_once_and_a_new_one_works(
    scheme: ChannelScheme, listener: ChannelListener, peers: list[Peer]
) -> None:
    other = join(scheme, listener, "other")
    channel = peers[0].send_to(listener, "dying", NUM_BYTES)
    time.sleep(0.1)  # it fills what there is to fill
    peers[0].end()
    assert seconds_to_break(channel, NUM_BYTES) < 1.0
    with pytest.raises(ChannelError, match="closed"):
        channel.receive(torch.empty(8, dtype=torch.uint8))
    check_works(*other)
    again = peers[1].send_to(listener, "again", 1000)
    payload = torch.empty(1000, dtype=torch.uint8)
    again.receive(payload)
    assert peers[1].line() == "sent"
    assert payload.unique().tolist() == [7]


def test_a_peer_stopped_in_mid_segment_is_timed_out_and_writes_nowhere_when_it_goes_on(
    scheme: ChannelScheme, listener: ChannelListener, peers: list[Peer]
) -> None:
    channel = peers[0].send_to(listener, "stopped", NUM_BYTES)
    time.sleep(0.1)
    peers[0].process.send_signal(signal.SIGSTOP)
    payload = torch.zeros(NUM_BYTES, dtype=torch.uint8)
    begun_s = time.monotonic()
    with pytest.raises(ChannelError):
        channel.receive(payload)
    assert 1.0 < time.monotonic() - begun_s < 4.0
    payload.zero_()  # the memory is someone else's by now
    peers[0].process.send_signal(signal.SIGCONT)
    assert peers[0].line() == "", "the writer heard that its pair is broken, and ended"
    assert not payload.any()
    check_works(*join(scheme, listener, "after"))


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="there is no /dev/shm to litter")
@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=["sender_first", "receiver_first"])
def test_killed_processes_leave_nothing_in_shared_memory(name: str, order: tuple[int, int]) -> None:
    before = set(os.listdir("/dev/shm"))
    pair = [Peer(name), Peer(name, RECEIVER)]
    pair[0].tell(pair[1].line(), "pair", NUM_BYTES)
    assert pair[0].line() == "sending"
    assert pair[1].line() == "received"
    for which in order:
        pair[which].end()
    assert set(os.listdir("/dev/shm")) <= before
