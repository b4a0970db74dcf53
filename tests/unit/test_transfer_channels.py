"""`tcp` and `shm` over real sockets: bytes, deadlines, strangers at the port, and which channel two sides agree on."""

from __future__ import annotations

import gc
import logging
import os
import socket
import struct
import threading
import time
from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch
from torch import Tensor
from twostroke_engine.model.config import ModelError
from twostroke_engine.transfer import rendezvous, shm
from twostroke_engine.transfer.channel import ChannelError, ChannelFactory, ChannelListener, ChannelScheme, KVChannel
from twostroke_engine.transfer.messages import PairWelcome
from twostroke_engine.transfer.rendezvous import greeting
from twostroke_engine.transfer.schemes import channel_factory, scheme_names
from twostroke_engine.transfer.shm import NUM_SLOTS, SLOT_BYTES, ShmScheme
from twostroke_engine.transfer.tcp import TcpScheme

from tests.support.channel_schemes import join, make_scheme
from tests.support.transfer_ends import TOKENS, Link, Receiving, Sending, begin, make_request, run_whole

RING = SLOT_BYTES * NUM_SLOTS


@pytest.fixture(params=["tcp", "shm"])
def scheme(request: pytest.FixtureRequest) -> ChannelScheme:
    return make_scheme(request.param, 1.0)


@pytest.fixture
def listener(scheme: ChannelScheme) -> Iterator[ChannelListener]:
    made = scheme.listen()
    yield made
    made.close()


@pytest.fixture
def pair(scheme: ChannelScheme, listener: ChannelListener) -> Iterator[tuple[KVChannel, KVChannel]]:
    made = join(scheme, listener, "pair")
    yield made
    for channel in made:
        channel.close()


def payload_of(num_bytes: int, seed: int) -> Tensor:
    return torch.randint(0, 256, (num_bytes,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def address_of(endpoint: str) -> tuple[socket.socket, str]:
    """A connection to an endpoint, and its token."""
    name, _, rest = endpoint.partition("://")
    address, _, token = rest.partition("/")
    if name == "shm":
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.connect(f"\0{address}")
    else:
        host, _, port = address.partition(":")
        connection = socket.create_connection((host, int(port)))
    connection.settimeout(5.0)
    return connection, token


def is_closed(connection: socket.socket) -> bool:
    try:
        return connection.recv(1) == b""
    except ConnectionError:
        return True


# ---- bytes -----------------------------------------------------------------------------------------------------------


def test_messages_of_any_size_arrive_in_order_and_untouched(pair: tuple[KVChannel, KVChannel]) -> None:
    sizes = [1, 4095, SLOT_BYTES - 1, SLOT_BYTES, SLOT_BYTES + 1, RING, RING + 1, 3 * RING + 17, 2]
    sent = [payload_of(size, seed) for seed, size in enumerate(sizes)]
    thread = threading.Thread(target=lambda: [pair[0].send(payload) for payload in sent])
    thread.start()
    for payload in sent:
        found = torch.full_like(payload, 99)
        pair[1].receive(found)
        assert torch.equal(found, payload)
    thread.join()


def test_a_slice_of_a_larger_tensor_is_sent_and_filled_alone(pair: tuple[KVChannel, KVChannel]) -> None:
    source, target = payload_of(1000, 1), torch.zeros(1000, dtype=torch.uint8)
    pair[0].send(source[100:200])
    pair[1].receive(target[300:400])
    assert torch.equal(target[300:400], source[100:200])
    assert not target[:300].any()
    assert not target[400:].any()


def test_a_message_of_another_size_than_announced_breaks_the_pair(pair: tuple[KVChannel, KVChannel]) -> None:
    pair[0].send(payload_of(100, 1))
    with pytest.raises(ChannelError, match="announced"):
        pair[1].receive(torch.empty(99, dtype=torch.uint8))
    with pytest.raises(ChannelError, match="the pair is closed"):
        pair[1].receive(torch.empty(100, dtype=torch.uint8))
    with pytest.raises(ChannelError):
        pair[0].send(torch.zeros(64 << 20, dtype=torch.uint8))  # more than a buffer takes


def test_pairs_are_independent_and_a_broken_one_can_be_made_again(
    scheme: ChannelScheme, listener: ChannelListener
) -> None:
    pairs = [join(scheme, listener, f"pair{number}") for number in range(3)]
    pairs[1][0].close()
    with pytest.raises(ChannelError):
        pairs[1][1].receive(torch.empty(8, dtype=torch.uint8))
    pairs[1] = join(scheme, listener, "pair1 again")
    for number, (sender, receiver) in enumerate(pairs):
        found = torch.empty(8, dtype=torch.uint8)
        sender.send(torch.full((8,), number, dtype=torch.uint8))
        receiver.receive(found)
        assert found.tolist() == [number] * 8


def test_files_and_memory_are_given_back(scheme: ChannelScheme) -> None:
    def open_files() -> int:
        gc.collect()
        return len(os.listdir("/proc/self/fd"))

    before = open_files()
    listener = scheme.listen()
    for number in range(5):
        for channel in join(scheme, listener, str(number)):
            channel.close()
    del channel
    listener.close()
    listener.close()
    assert open_files() <= before


# ---- time ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_side_that_does_not_come_or_says_nothing_is_timed_out(
    scheme: ChannelScheme, listener: ChannelListener
) -> None:
    times = [time.monotonic()]
    with pytest.raises(ChannelError, match="no pair"):
        listener.accept("nobody")
    times.append(time.monotonic())
    with pytest.raises(ChannelError):
        scheme.connect(listener.endpoint("alone"), "alone")
    times.append(time.monotonic())
    sender, receiver = join(scheme, listener, "silent")
    times.append(time.monotonic())
    with pytest.raises(ChannelError, match="Timed out"):
        receiver.receive(torch.empty(8, dtype=torch.uint8))
    times.append(time.monotonic())
    lasted = [after - before for before, after in pairwise(times)]
    assert all(0.5 < lasted[which] < 3.0 for which in (0, 1, 3)), lasted
    sender.close()


@pytest.mark.slow
def test_a_receiver_that_does_not_read_times_the_sender_out(pair: tuple[KVChannel, KVChannel]) -> None:
    begun_s = time.monotonic()
    with pytest.raises(ChannelError, match="Timed out"):
        pair[0].send(torch.zeros(64 << 20, dtype=torch.uint8))
    assert 0.5 < time.monotonic() - begun_s < 3.0


@pytest.mark.parametrize("side", [0, 1])
def test_closing_wakes_an_operation_of_either_side(pair: tuple[KVChannel, KVChannel], side: int) -> None:
    closing = threading.Timer(0.1, pair[side].close)
    closing.start()
    begun_s = time.monotonic()
    with pytest.raises(ChannelError, match="closed"):
        pair[1].receive(torch.empty(8, dtype=torch.uint8))
    assert time.monotonic() - begun_s < 0.8
    closing.join()
    pair[side].close()


def test_a_listener_that_closes_wakes_who_waits_for_a_sender(listener: ChannelListener) -> None:
    threading.Timer(0.1, listener.close).start()
    begun_s = time.monotonic()
    with pytest.raises(ChannelError, match="the listener is closed"):
        listener.accept("nobody")
    assert time.monotonic() - begun_s < 0.8


# ---- strangers -------------------------------------------------------------------------------------------------------


def test_garbage_at_the_port_is_closed_at_once_and_disturbs_no_one(
    scheme: ChannelScheme, listener: ChannelListener, pair: tuple[KVChannel, KVChannel]
) -> None:
    endpoint = listener.endpoint("next")
    token = endpoint.rpartition("/")[2]
    wrong = "00" * 32
    sayings = [
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"\x00" * 4096,
        greeting("next", wrong),
        greeting("another", token),
        greeting("next", token)[:40] + b"\xff\xff" + b"x" * 65535,
        greeting("", wrong),
    ]
    strangers = []
    for saying in sayings:
        stranger, _ = address_of(endpoint)
        stranger.sendall(saying)
        strangers.append(stranger)
    assert all(is_closed(stranger) for stranger in strangers)
    pair[0].send(payload_of(8, 1))
    pair[1].receive(torch.empty(8, dtype=torch.uint8))
    join(scheme, listener, "next")


@pytest.mark.slow
def test_strangers_that_say_nothing_hold_up_no_one_and_are_closed_in_time(
    scheme: ChannelScheme, listener: ChannelListener, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rendezvous, "MAX_STRANGERS", 8)
    endpoint = listener.endpoint("pair")
    strangers = [address_of(endpoint)[0] for _ in range(20)]
    strangers[-1].sendall(greeting("pair", endpoint.rpartition("/")[2])[:20])  # begins well, and stops
    assert all(is_closed(stranger) for stranger in strangers[:10]), "no more than a few are kept"
    begun_s = time.monotonic()
    join(scheme, listener, "pair")
    assert time.monotonic() - begun_s < 0.8
    assert all(is_closed(stranger) for stranger in strangers), "and none for longer than a greeting may take"


@pytest.mark.slow
def test_a_sender_whose_pair_no_one_accepts_is_let_go(listener: ChannelListener) -> None:
    endpoint = listener.endpoint("pair")
    connection, token = address_of(endpoint)
    connection.sendall(greeting("pair", token))
    assert is_closed(connection)


def test_a_frame_cut_short_breaks_its_pair_alone(pair: tuple[KVChannel, KVChannel]) -> None:
    scheme = TcpScheme("127.0.0.1", 1.0)
    listener = scheme.listen()
    connection, token = address_of(listener.endpoint("cut"))
    connection.sendall(greeting("cut", token))
    channel = listener.accept("cut")
    connection.sendall(struct.pack("<Q", 1000) + b"x" * 500)
    threading.Timer(0.1, connection.close).start()
    begun_s = time.monotonic()
    with pytest.raises(ChannelError):
        channel.receive(torch.empty(1000, dtype=torch.uint8))
    assert time.monotonic() - begun_s < 0.8
    pair[0].send(payload_of(8, 1))
    pair[1].receive(torch.empty(8, dtype=torch.uint8))
    listener.close()


def test_a_ring_that_could_shrink_is_refused() -> None:
    descriptor = os.memfd_create("ring")
    os.ftruncate(descriptor, 4096)
    with pytest.raises(ChannelError, match="ring"):
        shm._open_ring(descriptor, 4096, 1)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)


def test_what_is_no_endpoint_is_an_error() -> None:
    with pytest.raises(ChannelError, match="token"):
        ShmScheme(1.0).connect("shm://nothing", "pair")
    with pytest.raises(ChannelError, match="not a tcp endpoint"):
        TcpScheme("127.0.0.1", 1.0).connect("tcp://nothing", "pair")
    with pytest.raises(ChannelError, match="no pair at nothing"):
        ShmScheme(1.0).connect(f"shm://nothing/{'00' * 32}", "pair")


# ---- agreement -------------------------------------------------------------------------------------------------------


def test_a_pair_takes_the_receivers_best_that_the_sender_has_too() -> None:
    cpu = torch.device("cpu")
    factory = channel_factory(cpu, "127.0.0.1", 1.0)
    local, gloo, tcp = [text for text in factory.abilities if not text.startswith("nixl:")]
    assert (local, gloo, tcp) == (f"shm:{shm.place()}", "collective:gloo", "tcp")
    listeners = factory.listen()
    try:
        assert listeners.choose(factory.abilities).endpoint("p").startswith("shm://")
        assert listeners.choose([tcp, gloo, "shm:another host"]).endpoint("p").startswith("collective://")
        assert listeners.choose(["collective:nccl", "pigeon", tcp]).endpoint("p").startswith("tcp://")
        assert not listeners.refusal([tcp])
        with pytest.raises(ChannelError, match="no common channel"):
            listeners.choose(["shm:another host"])
        assert listeners.refusal(["pigeon"]).endswith("collective:gloo, tcp, the prefill worker pigeon")
    finally:
        listeners.close()
    asked = channel_factory(cpu, "127.0.0.1", 1.0, ["tcp", "shm"])
    assert asked.abilities == ("tcp", local)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["tcp", "pigeon"], "no KV channel pigeon here; there are shm, .*collective, tcp"),
        (["cuda_ipc"], "no KV channel cuda_ipc here"),
        (["tcp", "tcp"], "named twice"),
    ],
)
def test_channels_that_are_not_there_are_named(names: list[str], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        scheme_names("cpu", names)
    with pytest.raises(ValueError, match="at least one"):
        ChannelFactory([])


def test_a_pair_without_a_common_channel_is_refused_and_both_sides_know_why() -> None:
    link = Link(Sending(make_scheme("tcp", 1.0)), Receiving(make_scheme("shm", 1.0)))
    try:
        prompt = begin(link, make_request("r", TOKENS))
        prompt.chunk(1000)
        link.until(lambda: link.sending.outcome("r") is not None)
        outcome = link.sending.outcome("r")
        assert outcome is not None
        assert f"no common channel: the decode worker has shm:{shm.place()}, the prefill worker tcp" in outcome.error
        link.receiving.receiver.cancel("r")
        link.settle()
    finally:
        link.close()


def test_the_choice_is_in_the_log_of_both_sides_and_the_token_is_not(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    scheme = make_scheme("shm", 1.0)
    link = Link(Sending(scheme), Receiving(scheme))
    try:
        run_whole(link, make_request("r", TOKENS))
        link.settle()
    finally:
        link.close()
    assert "KV comes over shm" in caplog.text
    assert "KV goes over shm" in caplog.text
    welcome = next(message for message in link.log if isinstance(message, PairWelcome))
    assert welcome.channel.startswith("shm://")
    assert welcome.channel.rpartition("/")[2] not in caplog.text
