"""`KVSender` and `KVReceiver` with everything real but the engines and the network: prompts that arrive, or do not."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
from twostroke_engine.request import ErrorCode
from twostroke_engine.transfer.channel import ChannelError, ChannelFactory
from twostroke_engine.transfer.loopback import LoopbackScheme
from twostroke_engine.transfer.messages import (
    FirstToken,
    SegmentReady,
    TransferOpened,
)

from tests.support.channel_schemes import make_scheme
from tests.support.transfer_ends import (
    NUM_LAYERS,
    SPEC,
    TOKENS,
    FlippingScheme,
    Link,
    Receiving,
    Sending,
    begin,
    make_request,
    run_whole,
    wait_for,
)


@pytest.fixture(params=["loopback", "tcp", "shm"])
def link(request: pytest.FixtureRequest) -> Iterator[Link]:
    scheme = make_scheme(request.param, 5.0)
    made = Link(Sending(scheme), Receiving(scheme))
    yield made
    made.close()


def test_a_prompt_arrives_and_is_adopted(link: Link) -> None:
    run_whole(link, make_request("r", TOKENS), chunk=40)
    link.settle()
    first, facts = link.receiving.host.adopted["r"]
    assert first == (FirstToken(0, 5),)
    assert facts.kv_bytes == SPEC.block_bytes * 7 == link.receiving.receiver.kv_bytes
    outcome = link.sending.outcome("r")
    assert outcome is not None
    assert outcome.error == ""
    assert (outcome.kv_bytes, outcome.kv_segments, outcome.kv_resends) == (facts.kv_bytes, facts.kv_segments, 0)
    assert link.receiving.host.pool.num_cached == 6, "full blocks can be hit from now on"


def test_held_blocks_are_not_sent(link: Link) -> None:
    link.receiving.hold(TOKENS, 5)
    run_whole(link, make_request("r", TOKENS))
    link.settle()
    _, facts = link.receiving.host.adopted["r"]
    assert facts.kv_bytes == SPEC.block_bytes * 2
    assert facts.skipped_tokens == 80


def test_a_prompt_held_whole_needs_no_segment(link: Link) -> None:
    link.receiving.hold(TOKENS[:96], 6)
    run_whole(link, make_request("r", TOKENS[:96]))
    link.settle()
    assert link.receiving.host.adopted["r"][1].kv_segments == 0
    assert not [message for message in link.log if isinstance(message, SegmentReady)]


def test_the_first_segment_is_on_the_wire_before_the_last_layer_is_computed(link: Link) -> None:
    """Bar 8 at this level: one chunk, so that everything happens within one step of the sending engine."""
    link.direct()
    receiver, stop = link.receiving.receiver, threading.Event()

    def receiving_engine() -> None:
        while not stop.wait(0.001):
            receiver.poll(0.0)

    def before_layer(layer: int) -> None:
        if layer == NUM_LAYERS - 1:
            wait_for(lambda: receiver.kv_bytes > 0)

    prompt = begin(link, make_request("r", TOKENS))
    engine = threading.Thread(target=receiving_engine)
    engine.start()
    try:
        prompt.chunk(1000, before_layer)
    finally:
        stop.set()
        engine.join()
    prompt.finish()
    link.settle()
    assert "r" in link.receiving.host.adopted


def test_a_corrupted_segment_is_sent_again() -> None:
    scheme = LoopbackScheme(5.0)
    link = Link(Sending(scheme), Receiving(FlippingScheme(scheme, lambda number: number in (0, 2))))
    run_whole(link, make_request("r", TOKENS))
    link.settle()
    _, facts = link.receiving.host.adopted["r"]
    assert facts.kv_resends == 2
    assert link.receiving.receiver.digest_failures == 2
    link.close()


def test_a_segment_that_never_arrives_whole_ends_the_hand_off() -> None:
    scheme = LoopbackScheme(5.0)
    link = Link(Sending(scheme), Receiving(FlippingScheme(scheme, lambda number: True)))
    run_whole(link, make_request("r", TOKENS))
    link.settle()
    assert link.receiving.host.adopted == {}
    outcome = link.sending.outcome("r")
    assert outcome is not None
    assert "rejected 3 times" in outcome.error
    assert link.receiving.host.ends()["r"].error is ErrorCode.TRANSFER
    link.close()


def test_all_choices_finished_at_their_first_token_ends_well(link: Link) -> None:
    prompt = begin(link, make_request("r", TOKENS))
    prompt.chunk(1000)
    prompt.finish((FirstToken(0, 5, True), FirstToken(1, 6, True)))
    link.settle()
    outcome = link.sending.outcome("r")
    assert outcome is not None
    assert outcome.error == ""
    assert link.receiving.host.ends()["r"].error is None


@pytest.mark.parametrize("chunks", [0, 1, 3])
def test_cancel_at_the_sender(link: Link, chunks: int) -> None:
    prompt = begin(link, make_request("r", TOKENS))
    for _ in range(chunks):
        prompt.chunk(40)
        link.carry()
    assert link.sending.sender.cancel("r")
    assert not link.sending.sender.cancel("unknown")
    link.until(lambda: link.sending.outcome("r") is not None)
    outcome = link.sending.outcome("r")
    assert outcome is not None
    assert outcome.error == "cancelled"
    link.carry()
    link.receiving.receiver.cancel("r")  # the router tells both, in any order
    link.settle()
    assert link.receiving.host.ends()["r"].error is ErrorCode.CANCELLED
    assert link.receiving.host.adopted == {}


@pytest.mark.parametrize("is_opened", [False, True])
def test_cancel_at_the_receiver(link: Link, is_opened: bool) -> None:
    prompt = begin(link, make_request("r", TOKENS))
    if is_opened:
        prompt.chunk(40)
        link.until(lambda: any(isinstance(message, TransferOpened) for message in link.log))
    assert link.receiving.receiver.cancel("r")
    assert not link.receiving.receiver.cancel("r") or is_opened
    while prompt.num_left:
        prompt.chunk(40)
    prompt.finish()
    link.settle()
    assert link.receiving.host.ends()["r"].error is ErrorCode.CANCELLED
    outcome = link.sending.outcome("r")
    assert outcome is not None
    assert outcome.error


def test_a_stalled_transfer_is_given_up() -> None:
    scheme = LoopbackScheme(5.0)
    link = Link(Sending(scheme), Receiving(scheme, stall_timeout_s=0.2))
    prompt = begin(link, make_request("r", TOKENS))
    prompt.chunk(40)  # and no other
    link.until(lambda: "r" in link.receiving.host.ends())
    link.settle()
    outcome = link.sending.outcome("r")
    assert outcome is not None
    assert outcome.error == "the transfer stalled"
    link.close()


def test_a_silent_receiver_ends_the_hand_off_in_time() -> None:
    scheme = LoopbackScheme(0.3)
    link = Link(Sending(scheme, timeout_s=0.3), Receiving(scheme))
    prompt = begin(link, make_request("r", TOKENS))
    prompt.chunk(1000)

    def is_closed() -> bool:
        link.sending.sender.poll(0.0)
        return link.sending.sender.num_open == 0

    wait_for(is_closed)
    outcome = link.sending.outcome("r")
    assert outcome is not None
    assert "in time" in outcome.error
    link.receiving.receiver.cancel("r")
    link.settle()
    link.close()


def test_peer_loss_closes_both_sides_and_a_new_pair_works(link: Link) -> None:
    prompt = begin(link, make_request("r1", TOKENS))
    prompt.chunk(40)
    link.until(lambda: any(isinstance(message, SegmentReady) for message in link.log))
    link.lose("stream-2")
    link.settle()
    outcome = link.sending.outcome("r1")
    assert outcome is not None
    assert outcome.error == "lost"
    assert link.receiving.host.ends()["r1"].error is ErrorCode.TRANSFER
    run_whole(link, make_request("r2", TOKENS))
    link.settle()
    assert "r2" in link.receiving.host.adopted


def test_segments_of_a_lease_that_was_cancelled_go_nowhere(link: Link) -> None:
    """The receiver cancels while segments are announced; the next prompt on the same channel must be intact."""
    request = make_request("r1", TOKENS)
    prompt = begin(link, request)
    prompt.chunk(1000)
    prompt.finish()
    link.until(lambda: any(isinstance(message, SegmentReady) for message in link.log))
    link.receiving.receiver.cancel("r1")
    run_whole(link, make_request("r2", TOKENS))
    link.settle()
    assert "r2" in link.receiving.host.adopted


def test_close_ends_the_threads() -> None:
    scheme = LoopbackScheme(1.0)
    link = Link(Sending(scheme, worker_id="closing"), Receiving(scheme))
    prompt = begin(link, make_request("r", TOKENS))
    prompt.chunk(40)
    link.until(lambda: any(isinstance(message, TransferOpened) for message in link.log))
    link.close()
    wait_for(lambda: not [thread for thread in threading.enumerate() if "closing" in thread.name])


def test_an_unknown_scheme_is_an_error() -> None:
    factory = ChannelFactory([LoopbackScheme(1.0)])
    with pytest.raises(ChannelError, match="no channel for nixl; have loopback"):
        factory.connect("nixl://x", "pair")
