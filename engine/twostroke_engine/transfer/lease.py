"""`KVLease`: who may touch the blocks that a decode worker gives to one prompt. Pure; one thread owns it.

                 bind            complete            hand_over
    RESERVED ------------> FILLING ---------> READY -----------> CLOSED   the engine owns the blocks now
        |                     |                 |
        | abort               | abort           | abort
        v                     v                 v
      CLOSED               ABORTING --------> CLOSED                      the blocks are free
    (no blocks yet)            readers = 0 and writers = 0

There are two kinds of reference. A **reader** will read the blocks; the lease itself is the first one, from `bind`
until `hand_over` or `abort`. A **writer** may write to them: the thread that receives from the channel, or another
process where the sender writes to blocks by itself. Blocks become free only when there is neither, and are named as
free exactly once.

A writer is gone only when it says so itself (`end_write`): an acknowledgement, the end of its thread, the tearing down
of its mapping. This is the fence, and a fence is proof: no clock appears in this module. An expired lease is aborted,
and its blocks stay pinned until the writer was seen to end.

The epoch names the attempt: a writer with another epoch never becomes one (`may_write`).
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum


class LeaseState(Enum):
    """Phases of a lease, see the module's picture."""

    RESERVED = "reserved"
    FILLING = "filling"
    READY = "ready"
    ABORTING = "aborting"
    CLOSED = "closed"


class LeaseError(Exception):
    """An event that cannot happen in the lease's state: a bug of the caller."""


class KVLease:
    """The state machine of one promise of KV blocks."""

    def __init__(self, lease_id: str, epoch: int) -> None:
        self.lease_id = lease_id
        self.epoch = epoch
        self.state = LeaseState.RESERVED
        self.block_ids: tuple[int, ...] = ()
        self.readers = 0
        self.writers = 0

    def bind(self, block_ids: Sequence[int]) -> None:
        """The promise becomes blocks; the lease is their first reader."""
        self._expect(LeaseState.RESERVED)
        self.block_ids = tuple(block_ids)
        self.readers = 1
        self.state = LeaseState.FILLING

    def may_write(self, epoch: int) -> bool:
        """Whether a writer of this epoch may begin."""
        return self.state is LeaseState.FILLING and epoch == self.epoch

    def begin_write(self, epoch: int) -> None:
        """A writer begins; its blocks are pinned until `end_write`."""
        if not self.may_write(epoch):
            raise LeaseError(f"no writer of epoch {epoch} in a {self.state.value} lease of epoch {self.epoch}")
        self.writers += 1

    def end_write(self) -> tuple[int, ...]:
        """A writer says that it will write no more; returns the blocks that are free by that."""
        if not self.writers:
            raise LeaseError("more writers end than began")
        self.writers -= 1
        return self._freed()

    def begin_read(self) -> None:
        """One more reader, of complete blocks."""
        self._expect(LeaseState.READY)
        self.readers += 1

    def end_read(self) -> tuple[int, ...]:
        """A reader is done; returns the blocks that are free by that."""
        own = self.state in (LeaseState.FILLING, LeaseState.READY)
        if self.readers <= own:
            raise LeaseError("more readers end than began")
        self.readers -= 1
        return self._freed()

    def complete(self) -> None:
        """Every byte arrived and was checked, and no writer is left."""
        self._expect(LeaseState.FILLING)
        if self.writers:
            raise LeaseError("complete while a writer is active")
        self.state = LeaseState.READY

    def hand_over(self) -> tuple[int, ...]:
        """The blocks, whose references pass to the caller."""
        self._expect(LeaseState.READY)
        if self.readers != 1:
            raise LeaseError("handed over while others read")
        self.readers = 0
        self.state = LeaseState.CLOSED
        return self.block_ids

    def abort(self) -> tuple[int, ...]:
        """Gives the lease up, in any state; returns the blocks that are free now (the rest follow the last fence)."""
        if self.state is LeaseState.RESERVED:
            self.state = LeaseState.CLOSED
        elif self.state in (LeaseState.FILLING, LeaseState.READY):
            self.state = LeaseState.ABORTING
            self.readers -= 1
        return self._freed()

    def _freed(self) -> tuple[int, ...]:
        if self.state is not LeaseState.ABORTING or self.readers or self.writers:
            return ()
        self.state = LeaseState.CLOSED
        return self.block_ids

    def _expect(self, state: LeaseState) -> None:
        if self.state is not state:
            raise LeaseError(f"a {state.value} lease was expected, not a {self.state.value} one")
