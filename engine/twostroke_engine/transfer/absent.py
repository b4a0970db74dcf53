"""The transfer ends of an engine that has none: a colocated engine, or the side a worker does not play."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from twostroke_engine.messages import PeerMessage, RequestEnd, RequestUpdate
from twostroke_engine.request import ErrorCode, Request, RequestFacts
from twostroke_engine.transfer.end import ChunkOfHandOff, DecodeHost, KVSink, NoSink, TransferFaults
from twostroke_engine.transfer.messages import FirstToken, KVDestination, ReceiverMessage, SenderMessage


class CannotSend(Exception):
    """A request came with a destination, but this engine sends no KV."""


class NoTransfers:
    """A `TransferEnd` with nothing to do."""

    num_open = 0
    num_waiting = 0
    kv_bytes = 0
    digest_failures = 0
    num_quarantined = 0
    longest_wait_s = 0.0

    @property
    def faults(self) -> TransferFaults:
        """None."""
        return TransferFaults()

    def receive(self, peer: str, message: SenderMessage | ReceiverMessage) -> None:
        """Ignores a message that no one here can have asked for."""

    def peer_lost(self, peer: str, reason: str) -> None:
        """Nothing was open."""

    def cancel(self, request_id: str) -> bool:
        """Knows no request."""
        return False

    def poll(self, now_s: float) -> None:
        """Nothing is under way."""

    def take_outgoing(self) -> list[PeerMessage]:
        """Nothing to say."""
        return []

    def deliver_to(self, deliver: Callable[[PeerMessage], None]) -> None:
        """Nothing to say there either."""

    def close(self) -> None:
        """Nothing to stop."""


class NoSender(NoTransfers):
    """The `SendingEnd` of an engine that pushes no KV."""

    def begin(self, request: Request, destination: KVDestination) -> int:
        """Refuses.

        Raises:
            CannotSend: always.
        """
        raise CannotSend("this worker hands no KV over")

    def step_sink(self, chunks: Sequence[ChunkOfHandOff]) -> KVSink:
        """No one listens."""
        return NoSink()

    def prompt_computed(self, sink_id: int, first: tuple[FirstToken, ...]) -> None:
        """Never called: no hand-off can begin."""


class NoReceiver(NoTransfers):
    """The `ReceivingEnd` of an engine that takes no KV."""

    def __init__(self, host: DecodeHost) -> None:
        self._host = host

    def commit_heard(self, lease_id: str, at_s: float) -> None:
        """No one commits."""

    def reserve(self, request: Request, ttl_s: float) -> None:
        """Refuses the reservation at once."""
        end = RequestEnd(error=ErrorCode.INVALID, message="this worker takes no KV", facts=RequestFacts())
        self._host.report(RequestUpdate(request_id=request.id, end=end))
