"""Protobuf <-> engine structs: nothing is lost, and nothing impossible gets in."""

from __future__ import annotations

import math
from collections.abc import Callable

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from twostroke_engine import messages as engine
from twostroke_engine.request import ErrorCode, FinishReason, Request, RequestFacts, SamplingParams, TokenOut
from twostroke_engine.transfer import messages as transfer
from twostroke_proto.v1 import transfer_pb2, types_pb2, worker_pb2
from twostroke_worker.transfer_wire import (
    receiver_from_proto,
    receiver_to_proto,
    sender_from_proto,
    sender_to_proto,
)
from twostroke_worker.wire import (
    InvalidMessage,
    LeaseHome,
    RequestLimits,
    destination_from_proto,
    load_to_proto,
    request_from_proto,
    update_to_proto,
)

LIMITS = RequestLimits(vocab_size=1000, max_model_len=64)
HOME = LeaseHome(worker_id="decode-0", endpoint="127.0.0.1:4000", kv_fingerprint="f00d")
TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def engine_request(**fields: object) -> worker_pb2.EngineRequest:
    defaults: dict[str, object] = {"id": "r", "token_ids": [1, 2, 3], "n": 1}
    return worker_pb2.EngineRequest(**(defaults | fields))  # type: ignore[arg-type]


def test_every_field_of_a_request_arrives() -> None:
    sampling = types_pb2.SamplingParams(
        temperature=0.5,
        top_k=7,
        top_p=0.75,
        min_p=0.125,
        repetition_penalty=1.5,
        presence_penalty=-1.0,
        frequency_penalty=0.25,
        logit_bias={9: 1.5, 3: -100.0},
        seed=2**64 - 1,
        max_tokens=20,
        min_tokens=2,
        stop_token_ids=[5, 6],
        ignore_eos=True,
        logprobs=0,
    )
    message = engine_request(
        sampling=sampling, n=3, priority=-2, deadline_ms=1500, tenant="t", cache_salt=b"\x00s", adapter="a"
    )
    assert request_from_proto(message, TRACE, LIMITS) == Request(
        id="r",
        token_ids=(1, 2, 3),
        sampling=SamplingParams(
            temperature=0.5,
            top_k=7,
            top_p=0.75,
            min_p=0.125,
            repetition_penalty=1.5,
            presence_penalty=-1.0,
            frequency_penalty=0.25,
            logit_bias=((3, -100.0), (9, 1.5)),
            seed=2**64 - 1,
            max_tokens=20,
            min_tokens=2,
            stop_token_ids=(5, 6),
            ignore_eos=True,
            logprobs=0,
        ),
        n=3,
        priority=-2,
        deadline_s=1.5,
        tenant="t",
        cache_salt=b"\x00s",
        adapter="a",
        traceparent=TRACE,
    )


def test_every_struct_field_has_a_place_in_the_proto() -> None:
    fields = {field.name for field in msgspec.structs.fields(Request)}
    assert fields - {"deadline_s", "traceparent"} <= set(worker_pb2.EngineRequest.DESCRIPTOR.fields_by_name)
    fields = {field.name for field in msgspec.structs.fields(SamplingParams)}
    assert fields <= set(types_pb2.SamplingParams.DESCRIPTOR.fields_by_name)


def test_absent_sampling_fields_take_their_defaults() -> None:
    request = request_from_proto(engine_request(), "", LIMITS)
    assert request.sampling == SamplingParams()
    assert request.deadline_s is None


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"id": ""}, "request.id"),
        ({"token_ids": []}, "request.token_ids"),
        ({"token_ids": [1, 1000]}, "request.token_ids"),
        ({"token_ids": [1] * 64}, "request.token_ids"),
        ({"n": 0}, "request.n"),
        ({"n": 100_000}, "request.n"),
        ({"sampling": {"temperature": -0.1}}, "sampling.temperature"),
        ({"sampling": {"temperature": math.nan}}, "sampling.temperature"),
        ({"sampling": {"temperature": math.inf}}, "sampling.temperature"),
        ({"sampling": {"top_k": -1}}, "sampling.top_k"),
        ({"sampling": {"top_p": 0.0}}, "sampling.top_p"),
        ({"sampling": {"min_p": 1.0}}, "sampling.min_p"),
        ({"sampling": {"repetition_penalty": 0.0}}, "sampling.repetition_penalty"),
        ({"sampling": {"presence_penalty": 2.5}}, "sampling.presence_penalty"),
        ({"sampling": {"frequency_penalty": -3.0}}, "sampling.frequency_penalty"),
        ({"sampling": {"max_tokens": 0}}, "sampling.max_tokens"),
        ({"sampling": {"logit_bias": {1000: 1.0}}}, "sampling.logit_bias"),
        ({"sampling": {"logit_bias": {1: math.nan}}}, "sampling.logit_bias"),
        ({"sampling": {"stop_token_ids": [1000]}}, "sampling.stop_token_ids"),
        ({"sampling": {"stop": ["x"]}}, "sampling.stop"),
        ({"sampling": {"logprobs": 1 << 30}}, "sampling.logprobs"),
    ],
)
def test_an_impossible_request_is_refused_by_the_name_of_its_field(fields: dict[str, object], named: str) -> None:
    if "sampling" in fields:
        fields = {"sampling": types_pb2.SamplingParams(**fields["sampling"])}  # type: ignore[arg-type]
    with pytest.raises(InvalidMessage, match=f"^{named}"):
        request_from_proto(engine_request(**fields), "", LIMITS)


def test_a_granted_lease_becomes_a_destination_that_prefill_reads_back() -> None:
    grant = engine.LeaseGrant(lease_id="l", epoch=3, ttl_s=2.5)
    proto = update_to_proto(engine.RequestUpdate(request_id="r", reserved=grant), HOME)
    assert destination_from_proto(proto.reserved) == transfer.KVDestination(
        worker_id="decode-0", endpoint="127.0.0.1:4000", lease_id="l", epoch=3, kv_fingerprint="f00d", ttl_s=2.5
    )


@pytest.mark.parametrize("missing", ["worker_id", "endpoint", "lease_id", "kv_fingerprint"])
def test_a_destination_without_an_address_is_refused(missing: str) -> None:
    proto = types_pb2.KVDestination(worker_id="w", endpoint="e:1", lease_id="l", kv_fingerprint="f")
    proto.ClearField(missing)  # type: ignore[arg-type]
    with pytest.raises(InvalidMessage, match=f"^destination.{missing}"):
        destination_from_proto(proto)


def test_an_update_keeps_tokens_finish_error_and_facts() -> None:
    facts = RequestFacts(
        cached_tokens=1,
        preemptions=2,
        queue_s=0.5,
        prefill_s=0.25,
        transfer_s=0.125,
        kv_bytes=1 << 40,
        kv_segments=3,
        kv_resends=4,
        skipped_tokens=5,
    )
    token = TokenOut(7, -0.5, ((7, -0.5), (8, -1.5)))
    update = engine.RequestUpdate(
        request_id="r",
        deltas=(engine.ChoiceDelta(choice=1, offset=4, tokens=(token,), finish=FinishReason.LENGTH),),
        end=engine.RequestEnd(error=ErrorCode.TRANSFER, message="lost", facts=facts),
    )
    proto = update_to_proto(update, HOME)
    (delta,) = proto.deltas
    assert (delta.choice, delta.offset, delta.finish) == (1, 4, types_pb2.FINISH_REASON_LENGTH)
    assert [(t.id, t.logprob, [(a.token_id, a.logprob) for a in t.top]) for t in delta.tokens] == [
        (7, -0.5, [(7, -0.5), (8, -1.5)])
    ]
    assert (proto.end.error, proto.end.message) == (worker_pb2.ERROR_CODE_TRANSFER, "lost")
    assert {name: getattr(proto.end.facts, name) for name in msgspec.structs.asdict(facts)} == msgspec.structs.asdict(
        facts
    )
    assert not proto.HasField("reserved")


def test_ending_well_and_not_ending_differ() -> None:
    assert not update_to_proto(engine.RequestUpdate(request_id="r"), HOME).HasField("end")
    ended = engine.RequestUpdate(request_id="r", end=engine.RequestEnd(facts=RequestFacts()))
    proto = update_to_proto(ended, HOME)
    assert proto.HasField("end")
    assert proto.end.error == worker_pb2.ERROR_CODE_UNSPECIFIED


def test_every_load_field_arrives() -> None:
    names = [field.name for field in msgspec.structs.fields(engine.EngineLoad)]
    values = {name: number + 1 for number, name in enumerate(names)}
    proto = load_to_proto(engine.EngineLoad(**values), is_draining=True)
    assert {name: getattr(proto, name) for name in names} == values
    assert proto.draining
    assert set(names) | {"draining"} == set(worker_pb2.WorkerLoad.DESCRIPTOR.fields_by_name)


def test_enums_have_the_numbers_of_the_proto() -> None:
    assert {code.name: code.value for code in ErrorCode} | {"UNSPECIFIED": 0} == {
        name.removeprefix("ERROR_CODE_"): number for name, number in worker_pb2.ErrorCode.items()
    }
    assert {reason.name: reason.value for reason in FinishReason} | {"UNSPECIFIED": 0} == {
        name.removeprefix("FINISH_REASON_"): number for name, number in types_pb2.FinishReason.items()
    }


# ---- transfer --------------------------------------------------------------------------------------------------------

UINT32 = st.integers(0, 2**32 - 1)
UINT64 = st.integers(0, 2**64 - 1)
TEXT = st.text(max_size=10)


def structs_of(struct: type, **fields: st.SearchStrategy[object]) -> st.SearchStrategy[object]:
    """Random instances; uint32 and text where a field says int and str."""
    by_type = {int: UINT32, str: TEXT, bool: st.booleans()}
    infos = msgspec.inspect.type_info(struct).fields  # type: ignore[attr-defined]
    plain: dict[type, type] = {
        msgspec.inspect.IntType: int,
        msgspec.inspect.StrType: str,
        msgspec.inspect.BoolType: bool,
    }
    drawn = {info.name: by_type[plain[type(info.type)]] for info in infos if info.name not in fields}
    return st.builds(struct, **drawn, **fields)


TEXTS = st.lists(TEXT, max_size=3).map(tuple)
FIRST = st.lists(st.builds(transfer.FirstToken, UINT32, UINT32, st.booleans()), max_size=3).map(tuple)
SENDER = st.one_of(
    structs_of(transfer.PairHello, worker_epoch=UINT64, channels=TEXTS, wire_dtypes=TEXTS),
    structs_of(transfer.OpenTransfer),
    structs_of(transfer.SegmentReady, num_bytes=UINT64, digests=st.lists(UINT64, max_size=4).map(tuple)),
    structs_of(transfer.CommitTransfer, first=FIRST),
    structs_of(transfer.AbortTransfer),
)
RECEIVER = st.one_of(
    structs_of(transfer.PairWelcome, worker_epoch=UINT64),
    structs_of(transfer.TransferOpened),
    structs_of(transfer.SegmentResult),
    structs_of(transfer.TransferClosed),
)


def over_the_wire(proto: transfer_pb2.SenderMessage | transfer_pb2.ReceiverMessage) -> object:
    return type(proto).FromString(proto.SerializeToString())


@given(SENDER)
@settings(max_examples=100, deadline=None)
def test_sender_messages_round_trip(message: transfer.SenderMessage) -> None:
    assert sender_from_proto(over_the_wire(sender_to_proto(message))) == message  # type: ignore[arg-type]


@given(RECEIVER)
@settings(max_examples=100, deadline=None)
def test_receiver_messages_round_trip(message: transfer.ReceiverMessage) -> None:
    assert receiver_from_proto(over_the_wire(receiver_to_proto(message))) == message  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("read", "envelope"),
    [(sender_from_proto, transfer_pb2.SenderMessage()), (receiver_from_proto, transfer_pb2.ReceiverMessage())],
)
def test_a_transfer_message_of_an_unknown_kind_is_refused(read: Callable[[object], object], envelope: object) -> None:
    with pytest.raises(InvalidMessage, match="unknown kind"):
        read(envelope)
