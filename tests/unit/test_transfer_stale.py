"""Messages that come twice, out of order or with another epoch, and a channel out of step: noticed and got over."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from msgspec.structs import replace
from torch import Tensor
from twostroke_engine.messages import PeerMessage
from twostroke_engine.request import ErrorCode
from twostroke_engine.transfer.channel import ChannelListener, KVChannel
from twostroke_engine.transfer.loopback import LoopbackScheme
from twostroke_engine.transfer.messages import (
    CommitTransfer,
    OpenTransfer,
    PairHello,
    PairWelcome,
    ReceiverMessage,
    SegmentReady,
    SenderMessage,
    TransferClosed,
)

from tests.support.transfer_ends import DECODE, TOKENS, Link, Receiving, Sending, make_request, run_whole

Message = SenderMessage | ReceiverMessage
Receive = Callable[[str, Message], None]


class ChangingLink(Link):
    """Carries what `change` makes of a message."""

    change: Callable[[Message], list[Message]] = staticmethod(lambda message: [message])

    def _one(self, entry: PeerMessage, receive: Receive, peer: str) -> None:
        self.log.append(entry.message)
        for message in self.change(entry.message):
            receive(peer, message)


def make_link(timeout_s: float = 5.0) -> ChangingLink:
    scheme = LoopbackScheme(timeout_s)
    return ChangingLink(Sending(scheme, timeout_s=timeout_s), Receiving(scheme, timeout_s=timeout_s))


def check_works(link: Link) -> None:
    run_whole(link, make_request("after", range(5000, 5090)))
    link.settle()
    assert "after" in link.receiving.host.adopted


def test_whatever_comes_twice_counts_once() -> None:
    link = make_link()
    link.change = lambda message: [message, message]
    for number in range(3):
        run_whole(link, make_request(f"r{number}", range(number * 1000, number * 1000 + 100)), chunk=40)
    link.settle()
    assert len(link.receiving.host.adopted) == 3
    assert all(facts.kv_resends == 0 for _, facts in link.receiving.host.adopted.values())
    sender, receiver = link.sending.sender.faults, link.receiving.receiver.faults
    assert (sender.failed, receiver.failed, sender.broken_pairs, receiver.broken_pairs) == (0, 0, 0, 0)
    said = OpenTransfer | PairHello | SegmentReady | CommitTransfer
    num_said = sum(isinstance(message, said) for message in link.log)
    link.until(lambda: link.receiving.receiver.faults.stale == num_said)
    link.until(lambda: link.sending.sender.faults.stale > 0)
    link.close()


def test_announcements_that_change_places_break_the_pair_and_the_next_one_works() -> None:
    link = make_link()
    held: list[Message] = []

    def change(message: Message) -> list[Message]:
        if isinstance(message, SegmentReady) and message.number == 0:
            held.append(message)
            return []
        return [message, *held] if isinstance(message, SegmentReady) else [message]

    link.change = change
    run_whole(link, make_request("r", TOKENS))
    link.until(lambda: bool(held))
    # The sender of a loopback waits for its message to be taken: the next announcement is made here.
    assert isinstance(held[0], SegmentReady)
    link.receiving.receiver.receive(link.peer, replace(held[0], number=1))
    link.settle()
    assert link.receiving.host.adopted == {}
    assert "segment 1 was announced, but not 0" in link.receiving.host.ends()["r"].message
    assert link.receiving.receiver.faults.broken_pairs == 1
    link.change = lambda message: [message]
    check_works(link)
    link.close()


@pytest.mark.parametrize("kind", [OpenTransfer, SegmentReady, CommitTransfer, TransferClosed])
def test_another_epoch_is_counted_and_never_served(kind: type[Message]) -> None:
    link = make_link(timeout_s=0.5)
    link.change = lambda message: [replace(message, epoch=0) if isinstance(message, kind) else message]  # type: ignore[call-arg]
    run_whole(link, make_request("r", TOKENS))
    link.until(lambda: link.sending.sender.num_open == 0)
    link.change = lambda message: [message]
    outcome = link.sending.outcome("r")
    assert outcome is not None
    assert outcome.error
    assert link.sending.sender.faults.failed == 1
    assert link.receiving.receiver.faults.stale + link.sending.sender.faults.stale > 0
    assert ("r" in link.receiving.host.adopted) == (kind is TransferClosed), "only the answer went astray"
    link.receiving.receiver.cancel("r")
    link.settle()
    check_works(link)
    link.close()


class TwiceScheme(LoopbackScheme):
    """Its first payload comes twice: from then on each message is the one before it."""

    def listen(self) -> ChannelListener:  # type: ignore[override]
        return _TwiceListener(super().listen())


class _TwiceListener:
    is_over = False

    def __init__(self, inner: ChannelListener) -> None:
        self.endpoint = inner.endpoint
        self.close = inner.close
        self._inner = inner

    def accept(self, pair_id: str) -> KVChannel:
        channel = self._inner.accept(pair_id)
        if _TwiceListener.is_over:
            return channel
        _TwiceListener.is_over = True
        return _LaggingChannel(channel)


class _LaggingChannel:
    def __init__(self, inner: KVChannel) -> None:
        self.send = inner.send
        self.close = inner.close
        self._inner = inner
        self._last: Tensor | None = None

    def receive(self, payload: Tensor) -> None:
        self._inner.receive(payload)
        now = payload.clone()
        if self._last is not None:
            payload.copy_(self._last)
        self._last = now


def test_a_channel_out_of_step_is_given_up_with_its_pair() -> None:
    """Digests alone would refuse all that ever follows."""
    _TwiceListener.is_over = False
    scheme = TwiceScheme(5.0)
    link = Link(Sending(scheme), Receiving(scheme))
    tokens = range(16 * 5)  # whole blocks, so that segments are of one size and any of them fits any announcement
    run_whole(link, make_request("r", tokens), chunk=16)
    link.until(lambda: link.sending.sender.num_open == 0)
    link.settle()
    outcome = link.sending.outcome("r")
    assert outcome is not None
    assert "rejected 3 times" in outcome.error
    assert link.receiving.host.ends()["r"].error is ErrorCode.TRANSFER
    assert link.sending.sender.faults.broken_pairs == 1
    assert link.sending.sender.faults.resends >= 2
    check_works(link)
    assert sum(isinstance(message, PairHello) for message in link.log) == 2
    link.close()


def test_blocks_are_in_quarantine_while_their_writer_may_still_write() -> None:
    """A receive that is under way pins the blocks of a lease that was cancelled; its end frees them."""
    scheme = LoopbackScheme(1.0)
    link = ChangingLink(Sending(scheme), Receiving(scheme))
    receiver = link.receiving.receiver
    run_whole(link, make_request("r", TOKENS))
    link.change = lambda message: [] if isinstance(message, SegmentReady) else [message]
    link.until(lambda: any(isinstance(message, SegmentReady) for message in link.log))
    ready = next(message for message in link.log if isinstance(message, SegmentReady))
    link.sending.sender.peer_lost(DECODE, "gone without a word to the other side")
    receiver.receive(link.peer, ready)  # waits in vain for the bytes
    receiver.cancel("r")
    assert receiver.num_quarantined == 7
    assert link.receiving.host.pool.num_referenced == 7
    link.until(lambda: receiver.num_quarantined == 0)
    link.settle()
    link.close()


def test_a_sender_that_did_not_hear_that_its_pair_broke_hears_it_when_it_opens_a_lease() -> None:
    link = make_link(timeout_s=0.5)
    check_works(link)
    link.change = lambda message: [] if isinstance(message, PairWelcome) else [message]
    hello = next(message for message in link.log if isinstance(message, PairHello))
    link.receiving.receiver._pair_broken(link.peer, hello.pair_id, "test")  # as a broken channel tells it
    link.carry()
    link.change = lambda message: [message]
    run_whole(link, make_request("r", TOKENS))
    link.until(lambda: link.sending.outcome("r") is not None)
    link.receiving.receiver.cancel("r")
    link.settle()
    run_whole(link, make_request("again", TOKENS))
    link.settle()
    assert "again" in link.receiving.host.adopted
    link.close()


def test_a_late_welcome_is_of_the_pair_that_it_answers() -> None:
    """The first pair's comes when it was given up: it must not pass for the second one's."""
    link = make_link(timeout_s=0.5)
    late: list[Message] = []

    def change(message: Message) -> list[Message]:
        if isinstance(message, PairWelcome):
            late.append(message)
            return [late[0]] if len(late) > 1 else []
        return [message]

    link.change = change
    run_whole(link, make_request("r", TOKENS))
    link.until(lambda: link.sending.outcome("r") is not None)
    link.receiving.receiver.cancel("r")
    link.settle()
    run_whole(link, make_request("next", TOKENS))
    link.until(lambda: len(late) == 2)
    link.change = lambda message: [message]
    link.sending.sender.receive(DECODE, late[1])
    link.settle()
    assert "next" in link.receiving.host.adopted
    assert link.sending.sender.faults.stale > 0
    link.close()
