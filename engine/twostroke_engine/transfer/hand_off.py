"""`HandOff`: one prompt's way out of a prefill worker. Pure; the pair's thread owns it.

    NEW --first chunk--> OPENING --TransferOpened--> SENDING --prompt computed, all sent--> COMMITTING --TransferClosed
                                                        ^------------ a segment was rejected -----------'

It says what to send next and when to commit; `SendPair` does it.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from enum import Enum

from twostroke_engine.transfer.device import Mark
from twostroke_engine.transfer.end import ChunkOfHandOff, HandOffOutcome
from twostroke_engine.transfer.messages import CommitTransfer, FirstToken
from twostroke_engine.transfer.plan import (
    BEFORE_STEP,
    ChunkBlocks,
    KVSegment,
    KVTransferPlan,
    SegmentShape,
    plan_transfer,
)

MAX_TRIES = 3
"""Times a segment is sent before its hand-off is given up."""


class HandOffState(Enum):
    """Phases of a hand-off, see the module's picture."""

    NEW = "new"
    OPENING = "opening"
    SENDING = "sending"
    COMMITTING = "committing"


class TooManyTries(Exception):
    """A segment was rejected again and again."""


@dataclass(slots=True)
class Piece:
    """A segment on its way."""

    segment: KVSegment
    after: Mark
    tries: int = 0


@dataclass(slots=True)
class _Chunk:
    """One step's part of the prompt."""

    blocks: ChunkBlocks
    started: Mark
    layer: int = BEFORE_STEP
    marks: dict[int, Mark] = field(default_factory=dict)
    plan: KVTransferPlan | None = None
    num_taken: int = 0


class HandOff:
    """State of one hand-off."""

    def __init__(self, sink_id: int, request_id: str, lease_id: str, epoch: int, num_tokens: int) -> None:
        self.sink_id = sink_id
        self.request_id = request_id
        self.lease_id = lease_id
        self.epoch = epoch
        self.num_tokens = num_tokens
        self.state = HandOffState.NEW
        self.block_ids: tuple[int, ...] = ()
        self.answer_due_s: float | None = None
        self._chunks: deque[_Chunk] = deque()
        self._resends: deque[Piece] = deque()
        self._outstanding: dict[int, Piece] = {}
        self._num_held = 0
        self._first: tuple[FirstToken, ...] | None = None
        self._opened_s = 0.0
        self._committed_s: float | None = None
        self._num_sent = 0
        self._kv_bytes = 0
        self._num_resent = 0

    @property
    def is_finished(self) -> bool:
        """Every choice ended at its first token: nothing is left for decode to do."""
        return bool(self._first) and all(token.finished for token in self._first or ())

    @property
    def is_committable(self) -> bool:
        """The prompt is computed and every segment of it went out."""
        if self.state is not HandOffState.SENDING or self._first is None or self._resends:
            return False
        return all(chunk.plan is not None and chunk.num_taken == len(chunk.plan.segments) for chunk in self._chunks)

    def add_chunk(self, chunk: ChunkOfHandOff, started: Mark, now_s: float) -> bool:
        """A step will compute this part of the prompt; True if it is the first one, so that OpenTransfer is due."""
        self.block_ids = chunk.block_ids
        blocks = ChunkBlocks(chunk.first_block, chunk.num_hit_blocks, chunk.num_ready_blocks)
        self._chunks.append(_Chunk(blocks, started))
        if self.state is not HandOffState.NEW:
            return False
        self.state = HandOffState.OPENING
        self._opened_s = now_s
        return True

    def layer_written(self, layer: int, mark: Mark) -> None:
        """The last chunk's layers up to this one exist after the mark."""
        self._chunks[-1].layer = layer
        self._chunks[-1].marks[layer] = mark

    def opened(self, num_held_blocks: int) -> None:
        """The receiver has blocks, and holds some of the content, in blocks of the wire."""
        if self.state is HandOffState.OPENING:
            self.state = HandOffState.SENDING
            self.answer_due_s = None
            self._num_held = num_held_blocks

    def prompt_computed(self, first: tuple[FirstToken, ...]) -> None:
        """No chunk follows."""
        self._first = first

    def next_piece(self, shape: SegmentShape) -> Piece | None:
        """What to send now, None if nothing is ready."""
        if self.state is not HandOffState.SENDING:
            return None
        return self._resends.popleft() if self._resends else self._next_new(shape)

    def sent(self, piece: Piece, number: int, num_bytes: int) -> None:
        """The piece goes out under this number."""
        self._num_sent += 1
        piece.tries += 1
        self._num_resent += piece.tries > 1
        self._kv_bytes += num_bytes
        self._outstanding[number] = piece

    def result(self, number: int, accepted: bool) -> None:
        """What the receiver made of a segment; a rejected one is sent again, and a commit since then was void.

        Raises:
            TooManyTries: it was the last try.
        """
        piece = self._outstanding.pop(number, None)
        if piece is None or accepted:
            return
        if piece.tries >= MAX_TRIES:
            raise TooManyTries(f"segment {number} was rejected {MAX_TRIES} times")
        self._resends.append(piece)
        self.state = HandOffState.SENDING
        self.answer_due_s = None

    def commit(self, now_s: float) -> CommitTransfer:
        """The message that ends the transfer."""
        self.state = HandOffState.COMMITTING
        self._committed_s = now_s
        return CommitTransfer(
            lease_id=self.lease_id, epoch=self.epoch, num_segments=self._num_sent, first=self._first or ()
        )

    def outcome(self, error: str, now_s: float, block_size: int) -> HandOffOutcome:
        """How it ended; `block_size` is the wire's."""
        return HandOffOutcome(
            request_id=self.request_id,
            error=error,
            transfer_s=now_s - self._opened_s if self.state is not HandOffState.NEW else 0.0,
            kv_bytes=self._kv_bytes,
            kv_segments=self._num_sent - self._num_resent,
            kv_resends=self._num_resent,
            skipped_tokens=min(self._num_held * block_size, self.num_tokens),
            committed_s=self._committed_s,
            closed_s=now_s,
        )

    def _next_new(self, shape: SegmentShape) -> Piece | None:
        for chunk in self._chunks:
            if chunk.plan is None:
                chunk.plan = plan_transfer(shape, chunk.blocks, self.num_tokens, self._num_held)
            ready = chunk.plan.ready(chunk.num_taken, chunk.layer)
            if ready:
                chunk.num_taken += 1
                return Piece(ready[0], chunk.marks.get(ready[0].after_layer, chunk.started))
            if chunk.num_taken < len(chunk.plan.segments):
                return None
        return None
