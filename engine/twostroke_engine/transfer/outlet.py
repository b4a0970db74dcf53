"""`Outlet`: how a pair's sender brings a segment over. Chosen once, when the pair's channel is there."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from twostroke_kernels.backend import KVItems

from twostroke_engine.transfer.channel import BlockWriter, ChannelError, KVChannel
from twostroke_engine.transfer.context import TransferContext, kernel_wire
from twostroke_engine.transfer.hand_off import HandOff, Piece
from twostroke_engine.transfer.plan import SegmentShape, place_items


@dataclass(frozen=True, slots=True)
class Announced:
    """What the receiver is told of a segment, and what is still to be sent."""

    num_bytes: int
    digests: tuple[int, ...]
    """Unsigned, one for each block on the wire."""
    payload: Tensor | None = None
    """None: it is there already."""


class Outlet(Protocol):
    """One pair's way out. Called on the pair's thread."""

    shape: SegmentShape
    """How segments are cut."""

    def prepare(self, hand_off: HandOff, piece: Piece) -> Announced | None:
        """Makes what travels, or writes it where it belongs; None if the receiver has taken the lease back.

        Raises:
            ChannelError: the pair is broken.
        """
        ...

    def turn(self) -> AbstractContextManager[None]:
        """Held from before the announcement until `deliver` is done."""
        ...

    def deliver(self, announced: Announced) -> None:
        """After the announcement: sends what is still to be sent.

        Raises:
            ChannelError: the pair is broken.
        """
        ...

    def close(self) -> None:
        """Ends the pair; idempotent, from any thread."""
        ...


def outlet_of(context: TransferContext, shape: SegmentShape, channel: KVChannel | BlockWriter) -> Outlet:
    """The way out that a pair's channel needs."""
    if isinstance(channel, BlockWriter):
        return BlockOutlet(context, shape, channel)
    return ChannelOutlet(context, shape, channel)


class ChannelOutlet:
    """Packs a segment, and sends it through a byte pipe."""

    def __init__(self, context: TransferContext, shape: SegmentShape, channel: KVChannel) -> None:
        self.turn = context.device.turn
        self.close = channel.close
        self._context = context
        self.shape = shape
        self._channel = channel

    def prepare(self, hand_off: HandOff, piece: Piece) -> Announced:
        """Gathers, converts and digests."""
        context, segment = self._context, piece.segment
        items, wire = self.shape.items(segment, hand_off.block_ids), kernel_wire(self.shape.wire)
        with context.device.work(piece.after):
            ids = torch.tensor(items, dtype=torch.int64, device=context.pool.device)
            packed, digests = context.backend.pack_kv(context.pool, ids, segment.first_layer, segment.num_layers, wire)
            payload = packed.view(-1)
            announced = unsigned(digests)
        return Announced(payload.numel(), announced, payload)

    def deliver(self, announced: Announced) -> None:
        """One message of the channel."""
        if announced.payload is not None:
            self._channel.send(announced.payload)


class BlockOutlet:
    """Writes a segment into the receiver's blocks, and then announces it."""

    def __init__(self, context: TransferContext, shape: SegmentShape, writer: BlockWriter) -> None:
        self.close = writer.close
        self._context = context
        self.shape = shape.written_in_place(context.min_written_layers)
        self._writer = writer
        self._their_split = writer.pool.shape[3] // shape.wire.block_size
        stored = str(writer.pool.dtype).removeprefix("torch.")
        if writer.pool.shape[3] % shape.wire.block_size or stored != shape.wire.dtype:
            writer.close()
            raise ChannelError(f"the receiver's pool does not hold {shape.wire} as it is")

    def prepare(self, hand_off: HandOff, piece: Piece) -> Announced | None:
        """Gathers, converts, writes and digests; all of it has ended when the lease may be taken back again."""
        context, segment, wire = self._context, piece.segment, kernel_wire(self.shape.wire)
        items = self.shape.items(segment, hand_off.block_ids)
        with self._writer.writing(hand_off.lease_id, hand_off.epoch) as block_ids:
            if block_ids is None:
                return None
            theirs = place_items(block_ids, segment.first_block, segment.num_blocks, self._their_split)
            if min(theirs) < 0:
                raise ChannelError("a segment would be written to blocks that were not granted")
            with context.device.work(piece.after):
                ids, their_ids = torch.tensor([items, theirs], dtype=torch.int64, device=context.pool.device)
                source, target = KVItems(context.pool, ids), KVItems(self._writer.pool, their_ids)
                digests = context.backend.push_kv(source, target, segment.first_layer, segment.num_layers, wire)
                announced = unsigned(digests)
        num_bytes = segment.num_layers * segment.num_blocks * self.shape.layer_block_bytes
        return Announced(num_bytes, announced)

    def turn(self) -> AbstractContextManager[None]:
        """No channel operation follows."""
        return nullcontext()

    def deliver(self, announced: Announced) -> None:
        """It is there."""


def unsigned(digests: Tensor) -> tuple[int, ...]:
    """As messages have them."""
    return tuple(digest & 0xFFFF_FFFF_FFFF_FFFF for digest in digests.tolist())
