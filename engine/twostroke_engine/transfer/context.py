"""`TransferContext`: what both ends of a transfer are made of."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor
from twostroke_kernels.backend import Backend

from twostroke_engine.kv.spec import KVSpec
from twostroke_engine.transfer.channel import ChannelFactory
from twostroke_engine.transfer.device import DeviceSide, device_side
from twostroke_engine.transfer.layout import KVLayout
from twostroke_engine.transfer.plan import SegmentShape

PROTOCOL_VERSION = 1


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
    clock: Callable[[], float] = time.monotonic
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
        """How segments are cut."""
        return SegmentShape(KVLayout.whole(self.spec), self.layers_per_segment)
