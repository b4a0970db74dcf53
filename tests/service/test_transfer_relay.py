"""The control streams of KV transfers, over real gRPC on loopback: both relays, no engine."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import pytest
from twostroke_chassis.rpc import RpcServer, serve
from twostroke_engine.messages import InboxMessage, PeerLost, PeerMessage
from twostroke_engine.transfer.messages import (
    AbortTransfer,
    OpenTransfer,
    PairHello,
    PairWelcome,
    ReceiverMessage,
    SenderMessage,
    TransferOpened,
)
from twostroke_worker import transfer_relay
from twostroke_worker.transfer_relay import ReceiverRelay, SenderRelay

HELLO = PairHello(
    version=1,
    worker_id="p",
    worker_epoch=1,
    kv_fingerprint="k",
    model_fingerprint="m",
    pair_id="pair",
    channels=("collective",),
    tokenizer_hash="t",
    block_size=16,
    kv_dtype="float32",
    transfer_dtype="auto",
    wire_dtypes=("float32", "int8"),
)
OPENED = TransferOpened(lease_id="l", epoch=1, num_held_blocks=0)


class Inbox:
    """What an engine would be told."""

    def __init__(self) -> None:
        self.queue: asyncio.Queue[InboxMessage] = asyncio.Queue()

    async def deliver(self, message: InboxMessage) -> None:
        await self.queue.put(message)

    async def next(self) -> PeerMessage | PeerLost:
        message = await asyncio.wait_for(self.queue.get(), 10)
        assert isinstance(message, PeerMessage | PeerLost)
        return message


@dataclass
class Decode:
    """A decode worker's relay, its engine's inbox and its server."""

    relay: ReceiverRelay
    inbox: Inbox
    server: RpcServer

    @property
    def endpoint(self) -> str:
        return self.server.endpoint


@dataclass
class Prefill:
    """A prefill worker's relay and its engine's inbox."""

    inbox: Inbox = field(default_factory=Inbox)
    relay: SenderRelay = field(init=False)

    def __post_init__(self) -> None:
        self.relay = SenderRelay(self.inbox.deliver, connect_timeout_s=1.0)


@pytest.fixture
async def decode() -> AsyncIterator[Decode]:
    inbox = Inbox()
    relay = ReceiverRelay(inbox.deliver)
    server = await serve("127.0.0.1:0", [relay.attach], ["twostroke.v1.Transfer"])
    yield Decode(relay, inbox, server)
    await relay.close()
    await server.stop(0.5)


@pytest.fixture
async def prefill() -> AsyncIterator[Prefill]:
    side = Prefill()
    yield side
    await side.relay.close()


async def test_messages_go_both_ways_in_order(decode: Decode, prefill: Prefill) -> None:
    prefill.relay.send(PeerMessage(peer=decode.endpoint, message=HELLO))
    opens: list[SenderMessage] = [
        OpenTransfer(lease_id=f"l{i}", epoch=i, request_id="r", num_tokens=i) for i in range(200)
    ]
    for message in opens:
        prefill.relay.send(PeerMessage(peer=decode.endpoint, message=message))
    first = await decode.inbox.next()
    received = [await decode.inbox.next() for _ in opens]
    assert isinstance(first, PeerMessage)
    assert [message.message for message in [first, *received]] == [HELLO, *opens]  # type: ignore[union-attr]
    assert {message.peer for message in received} == {first.peer}

    answers: list[ReceiverMessage] = [PairWelcome(worker_id="d"), OPENED]
    for answer in answers:
        decode.relay.send(PeerMessage(peer=first.peer, message=answer))
    got = [await prefill.inbox.next() for _ in answers]
    assert [(each.peer, each.message) for each in got] == [(decode.endpoint, answer) for answer in answers]  # type: ignore[union-attr]
    assert all(0 <= time.monotonic() - each.received_s < 60 for each in got)  # type: ignore[union-attr,operator]


async def test_two_senders_have_different_names(decode: Decode, prefill: Prefill) -> None:
    other = Prefill()
    names = set()
    for side in (prefill, other):
        side.relay.send(PeerMessage(peer=decode.endpoint, message=HELLO))
        names.add((await decode.inbox.next()).peer)
    assert len(names) == 2
    await other.relay.close()


async def test_a_sender_that_goes_is_lost_and_comes_back_as_another(decode: Decode, prefill: Prefill) -> None:
    prefill.relay.send(PeerMessage(peer=decode.endpoint, message=HELLO))
    first = await decode.inbox.next()
    await prefill.relay.close()
    lost = await decode.inbox.next()
    assert isinstance(lost, PeerLost)
    assert lost.peer == first.peer
    decode.relay.send(PeerMessage(peer=first.peer, message=OPENED))  # too late: dropped, not delivered to anyone
    assert isinstance(await prefill.inbox.next(), PeerLost)

    prefill.relay.send(PeerMessage(peer=decode.endpoint, message=HELLO))
    again = await decode.inbox.next()
    assert isinstance(again, PeerMessage)
    assert again.peer != first.peer


async def test_a_receiver_that_goes_is_lost(decode: Decode, prefill: Prefill) -> None:
    prefill.relay.send(PeerMessage(peer=decode.endpoint, message=HELLO))
    await decode.inbox.next()
    await decode.server.stop(0)
    lost = await prefill.inbox.next()
    assert isinstance(lost, PeerLost)
    assert lost.peer == decode.endpoint


async def test_nobody_listening_is_told_at_once(prefill: Prefill) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        endpoint = f"127.0.0.1:{probe.getsockname()[1]}"
        started = time.monotonic()
        prefill.relay.send(PeerMessage(peer=endpoint, message=HELLO))
        lost = await prefill.inbox.next()
    assert isinstance(lost, PeerLost)
    assert lost.peer == endpoint
    assert lost.reason
    assert time.monotonic() - started < 3


async def test_a_silent_listener_is_lost_after_the_connect_timeout(prefill: Prefill) -> None:
    with socket.socket() as silent:  # accepts connections into its backlog and says nothing
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        endpoint = f"127.0.0.1:{silent.getsockname()[1]}"
        prefill.relay.send(PeerMessage(peer=endpoint, message=HELLO))
        lost = await prefill.inbox.next()
    assert isinstance(lost, PeerLost)
    assert "no connection within 1 s" in lost.reason


async def test_only_a_hello_opens_a_stream(decode: Decode, prefill: Prefill) -> None:
    stale = AbortTransfer(lease_id="l", epoch=1)
    prefill.relay.send(PeerMessage(peer=decode.endpoint, message=stale))
    prefill.relay.send(PeerMessage(peer=decode.endpoint, message=HELLO))
    first = await decode.inbox.next()
    assert isinstance(first, PeerMessage)
    assert first.message == HELLO


async def test_a_peer_whose_queue_is_full_is_lost(
    decode: Decode, prefill: Prefill, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfer_relay, "MAX_QUEUED", 4)
    prefill.relay.send(PeerMessage(peer=decode.endpoint, message=HELLO))
    for _ in range(5):  # without a pause: nothing is written meanwhile
        prefill.relay.send(PeerMessage(peer=decode.endpoint, message=AbortTransfer(lease_id="l", epoch=1)))
    lost = await prefill.inbox.next()
    assert isinstance(lost, PeerLost)
    assert "does not read" in lost.reason
