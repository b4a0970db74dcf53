"""`SendPair`: the thread that serves one decode worker. A dead peer holds up its own pair and no other.

It owns its hand-offs: the engine's thread and the control stream only post to its mailbox. Between two segments it
takes in everything posted, so a cancel acts at the next segment. Hello and OpenTransfer go out without waiting for
answers (the control stream keeps their order); segments wait for both.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from threading import Thread

import msgspec

from twostroke_engine.kv.spec import PROTOCOL_VERSION
from twostroke_engine.transfer.channel import ChannelError, scheme_of
from twostroke_engine.transfer.context import TransferContext
from twostroke_engine.transfer.device import Mark
from twostroke_engine.transfer.end import ChunkOfHandOff, HandOffOutcome
from twostroke_engine.transfer.hand_off import HandOff, HandOffState, Piece, TooManyTries
from twostroke_engine.transfer.mailbox import Mailbox
from twostroke_engine.transfer.messages import (
    AbortTransfer,
    FirstToken,
    OpenTransfer,
    PairHello,
    PairWelcome,
    ReceiverMessage,
    SegmentReady,
    SegmentResult,
    SenderMessage,
    TransferClosed,
    TransferOpened,
)
from twostroke_engine.transfer.outlet import Outlet, outlet_of
from twostroke_engine.transfer.wire import CannotPair, WireFormat, check_wire

log = logging.getLogger(__name__)

_IDLE_S = 5.0

CANCELLED = "cancelled"
"""The error of a hand-off that was cancelled here."""


class SendPair:
    """One pair's sending side."""

    def __init__(
        self,
        pair_id: str,
        context: TransferContext,
        say: Callable[[SenderMessage], None],
        closed: Callable[[int, HandOffOutcome], None],
        broken: Callable[[SendPair], None],
    ) -> None:
        """`say`, `closed` and `broken` are called on the pair's thread and must not block."""
        self.num_stale = 0
        """Answers for a hand-off that is over, or with another epoch."""
        self._pair_id = pair_id
        self._context = context
        self._say = say
        self._closed = closed
        self._broken = broken
        self._mailbox = Mailbox()
        self._hand_offs: dict[int, HandOff] = {}
        self._outlet: Outlet | None = None
        self._shape = context.shape
        self._num_announced = 0
        self._welcome_due_s: float | None = None
        self._failure = ""
        self._stop_reason = ""
        self._is_stopped = False
        self._thread = Thread(target=self._run, name=f"kv-send-{pair_id}", daemon=True)
        self.post = self._mailbox.post

    def start(self) -> None:
        """Begins with the greeting."""
        self._mailbox.post(self._hello)
        self._thread.start()

    def stop(self, reason: str) -> None:
        """Any thread: closes everything with this reason, then ends the thread."""
        self._stop_reason = reason
        self._mailbox.post(self._stop)
        outlet = self._outlet
        if outlet is not None:
            outlet.close()

    def join(self, timeout_s: float) -> None:
        """Waits for the thread's end."""
        self._thread.join(timeout_s)

    def ends_segment(self, layer: int) -> bool:
        """Any thread: whether a segment becomes ready by this layer. Before the greeting has been answered segments are
        taken to be as small as they may be."""
        return self._shape.is_boundary(layer)

    # ---- calls for the mailbox, all on the pair's thread ---------------------------------------------------------

    def begin(self, hand_off: HandOff, refusal: str) -> None:
        """Takes a hand-off in, or refuses it."""
        self._hand_offs[hand_off.sink_id] = hand_off
        if refusal or self._failure:
            self._close(hand_off, refusal or self._failure)

    def chunk(self, chunk: ChunkOfHandOff, started: Mark) -> None:
        """A step will compute a chunk; the first one opens the transfer."""
        hand_off = self._hand_offs.get(chunk.sink_id)
        if hand_off is not None and hand_off.add_chunk(chunk, started, self._now_s()):
            hand_off.answer_due_s = self._due_s()
            self._say(
                OpenTransfer(
                    lease_id=hand_off.lease_id,
                    epoch=hand_off.epoch,
                    request_id=hand_off.request_id,
                    num_tokens=hand_off.num_tokens,
                )
            )

    def layer_written(self, sink_ids: tuple[int, ...], layer: int, mark: Mark) -> None:
        """A layer of these hand-offs' chunks exists after the mark."""
        for sink_id in sink_ids:
            hand_off = self._hand_offs.get(sink_id)
            if hand_off is not None:
                hand_off.layer_written(layer, mark)

    def prompt_computed(self, sink_id: int, first: tuple[FirstToken, ...]) -> None:
        """Commit when everything went out; if nothing is left to decode, abort instead, which ends well."""
        hand_off = self._hand_offs.get(sink_id)
        if hand_off is None:
            return
        hand_off.prompt_computed(first)
        if hand_off.is_finished:
            self._abort(hand_off, "finished", "")

    def cancel(self, sink_id: int) -> None:
        """Nothing more is read of the hand-off's blocks."""
        hand_off = self._hand_offs.get(sink_id)
        if hand_off is not None:
            self._abort(hand_off, CANCELLED, CANCELLED)

    def hear(self, message: ReceiverMessage) -> None:
        """A message of the receiver; what names no hand-off of ours is stale."""
        if isinstance(message, PairWelcome):
            if message.pair_id == self._pair_id:
                self._welcome(message)
            else:  # of the pair before this one
                self.num_stale += 1
            return
        found = [ho for ho in self._hand_offs.values() if (ho.lease_id, ho.epoch) == (message.lease_id, message.epoch)]
        self.num_stale += not found
        for hand_off in found:
            self._hear(hand_off, message)

    # ---- the thread ----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._is_stopped:
                self._turn()
        finally:
            self._break("the transfer thread ended")

    def _turn(self) -> None:
        try:
            self._mailbox.run_pending()
            if not (self._is_stopped or self._send_next()):
                self._mailbox.run_one(self._wait_s())
            self._expire()
        except ChannelError as error:
            self._break(f"channel: {error}")
        except CannotPair as error:
            self._break(f"the decode worker's answer: {error}")
        except Exception as error:  # noqa: BLE001 - a thread's boundary: whatever broke, its hand-offs must close
            self._break(f"{type(error).__name__}: {error}")

    def _hello(self) -> None:
        context = self._context
        self._welcome_due_s = self._due_s()
        self._say(
            PairHello(
                version=PROTOCOL_VERSION,
                worker_id=context.worker_id,
                worker_epoch=context.worker_epoch,
                pair_id=self._pair_id,
                channels=context.channels.abilities,
                **msgspec.structs.asdict(context.side),
            )
        )

    def _welcome(self, message: PairWelcome) -> None:
        if message.refused:
            self._break(f"refused: {message.refused}")
        elif self._outlet is None and not self._failure:
            wire = WireFormat(message.block_size, message.wire_dtype)
            check_wire(wire, self._context.side)
            self._shape = self._context.shape_on(wire)
            log.info("pair %s: KV goes over %s as %s", self._pair_id, scheme_of(message.channel), wire)
            channel = self._context.channels.connect(message.channel, self._pair_id)
            self._outlet = outlet_of(self._context, self._shape, channel)
            self._shape = self._outlet.shape
            self._welcome_due_s = None

    def _hear(self, hand_off: HandOff, message: TransferOpened | SegmentResult | TransferClosed) -> None:
        match message:
            case TransferOpened():
                hand_off.opened(message.num_held_blocks)
            case SegmentResult():
                try:
                    hand_off.result(message.number, message.accepted)
                except TooManyTries as error:
                    # The channel may have fallen out of step, and then nothing that follows would be right.
                    self._break(str(error))
            case TransferClosed():
                is_early = hand_off.state is not HandOffState.COMMITTING
                self._close(hand_off, message.error or ("closed before it was committed" if is_early else ""))

    def _send_next(self) -> bool:
        """Sends one segment or commits one hand-off, the oldest first; False if there is nothing to do."""
        for hand_off in [] if self._outlet is None else list(self._hand_offs.values()):
            piece = hand_off.next_piece(self._shape)
            if piece is not None:
                self._send(self._outlet, hand_off, piece)
                return True
            if hand_off.is_committable:
                self._say(hand_off.commit(self._now_s()))
                hand_off.answer_due_s = self._due_s()
                return True
        return False

    def _send(self, outlet: Outlet | None, hand_off: HandOff, piece: Piece) -> None:
        assert outlet is not None
        prepared, segment = outlet.prepare(hand_off, piece), piece.segment
        if prepared is None:  # the receiver has given the lease up; its word for that is on its way
            return
        number = self._num_announced
        self._num_announced += 1
        hand_off.sent(piece, number, prepared.num_bytes)
        with outlet.turn():
            self._say(
                SegmentReady(
                    lease_id=hand_off.lease_id,
                    epoch=hand_off.epoch,
                    number=number,
                    first_layer=segment.first_layer,
                    num_layers=segment.num_layers,
                    first_block=segment.first_block,
                    num_blocks=segment.num_blocks,
                    num_bytes=prepared.num_bytes,
                    digests=prepared.digests,
                )
            )
            outlet.deliver(prepared)

    def _abort(self, hand_off: HandOff, reason: str, error: str) -> None:
        # An unopened lease is left alone: the router may give it to another prefill worker.
        if hand_off.state is not HandOffState.NEW:
            self._say(AbortTransfer(lease_id=hand_off.lease_id, epoch=hand_off.epoch, reason=reason))
        self._close(hand_off, error)

    def _close(self, hand_off: HandOff, error: str) -> None:
        del self._hand_offs[hand_off.sink_id]
        outcome = hand_off.outcome(error, self._now_s(), self._shape.wire.block_size)
        self._closed(hand_off.sink_id, outcome)

    def _break(self, reason: str) -> None:
        """The pair is of no use any more; hand-offs that still come are refused until the engine stops it."""
        reason = self._stop_reason or reason
        for hand_off in list(self._hand_offs.values()):
            if self._stop_reason:  # there is no one left to tell
                self._close(hand_off, reason)
            else:
                self._abort(hand_off, reason, reason)
        outlet, self._outlet = self._outlet, None
        if outlet is not None:
            outlet.close()
        self._welcome_due_s = None
        if not self._failure:
            self._failure = reason
            self._broken(self)

    def _stop(self) -> None:
        self._is_stopped = True
        self._break(self._stop_reason)

    # ---- time ----------------------------------------------------------------------------------------------------

    def _now_s(self) -> float:
        return self._context.clock()

    def _due_s(self) -> float:
        return self._context.clock() + self._context.timeout_s

    def _wait_s(self) -> float:
        dues = [due for due in (self._welcome_due_s, *(ho.answer_due_s for ho in self._hand_offs.values())) if due]
        return min(_IDLE_S, max(0.0, min(dues, default=_IDLE_S + self._now_s()) - self._now_s()))

    def _expire(self) -> None:
        now_s = self._now_s()
        if self._welcome_due_s is not None and self._welcome_due_s <= now_s:
            self._break("the decode worker did not answer in time")
        for hand_off in list(self._hand_offs.values()):
            if hand_off.answer_due_s is not None and hand_off.answer_due_s <= now_s:
                reason = f"the decode worker did not answer in time ({hand_off.state.value})"
                self._abort(hand_off, reason, reason)
