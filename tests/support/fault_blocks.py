"""Faults of a sender that writes to the receiver's blocks: it writes what is wrong, or ends or stops while it may."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial

import torch
from torch import Tensor
from twostroke_engine.transfer.channel import BlockWriter
from twostroke_engine.transfer.hand_off import HandOff, Piece
from twostroke_engine.transfer.outlet import Announced, Outlet
from twostroke_engine.transfer.plan import KVSegment

from tests.support.fault_channel import Injector, end_here
from tests.support.fault_plan import Planned


class FaultyWriter:
    """Another writer, with something that happens before and after what is written, while the grant is held."""

    def __init__(self, inner: BlockWriter) -> None:
        self.close = inner.close
        self.before: Callable[[], None] = _nothing
        self.after: Callable[[tuple[int, ...]], None] = _nothing
        self._inner = inner

    @property
    def pool(self) -> Tensor:
        return self._inner.pool

    @contextmanager
    def writing(self, lease_id: str, epoch: int) -> Iterator[tuple[int, ...] | None]:
        with self._inner.writing(lease_id, epoch) as block_ids:
            if block_ids is None:
                yield None
                return
            self.before()
            yield block_ids
            self.after(block_ids)


class FaultyOutlet:
    """The way out of a pair with such a writer."""

    def __init__(self, inner: Outlet, writer: FaultyWriter, injector: Injector) -> None:
        self.close = inner.close
        self.shape = inner.shape
        self._inner = inner
        self._writer = writer
        self._injector = injector
        self._number = 0
        self._lease_id = ""
        self._due: list[Planned] = []

    def prepare(self, hand_off: HandOff, piece: Piece) -> Announced | None:
        segment = piece.segment
        place = (hand_off.lease_id, segment.first_layer, segment.first_block)
        self._due = self._injector.due_to_write(hand_off.request_id, place)
        kinds = [fault.kind for fault in self._due]
        for fault in self._due:
            if fault.kind == "stop":
                self._writer.before = partial(self._injector.stop, fault, hand_off.lease_id, self._number)
            elif fault.kind != "kill-after":
                self._injector.tell(fault, hand_off.lease_id, self._number)
        self._lease_id = hand_off.lease_id
        try:
            if "twice" in kinds:
                self._inner.prepare(hand_off, piece)
            if "kill-mid" in kinds:
                self._writer.before = lambda: end_here(signal.SIGKILL)
            if {"flip", "flips", "truncate"} & set(kinds):
                self._writer.after = lambda block_ids: self._spoil(segment, block_ids, "truncate" in kinds)
            return self._inner.prepare(hand_off, piece)
        finally:
            self._writer.before = self._writer.after = _nothing
            if {"kill-before", "kill-mid"} & set(kinds):
                end_here(signal.SIGKILL)

    def turn(self) -> AbstractContextManager[None]:
        return self._inner.turn()

    def deliver(self, announced: Announced) -> None:
        self._inner.deliver(announced)
        for fault in self._due:
            if fault.kind == "kill-after":
                self._injector.tell(fault, self._lease_id, self._number)
                end_here(signal.SIGKILL)
        self._number += 1

    def _spoil(self, segment: KVSegment, block_ids: tuple[int, ...], cuts: bool) -> None:
        """Changes a bit of the segment's first item, or leaves nothing of its last one."""
        pool, tokens = self._writer.pool, self.shape.wire.block_size
        place = segment.first_block + (segment.num_blocks - 1 if cuts else 0)
        layer = segment.first_layer + (segment.num_layers - 1 if cuts else 0)
        split = pool.shape[3] // tokens
        first = place % split * tokens
        item = pool[block_ids[place // split], layer, 0, first : first + tokens]
        if cuts:
            item.fill_(torch.nan)
        else:
            numbers = item[0, 0].view(torch.uint8)
            numbers[segment.first_block % numbers.numel()] ^= 1 << (self._number % 8)
        if pool.is_cuda:
            torch.cuda.synchronize(pool.device)


def _nothing(*told: object) -> None:
    return None
