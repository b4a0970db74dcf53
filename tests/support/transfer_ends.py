"""Both ends of a transfer in one process: real pools, backend and channels, and a forward pass that knows its bytes.

The KV of a token is a function of the tokens up to it, so what arrives can be checked without the sender, whatever the
block sizes of the two.
"""

from __future__ import annotations

import itertools
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from queue import SimpleQueue

import torch
from torch import Tensor
from twostroke_engine.kv.block_pool import BlockPool
from twostroke_engine.kv.hashing import block_hashes
from twostroke_engine.kv.spec import KVSpec, LayerGroup
from twostroke_engine.messages import LeaseGrant, PeerMessage, RequestEnd, RequestUpdate
from twostroke_engine.request import Request, RequestFacts, SamplingParams
from twostroke_engine.transfer.channel import BlockScheme, ChannelFactory, ChannelListener, ChannelScheme, KVChannel
from twostroke_engine.transfer.context import TransferContext
from twostroke_engine.transfer.end import ChunkOfHandOff, HandOffOutcome
from twostroke_engine.transfer.messages import (
    FirstToken,
    KVDestination,
    PairHello,
    ReceiverMessage,
    SenderMessage,
)
from twostroke_engine.transfer.receiver import KVReceiver
from twostroke_engine.transfer.sender import KVSender
from twostroke_kernels.choice import choose_backend

NUM_LAYERS = 3
SPEC = KVSpec(block_size=16, dtype="float32", groups=(LayerGroup(num_layers=NUM_LAYERS, num_kv_heads=1, head_dim=2),))
TOKENS = tuple(range(1000, 1100))
"""7 blocks, the last one partial."""
DECODE = "decode:1"
"""The decode worker's endpoint: the peer's name on the prefill side."""


def make_request(request_id: str, token_ids: Sequence[int], **more: object) -> Request:
    return Request(id=request_id, token_ids=tuple(token_ids), sampling=SamplingParams(), **more)  # type: ignore[arg-type]


def make_spec(block_size: int = 16, dtype: str = "float32", head_dim: int = 2) -> KVSpec:
    group = LayerGroup(num_layers=NUM_LAYERS, num_kv_heads=1, head_dim=head_dim)
    return KVSpec(block_size=block_size, dtype=dtype, groups=(group,))


def make_pool(num_blocks: int, spec: KVSpec = SPEC) -> Tensor:
    """NaN where nothing was written: it must reach no one."""
    group = spec.groups[0]
    shape = (num_blocks, spec.num_layers, 2, spec.block_size, group.num_kv_heads, group.head_dim)
    return torch.full(shape, torch.nan, dtype=getattr(torch, spec.dtype))


@cache
def prompt_content(token_ids: tuple[int, ...], head_dim: int) -> Tensor:
    """[token, layer, 2, G, D] of a prompt."""
    seeds = itertools.accumulate(
        token_ids, lambda seed, token: zlib.crc32(token.to_bytes(4, "little"), seed), initial=0
    )
    generators = [torch.Generator().manual_seed(seed) for seed in list(seeds)[1:]]
    return torch.stack([torch.rand(NUM_LAYERS, 2, 1, head_dim, generator=generator) for generator in generators])


def block_content(token_ids: Sequence[int], block: int, spec: KVSpec = SPEC) -> Tensor:
    """[layer, 2, B, G, D] of one block of a prompt, zero where it has no token."""
    first = block * spec.block_size
    tokens = prompt_content(tuple(token_ids), spec.groups[0].head_dim)[first : first + spec.block_size]
    content = torch.zeros(make_pool(1, spec).shape[1:], dtype=getattr(torch, spec.dtype))
    content[:, :, : tokens.shape[0]] = tokens.permute(1, 2, 0, 3, 4)
    return content


def make_context(
    pool: Tensor, worker_id: str, scheme: ChannelScheme | BlockScheme, spec: KVSpec = SPEC, **more: object
) -> TransferContext:
    fields: dict[str, object] = {
        "timeout_s": 5.0,
        "layers_per_segment": 1,
        "min_written_layers": 1,
        "backend": choose_backend(pool.device),
    } | more
    return TransferContext(
        pool=pool,
        spec=spec,
        worker_id=worker_id,
        worker_epoch=7,
        model_fingerprint="model",
        channels=ChannelFactory([scheme]),
        **fields,  # type: ignore[arg-type]
    )


@dataclass
class PrefillHostForTests:
    """The part of an engine that a `KVSender` sees."""

    outcomes: list[HandOffOutcome] = field(default_factory=list)

    def hand_off_closed(self, outcome: HandOffOutcome) -> None:
        self.outcomes.append(outcome)


class DecodeHostForTests:
    """The part of an engine that a `KVReceiver` sees; it frees what it adopts, after a look at the bytes."""

    def __init__(self, num_blocks: int, pool: Tensor, spec: KVSpec = SPEC, tolerance: float = 0.0) -> None:
        self.pool = BlockPool(num_blocks)
        self.spec = spec
        self.tolerance = tolerance
        self.bytes = pool
        self.adopted: dict[str, tuple[tuple[FirstToken, ...], RequestFacts]] = {}
        self.updates: list[RequestUpdate] = []
        self.wrong_blocks = 0

    def may_promise(self, num_blocks: int) -> bool:
        return num_blocks <= self.pool.num_available

    def adopt(
        self, request: Request, block_ids: tuple[int, ...], first: tuple[FirstToken, ...], facts: RequestFacts
    ) -> None:
        for block, block_id in enumerate(block_ids):
            found, expected = self.bytes[block_id].cpu(), block_content(request.token_ids, block, self.spec)
            self.wrong_blocks += not torch.isfinite(found).all()  # tokens that are none included
            num_tokens = request.num_prompt_tokens - block * self.spec.block_size
            error = (found.double() - expected.double())[:, :, :num_tokens].abs().max()
            self.wrong_blocks += not error <= self.tolerance
        self.adopted[request.id] = (first, facts)
        self.pool.release(block_ids[::-1])

    def report(self, update: RequestUpdate) -> None:
        self.updates.append(update)

    def grants(self) -> dict[str, LeaseGrant]:
        return {update.request_id: update.reserved for update in self.updates if update.reserved}

    def ends(self) -> dict[str, RequestEnd]:
        return {update.request_id: update.end for update in self.updates if update.end}


class Sending:
    """A prefill worker's engine, as far as its sender goes; each prompt has blocks of its own."""

    def __init__(
        self,
        scheme: ChannelScheme | BlockScheme,
        worker_id: str = "p0",
        num_blocks: int = 64,
        spec: KVSpec = SPEC,
        pool: Tensor | None = None,
        **more: object,
    ) -> None:
        self.spec = spec
        self.pool = make_pool(num_blocks, spec) if pool is None else pool
        self.host = PrefillHostForTests()
        self.woken: SimpleQueue[None] = SimpleQueue()
        self.sender = KVSender(make_context(self.pool, worker_id, scheme, spec, **more), self.host, self._wake)
        self._free = itertools.cycle(range(num_blocks))

    def begin(self, request: Request, grant: LeaseGrant, num_hit_blocks: int = 0) -> Prompt:
        destination = KVDestination(
            worker_id="d0",
            endpoint=DECODE,
            lease_id=grant.lease_id,
            epoch=grant.epoch,
            kv_fingerprint=self.spec.fingerprint(),
            ttl_s=grant.ttl_s,
        )
        blocks = tuple(next(self._free) for _ in range(self.spec.num_blocks(request.num_prompt_tokens)))
        for block in range(num_hit_blocks):
            self.pool[blocks[block]] = block_content(request.token_ids, block, self.spec)
        return Prompt(self, request, self.sender.begin(request, destination), blocks, num_hit_blocks)

    def hello(self) -> PairHello:
        """The greeting of its pair, once it is said."""
        said: list[PeerMessage] = []
        wait_for(lambda: bool(said.extend(self.sender.take_outgoing()) or said))
        assert isinstance(said[0].message, PairHello)
        return said[0].message

    def outcome(self, request_id: str) -> HandOffOutcome | None:
        return next((outcome for outcome in self.host.outcomes if outcome.request_id == request_id), None)

    def _wake(self) -> None:
        self.woken.put(None)


@dataclass
class Prompt:
    """One prompt's way through a prefill engine."""

    side: Sending
    request: Request
    sink_id: int
    blocks: tuple[int, ...]
    num_hit_blocks: int
    computed: int = 0

    @property
    def num_left(self) -> int:
        return self.request.num_prompt_tokens - max(self.computed, self.num_hit_blocks * self.side.spec.block_size)

    def chunk(self, num_tokens: int, before_layer: Callable[[int], None] = lambda layer: None) -> None:
        """One step: computes the next tokens layer by layer, and hands each layer to the sink."""
        size = self.side.spec.block_size
        first_block = self.computed // size
        start = max(self.computed, self.num_hit_blocks * size)
        end = min(start + num_tokens, self.request.num_prompt_tokens)
        is_last = end == self.request.num_prompt_tokens
        ready = len(self.blocks) if is_last else end // size
        hits = max(first_block, self.num_hit_blocks)
        chunk = ChunkOfHandOff(self.sink_id, self.blocks[: self.side.spec.num_blocks(end)], first_block, ready, hits)
        sink = self.side.sender.step_sink([chunk])
        for layer in range(NUM_LAYERS):
            before_layer(layer)
            for block in range(hits, ready):
                content = block_content(self.request.token_ids, block, self.side.spec)
                self.side.pool[self.blocks[block], layer] = content[layer]
            sink.layer_written(layer)
        self.computed = end

    def finish(self, first: tuple[FirstToken, ...] = (FirstToken(0, 5),)) -> None:
        self.side.sender.prompt_computed(self.sink_id, first)


class Receiving:
    """A decode worker's engine, as far as its receiver goes."""

    def __init__(
        self,
        scheme: ChannelScheme | BlockScheme,
        num_blocks: int = 64,
        spec: KVSpec = SPEC,
        tolerance: float = 0.0,
        pool: Tensor | None = None,
        **more: object,
    ) -> None:
        self.spec = spec
        self.bytes = make_pool(num_blocks, spec) if pool is None else pool
        self.host = DecodeHostForTests(num_blocks, self.bytes, spec, tolerance)
        self.woken: SimpleQueue[None] = SimpleQueue()
        context = make_context(self.bytes, "d0", scheme, spec, **more)
        self.receiver = KVReceiver(context, self.host, lambda: self.woken.put(None))

    def hold(self, token_ids: Sequence[int], num_blocks: int) -> None:
        """Leaves the first blocks of a prompt in the prefix cache."""
        hashes = block_hashes(token_ids, self.spec.block_size)[:num_blocks]
        known = len(self.host.pool.match(hashes))
        block_ids = self.host.pool.allocate(len(hashes) - known)
        for block, block_id in enumerate(block_ids, start=known):
            self.bytes[block_id] = block_content(token_ids, block, self.spec)
            self.host.pool.publish(block_id, hashes[block])
        self.host.pool.release(block_ids[::-1])


class Link:
    """Carries control messages between ends, as two services would."""

    def __init__(self, sending: Sending, receiving: Receiving, peer: str = "stream-1") -> None:
        self.sending = sending
        self.receiving = receiving
        self.peer = peer
        self.log: list[SenderMessage | ReceiverMessage] = []

    def carry(self) -> bool:
        """Polls both ends and moves what they have to say; False if there was nothing."""
        now_s = time.monotonic()
        self.sending.sender.poll(now_s)
        self.receiving.receiver.poll(now_s)
        moved = self._move(self.sending.sender.take_outgoing(), self.receiving.receiver.receive, self.peer)
        return self._move(self.receiving.receiver.take_outgoing(), self.sending.sender.receive, DECODE) or moved

    def direct(self) -> None:
        """Messages go over as they are made, whatever the engines' threads do."""
        self.sending.sender.deliver_to(lambda entry: self._one(entry, self.receiving.receiver.receive, self.peer))
        self.receiving.receiver.deliver_to(lambda entry: self._one(entry, self.sending.sender.receive, DECODE))

    def until(self, condition: Callable[[], bool], timeout_s: float = 20.0) -> None:
        """Carries until the condition holds."""
        due_s = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < due_s, "it did not come to pass"
            if not self.carry():
                time.sleep(0.001)

    def settle(self) -> None:
        """Carries until nothing is open, and checks that nothing is left behind."""
        receiver, sender = self.receiving.receiver, self.sending.sender
        self.until(lambda: not (receiver.num_open or receiver.num_waiting or sender.num_open))
        self.receiving.host.pool.check()
        assert self.receiving.host.pool.num_promised == 0
        assert self.receiving.host.pool.num_referenced == 0
        assert self.receiving.host.wrong_blocks == 0

    def lose(self, peer: str) -> None:
        """The stream ends; a later one has another name at the receiver."""
        self.sending.sender.take_outgoing()
        self.sending.sender.peer_lost(DECODE, "lost")
        self.receiving.receiver.peer_lost(self.peer, "lost")
        self.receiving.receiver.take_outgoing()
        self.peer = peer

    def close(self) -> None:
        self.sending.sender.close()
        self.receiving.receiver.close()

    def _move(
        self, entries: list[PeerMessage], receive: Callable[[str, SenderMessage | ReceiverMessage], None], peer: str
    ) -> bool:
        for entry in entries:
            self._one(entry, receive, peer)
        return bool(entries)

    def _one(
        self, entry: PeerMessage, receive: Callable[[str, SenderMessage | ReceiverMessage], None], peer: str
    ) -> None:
        self.log.append(entry.message)
        receive(peer, entry.message)


class FlippingScheme:
    """Another scheme whose receiver gets some messages with one byte changed."""

    def __init__(self, inner: ChannelScheme, is_bad: Callable[[int], bool]) -> None:
        self.name = inner.name
        self.ability = inner.ability
        self._inner = inner
        self._is_bad = is_bad

    def listen(self) -> ChannelListener:
        return _FlippingListener(self._inner.listen(), self._is_bad)

    def connect(self, endpoint: str, pair_id: str) -> KVChannel:
        return self._inner.connect(endpoint, pair_id)


class _FlippingListener:
    def __init__(self, inner: ChannelListener, is_bad: Callable[[int], bool]) -> None:
        self.endpoint = inner.endpoint
        self.close = inner.close
        self._inner = inner
        self._is_bad = is_bad

    def accept(self, pair_id: str) -> KVChannel:
        return _FlippingChannel(self._inner.accept(pair_id), self._is_bad)


class _FlippingChannel:
    def __init__(self, inner: KVChannel, is_bad: Callable[[int], bool]) -> None:
        self.send = inner.send
        self.close = inner.close
        self._inner = inner
        self._is_bad = is_bad
        self._numbers = itertools.count()

    def receive(self, payload: Tensor) -> None:
        self._inner.receive(payload)
        number = next(self._numbers)
        if self._is_bad(number):
            payload[number % payload.numel()] ^= 1


def reserve(link: Link, request: Request, ttl_s: float = 60.0) -> None:
    link.receiving.receiver.reserve(request, ttl_s)
    assert request.id in link.receiving.host.grants()


def begin(link: Link, request: Request, num_hit_blocks: int = 0) -> Prompt:
    reserve(link, request)
    return link.sending.begin(request, link.receiving.host.grants()[request.id], num_hit_blocks)


def wait_for(condition: Callable[[], bool]) -> None:
    for _ in range(1000):
        if condition():
            return
        time.sleep(0.005)
    raise AssertionError("it did not come to pass")


def run_whole(link: Link, request: Request, chunk: int = 1000) -> None:
    prompt = begin(link, request)
    while prompt.num_left:
        prompt.chunk(chunk)
    prompt.finish()
