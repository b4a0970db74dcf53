"""`Slots`: the memory of one NIXL pair, and what becomes of it when its pair ends but its writer may go on.

A writer that was stopped, or is behind a broken link, may still write to slots that it was told of: UCX moves bytes
straight into the process (on one host by a system call of the writer's), and memory that was unregistered is no fence
against that. So slots are kept as they are until the writer says farewell or its process has ended. Time frees nothing.
A writer on another host that died without a word leaves its slots behind for as long as this process lives; as the
number of slots is bounded, the last resort is that no more pairs are made, and the engine goes over to other channels.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from twostroke_engine.transfer.channel import ChannelError
from twostroke_engine.transfer.nixl_agent import NixlAgent
from twostroke_engine.transfer.peer_process import ProcessWatch
from twostroke_engine.transfer.polled_socket import PolledSocket

log = logging.getLogger(__name__)

FAREWELL = b"\x02"
"""A sender's last word: no write of it is under way."""
MAX_PAIRS = 64
"""Sets of slots that one process has at a time, those that are kept for silent writers among them."""
NUM_SLOTS = 4
_SLOT_BYTES = {"cpu": 2 << 20, "cuda": 8 << 20}
"""A write costs the interpreter some 50 us, whatever its size; on a host larger slots leave the caches."""


class Slots:
    """Registered memory, in equal parts."""

    def __init__(
        self, agent: NixlAgent, device: torch.device, given_back: Callable[[], None], abandoned: list[object]
    ) -> None:
        """`given_back` is called once they are free; what goes into `abandoned` stays in memory."""
        self.slot_bytes = _SLOT_BYTES.get(device.type, _SLOT_BYTES["cpu"])
        self.num_slots = NUM_SLOTS
        self._agent = agent
        self._given_back = given_back
        self._abandoned = abandoned
        self._memory: Tensor | None = torch.zeros((self.num_slots, self.slot_bytes), dtype=torch.uint8, device=device)
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._registered: Any = agent.register(self._memory)

    @property
    def address(self) -> int:
        """Of the first slot."""
        return self._parts().data_ptr()

    @property
    def device_index(self) -> int:
        """The GPU that they are on; 0 on a host."""
        return self._parts().device.index or 0

    def describe(self) -> bytes:
        """What the agent of a peer must be told of them."""
        return self._agent.describe(self._registered)

    def fill(self, which: int, piece: Tensor) -> Tensor:
        """Copies a piece into a slot; the part that it takes."""
        slot = self._parts()[which, : piece.numel()]
        self._copy(slot, piece)
        return slot

    def empty(self, which: int, piece: Tensor) -> None:
        """Copies a piece out of a slot."""
        self._copy(piece, self._parts()[which, : piece.numel()])

    def give_back(self) -> None:
        """No one writes to them, or reads them, any more; idempotent."""
        if self._memory is None:
            return
        try:
            self._agent.forget(self._registered)
        except ChannelError as error:
            log.warning("slots stay registered: %s", error)
            self.abandon()
            return
        self._memory = None
        self._given_back()

    def abandon(self, *under_way: object) -> None:
        """Something may still read or write them, and nothing will ever tell: they stay as they are, and so do the
        writes that are under way."""
        self._abandoned += [self._memory, self._registered, *under_way]
        self._memory = None

    def _parts(self) -> Tensor:
        if self._memory is None:
            raise ChannelError("the pair is closed")
        return self._memory

    def _copy(self, target: Tensor, source: Tensor) -> None:
        if self._stream is None:
            target.copy_(source)
            return
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
        self._stream.synchronize()


@dataclass(slots=True)
class _Kept:
    """Slots whose writer has not said farewell."""

    slots: Slots
    link: PolledSocket
    watch: ProcessWatch | None
    is_deaf: bool = False

    def is_over(self) -> bool:
        """Whether nothing can be written any more."""
        if not self.is_deaf:
            try:
                if FAREWELL in self.link.look(1):
                    return True
            except ChannelError:
                self.is_deaf = True
        return self.watch is not None and self.watch.is_dead()


class SlotKeeper:
    """All slots of one process."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._lock = Lock()
        self._num_taken = 0
        self._kept: list[_Kept] = []
        self._abandoned: list[object] = []

    @property
    def num_taken(self) -> int:
        """Sets of slots that are in use or kept."""
        return self._num_taken

    @property
    def num_kept(self) -> int:
        """Sets of slots that wait for their writer's end."""
        return len(self._kept)

    def take(self, agent: NixlAgent) -> Slots:
        """New slots.

        Raises:
            ChannelError: there are too many.
        """
        self.look_again()
        with self._lock:
            if self._num_taken >= MAX_PAIRS:
                raise ChannelError(f"{MAX_PAIRS} NIXL pairs, {len(self._kept)} of them kept for silent writers")
            self._num_taken += 1
        try:
            return Slots(agent, self._device, self._given_back, self._abandoned)
        except BaseException:
            self._given_back()
            raise

    def keep(self, slots: Slots, link: PolledSocket, watch: ProcessWatch | None, *, is_over: bool) -> None:
        """Gives slots of an ended pair back as soon as that is safe: at once if `is_over`, else when it is proven."""
        link.stop_saying()
        kept = _Kept(slots, link, watch)
        with self._lock:
            self._kept.append(kept)
        if is_over:
            self._drop(kept)
        self.look_again()

    def look_again(self) -> None:
        """Gives back what has become safe to give back."""
        for kept in list(self._kept):
            if kept.is_over():
                self._drop(kept)

    def _drop(self, kept: _Kept) -> None:
        with self._lock:
            if kept not in self._kept:
                return
            self._kept.remove(kept)
        kept.link.close()
        if kept.watch is not None:
            kept.watch.close()
        kept.slots.give_back()

    def _given_back(self) -> None:
        with self._lock:
            self._num_taken -= 1
