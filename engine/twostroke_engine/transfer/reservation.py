"""`Reservation`: what a decode worker knows of one lease beside its state machine. Engine thread only."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from msgspec.structs import replace

from twostroke_engine.kv.hashing import BlockHash
from twostroke_engine.request import ErrorCode, Request, RequestFacts
from twostroke_engine.transfer.lease import KVLease, LeaseState
from twostroke_engine.transfer.receive_pair import WriteGrant

FIRST_EPOCH = 1


@dataclass(frozen=True, slots=True)
class WaitingRequest:
    """A reservation that waits for capacity."""

    request: Request
    ttl_s: float
    num_blocks: int
    since_s: float

    def is_overdue(self, now_s: float) -> bool:
        """Whether the request's deadline has passed."""
        deadline_s = self.request.deadline_s
        return deadline_s is not None and now_s - self.since_s >= deadline_s


class Reservation:
    """One lease and its bookkeeping."""

    def __init__(self, lease_id: str, entry: WaitingRequest, now_s: float) -> None:
        self.lease = KVLease(lease_id, FIRST_EPOCH)
        self.request = entry.request
        self.peer = ""
        self.num_held_blocks = 0
        self.progress_s = now_s
        self.error: tuple[ErrorCode | None, str] = (None, "")
        self._entry = entry
        self._granted_s = now_s
        self._opened_s = now_s
        self._num_promised = entry.num_blocks
        self._hashes: tuple[BlockHash, ...] = ()
        self._is_given_up = False
        self._committed_s: float | None = None
        self._written: WriteGrant | None = None

    @property
    def waited_s(self) -> float:
        """From the request for it to the grant."""
        return self._granted_s - self._entry.since_s

    def request_from(self, now_s: float) -> Request:
        """The request, with the time that its deadline leaves from now on."""
        if self.request.deadline_s is None:
            return self.request
        return replace(self.request, deadline_s=self.request.deadline_s - (now_s - self._entry.since_s))

    def may_open(self, epoch: int) -> bool:
        """Whether this attempt may bind blocks."""
        return self.lease.state is LeaseState.RESERVED and epoch == self.lease.epoch

    def is_open_for(self, peer: str, epoch: int) -> bool:
        """Whether this attempt has its blocks already."""
        return self.lease.state is LeaseState.FILLING and (peer, epoch) == (self.peer, self.lease.epoch)

    def take_promise(self) -> int:
        """The promised blocks, once: the caller withdraws them."""
        promised, self._num_promised = self._num_promised, 0
        return promised

    def bind(
        self, peer: str, block_ids: tuple[int, ...], hashes: tuple[BlockHash, ...], num_held_blocks: int, now_s: float
    ) -> None:
        """The blocks are known, and the peer's thread is to fill them."""
        self.peer = peer
        self.num_held_blocks = num_held_blocks
        self.progress_s = self._opened_s = now_s
        self._hashes = hashes
        self.lease.bind(block_ids)
        self.lease.begin_write(self.lease.epoch)

    def commit_heard(self, now_s: float) -> None:
        """The sender says that all of it was sent; any thread."""
        self._committed_s = now_s

    def note(self, grant: WriteGrant) -> None:
        """What was written, for the facts."""
        self._written = grant

    def new_full_blocks(self) -> Iterator[tuple[int, BlockHash]]:
        """Blocks that were sent and can be hit from now on."""
        named = zip(self.lease.block_ids, self._hashes, strict=False)  # a partial last block has no hash
        yield from list(named)[self.num_held_blocks :]

    def overdue(self, now_s: float, stall_timeout_s: float) -> tuple[ErrorCode, str] | None:
        """Why the lease must be given up now, if it must."""
        deadline_s = self.request.deadline_s
        if deadline_s is not None and now_s - self._entry.since_s >= deadline_s:
            return ErrorCode.DEADLINE, "the deadline passed before the prompt's KV came"
        if self.lease.state is LeaseState.RESERVED and now_s - self._granted_s >= self._entry.ttl_s:
            return ErrorCode.TRANSFER, "reservation lapsed"
        if self.lease.state is LeaseState.FILLING and now_s - self.progress_s >= stall_timeout_s:
            return ErrorCode.TRANSFER, "the transfer stalled"
        return None

    def give_up(self, code: ErrorCode | None, reason: str) -> bool:
        """Notes why, the first time; False if it was given up before."""
        if self._is_given_up:
            return False
        self._is_given_up = True
        self.error = (code, reason)
        return True

    def facts(self, now_s: float, block_size: int) -> RequestFacts:
        """What was measured."""
        written = self._written
        is_opened = bool(self.peer)
        return RequestFacts(
            queue_s=self.waited_s,
            transfer_s=now_s - self._opened_s if is_opened else 0.0,
            kv_bytes=written.kv_bytes if written else 0,
            kv_segments=written.kv_segments if written else 0,
            kv_resends=written.kv_resends if written else 0,
            skipped_tokens=min(self.num_held_blocks * block_size, self.request.num_prompt_tokens),
            ready_s=0.0 if self._committed_s is None else now_s - self._committed_s,
        )
