"""transfer.proto <-> the engine's twins of its messages: same names, same fields."""

from __future__ import annotations

from typing import Any, TypeVar

import msgspec
from google.protobuf.message import Message
from twostroke_engine.transfer.messages import (
    AbortTransfer,
    CommitTransfer,
    FirstToken,
    OpenTransfer,
    PairHello,
    PairWelcome,
    ReceiverMessage,
    SegmentReady,
    SegmentResult,
    SenderMessage,
    TransferClosed,
    TransferOpened,
)
from twostroke_proto.v1 import transfer_pb2

from twostroke_worker.wire import InvalidMessage

_Envelope = TypeVar("_Envelope", transfer_pb2.SenderMessage, transfer_pb2.ReceiverMessage)

_SENDER = {
    "hello": PairHello,
    "open": OpenTransfer,
    "segment": SegmentReady,
    "commit": CommitTransfer,
    "abort": AbortTransfer,
}
_RECEIVER = {
    "welcome": PairWelcome,
    "opened": TransferOpened,
    "result": SegmentResult,
    "closed": TransferClosed,
}


def sender_to_proto(message: SenderMessage) -> transfer_pb2.SenderMessage:
    """What the prefill worker says, for the wire."""
    return _wrap(transfer_pb2.SenderMessage(), message)


def receiver_to_proto(message: ReceiverMessage) -> transfer_pb2.ReceiverMessage:
    """What the decode worker says, for the wire."""
    return _wrap(transfer_pb2.ReceiverMessage(), message)


def sender_from_proto(envelope: transfer_pb2.SenderMessage) -> SenderMessage:
    """What a prefill worker said; `InvalidMessage` for a kind that this version does not know."""
    message: SenderMessage = _unwrap(envelope, envelope.WhichOneof("kind"), _SENDER)
    return message


def receiver_from_proto(envelope: transfer_pb2.ReceiverMessage) -> ReceiverMessage:
    """What a decode worker said; `InvalidMessage` for a kind that this version does not know."""
    message: ReceiverMessage = _unwrap(envelope, envelope.WhichOneof("kind"), _RECEIVER)
    return message


def _wrap(envelope: _Envelope, message: SenderMessage | ReceiverMessage) -> _Envelope:
    """Fills the envelope's field that is named like the struct's tag."""
    inner = getattr(envelope, str(message.__struct_config__.tag))
    inner.SetInParent()
    for name, value in msgspec.structs.asdict(message).items():
        if name == "first":
            inner.first.extend(transfer_pb2.FirstToken(**msgspec.structs.asdict(token)) for token in value)
        elif isinstance(value, tuple):
            getattr(inner, name).extend(value)
        else:
            setattr(inner, name, value)
    return envelope


def _unwrap(envelope: Message, kind: str | None, structs: dict[str, Any]) -> Any:
    struct = structs.get(kind or "")
    if struct is None:
        raise InvalidMessage(f"unknown kind of {type(envelope).__name__}")
    inner = getattr(envelope, kind or "")
    return struct(**{field.name: _value(inner, field.name) for field in msgspec.structs.fields(struct)})


def _value(inner: Message, name: str) -> Any:
    value = getattr(inner, name)
    if name == "first":
        return tuple(FirstToken(token.choice, token.token_id, token.finished) for token in value)
    return tuple(value) if inner.DESCRIPTOR.fields_by_name[name].is_repeated else value
