"""`KVReceiver`: the transfer end of a decode worker. Leases live here, on the engine's thread; `ReceivePair`s write.

A reservation waits its turn (first come, first served: a large one is not overtaken for ever), becomes a lease when
capacity can be promised, gets blocks when the sender opens it, and ends in the engine's hands or freed.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import count

from twostroke_engine.kv.hashing import block_hashes
from twostroke_engine.kv.spec import PROTOCOL_VERSION
from twostroke_engine.messages import LeaseGrant, PeerMessage, RequestEnd, RequestUpdate
from twostroke_engine.request import ErrorCode, Request, RequestFacts
from twostroke_engine.transfer.channel import BlockListener, ChannelListener, scheme_of
from twostroke_engine.transfer.context import TransferContext
from twostroke_engine.transfer.end import DecodeHost, TransferFaults
from twostroke_engine.transfer.lease import LeaseState
from twostroke_engine.transfer.mailbox import Mailbox
from twostroke_engine.transfer.messages import (
    AbortTransfer,
    CommitTransfer,
    OpenTransfer,
    PairHello,
    PairWelcome,
    ReceiverMessage,
    SegmentReady,
    SenderMessage,
    TransferClosed,
    TransferOpened,
)
from twostroke_engine.transfer.outgoing import Outgoing
from twostroke_engine.transfer.plan import Tiling
from twostroke_engine.transfer.quarantine import Quarantine
from twostroke_engine.transfer.receive_pair import Ending, PairReports, ReceivePair, WriteEnd, WriteGrant
from twostroke_engine.transfer.reservation import Reservation, WaitingRequest
from twostroke_engine.transfer.wire import CannotPair, KVSide, WireFormat, choose_wire

log = logging.getLogger(__name__)

_JOIN_S = 0.5

_ABORTS: dict[str, ErrorCode | None] = {"finished": None, "cancelled": ErrorCode.CANCELLED}
"""What a sender's reason means here; any other is a failed transfer."""


class KVReceiver:
    """Takes prompts' KV from prefill workers; a `ReceivingEnd`."""

    def __init__(self, context: TransferContext, host: DecodeHost, wake: Callable[[], None]) -> None:
        self.kv_bytes = 0
        self.digest_failures = 0
        self.longest_wait_s = 0.0
        self._faults = TransferFaults()
        self._quarantine = Quarantine()
        self._context = context
        self._host = host
        self._wake = wake
        self._listeners = context.channels.listen()
        self._calls = Mailbox()
        self._outgoing = Outgoing(wake)
        self._numbers = count(1)
        self._waiting: deque[WaitingRequest] = deque()
        self._leases: dict[str, Reservation] = {}
        self._pairs: dict[str, ReceivePair] = {}
        self._broken: dict[str, str] = {}  # by peer: its last pair, if that broke

    @property
    def num_open(self) -> int:
        """Leases not yet closed."""
        return len(self._leases)

    @property
    def num_waiting(self) -> int:
        """Reservations that wait for capacity."""
        return len(self._waiting)

    @property
    def faults(self) -> TransferFaults:
        """What went wrong so far."""
        return replace(self._faults, stale=self._faults.stale + sum(pair.num_stale for pair in self._pairs.values()))

    @property
    def num_quarantined(self) -> int:
        """Blocks of leases that were given up while a writer may still write to them."""
        given_up = (entry.lease for entry in self._leases.values() if entry.lease.state is LeaseState.ABORTING)
        return sum(len(lease.block_ids) for lease in given_up) + self._quarantine.num_blocks

    # ---- the engine's thread -------------------------------------------------------------------------------------

    def reserve(self, request: Request, ttl_s: float) -> None:
        """Queues a reservation; the answer is a `RequestUpdate`, granted or ended."""
        # One block of room to grow is part of the promise, so that the first decode step needs no one's block.
        num_blocks = self._context.spec.num_blocks(request.num_prompt_tokens + 1)
        if num_blocks > self._host.pool.num_blocks:
            message = f"the prompt needs {num_blocks} KV blocks, this worker has {self._host.pool.num_blocks}"
            self._report_end(request.id, ErrorCode.INVALID, message, RequestFacts())
            return
        self._waiting.append(WaitingRequest(request, ttl_s, num_blocks, self._context.clock()))
        self._grant_waiting()

    def receive(self, peer: str, message: SenderMessage | ReceiverMessage) -> None:
        """Any thread: segments and what must stay in order with them go to the pair's thread, the rest to poll."""
        pair = self._pairs.get(peer)
        if isinstance(message, PairHello):
            self._post(self._hello, peer, message)
        elif isinstance(message, OpenTransfer):
            self._post(self._open, peer, message)
        elif isinstance(message, SegmentReady | CommitTransfer | AbortTransfer):
            if pair is not None:
                pair.post(pair.hear, message)
            else:  # its greeting may still wait for this thread
                self._post(self._pass_on, peer, message)

    def commit_heard(self, lease_id: str, at_s: float) -> None:
        """Any thread: a sender's commit was at this host, on this clock; what it says comes by `receive`."""
        reservation = self._leases.get(lease_id)
        if reservation is not None:
            reservation.commit_heard(at_s)

    def peer_lost(self, peer: str, reason: str) -> None:
        """Gives up every lease that the peer was filling."""
        self._drop_pair(peer, reason or "the prefill worker's control stream ended")

    def cancel(self, request_id: str) -> bool:
        """Gives up what is open for a request; its end is reported once no one writes any more."""
        waiting = [entry for entry in self._waiting if entry.request.id == request_id]
        for entry in waiting:
            self._waiting.remove(entry)
            self._report_end(request_id, ErrorCode.CANCELLED, "cancelled", RequestFacts())
        leases = [lease for lease in self._leases.values() if lease.request.id == request_id]
        for lease in leases:
            self._give_up(lease, ErrorCode.CANCELLED, "cancelled")
        if waiting:
            self._grant_waiting()
        return bool(waiting or leases)

    def poll(self, now_s: float) -> None:
        """Takes in what the pairs did, expires what is overdue, grants what has become possible."""
        self._calls.run_pending()
        self._expire(self._context.clock())
        self._grant_waiting()

    def take_outgoing(self) -> list[PeerMessage]:
        """Messages for prefill workers."""
        return self._outgoing.take()

    def deliver_to(self, deliver: Callable[[PeerMessage], None]) -> None:
        """Messages go out as they are made."""
        self._outgoing.deliver_to(deliver)

    def close(self) -> None:
        """Stops every pair and the listener."""
        pairs = list(self._pairs.values())
        for peer in list(self._pairs):
            self._drop_pair(peer, "the decode worker stops")
        self._listeners.close()
        for pair in pairs:
            pair.join(_JOIN_S)

    # ---- reservations --------------------------------------------------------------------------------------------

    def _grant_waiting(self) -> None:
        pool = self._host.pool
        while self._waiting:
            entry = self._waiting[0]
            if not (self._host.may_promise(entry.num_blocks) and pool.promise(entry.num_blocks)):
                return
            self._waiting.popleft()
            self._grant(entry)

    def _grant(self, entry: WaitingRequest) -> None:
        context = self._context
        lease_id = f"{context.worker_id}-{context.worker_epoch:x}-{next(self._numbers)}"
        reservation = Reservation(lease_id, entry, context.clock())
        self._leases[lease_id] = reservation
        self.longest_wait_s = max(self.longest_wait_s, reservation.waited_s)
        granted = LeaseGrant(lease_id=lease_id, epoch=reservation.lease.epoch, ttl_s=entry.ttl_s)
        self._host.report(RequestUpdate(request_id=entry.request.id, reserved=granted))

    def _expire(self, now_s: float) -> None:
        for entry in [entry for entry in self._waiting if entry.is_overdue(now_s)]:
            self._waiting.remove(entry)
            self._report_end(entry.request.id, ErrorCode.DEADLINE, "no capacity before the deadline", RequestFacts())
        for reservation in list(self._leases.values()):
            overdue = reservation.overdue(now_s, self._context.stall_timeout_s)
            if overdue is not None:
                self._give_up(reservation, *overdue)

    # ---- messages of senders -------------------------------------------------------------------------------------

    def _hello(self, peer: str, message: PairHello) -> None:
        known = self._pairs.get(peer)
        if known is not None and known.pair_id == message.pair_id:
            self._faults.stale += 1
            return
        self._drop_pair(peer, "the prefill worker made a new pair")
        refused, channel, wire = "", "", WireFormat(0, "")
        try:
            listener, wire = self._settle(message)
        except CannotPair as error:
            refused = str(error)
            log.warning("prefill worker %s is refused: %s", message.worker_id, refused)
        else:
            channel = listener.endpoint(message.pair_id)
            log.info("pair %s: KV comes over %s as %s", message.pair_id, scheme_of(channel), wire)
            reports = PairReports(
                say=partial(self._outgoing.say, peer),
                ended=partial(self._post, self._write_ended),
                received=self._post_received,
                broken=partial(self._post, self._pair_broken, peer, message.pair_id),
                fenced=partial(self._post, self._fenced),
            )
            pair = self._pairs[peer] = ReceivePair(message.pair_id, self._context, wire, listener, reports)
            pair.start()
        self._outgoing.say(
            peer,
            PairWelcome(
                refused=refused,
                worker_id=self._context.worker_id,
                worker_epoch=self._context.worker_epoch,
                channel=channel,
                block_size=wire.block_size,
                wire_dtype=wire.dtype,
                pair_id=message.pair_id,
            ),
        )

    def _pass_on(self, peer: str, message: SegmentReady | CommitTransfer | AbortTransfer) -> None:
        pair = self._pairs.get(peer)
        if pair is not None:
            pair.post(pair.hear, message)

    def _settle(self, message: PairHello) -> tuple[ChannelListener | BlockListener, WireFormat]:
        """Over which channel and as what the pair will send, or `CannotPair`."""
        if message.version != PROTOCOL_VERSION:
            raise CannotPair(f"transfer protocol {message.version}; this worker speaks {PROTOCOL_VERSION}")
        if reason := self._listeners.refusal(message.channels):
            raise CannotPair(reason)
        theirs = KVSide(**{name: getattr(message, name) for name in KVSide.__struct_fields__})
        wire = choose_wire(theirs, self._context.side, self._context.shape.layout.head_dim)
        listener = self._listeners.choose(message.channels)
        # What is written to blocks is as they store it: a wish to spare a link has no link to spare.
        stored = WireFormat(wire.block_size, self._context.spec.dtype)
        return listener, stored if isinstance(listener, BlockListener) else wire

    def _open(self, peer: str, message: OpenTransfer) -> None:
        pair, reservation = self._pairs.get(peer), self._leases.get(message.lease_id)
        if reservation is not None and reservation.is_open_for(peer, message.epoch):
            self._faults.stale += 1  # it came twice
            return
        error = ""
        if pair is None:
            error = "no pair: its greeting was refused, or it broke"
        elif reservation is None or not reservation.may_open(message.epoch):
            error = "unknown lease, or not in this epoch"
        elif message.num_tokens != reservation.request.num_prompt_tokens:
            error = f"{message.num_tokens} tokens; the reservation is for {reservation.request.num_prompt_tokens}"
        if error or pair is None or reservation is None:
            self._faults.stale += pair is not None
            if pair is None:  # the peer may not have heard, and would open one lease after the other in vain
                self._refuse_broken(peer, "before this lease was opened")
            closed = TransferClosed(lease_id=message.lease_id, epoch=message.epoch, error=error)
            self._outgoing.say(peer, closed)
            return
        self._bind(reservation, peer, pair)
        num_held = reservation.num_held_blocks * pair.shape.split
        opened = TransferOpened(lease_id=message.lease_id, epoch=message.epoch, num_held_blocks=num_held)
        self._outgoing.say(peer, opened)

    def _bind(self, reservation: Reservation, peer: str, pair: ReceivePair) -> None:
        """The promise becomes blocks, in one breath; hits first, so that they are not evicted for the rest."""
        pool, spec, request = self._host.pool, self._context.spec, reservation.request
        num_blocks = spec.num_blocks(request.num_prompt_tokens)
        hashes = block_hashes(request.token_ids, spec.block_size, request.cache_salt, request.adapter)
        pool.withdraw(reservation.take_promise())
        held = pool.match(hashes)
        pool.acquire(held)
        block_ids = (*held, *pool.allocate(num_blocks - len(held)))
        reservation.bind(peer, block_ids, tuple(hashes), len(held), self._context.clock())
        # Hits are whole blocks of ours, so whole items of the wire, wherever they end in a block of the sender.
        num_items = pair.shape.wire.num_blocks(request.num_prompt_tokens)
        tiling = Tiling(spec.num_layers, min(len(held) * pair.shape.split, num_items), num_items)
        mark = self._context.device.mark()
        pair.post(pair.grant, WriteGrant(reservation.lease.lease_id, reservation.lease.epoch, block_ids, tiling, mark))

    # ---- reports of the pairs' threads ---------------------------------------------------------------------------

    def _received(self, lease_id: str, num_bytes: int, is_good: bool) -> None:
        self.kv_bytes += num_bytes
        self.digest_failures += not is_good
        reservation = self._leases.get(lease_id)
        if reservation is not None:
            reservation.progress_s = self._context.clock()

    def _write_ended(self, end: WriteEnd) -> None:
        reservation = self._leases.get(end.lease_id)
        if reservation is None or reservation.lease.epoch != end.epoch:
            self._faults.stale += 1
            return
        if end.grant is not None:
            reservation.note(end.grant)
            if end.is_fenced or not self._quarantine.hold(reservation.lease):
                self._free(reservation.lease.end_write())
        if reservation.lease.state is LeaseState.FILLING and end.ending is Ending.FILLED:
            self._adopt(reservation, end)
        elif reservation.lease.state in (LeaseState.RESERVED, LeaseState.FILLING):
            code = _ABORTS.get(end.reason, ErrorCode.TRANSFER) if end.ending is Ending.ABORTED else ErrorCode.TRANSFER
            self._give_up(reservation, code, end.reason)
        else:
            self._close_if_done(reservation)

    def _fenced(self, lease_id: str, epoch: int) -> None:
        lease = self._quarantine.fenced(lease_id, epoch)
        if lease is not None:
            self._free(lease.end_write())

    def _adopt(self, reservation: Reservation, end: WriteEnd) -> None:
        pool, lease = self._host.pool, reservation.lease
        lease.complete()
        for block_id, block_hash in reservation.new_full_blocks():
            pool.publish(block_id, block_hash)
        facts = reservation.facts(self._context.clock(), self._context.spec.block_size)
        del self._leases[lease.lease_id]
        self._host.adopt(reservation.request_from(self._context.clock()), lease.hand_over(), end.first, facts)
        self._say_closed(reservation, "")

    def _pair_broken(self, peer: str, pair_id: str, reason: str) -> None:
        """Says so, because a sender that is idle notices nothing of a broken channel."""
        pair = self._pairs.get(peer)
        if pair is not None and pair.pair_id == pair_id:
            self._drop_pair(peer, reason)
            self._broken[peer] = pair_id
            self._refuse_broken(peer, reason)

    def _refuse_broken(self, peer: str, reason: str) -> None:
        if pair_id := self._broken.get(peer):
            self._outgoing.say(peer, PairWelcome(refused=f"the pair broke: {reason}", pair_id=pair_id))

    # ---- endings -------------------------------------------------------------------------------------------------

    def _drop_pair(self, peer: str, reason: str) -> None:
        self._broken.pop(peer, None)
        pair = self._pairs.pop(peer, None)
        if pair is None:
            return
        self._faults.broken_pairs += 1
        self._faults.stale += pair.num_stale
        for reservation in [entry for entry in self._leases.values() if entry.peer == peer]:
            self._give_up(reservation, ErrorCode.TRANSFER, reason)
        pair.stop(reason)

    def _give_up(self, reservation: Reservation, code: ErrorCode | None, reason: str) -> None:
        """Aborts a lease; its end is reported when its blocks are free."""
        if not reservation.give_up(code, reason):
            return
        self._faults.failed += code is ErrorCode.TRANSFER
        self._host.pool.withdraw(reservation.take_promise())
        lease, pair = reservation.lease, self._pairs.get(reservation.peer)
        if pair is not None:
            pair.post(pair.revoke, lease.lease_id, lease.epoch)
        self._say_closed(reservation, reason)
        self._free(lease.abort())
        self._close_if_done(reservation)

    def _close_if_done(self, reservation: Reservation) -> None:
        lease = reservation.lease
        if lease.state is not LeaseState.CLOSED and not self._quarantine.holds(lease):
            return
        del self._leases[reservation.lease.lease_id]
        code, reason = reservation.error
        facts = reservation.facts(self._context.clock(), self._context.spec.block_size)
        self._report_end(reservation.request.id, code, reason if code is not None else "", facts)

    def _free(self, block_ids: tuple[int, ...]) -> None:
        self._host.pool.release(block_ids[::-1])

    def _say_closed(self, reservation: Reservation, error: str) -> None:
        if reservation.peer in self._pairs:
            lease = reservation.lease
            self._outgoing.say(
                reservation.peer, TransferClosed(lease_id=lease.lease_id, epoch=lease.epoch, error=error)
            )

    def _report_end(self, request_id: str, code: ErrorCode | None, message: str, facts: RequestFacts) -> None:
        end = RequestEnd(error=code, message=message, facts=facts)
        self._host.report(RequestUpdate(request_id=request_id, end=end))

    def _post_received(self, lease_id: str, num_bytes: int, is_good: bool) -> None:
        # Does not wake the loop: a turn and a report for each segment would be for statistics only.
        self._calls.post(self._received, lease_id, num_bytes, is_good)

    def _post(self, call: Callable[..., None], *args: object) -> None:
        self._calls.post(call, *args)
        self._wake()
