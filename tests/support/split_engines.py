"""A prefill and a decode engine in one process, a real channel between them, and an engine alone to compare with."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from msgspec.structs import replace
from twostroke_engine.config import EngineConfig
from twostroke_engine.loop import EngineLoop
from twostroke_engine.messages import (
    OutboxMessage,
    PeerMessage,
    RequestEnd,
    RequestUpdate,
    Reserve,
    StepReport,
    Stop,
    Submit,
)
from twostroke_engine.process import assemble
from twostroke_engine.request import Request
from twostroke_engine.transfer.messages import KVDestination

Streams = dict[tuple[str, int], dict[int, int]]
"""The tokens of each (request, choice) by offset."""


class SplitEngines:
    """A prefill, a decode and a colocated engine; control messages of the first two go straight to each other."""

    def __init__(
        self, model_dir: Path, block_sizes: tuple[int, int] = (16, 16), num_tokens: int = 2048, **config: Any
    ) -> None:
        self.names = ("prefill", "decode", "alone")
        self.updates: dict[str, SimpleQueue[RequestUpdate]] = {name: SimpleQueue() for name in self.names}
        self.ends: dict[tuple[str, str], RequestEnd] = {}
        """By engine and request."""
        self.margins: dict[tuple[str, int], dict[int, float]] = defaultdict(dict)
        """How much likelier the best token was than the second, by (request, choice) and offset, where it was asked."""
        self.loops: dict[str, EngineLoop] = {}
        told: dict[str, Any] = {"dtype": "float32", "max_step_tokens": 64, **config}
        common = EngineConfig(model_dir=str(model_dir), **told)
        kinds = (
            ("prefill", "decode", "stream", {"worker_id": "p", "worker_epoch": 1, "sends_kv": True}),
            ("decode", "prefill", "decode:1", {"worker_id": "d", "worker_epoch": 2, "receives_kv": True}),
            ("alone", "", "", {}),
        )
        for (name, other, peer, kind), size in zip(kinds, (*block_sizes, 16), strict=True):
            made = replace(common, block_size=size, num_blocks=num_tokens // size, **kind)
            self.loops[name], ready = assemble(made, self._outbox(name, other, peer))
            self.fingerprint = ready.kv_spec.fingerprint()
        for loop in self.loops.values():
            loop.start()

    def run(self, requests: list[Request]) -> Streams:
        """Reserves, prefills and decodes."""
        streams: Streams = defaultdict(dict)
        for request in requests:
            self.loops["decode"].post(Reserve(request=request, ttl_s=60.0))
        by_id = {request.id: request for request in requests}
        self._collect(streams, 2 * len(requests), lambda update: self._granted(by_id[update.request_id], update))
        return streams

    def run_on(self, name: str, requests: list[Request]) -> Streams:
        """The same on one engine alone."""
        streams: Streams = defaultdict(dict)
        for request in requests:
            self.loops[name].post(Submit(request=request))
        self._collect(streams, len(requests), lambda update: None)
        return streams

    def stop(self) -> None:
        for loop in self.loops.values():
            loop.post(Stop())
        for loop in self.loops.values():
            assert loop.join(10.0)

    def _outbox(self, name: str, other: str, peer: str) -> Callable[[OutboxMessage], None]:
        def put(message: OutboxMessage) -> None:
            assert isinstance(message, StepReport), message
            for entry in message.peers:
                self.loops[other].post(PeerMessage(peer=peer, message=entry.message))
            for update in message.requests:
                self.updates[name].put(update)

        return put

    def _granted(self, request: Request, update: RequestUpdate) -> None:
        if update.reserved is None:
            return
        destination = KVDestination(
            worker_id="d",
            endpoint="decode:1",
            lease_id=update.reserved.lease_id,
            epoch=update.reserved.epoch,
            kv_fingerprint=self.fingerprint,
            ttl_s=update.reserved.ttl_s,
        )
        self.loops["prefill"].post(Submit(request=request, destination=destination))

    def _collect(self, streams: Streams, num_ends: int, seen: Callable[[RequestUpdate], None]) -> None:
        ends: list[RequestEnd] = []
        due_s = time.monotonic() + 60.0
        while len(ends) < num_ends:
            assert time.monotonic() < due_s, f"{len(ends)} of {num_ends} ends"
            for name, queue in self.updates.items():
                while not queue.empty():
                    update = queue.get()
                    for delta in update.deltas:
                        offsets = enumerate(delta.tokens, start=delta.offset)
                        for at, token in offsets:
                            streams[update.request_id, delta.choice][at] = token.id
                            if len(token.top) > 1:
                                margin = token.top[0][1] - token.top[1][1]
                                self.margins[update.request_id, delta.choice][at] = margin
                    seen(update)
                    if update.end:
                        self.ends[name, update.request_id] = update.end
                        ends.append(update.end)
            time.sleep(0.001)
        assert [end.message for end in ends if end.error is not None] == []
