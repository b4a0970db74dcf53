"""A prefill engine and a decode engine over scripted runners, with a transfer between them that is slow on purpose.

What the real ends do over a channel, `ScriptedSender` does with shadow KV: it reads prefill's blocks as late as it may,
and asserts on every read that they still hold the prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from twostroke_engine.request import Request, RequestFacts
from twostroke_engine.transfer.absent import NoTransfers
from twostroke_engine.transfer.end import ChunkOfHandOff, HandOffOutcome, KVSink, NoSink
from twostroke_engine.transfer.messages import FirstToken, KVDestination

from tests.support.engine_bench import EngineBench
from tests.support.scripted_runner import kv_of


@dataclass
class HandOff:
    """One prompt under way."""

    sink_id: int
    request: Request
    block_ids: tuple[int, ...] = ()
    num_offered: int = 0
    first: tuple[FirstToken, ...] | None = None
    is_cancelled: bool = False
    sent: list[list[bytes | None]] = field(default_factory=list)


class ScriptedSender(NoTransfers):
    """Checks what it is offered; `advance` moves one hand-off on by a block, or closes it."""

    def __init__(self, prefill: EngineBench, committed: Callable[[HandOff], None]) -> None:
        self._prefill = prefill
        self._committed = committed
        self.open: dict[int, HandOff] = {}
        self.num_begun = 0

    def begin(self, request: Request, destination: KVDestination | None) -> int:
        self.num_begun += 1
        self.open[self.num_begun] = HandOff(self.num_begun, request)
        return self.num_begun

    def step_sink(self, chunks: Sequence[ChunkOfHandOff]) -> KVSink:
        for chunk in chunks:
            hand_off = self.open[chunk.sink_id]
            num_hits, known = chunk.num_hit_blocks, len(hand_off.block_ids)
            assert chunk.first_block == hand_off.num_offered, "a block is offered twice or never"
            assert chunk.block_ids[:known] == hand_off.block_ids, "a block table changed"
            assert chunk.num_ready_blocks <= len(chunk.block_ids)
            if chunk.first_block < num_hits:
                self._check(hand_off.request, chunk.block_ids, num_hits)
            hand_off.block_ids = chunk.block_ids
            hand_off.num_offered = chunk.num_ready_blocks
        return NoSink()

    def prompt_computed(self, sink_id: int, first: tuple[FirstToken, ...]) -> None:
        hand_off = self.open[sink_id]
        assert hand_off.num_offered == len(hand_off.block_ids) == -(-hand_off.request.num_prompt_tokens // 16)
        assert [token.choice for token in first] == list(range(hand_off.request.n))
        hand_off.first = first

    def cancel(self, request_id: str) -> bool:
        found = [hand_off for hand_off in self.open.values() if hand_off.request.id == request_id]
        for hand_off in found:
            hand_off.is_cancelled = True
        return bool(found)

    def advance(self, sink_id: int) -> None:
        """Reads one more block, or acknowledges a cancel, or commits."""
        hand_off = self.open[sink_id]
        if hand_off.is_cancelled:
            self._close(hand_off, "cancelled")
        elif len(hand_off.sent) < hand_off.num_offered:
            self._check(hand_off.request, hand_off.block_ids, hand_off.num_offered)
            hand_off.sent.append(list(self._prefill.runner.kv[hand_off.block_ids[len(hand_off.sent)]]))
        elif hand_off.first is not None:
            if not all(token.finished for token in hand_off.first):
                self._committed(hand_off)
            self._close(hand_off, "")

    def fail(self, sink_id: int) -> None:
        """The peer is lost."""
        self._close(self.open[sink_id], "the peer is lost")

    def _close(self, hand_off: HandOff, error: str) -> None:
        self._check(hand_off.request, hand_off.block_ids, hand_off.num_offered)
        del self.open[hand_off.sink_id]
        outcome = HandOffOutcome(hand_off.request.id, error, 1.0, 64, len(hand_off.sent), 0, 0)
        self._prefill.engine.hand_off_closed(outcome)

    def _check(self, request: Request, block_ids: tuple[int, ...], num_blocks: int) -> None:
        num_tokens = min(num_blocks * 16, request.num_prompt_tokens)
        assert self._prefill.runner.read(block_ids, num_tokens) == kv_of(request.token_ids[:num_tokens])


class Pair:
    """Prefill, decode, and reservations that are granted in order."""

    def __init__(self, prefill: EngineBench, decode: EngineBench) -> None:
        self.prefill, self.decode = prefill, decode
        decode.first_offset = 1
        self.sender = ScriptedSender(prefill, self._arrived)
        prefill.engine.attach_sender(self.sender)
        self.waiting: list[Request] = []
        self._promised: dict[str, int] = {}

    def reserve(self, request: Request) -> None:
        self.waiting.append(request)

    def poll(self) -> None:
        """Grants what may be granted; a granted request goes to prefill."""
        while self.waiting:
            num_blocks = -(-self.waiting[0].num_prompt_tokens // 16)
            if not self.decode.engine.may_promise(num_blocks):
                return
            request = self.waiting.pop(0)
            assert self.decode.engine.pool.promise(num_blocks), "may_promise said that there is room"
            self._promised[request.id] = num_blocks
            self.prefill.engine.submit(request, self.sender.begin(request, None))

    def settle(self, request_id: str) -> None:
        """Gives back the promise of a request that ended on prefill without a commit."""
        self.decode.engine.pool.withdraw(self._promised.pop(request_id, 0))

    def cancel(self, request_id: str) -> None:
        """As the router does it: everywhere."""
        self.waiting = [request for request in self.waiting if request.id != request_id]
        self.prefill.engine.cancel(request_id)
        self.decode.engine.cancel(request_id)

    def _arrived(self, hand_off: HandOff) -> None:
        pool = self.decode.engine.pool
        pool.withdraw(self._promised.pop(hand_off.request.id))
        block_ids = pool.allocate(len(hand_off.sent))
        for block_id, content in zip(block_ids, hand_off.sent, strict=True):
            self.decode.runner.kv[block_id] = content
        assert hand_off.first is not None
        self.decode.engine.adopt(hand_off.request, block_ids, hand_off.first, RequestFacts(transfer_s=1.0))
