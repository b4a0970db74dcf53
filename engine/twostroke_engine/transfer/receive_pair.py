"""`ReceivePair`: the thread that takes segments from one prefill worker. It is the only writer of their blocks.

The engine's thread owns the leases and gives this thread a `WriteGrant` for each bound one: a writer reference, held
until the thread says that it has dropped it. It drops a grant when the lease was filled, aborted, revoked or failed, or
when the pair broke; by then it writes to none of the blocks, which makes the report a fence.

Announced bytes are always received, in the order of their announcements, so that the channel stays in step: without a
grant of that lease and epoch they go nowhere. A segment is unpacked into blocks only after its digests were compared.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from threading import Thread

import torch
from torch import Tensor

from twostroke_engine.transfer.channel import ChannelError, ChannelListener, KVChannel
from twostroke_engine.transfer.context import TransferContext, kernel_wire
from twostroke_engine.transfer.device import Mark
from twostroke_engine.transfer.mailbox import Mailbox
from twostroke_engine.transfer.messages import (
    AbortTransfer,
    CommitTransfer,
    FirstToken,
    ReceiverMessage,
    SegmentReady,
    SegmentResult,
)
from twostroke_engine.transfer.plan import MAX_SEGMENT_BYTES, KVSegment, Tiling
from twostroke_engine.transfer.wire import WireFormat

_IDLE_S = 5.0


class Ending(Enum):
    """Why a writer ended."""

    FILLED = "filled"
    ABORTED = "aborted"
    REVOKED = "revoked"
    FAILED = "failed"


@dataclass(slots=True)
class WriteGrant:
    """The right to fill the blocks of one lease."""

    lease_id: str
    epoch: int
    block_ids: tuple[int, ...]
    tiling: Tiling
    after: Mark
    """Earlier use of the blocks has ended by then."""
    kv_bytes: int = 0
    kv_segments: int = 0
    kv_resends: int = 0


@dataclass(frozen=True, slots=True)
class WriteEnd:
    """The thread will not touch the blocks of this grant any more."""

    lease_id: str
    epoch: int
    ending: Ending
    reason: str = ""
    grant: WriteGrant | None = None
    """None: an abort of a lease that was never bound here."""
    first: tuple[FirstToken, ...] = field(default=())


class PairReports:
    """What a pair's thread tells the engine's side; called on the pair's thread."""

    def __init__(
        self,
        say: Callable[[ReceiverMessage], None],
        ended: Callable[[WriteEnd], None],
        received: Callable[[str, int, bool], None],
        broken: Callable[[str], None],
    ) -> None:
        self.say = say
        self.ended = ended
        self.received = received
        """(lease id, payload bytes, whether the digests matched) of each segment that a grant waited for."""
        self.broken = broken


class ReceivePair:
    """One pair's receiving side."""

    def __init__(
        self,
        pair_id: str,
        context: TransferContext,
        wire: WireFormat,
        listener: ChannelListener,
        reports: PairReports,
    ) -> None:
        self.pair_id = pair_id
        self.shape = context.shape_on(wire)
        self._context = context
        self._listener = listener
        self._reports = reports
        self._mailbox = Mailbox()
        self._grants: dict[tuple[str, int], WriteGrant] = {}
        self._channel: KVChannel | None = None
        self._failure = ""
        self._stop_reason = ""
        self._is_stopped = False
        self._thread = Thread(target=self._run, name=f"kv-receive-{pair_id}", daemon=True)
        self.post = self._mailbox.post

    def start(self) -> None:
        """Begins with waiting for the sender's side of the channel."""
        self._mailbox.post(self._accept)
        self._thread.start()

    def stop(self, reason: str) -> None:
        """Any thread: ends every grant, then the thread."""
        self._stop_reason = reason
        self._mailbox.post(self._stop)
        channel = self._channel
        if channel is not None:
            channel.close()

    def join(self, timeout_s: float) -> None:
        """Waits for the thread's end."""
        self._thread.join(timeout_s)

    # ---- calls for the mailbox, all on the pair's thread ---------------------------------------------------------

    def grant(self, grant: WriteGrant) -> None:
        """The engine bound a lease; segments of it may be written from now on."""
        self._grants[grant.lease_id, grant.epoch] = grant
        if self._failure:
            self._end(grant, Ending.FAILED, self._failure)
        else:
            self._clear_rest(grant)

    def revoke(self, lease_id: str, epoch: int) -> None:
        """The engine gives a lease up."""
        grant = self._grants.get((lease_id, epoch))
        if grant is not None:
            self._end(grant, Ending.REVOKED, "")

    def hear(self, message: SegmentReady | CommitTransfer | AbortTransfer) -> None:
        """A message of the sender, in its order."""
        match message:
            case SegmentReady():
                self._segment(message)
            case CommitTransfer():
                self._commit(message)
            case AbortTransfer():
                self._abort(message)

    # ---- the thread ----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._is_stopped:
                self._turn()
        finally:
            self._break("the transfer thread ended")

    def _turn(self) -> None:
        try:
            self._mailbox.run_one(_IDLE_S)
        except ChannelError as error:
            self._break(f"channel: {error}")
        except Exception as error:  # noqa: BLE001 - a thread's boundary: whatever broke, its grants must end
            self._break(f"{type(error).__name__}: {error}")

    def _accept(self) -> None:
        self._channel = self._listener.accept(self.pair_id)

    def _segment(self, message: SegmentReady) -> None:
        if self._failure:
            return
        payload = self._receive(message.num_bytes)
        grant = self._grants.get((message.lease_id, message.epoch))
        if grant is None:
            return
        segment = KVSegment(
            message.first_layer,
            message.num_layers,
            message.first_block,
            message.num_blocks,
            self.shape.layout.first_head,
            self.shape.layout.num_heads,
        )
        if not grant.tiling.fits(segment) or payload.numel() != self._num_bytes(segment):
            self._end(grant, Ending.FAILED, f"segment {message.number} does not fit the lease")
            return
        is_good = self._store(grant, segment, message.digests, payload)
        grant.kv_segments += is_good
        grant.kv_resends += not is_good
        grant.kv_bytes += payload.numel()
        self._reports.received(grant.lease_id, payload.numel(), is_good)
        self._reports.say(
            SegmentResult(lease_id=message.lease_id, epoch=message.epoch, number=message.number, accepted=is_good)
        )

    def _receive(self, num_bytes: int) -> Tensor:
        """The announced bytes, in memory of their own."""
        most = max(MAX_SEGMENT_BYTES, self._context.spec.block_bytes)
        if self._channel is None or not 0 < num_bytes <= most:
            raise ChannelError(f"a segment of {num_bytes} bytes was announced; at most {most} are taken")
        device = self._context.device
        with device.work(None):
            payload = torch.empty(num_bytes, dtype=torch.uint8, device=self._context.pool.device)
        with device.turn():
            self._channel.receive(payload)
        return payload

    def _store(self, grant: WriteGrant, segment: KVSegment, digests: tuple[int, ...], payload: Tensor) -> bool:
        """Compares the digests, then writes; False, and nothing is written, if one differs."""
        context = self._context
        with context.device.work(grant.after):
            packed = payload.view(segment.num_blocks, -1)
            found = [digest & 0xFFFF_FFFF_FFFF_FFFF for digest in context.backend.digest(packed).tolist()]
            if found != list(digests):
                return False
            items = self.shape.items(segment, grant.block_ids)
            ids = torch.tensor(items, dtype=torch.int64, device=context.pool.device)
            context.backend.unpack_kv(context.pool, ids, segment.first_layer, packed, kernel_wire(self.shape.wire))
        grant.tiling.add(segment)
        return True

    def _clear_rest(self, grant: WriteGrant) -> None:
        """Zeroes what no item covers of a last block: what an earlier user left there may be NaN."""
        num_missing = len(grant.block_ids) * self.shape.split - grant.tiling.num_blocks
        if num_missing:
            context, num_tokens = self._context, num_missing * self.shape.wire.block_size
            with context.device.work(grant.after):
                context.pool[grant.block_ids[-1], :, :, -num_tokens:].zero_()

    def _commit(self, message: CommitTransfer) -> None:
        """All segments before it were dealt with: the mailbox keeps their order."""
        grant = self._grants.get((message.lease_id, message.epoch))
        if grant is None:
            return
        num_dealt_with = grant.kv_segments + grant.kv_resends
        if grant.tiling.is_complete and message.num_segments == num_dealt_with:
            self._end(grant, Ending.FILLED, "", message.first)
        elif not grant.kv_resends or message.num_segments != num_dealt_with:
            self._end(grant, Ending.FAILED, "committed, but not every block of every layer has come")
        # Otherwise the sender committed before it heard of a rejection: it sends again and commits again.

    def _abort(self, message: AbortTransfer) -> None:
        grant = self._grants.get((message.lease_id, message.epoch))
        if grant is not None:
            self._end(grant, Ending.ABORTED, message.reason)
        else:
            self._reports.ended(WriteEnd(message.lease_id, message.epoch, Ending.ABORTED, message.reason))

    def _end(self, grant: WriteGrant, ending: Ending, reason: str, first: tuple[FirstToken, ...] = ()) -> None:
        del self._grants[grant.lease_id, grant.epoch]
        self._reports.ended(WriteEnd(grant.lease_id, grant.epoch, ending, reason, grant, first))

    def _break(self, reason: str) -> None:
        """The pair is of no use any more; grants that still come end at once until the engine stops it."""
        reason = self._stop_reason or reason
        channel, self._channel = self._channel, None
        if channel is not None:
            channel.close()
        for grant in list(self._grants.values()):
            self._end(grant, Ending.FAILED, reason)
        if not self._failure:
            self._failure = reason
            self._reports.broken(reason)

    def _stop(self) -> None:
        self._is_stopped = True
        self._break(self._stop_reason)

    def _num_bytes(self, segment: KVSegment) -> int:
        return segment.num_layers * segment.num_blocks * self.shape.layer_block_bytes
