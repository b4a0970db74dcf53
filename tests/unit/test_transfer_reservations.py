"""What a `KVReceiver` grants, binds, refuses and lets lapse."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from twostroke_engine.kv.spec import PROTOCOL_VERSION
from twostroke_engine.request import ErrorCode
from twostroke_engine.transfer.loopback import LoopbackScheme
from twostroke_engine.transfer.messages import (
    CommitTransfer,
    OpenTransfer,
    PairHello,
    TransferClosed,
)

from tests.support.transfer_ends import (
    SPEC,
    TOKENS,
    Link,
    Receiving,
    Sending,
    make_request,
    reserve,
    run_whole,
)


@pytest.fixture
def link() -> Iterator[Link]:
    scheme = LoopbackScheme(5.0)
    made = Link(Sending(scheme), Receiving(scheme))
    yield made
    made.close()


def test_a_reservation_lapses() -> None:
    now_s = [100.0]
    scheme = LoopbackScheme(5.0)
    link = Link(Sending(scheme), Receiving(scheme, clock=lambda: now_s[0]))
    reserve(link, make_request("r", TOKENS), ttl_s=2.0)
    now_s[0] += 1.9
    link.carry()
    assert link.receiving.host.ends() == {}
    now_s[0] += 0.2
    link.carry()
    end = link.receiving.host.ends()["r"]
    assert (end.error, end.message) == (ErrorCode.TRANSFER, "reservation lapsed")
    link.settle()
    link.close()


def test_reservations_are_first_come_first_served() -> None:
    scheme = LoopbackScheme(5.0)
    link = Link(Sending(scheme), Receiving(scheme, num_blocks=8))
    host, receiver = link.receiving.host, link.receiving.receiver
    for name, num_tokens in (("a", 60), ("large", 120), ("small", 10)):
        receiver.reserve(make_request(name, range(num_tokens)), 60.0)
    assert list(host.grants()) == ["a"], "the small one fits, but the large one came first"
    assert receiver.num_waiting == 2
    receiver.cancel("a")
    link.carry()
    assert list(host.grants()) == ["a", "large"]
    receiver.cancel("large")
    link.carry()
    assert list(host.grants()) == ["a", "large", "small"]
    receiver.cancel("small")
    link.settle()
    link.close()


def test_a_waiting_reservation_has_a_deadline() -> None:
    now_s = [100.0]
    scheme = LoopbackScheme(5.0)
    link = Link(Sending(scheme), Receiving(scheme, num_blocks=8, clock=lambda: now_s[0]))
    link.receiving.receiver.reserve(make_request("a", range(120)), 60.0)
    link.receiving.receiver.reserve(make_request("b", range(120), deadline_s=3.0), 60.0)
    now_s[0] += 3.5
    link.carry()
    assert link.receiving.host.ends()["b"].error is ErrorCode.DEADLINE
    link.receiving.receiver.cancel("a")
    link.settle()
    link.close()


def test_a_prompt_larger_than_the_pool_is_refused() -> None:
    scheme = LoopbackScheme(5.0)
    link = Link(Sending(scheme), Receiving(scheme, num_blocks=4))
    link.receiving.receiver.reserve(make_request("r", range(64)), 60.0)
    end = link.receiving.host.ends()["r"]
    assert end.error is ErrorCode.INVALID
    assert end.message == "the prompt needs 5 KV blocks, this worker has 4"
    link.settle()
    link.close()


def hello_with(**fields: object) -> PairHello:
    common: dict[str, object] = {
        "version": PROTOCOL_VERSION,
        "worker_id": "p9",
        "worker_epoch": 1,
        "kv_fingerprint": SPEC.fingerprint(),
        "model_fingerprint": "model",
        "pair_id": "pair",
        "tokenizer_hash": "",
        "block_size": SPEC.block_size,
        "kv_dtype": SPEC.dtype,
        "transfer_dtype": "auto",
        "wire_dtypes": ("float32", "int8"),
        "channels": ("loopback",),
    }
    return PairHello(**(common | fields))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"version": 1}, "transfer protocol 1; this worker speaks 3"),
        ({"kv_fingerprint": "other"}, "shapes"),
        ({"model_fingerprint": "other"}, "models differ"),
        ({"tokenizer_hash": "other"}, "tokenizers differ"),
        ({"block_size": 24}, "blocks of 24 tokens"),
        ({"block_size": 0}, "blocks of 0 tokens"),
        ({"transfer_dtype": "int8"}, "heads of 2 numbers cannot travel as int8"),
        ({"transfer_dtype": "fp8"}, "the sender cannot convert 'float8_e4m3fn'"),
        ({"transfer_dtype": "int3"}, "the sender cannot convert 'int3'"),
        ({"channels": ("collective",)}, "no common channel"),
    ],
)
def test_a_pair_that_does_not_fit_is_refused(link: Link, fields: dict[str, object], reason: str) -> None:
    receiver = link.receiving.receiver
    receiver.receive("stream-9", hello_with(**fields))
    receiver.receive("stream-9", OpenTransfer(lease_id="x", epoch=1, request_id="r", num_tokens=3))
    receiver.poll(0.0)
    welcome, closed = [entry.message for entry in receiver.take_outgoing()]
    assert reason in welcome.refused  # type: ignore[union-attr]
    assert "no pair" in closed.error  # type: ignore[union-attr]


def test_a_refused_pair_closes_its_hand_offs() -> None:
    scheme = LoopbackScheme(5.0)
    sending = Sending(scheme)
    link = Link(sending, Receiving(scheme))
    object.__setattr__(sending.sender._context, "model_fingerprint", "other")
    run_whole(link, make_request("r", TOKENS))
    link.until(lambda: sending.outcome("r") is not None)
    outcome = sending.outcome("r")
    assert outcome is not None
    assert outcome.error == "refused: the models differ"
    link.receiving.receiver.cancel("r")
    link.settle()
    link.close()


@pytest.mark.parametrize(
    "message",
    [
        OpenTransfer(lease_id="unknown", epoch=1, request_id="r", num_tokens=100),
        OpenTransfer(lease_id="LEASE", epoch=2, request_id="r", num_tokens=100),
        OpenTransfer(lease_id="LEASE", epoch=1, request_id="r", num_tokens=99),
    ],
)
def test_open_is_checked(link: Link, message: OpenTransfer) -> None:
    receiver = link.receiving.receiver
    reserve(link, make_request("r", TOKENS))
    lease_id = link.receiving.host.grants()["r"].lease_id
    receiver.receive("stream-9", hello_with())
    changed = {"lease_id": lease_id} if message.lease_id == "LEASE" else {}
    receiver.receive(
        "stream-9", OpenTransfer(**{field: getattr(message, field) for field in message.__struct_fields__} | changed)
    )
    receiver.poll(0.0)
    closed = receiver.take_outgoing()[-1].message
    assert isinstance(closed, TransferClosed)
    assert closed.error
    assert receiver.num_open == 1, "the reservation is someone else's"
    receiver.cancel("r")
    link.settle()


def test_a_commit_without_all_segments_is_never_adopted() -> None:
    scheme = LoopbackScheme(5.0)
    link = Link(Sending(scheme), Receiving(scheme))
    receiver = link.receiving.receiver
    reserve(link, make_request("r", TOKENS))
    lease_id = link.receiving.host.grants()["r"].lease_id
    receiver.receive("stream-9", hello_with())
    receiver.receive("stream-9", OpenTransfer(lease_id=lease_id, epoch=1, request_id="r", num_tokens=100))
    receiver.poll(0.0)
    scheme.connect("loopback://0", "pair")
    receiver.receive("stream-9", CommitTransfer(lease_id=lease_id, epoch=1, num_segments=0, first=()))
    link.until(lambda: receiver.num_open == 0)
    assert link.receiving.host.adopted == {}
    end = link.receiving.host.ends()["r"]
    assert (end.error, "not every block" in end.message) == (ErrorCode.TRANSFER, True)
    link.settle()
    link.close()
