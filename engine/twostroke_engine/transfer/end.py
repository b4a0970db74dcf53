"""The seams between an engine and its transfer ends. Everything here runs on the engine's thread, but `receive`.

A prefill worker is an engine plus a `KVSender`, a decode worker an engine plus a `KVReceiver`; both are `TransferEnd`s.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from twostroke_engine.kv.block_pool import BlockPool
from twostroke_engine.messages import PeerMessage, RequestUpdate
from twostroke_engine.request import Request, RequestFacts
from twostroke_engine.transfer.messages import FirstToken, KVDestination, ReceiverMessage, SenderMessage


@dataclass(slots=True)
class TransferFaults:
    """What went wrong so far and was noticed, digests aside."""

    resends: int = 0
    """Segments sent again."""
    stale: int = 0
    """Messages and segments for a lease or an epoch that is over, and those that came twice."""
    broken_pairs: int = 0
    failed: int = 0
    """Hand-offs, or leases, that came to nothing by a fault: their prompts are prefilled again."""


class TransferEnd(Protocol):
    """One end of KV transfers, driven by the engine loop."""

    @property
    def num_open(self) -> int:
        """Leases or hand-offs not yet closed."""
        ...

    @property
    def num_waiting(self) -> int:
        """Reservations that wait for capacity; 0 on the sending side."""
        ...

    @property
    def kv_bytes(self) -> int:
        """Payload moved so far."""
        ...

    @property
    def digest_failures(self) -> int:
        """Segments whose digest did not match so far."""
        ...

    @property
    def faults(self) -> TransferFaults:
        """What went wrong so far."""
        ...

    @property
    def num_quarantined(self) -> int:
        """Blocks given up that a writer may still write to; 0 on the sending side."""
        ...

    @property
    def longest_wait_s(self) -> float:
        """Longest wait of a reservation for its grant so far; 0 on the sending side."""
        ...

    def receive(self, peer: str, message: SenderMessage | ReceiverMessage) -> None:
        """A control message from a peer; any thread may call. A loop passes it on as it arrives, not between steps: a
        segment that waits for a step of either side costs more than its bytes."""
        ...

    def peer_lost(self, peer: str, reason: str) -> None:
        """The peer's control stream ended: close everything open with it."""
        ...

    def cancel(self, request_id: str) -> bool:
        """Gives up what is open for a request; False if this end does not know it."""
        ...

    def poll(self, now_s: float) -> None:
        """Takes in results of this end's own threads and expires what is overdue. Called before every step, and
        whenever the loop wakes (this end's threads wake it, and it wakes by itself at least every 100 ms)."""
        ...

    def take_outgoing(self) -> list[PeerMessage]:
        """Control messages to deliver, oldest first; empties the list. Always empty after `deliver_to`."""
        ...

    def deliver_to(self, deliver: Callable[[PeerMessage], None]) -> None:
        """From now on control messages go to `deliver` as they are made, one at a time and in order, on any thread:
        layers then go out while a step computes. It must not block for long, nor call back."""
        ...

    def close(self) -> None:
        """Stops this end's threads; idempotent."""
        ...


class KVSink(Protocol):
    """Hears, during a forward pass, that a layer's KV of this step is in the pool. Must not block.

    On a GPU the call happens at launch: an implementation records an event.
    """

    def layer_written(self, layer: int) -> None:
        """Layer `layer` was written for every scheduled token; layers come in order."""
        ...


class NoSink:
    """No one listens."""

    def layer_written(self, layer: int) -> None:
        """Does nothing."""


@dataclass(frozen=True, slots=True)
class ChunkOfHandOff:
    """A prompt chunk of one step whose KV is to be pushed."""

    sink_id: int
    block_ids: tuple[int, ...]
    """Blocks of the prompt from its first token on, prefix hits included, as far as this chunk reaches."""
    first_block: int
    """Blocks before this one were offered in an earlier step (0 in the first step: hits are offered with it)."""
    num_ready_blocks: int
    """Blocks [first_block, num_ready_blocks) are complete, layer by layer, once this step has written the layer; a
    partial last block counts only in the chunk that ends the prompt."""
    num_hit_blocks: int
    """Of them, blocks [first_block, num_hit_blocks) hold KV of every layer already, before the step."""


@dataclass(frozen=True, slots=True)
class HandOffOutcome:
    """How a hand-off ended; `error` is empty if decode has committed."""

    request_id: str
    error: str
    transfer_s: float
    kv_bytes: int
    kv_segments: int
    kv_resends: int
    skipped_tokens: int
    committed_s: float | None = None
    """When the last commit went out, on the sender's clock."""
    closed_s: float = 0.0
    """When the hand-off was over, on the same clock."""


class SendingEnd(TransferEnd, Protocol):
    """What an engine and its loop ask of the prefill side's end; `KVSender` is the real one, `NoSender` the null."""

    def begin(self, request: Request, destination: KVDestination) -> int:
        """Opens a hand-off and names it by a sink id above 0; nothing is sent yet, and nothing fails yet."""
        ...

    def step_sink(self, chunks: Sequence[ChunkOfHandOff]) -> KVSink:
        """Listener for the forward pass of a step with these chunks (`NoSink` if there are none)."""
        ...

    def prompt_computed(self, sink_id: int, first: tuple[FirstToken, ...]) -> None:
        """The step that ended a prompt is done: commit once everything was sent."""
        ...


class ReceivingEnd(TransferEnd, Protocol):
    """What an engine's loop asks of the decode side's end; `KVReceiver` is the real one, `NoReceiver` the null."""

    def reserve(self, request: Request, ttl_s: float) -> None:
        """Queues a reservation; the answer is a `RequestUpdate`, granted or ended."""
        ...

    def commit_heard(self, lease_id: str, at_s: float) -> None:
        """When a sender's commit was at this host; any thread may call."""
        ...


class PrefillHost(Protocol):
    """What a `KVSender` asks of the engine."""

    def hand_off_closed(self, outcome: HandOffOutcome) -> None:
        """No one reads the sequence's blocks any more: release them and report the request's end."""
        ...


class DecodeHost(Protocol):
    """What a `KVReceiver` asks of the engine."""

    pool: BlockPool

    def may_promise(self, num_blocks: int) -> bool:
        """Whether capacity can be promised now: promises eat neither the growth watermark of running sequences nor
        the room of preempted ones that wait."""
        ...

    def adopt(
        self, request: Request, block_ids: tuple[int, ...], first: tuple[FirstToken, ...], facts: RequestFacts
    ) -> None:
        """Takes over a prompt whose KV is complete in `block_ids` (references pass to the engine) and goes on after
        the first tokens; reports the request's end in due time."""
        ...

    def report(self, update: RequestUpdate) -> None:
        """Adds news to the next `StepReport`."""
        ...
