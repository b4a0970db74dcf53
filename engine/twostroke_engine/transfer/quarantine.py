"""`Quarantine`: leases that are over, but whose blocks a writer in another process may still write to.

A request need not wait for that: its end is reported, and a retry gets other blocks. Only a fence frees these, see
`BlockTarget.end`; a sender that is stopped for an hour keeps them for an hour.
"""

from __future__ import annotations

from twostroke_engine.transfer.lease import KVLease
from twostroke_engine.transfer.writer_fence import LeaseKey


class Quarantine:
    """One receiver's; engine thread only."""

    def __init__(self) -> None:
        self._leases: dict[LeaseKey, KVLease] = {}
        self._early: set[LeaseKey] = set()

    @property
    def num_blocks(self) -> int:
        """Blocks that wait for a fence."""
        return sum(len(lease.block_ids) for lease in self._leases.values())

    def holds(self, lease: KVLease) -> bool:
        """Whether the lease waits for its fence."""
        return (lease.lease_id, lease.epoch) in self._leases

    def hold(self, lease: KVLease) -> bool:
        """The lease's write has ended without a fence; False if the fence has overtaken this news."""
        key = (lease.lease_id, lease.epoch)
        if key in self._early:
            self._early.discard(key)
            return False
        self._leases[key] = lease
        return True

    def fenced(self, lease_id: str, epoch: int) -> KVLease | None:
        """The writer is proven to have let go: the lease, once, whose write is to be ended; None if that news is still
        on its way."""
        key = (lease_id, epoch)
        if key not in self._leases:
            self._early.add(key)
        return self._leases.pop(key, None)
