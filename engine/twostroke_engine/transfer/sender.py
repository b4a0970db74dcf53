"""`KVSender`: a prefill worker's transfer end. The engine's thread only posts and polls; `SendPair`s do the work."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import count
from uuid import uuid4

from twostroke_engine.messages import PeerMessage
from twostroke_engine.request import Request
from twostroke_engine.transfer.context import TransferContext
from twostroke_engine.transfer.device import DeviceSide
from twostroke_engine.transfer.end import ChunkOfHandOff, HandOffOutcome, KVSink, NoSink, PrefillHost, TransferFaults
from twostroke_engine.transfer.hand_off import HandOff
from twostroke_engine.transfer.mailbox import Mailbox
from twostroke_engine.transfer.messages import (
    FirstToken,
    KVDestination,
    PairWelcome,
    ReceiverMessage,
    SegmentResult,
    SenderMessage,
    TransferClosed,
    TransferOpened,
)
from twostroke_engine.transfer.outgoing import Outgoing
from twostroke_engine.transfer.send_pair import CANCELLED, SendPair

_JOIN_S = 0.5


class _StepSink:
    """Tells the pairs of a step's hand-offs of each layer that ends a segment."""

    def __init__(self, device: DeviceSide, sinks: dict[SendPair, tuple[int, ...]]) -> None:
        self._device = device
        self._sinks = sinks

    def layer_written(self, layer: int) -> None:
        """Posts; the pairs' threads send while the next layer is computed."""
        listening = [pair for pair in self._sinks if pair.ends_segment(layer)]
        if not listening:
            return
        mark = self._device.mark()
        for pair in listening:
            pair.post(pair.layer_written, self._sinks[pair], layer, mark)


class KVSender:
    """Pushes prompts' KV to decode workers; a `SendingEnd`."""

    def __init__(self, context: TransferContext, host: PrefillHost, wake: Callable[[], None]) -> None:
        self.kv_bytes = 0
        self.digest_failures = 0
        self._faults = TransferFaults()
        self._context = context
        self._host = host
        self._wake = wake
        self._results = Mailbox()
        self._outgoing = Outgoing(wake)
        self._sink_ids = count(1)
        self._pairs: dict[str, SendPair] = {}
        self._open: dict[int, tuple[str, SendPair]] = {}

    @property
    def num_open(self) -> int:
        """Hand-offs not yet closed."""
        return len(self._open)

    @property
    def faults(self) -> TransferFaults:
        """What went wrong so far."""
        return replace(self._faults, stale=self._faults.stale + sum(pair.num_stale for pair in self._pairs.values()))

    @property
    def num_quarantined(self) -> int:
        """A sender gives no blocks to writers."""
        return 0

    @property
    def longest_wait_s(self) -> float:
        """No reservation waits on this side."""
        return 0.0

    @property
    def num_waiting(self) -> int:
        """A sender has no reservations."""
        return 0

    def begin(self, request: Request, destination: KVDestination) -> int:
        """Opens a hand-off and names it; its pair is greeted if it is new, so that it is ready when the KV is."""
        sink_id = next(self._sink_ids)
        pair = self._pair(destination.endpoint)
        self._open[sink_id] = (request.id, pair)
        hand_off = HandOff(sink_id, request.id, destination.lease_id, destination.epoch, request.num_prompt_tokens)
        is_same = destination.kv_fingerprint == self._context.spec.fingerprint()
        pair.post(pair.begin, hand_off, "" if is_same else "the decode worker's KV cache has another shape")
        return sink_id

    def step_sink(self, chunks: Sequence[ChunkOfHandOff]) -> KVSink:
        """Listener for the forward pass of a step with these chunks; offers their prefix hits at once."""
        known = [chunk for chunk in chunks if chunk.sink_id in self._open]
        if not known:
            return NoSink()
        started = self._context.device.mark()
        sinks: dict[SendPair, tuple[int, ...]] = {}
        for chunk in known:
            pair = self._open[chunk.sink_id][1]
            pair.post(pair.chunk, chunk, started)
            sinks[pair] = (*sinks.get(pair, ()), chunk.sink_id)
        return _StepSink(self._context.device, sinks)

    def prompt_computed(self, sink_id: int, first: tuple[FirstToken, ...]) -> None:
        """After the step that ended the prompt: commit once everything was sent."""
        if sink_id in self._open:
            pair = self._open[sink_id][1]
            pair.post(pair.prompt_computed, sink_id, first)

    def receive(self, peer: str, message: SenderMessage | ReceiverMessage) -> None:
        """Any thread: passes a decode worker's message to its pair."""
        pair = self._pairs.get(peer)
        if pair is not None and isinstance(message, PairWelcome | TransferOpened | SegmentResult | TransferClosed):
            pair.post(pair.hear, message)

    def peer_lost(self, peer: str, reason: str) -> None:
        """Closes the pair; the next hand-off to the peer makes a new one."""
        pair = self._pairs.pop(peer, None)
        if pair is not None:
            self._dropped(pair)
            pair.stop(reason or "the decode worker's control stream ended")

    def cancel(self, request_id: str) -> bool:
        """Stops a request's hand-off at its next segment."""
        found = [(sink_id, pair) for sink_id, (known, pair) in self._open.items() if known == request_id]
        for sink_id, pair in found:
            pair.post(pair.cancel, sink_id)
        return bool(found)

    def poll(self, now_s: float) -> None:
        """Reports hand-offs that closed, and drops pairs that broke."""
        self._results.run_pending()

    def take_outgoing(self) -> list[PeerMessage]:
        """Messages for decode workers."""
        return self._outgoing.take()

    def deliver_to(self, deliver: Callable[[PeerMessage], None]) -> None:
        """Messages go out as they are made."""
        self._outgoing.deliver_to(deliver)

    def close(self) -> None:
        """Stops every pair; their hand-offs close with an error."""
        pairs, self._pairs = list(self._pairs.values()), {}
        for pair in pairs:
            pair.stop("the prefill worker stops")
        for pair in pairs:
            pair.join(_JOIN_S)

    def _pair(self, peer: str) -> SendPair:
        pair = self._pairs.get(peer)
        if pair is None:
            context = self._context
            pair_id = f"{context.worker_id}-{uuid4().hex}"  # a channel meets under it, and never twice
            say = partial(self._outgoing.say, peer)
            pair = SendPair(pair_id, context, say, self._post_closed, partial(self._post_broken, peer))
            self._pairs[peer] = pair
            pair.start()
        return pair

    def _post_closed(self, sink_id: int, outcome: HandOffOutcome) -> None:
        self._results.post(self._closed, sink_id, outcome)
        self._wake()

    def _post_broken(self, peer: str, pair: SendPair) -> None:
        self._results.post(self._drop, peer, pair)
        self._wake()

    def _closed(self, sink_id: int, outcome: HandOffOutcome) -> None:
        del self._open[sink_id]
        self.kv_bytes += outcome.kv_bytes
        self.digest_failures += outcome.kv_resends
        self._faults.resends += outcome.kv_resends
        self._faults.failed += bool(outcome.error) and outcome.error != CANCELLED
        self._host.hand_off_closed(outcome)

    def _drop(self, peer: str, pair: SendPair) -> None:
        if self._pairs.get(peer) is pair:
            del self._pairs[peer]
            self._dropped(pair)
        pair.stop("the pair is broken")

    def _dropped(self, pair: SendPair) -> None:
        self._faults.broken_pairs += 1
        self._faults.stale += pair.num_stale
