"""NIXL pairs over host memory: what arrives, when memory is given back, and peers that die, stop and come again."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor
from twostroke_engine.transfer import nixl_agent, nixl_slots, schemes
from twostroke_engine.transfer.channel import ChannelError, ChannelListener, KVChannel
from twostroke_engine.transfer.nixl import NixlScheme
from twostroke_engine.transfer.nixl_slots import NUM_SLOTS

from tests.support.channel_peer import Peer, check_works, seconds_to_break
from tests.support.channel_schemes import join, make_scheme, needs_nixl
from tests.support.transfer_ends import TOKENS, Link, Receiving, Sending, make_request, run_whole

pytestmark = [pytest.mark.slow, needs_nixl]

SLOT = 2 << 20
NUM_BYTES = 64 << 20
"""More than the slots hold."""
TIMEOUT_S = 3.0


@pytest.fixture(scope="module")
def sending() -> NixlScheme:
    return make_nixl(TIMEOUT_S)


@pytest.fixture(scope="module")
def receiving() -> NixlScheme:
    return make_nixl(TIMEOUT_S)


def make_nixl(timeout_s: float) -> NixlScheme:
    made = make_scheme("nixl", timeout_s)
    assert isinstance(made, NixlScheme)
    return made


@pytest.fixture
def listener(receiving: NixlScheme) -> Iterator[ChannelListener]:
    made = receiving.listen()
    yield made
    made.close()
    receiving.keeper.look_again()
    assert receiving.keeper.num_kept == 0


@pytest.fixture
def pair(sending: NixlScheme, listener: ChannelListener) -> Iterator[tuple[KVChannel, KVChannel]]:
    made = join(sending, listener, "pair")
    yield made
    for channel in made:
        channel.close()


def payload_of(num_bytes: int, seed: int) -> Tensor:
    return torch.randint(0, 256, (num_bytes,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def test_messages_of_any_size_arrive_in_order_and_untouched(pair: tuple[KVChannel, KVChannel]) -> None:
    sizes = [1, 4095, SLOT - 1, SLOT, SLOT + 1, SLOT * NUM_SLOTS + 1, 3 * SLOT * NUM_SLOTS + 17, 2]
    sent = [payload_of(size, seed) for seed, size in enumerate(sizes)]
    thread = threading.Thread(target=lambda: [pair[0].send(payload) for payload in sent])
    thread.start()
    for payload in sent:
        found = torch.full_like(payload, 99)
        pair[1].receive(found)
        assert torch.equal(found, payload)
    thread.join()


def test_a_message_of_another_size_than_announced_breaks_the_pair(pair: tuple[KVChannel, KVChannel]) -> None:
    thread = threading.Thread(target=pair[0].send, args=(payload_of(100, 1),))
    thread.start()
    with pytest.raises(ChannelError, match="announced"):
        pair[1].receive(torch.empty(99, dtype=torch.uint8))
    with pytest.raises(ChannelError, match="the pair is closed"):
        pair[1].receive(torch.empty(100, dtype=torch.uint8))
    thread.join()
    with pytest.raises(ChannelError, match="closed"):
        pair[0].send(torch.zeros(NUM_BYTES, dtype=torch.uint8))


@pytest.mark.parametrize("side", [0, 1])
def test_closing_wakes_an_operation_of_either_side_and_gives_the_memory_back(
    sending: NixlScheme, receiving: NixlScheme, listener: ChannelListener, side: int
) -> None:
    pair, other = join(sending, listener, "pair"), join(sending, listener, "other")
    threading.Timer(0.1, pair[side].close).start()
    begun_s = time.monotonic()
    with pytest.raises(ChannelError, match="closed"):
        pair[1].receive(torch.empty(8, dtype=torch.uint8))
    assert time.monotonic() - begun_s < 0.8 * TIMEOUT_S
    for channel in pair:
        channel.close()
    check_works(*other)
    for channel in other:
        channel.close()
    receiving.keeper.look_again()
    assert (receiving.keeper.num_kept, receiving.keeper.num_taken, sending.keeper.num_taken) == (0, 0, 0)


def test_a_side_that_is_silent_is_timed_out(pair: tuple[KVChannel, KVChannel]) -> None:
    begun_s = time.monotonic()
    with pytest.raises(ChannelError, match="Timed out"):
        pair[1].receive(torch.empty(8, dtype=torch.uint8))
    assert time.monotonic() - begun_s > 0.8 * TIMEOUT_S


def test_there_are_only_so_many_pairs(
    sending: NixlScheme, listener: ChannelListener, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nixl_slots, "MAX_PAIRS", 1)
    only = join(sending, listener, "only")
    with pytest.raises(ChannelError, match="1 NIXL pairs"):
        sending.connect(listener.endpoint("more"), "more")
    check_works(*only)
    for channel in only:
        channel.close()


def test_a_prompt_crosses(sending: NixlScheme, receiving: NixlScheme) -> None:
    link = Link(Sending(sending), Receiving(receiving))
    try:
        run_whole(link, make_request("r", TOKENS), chunk=40)
        link.settle()
        assert "r" in link.receiving.host.adopted
    finally:
        link.close()


def test_killed_and_stopped_peers_break_their_own_pairs_and_keep_their_slots_until_it_is_safe(
    sending: NixlScheme, receiving: NixlScheme, listener: ChannelListener
) -> None:
    with ThreadPoolExecutor(3) as starting:
        peers = list(starting.map(Peer, ["nixl"] * 3))
    try:
        other = join(sending, listener, "other")
        dying, stopped = (peers[at].send_to(listener, f"pair{at}", NUM_BYTES) for at in range(2))
        time.sleep(0.1)  # they fill what there is to fill
        peers[0].process.kill()
        assert seconds_to_break(dying, NUM_BYTES) < 0.8 * TIMEOUT_S
        peers[0].process.wait()
        receiving.keeper.look_again()
        assert receiving.keeper.num_kept == 0, "its end is proven"

        peers[1].process.send_signal(signal.SIGSTOP)
        assert seconds_to_break(stopped, NUM_BYTES) > 0.8 * TIMEOUT_S
        receiving.keeper.look_again()
        assert receiving.keeper.num_kept == 1, "it may write yet"
        check_works(*other)
        peers[1].process.send_signal(signal.SIGCONT)
        assert peers[1].line() == "", "the writer heard that its pair is broken, and ended"
        receiving.keeper.look_again()
        assert receiving.keeper.num_kept == 0

        again = peers[2].send_to(listener, "pair2", 1000)
        payload = torch.empty(1000, dtype=torch.uint8)
        again.receive(payload)
        assert peers[2].line() == "sent"
        assert payload.unique().tolist() == [7]
        for channel in (again, *other):
            channel.close()
    finally:
        for peer in peers:
            peer.end()


@pytest.mark.parametrize("has_fabric", [False, True])
def test_it_is_told_of_by_its_version_where_it_was_asked_for_or_pays(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, has_fabric: bool
) -> None:
    monkeypatch.setattr(schemes, "_FABRIC", tmp_path)
    if has_fabric:
        (tmp_path / "mlx5_0").mkdir()
    ability = f"nixl:ucx.{nixl_agent.release()}.DRAM"
    assert ("nixl" in schemes.scheme_names("cpu")) == ("nixl" in schemes.scheme_names("cuda")) == has_fabric
    asked = schemes.channel_factory(torch.device("cpu"), "127.0.0.1", 1.0, ["tcp", "nixl"])
    assert asked.abilities == ("tcp", ability)
