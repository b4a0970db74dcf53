"""KV handed over between caches that store it differently: block sizes, number formats, hits on either side."""

from __future__ import annotations

import random
from itertools import product

import pytest
from twostroke_engine.transfer.loopback import LoopbackScheme
from twostroke_engine.transfer.messages import PairWelcome, SegmentReady

from tests.support.transfer_ends import Link, Receiving, Sending, begin, make_request, make_spec

SIZES = [(16, 16), (16, 64), (64, 16), (64, 64), (32, 48), (96, 64)]
LENGTHS = [1, 15, 16, 17, 63, 64, 65, 127, 128, 129, 200]
MAX_INT8_ERROR = 1 / 254 + 1e-6
MAX_FP8_ERROR = 1 / 16


def link_of(sender: int, receiver: int, **more: object) -> Link:
    scheme = LoopbackScheme(5.0)
    spec = {"head_dim": 4}
    return Link(
        Sending(scheme, spec=make_spec(sender, **spec)), Receiving(scheme, spec=make_spec(receiver, **spec), **more)
    )


def hand_over(link: Link, name: str, num_tokens: int, *, chunk: int, held: int, hits: int) -> int:
    """One prompt, of which either side has leading tokens already; the tokens that were skipped."""
    request = make_request(name, [ord(letter) for letter in name] + list(range(1000, 1000 + num_tokens - len(name))))
    link.receiving.hold(request.token_ids, held // link.receiving.spec.block_size)
    prompt = begin(link, request, min(hits, num_tokens - 1) // link.sending.spec.block_size)
    while prompt.num_left:
        prompt.chunk(chunk)
    prompt.finish()
    link.until(lambda: link.sending.outcome(name) is not None)
    outcome = link.sending.outcome(name)
    assert outcome is not None
    assert outcome.error == ""
    assert link.receiving.host.adopted[name][1].skipped_tokens == outcome.skipped_tokens
    return outcome.skipped_tokens


@pytest.mark.parametrize(("sender", "receiver"), SIZES)
def test_every_length_and_hit(sender: int, receiver: int) -> None:
    link = link_of(sender, receiver)
    for number, (length, part) in enumerate(product(LENGTHS, (0.0, 0.5, 1.0))):
        held, hits = int(length * part), int(length * random.Random(number).choice((0.0, 0.5, 1.0)))
        name = chr(65 + number % 26) if length < 3 else f"{number:03}"
        skipped = hand_over(link, name, length, chunk=(sender, 80, 1000)[number % 3], held=held, hits=hits)
        assert skipped == held // receiver * receiver
    link.settle()
    link.close()


def test_items_of_the_smaller_size_travel() -> None:
    """150 tokens in blocks of 64 to blocks of 16: 10 items, the last two of the third block are not sent."""
    link = link_of(64, 16)
    hand_over(link, "r", 150, chunk=1000, held=0, hits=0)
    welcome = next(message for message in link.log if isinstance(message, PairWelcome))
    assert (welcome.block_size, welcome.wire_dtype) == (16, "float32")
    segments = [message for message in link.log if isinstance(message, SegmentReady)]
    assert {(segment.first_block, segment.num_blocks) for segment in segments} == {(0, 10)}
    assert {len(segment.digests) for segment in segments} == {10}
    link.settle()
    link.close()


@pytest.mark.parametrize(("stored", "kept"), list(product(("float32", "bfloat16", "float16"), repeat=2)))
def test_number_formats_of_two_caches(stored: str, kept: str) -> None:
    """As exact as the receiver's is: numbers here are below 1."""
    scheme = LoopbackScheme(5.0)
    tolerance = 0.0 if stored == kept else 2**-8
    receiving = Receiving(scheme, spec=make_spec(64, kept), tolerance=tolerance)
    link = Link(Sending(scheme, spec=make_spec(16, stored)), receiving)
    hand_over(link, "r", 100, chunk=1000, held=0, hits=0)
    welcome = next(message for message in link.log if isinstance(message, PairWelcome))
    narrow = {"float32": 4, "bfloat16": 2, "float16": 2}
    assert welcome.wire_dtype == (stored if narrow[stored] <= narrow[kept] else kept)
    link.settle()
    link.close()


@pytest.mark.parametrize(
    ("wish", "sent", "error"), [("int8", "int8", MAX_INT8_ERROR), ("fp8", "float8_e4m3fn", MAX_FP8_ERROR)]
)
@pytest.mark.parametrize("asker", ["sender", "receiver"])
def test_a_lossy_format_on_request(wish: str, sent: str, error: float, asker: str) -> None:
    scheme, wishes = LoopbackScheme(5.0), {"transfer_dtype": wish}
    sending = Sending(scheme, spec=make_spec(16, head_dim=64), **(wishes if asker == "sender" else {}))
    receiving = Receiving(
        scheme, spec=make_spec(64, head_dim=64), tolerance=error, **(wishes if asker == "receiver" else {})
    )
    link = Link(sending, receiving)
    hand_over(link, "r", 100, chunk=40, held=0, hits=0)
    link.settle()
    outcome = sending.outcome("r")
    assert outcome is not None
    assert next(message for message in link.log if isinstance(message, PairWelcome)).wire_dtype == sent
    assert outcome.kv_bytes == 7 * 3 * 2 * 16 * (64 + 4)  # 7 items of 3 layers, keys and values of 16 tokens
    receiving.host.tolerance = error / 16
    again = make_request("again", range(3000, 3100))
    prompt = begin(link, again)
    prompt.chunk(1000)
    prompt.finish()
    link.until(lambda: "again" in receiving.host.adopted)
    assert receiving.host.wrong_blocks > 0, "the bound says little"
    link.close()


def test_a_choice_that_the_sender_cannot_make_ends_its_hand_offs() -> None:
    scheme = LoopbackScheme(5.0)
    link = link_of(16, 16)
    sending = Sending(scheme)
    request = make_request("r", range(40))
    link.receiving.receiver.reserve(request, 60.0)
    prompt = sending.begin(request, link.receiving.host.grants()["r"])
    prompt.chunk(1000)
    hello = sending.hello()
    welcome = PairWelcome(channel="loopback://0", block_size=64, wire_dtype="float32", pair_id=hello.pair_id)
    sending.sender.receive("decode:1", welcome)
    for _ in range(1000):
        sending.sender.poll(0.0)
        if sending.outcome("r") is not None:
            break
        sending.woken.get(timeout=5.0)
    outcome = sending.outcome("r")
    assert outcome is not None
    assert "do not fill blocks of 16" in outcome.error
    sending.sender.close()
    link.close()
