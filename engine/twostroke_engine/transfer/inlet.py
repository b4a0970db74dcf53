"""`Inlet`: how a pair's receiver takes a segment in. Chosen once, when the pair's channel is there.

It also knows who writes to a lease's blocks: the pair's own thread, which is done when it says so, or the sender, of
which that must be proven.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor
from twostroke_kernels.backend import KVItems

from twostroke_engine.transfer.channel import NOT_GRANTED, BlockTarget, KVChannel
from twostroke_engine.transfer.context import TransferContext, kernel_wire
from twostroke_engine.transfer.outlet import unsigned
from twostroke_engine.transfer.plan import MAX_SEGMENT_BYTES, KVSegment, SegmentShape

if TYPE_CHECKING:
    from twostroke_engine.transfer.receive_pair import WriteGrant


class Inlet(Protocol):
    """One pair's way in. Called on the pair's thread, but `close`."""

    max_bytes: int
    """Of a segment."""

    def open(self, grant: WriteGrant) -> None:
        """The lease's blocks may be written to, once earlier use of them has ended.

        Raises:
            ChannelError: the pair is broken.
        """
        ...

    def take(self, num_bytes: int) -> Tensor | None:
        """The next announced bytes, in memory of their own; None if they are in the blocks already.

        Raises:
            ChannelError: the pair is broken.
        """
        ...

    def store(self, segment: KVSegment, grant: WriteGrant, digests: tuple[int, ...], taken: Tensor | None) -> bool:
        """Compares the digests, and sees to it that the blocks hold the segment; False if a digest differs."""
        ...

    def end(self, lease_id: str, epoch: int, *, is_acknowledged: bool) -> bool:
        """The lease is over: whether no one writes to its blocks any more. False: `fenced` of the pair follows.
        `is_acknowledged`: the sender itself has said that it is done."""
        ...

    def close(self) -> None:
        """Ends the pair; idempotent, from any thread."""
        ...


def inlet_of(context: TransferContext, shape: SegmentShape, channel: KVChannel | BlockTarget) -> Inlet:
    """The way in that a pair's channel needs."""
    if isinstance(channel, BlockTarget):
        return BlockInlet(context, shape, channel)
    return ChannelInlet(context, shape, channel)


class ChannelInlet:
    """Takes segments from a byte pipe into scratch memory, and from there, if they are right, into blocks."""

    def __init__(self, context: TransferContext, shape: SegmentShape, channel: KVChannel) -> None:
        self.close = channel.close
        self.max_bytes = max(MAX_SEGMENT_BYTES, context.spec.block_bytes)
        self._context = context
        self._shape = shape
        self._channel = channel

    def open(self, grant: WriteGrant) -> None:
        """This side's own thread writes, and waits for the mark itself."""

    def take(self, num_bytes: int) -> Tensor:
        """The channel's next message."""
        device = self._context.device
        with device.work(None):
            payload = torch.empty(num_bytes, dtype=torch.uint8, device=self._context.pool.device)
        with device.turn():
            self._channel.receive(payload)
        return payload

    def store(self, segment: KVSegment, grant: WriteGrant, digests: tuple[int, ...], taken: Tensor | None) -> bool:
        """Compares the digests, then writes; nothing is written if one differs."""
        assert taken is not None
        context = self._context
        with context.device.work(grant.after):
            packed = taken.view(segment.num_blocks, -1)
            if unsigned(context.backend.digest(packed)) != digests:
                return False
            items = self._shape.items(segment, grant.block_ids)
            ids = torch.tensor(items, dtype=torch.int64, device=context.pool.device)
            context.backend.unpack_kv(context.pool, ids, segment.first_layer, packed, kernel_wire(self._shape.wire))
        return True

    def end(self, lease_id: str, epoch: int, *, is_acknowledged: bool) -> bool:
        """Only this thread wrote."""
        return True


class BlockInlet:
    """Lets the sender write into blocks, and compares the digests where they lie."""

    def __init__(self, context: TransferContext, shape: SegmentShape, target: BlockTarget) -> None:
        self.end = target.end
        self.close = target.close
        self.max_bytes = context.pool.nbytes
        self._context = context
        self._shape = shape
        self._target = target

    def open(self, grant: WriteGrant) -> None:
        """Grants, once earlier use of the blocks has ended; those that were hit are others' too, and left out."""
        num_held = grant.tiling.first_block // self._shape.split
        with self._context.device.work(grant.after):
            pass
        self._target.grant(grant.lease_id, grant.epoch, (NOT_GRANTED,) * num_held + grant.block_ids[num_held:])

    def take(self, num_bytes: int) -> None:
        """They are in the blocks already."""

    def store(self, segment: KVSegment, grant: WriteGrant, digests: tuple[int, ...], taken: Tensor | None) -> bool:
        """Reads the blocks."""
        context = self._context
        with context.device.work(None):
            places = self._shape.items(segment, grant.block_ids)
            items = KVItems(context.pool, torch.tensor(places, dtype=torch.int64, device=context.pool.device))
            wire = kernel_wire(self._shape.wire)
            found = context.backend.digest_kv(items, segment.first_layer, segment.num_layers, wire)
            return unsigned(found) == digests
