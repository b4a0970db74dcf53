"""`ReceivePair`: the thread that takes segments from one prefill worker. It is the only writer of their blocks, but on
a channel whose sender writes to them itself (`Inlet`), where a grant that ends may wait for its fence.

The engine's thread owns the leases and gives this thread a `WriteGrant` for each bound one: a writer reference, held
until the thread says that it has dropped it. It drops a grant when the lease was filled, aborted, revoked or failed, or
when the pair broke; by then it writes to none of the blocks, which makes the report a fence.

Announced bytes are always received, in the order of their announcements, so that the channel stays in step: without a
grant of that lease and epoch they go nowhere. Announcements are numbered, so one that comes twice is known, and one
that is missing breaks the pair. A segment is unpacked into blocks only after its digests were compared.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from threading import Thread

from torch import Tensor

from twostroke_engine.transfer.channel import BlockListener, BlockTarget, ChannelError, ChannelListener, KVChannel
from twostroke_engine.transfer.context import TransferContext
from twostroke_engine.transfer.device import Mark
from twostroke_engine.transfer.inlet import Inlet, inlet_of
from twostroke_engine.transfer.mailbox import Mailbox
from twostroke_engine.transfer.messages import (
    AbortTransfer,
    CommitTransfer,
    FirstToken,
    ReceiverMessage,
    SegmentReady,
    SegmentResult,
)
from twostroke_engine.transfer.plan import KVSegment, Tiling
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
    is_fenced: bool = True
    """False: the sender may still write to the blocks; `PairReports.fenced` follows."""


class PairReports:
    """What a pair's thread tells the engine's side; called on the pair's thread."""

    def __init__(
        self,
        say: Callable[[ReceiverMessage], None],
        ended: Callable[[WriteEnd], None],
        received: Callable[[str, int, bool], None],
        broken: Callable[[str], None],
        fenced: Callable[[str, int], None],
    ) -> None:
        self.say = say
        self.ended = ended
        self.received = received
        """(lease id, payload bytes, whether the digests matched) of each segment that a grant waited for."""
        self.broken = broken
        self.fenced = fenced
        """(lease id, epoch) of a write end that was not fenced, and is now; from any thread."""


class ReceivePair:
    """One pair's receiving side."""

    def __init__(
        self,
        pair_id: str,
        context: TransferContext,
        wire: WireFormat,
        listener: ChannelListener | BlockListener,
        reports: PairReports,
    ) -> None:
        self.pair_id = pair_id
        self.num_stale = 0
        """Messages for a lease or an epoch that is over, or that came before."""
        self.shape = context.shape_on(wire)
        self._context = context
        self._listener = listener
        self._reports = reports
        self._mailbox = Mailbox()
        self._grants: dict[tuple[str, int], WriteGrant] = {}
        self._num_announced = 0
        self._inlet: Inlet | None = None
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
        inlet = self._inlet
        if inlet is not None:
            inlet.close()

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
            if self._inlet is not None:
                self._inlet.open(grant)

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
        self._inlet = inlet_of(self._context, self.shape, self._meet())

    def _meet(self) -> KVChannel | BlockTarget:
        if isinstance(self._listener, BlockListener):
            return self._listener.accept_writer(self.pair_id, self._reports.fenced)
        return self._listener.accept(self.pair_id)

    def _segment(self, message: SegmentReady) -> None:
        if self._failure or not self._is_next(message.number):
            return
        inlet, taken = self._take(message.num_bytes)
        grant = self._grants.get((message.lease_id, message.epoch))
        if grant is None:
            self.num_stale += 1
            return
        segment = KVSegment(
            message.first_layer,
            message.num_layers,
            message.first_block,
            message.num_blocks,
            self.shape.layout.first_head,
            self.shape.layout.num_heads,
        )
        if not grant.tiling.fits(segment) or message.num_bytes != self._num_bytes(segment):
            self._end(grant, Ending.FAILED, f"segment {message.number} does not fit the lease")
            return
        is_good = inlet.store(segment, grant, message.digests, taken)
        if is_good:
            grant.tiling.add(segment)
        grant.kv_segments += is_good
        grant.kv_resends += not is_good
        grant.kv_bytes += message.num_bytes
        self._reports.received(grant.lease_id, message.num_bytes, is_good)
        self._reports.say(
            SegmentResult(lease_id=message.lease_id, epoch=message.epoch, number=message.number, accepted=is_good)
        )

    def _is_next(self, number: int) -> bool:
        """Whether the channel's next message is the one with this number; False if it was dealt with before."""
        if number < self._num_announced:
            self.num_stale += 1
            return False
        if number > self._num_announced:
            raise ChannelError(f"segment {number} was announced, but not {self._num_announced}")
        self._num_announced += 1
        return True

    def _take(self, num_bytes: int) -> tuple[Inlet, Tensor | None]:
        """The announced bytes, unless they are in the blocks already."""
        if self._inlet is None or not 0 < num_bytes <= self._inlet.max_bytes:
            most = 0 if self._inlet is None else self._inlet.max_bytes
            raise ChannelError(f"a segment of {num_bytes} bytes was announced; at most {most} are taken")
        return self._inlet, self._inlet.take(num_bytes)

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
            self.num_stale += 1
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
        # After a commit or an abort the sender touches the blocks no more: it has said so.
        is_acknowledged = ending in (Ending.FILLED, Ending.ABORTED)
        inlet = self._inlet
        is_fenced = inlet is None or inlet.end(grant.lease_id, grant.epoch, is_acknowledged=is_acknowledged)
        self._reports.ended(WriteEnd(grant.lease_id, grant.epoch, ending, reason, grant, first, is_fenced))

    def _break(self, reason: str) -> None:
        """The pair is of no use any more; grants that still come end at once until the engine stops it."""
        reason = self._stop_reason or reason
        if self._inlet is not None:
            self._inlet.close()
        for grant in list(self._grants.values()):
            self._end(grant, Ending.FAILED, reason)
        self._inlet = None
        if not self._failure:
            self._failure = reason
            self._reports.broken(reason)

    def _stop(self) -> None:
        self._is_stopped = True
        self._break(self._stop_reason)

    def _num_bytes(self, segment: KVSegment) -> int:
        return segment.num_layers * segment.num_blocks * self.shape.layer_block_bytes
