"""A channel whose other side is a process that dies or stops: an error in time, and nothing left behind."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from twostroke_engine.transfer.channel import ChannelError, ChannelListener, ChannelScheme

from tests.support.channel_peer import RECEIVER, Peer, check_works, seconds_to_break
from tests.support.channel_schemes import NETWORKED, join, make_scheme

pytestmark = pytest.mark.slow

NUM_BYTES = 64 << 20
"""More than sockets and rings hold: its sender is in the middle of it until a receiver comes."""


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
