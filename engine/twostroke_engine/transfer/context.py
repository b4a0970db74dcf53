"""`TransferContext`: what both ends of a transfer are made of."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from twostroke_kernels.backend import Backend, KVWire

from twostroke_engine.kv.spec import KVSpec
from twostroke_engine.transfer.channel import ChannelFactory
from twostroke_engine.transfer.device import DeviceSide, device_side
from twostroke_engine.transfer.layout import KVLayout
from twostroke_engine.transfer.plan import SegmentShape
from twostroke_engine.transfer.wire import AUTO, WIRE_DTYPES, KVSide, WireFormat, own_format


@dataclass(frozen=True)
class TransferContext:
    """The engine's KV memory, who it is, and how it reaches others."""

    pool: Tensor
    backend: Backend
    spec: KVSpec
    worker_id: str
    worker_epoch: int
    model_fingerprint: str
    channels: ChannelFactory
    timeout_s: float
    """An answer or a channel operation that takes longer ends the hand-off or the pair."""
    layers_per_segment: int = 1
    tokenizer_hash: str = ""
    """Of tokenizer.json; empty if there is none."""
    transfer_dtype: str = AUTO
    """Number format on the wire, as far as this side's user has a wish: `auto` or a key of `LOSSY_DTYPES`."""
    clock: Callable[[], float] = time.monotonic
    min_written_layers: int = 16
    """Of a segment that is written into the receiver's blocks: to tell of one takes longer than to write it."""
    stall_timeout_s: float = 60.0
    """A bound lease that makes no progress for so long is given up. Longer than a wait for the next chunk of a busy
    prefill worker; a dead one is noticed much earlier, by its control stream or its channel."""

    def __post_init__(self) -> None:
        # What a back end derives for its first digest of a whole block is there before several threads ask for one.
        self.backend.digest(self.pool[:1])

    @cached_property
    def device(self) -> DeviceSide:
        """The side of the pool's device."""
        return device_side(self.pool.device)

    @cached_property
    def shape(self) -> SegmentShape:
        """How segments would be cut if blocks travelled as they are stored."""
        return self.shape_on(own_format(self.spec))

    def shape_on(self, wire: WireFormat) -> SegmentShape:
        """How segments are cut for a peer."""
        return SegmentShape(KVLayout.whole(self.spec), self.layers_per_segment, wire)

    @cached_property
    def side(self) -> KVSide:
        """What peers must know of this worker."""
        return KVSide(
            kv_fingerprint=self.spec.fingerprint(),
            model_fingerprint=self.model_fingerprint,
            tokenizer_hash=self.tokenizer_hash,
            block_size=self.spec.block_size,
            kv_dtype=self.spec.dtype,
            transfer_dtype=self.transfer_dtype,
            wire_dtypes=WIRE_DTYPES,
        )


def kernel_wire(wire: WireFormat) -> KVWire:
    """The same, as the back end is told."""
    return KVWire(wire.block_size, getattr(torch, wire.dtype))
