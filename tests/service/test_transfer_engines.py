"""Two whole engines in one process, a tiny model, gloo between them: what decode streams is what one engine streams."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from queue import SimpleQueue

import pytest
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
from twostroke_engine.request import Request, SamplingParams
from twostroke_engine.transfer.messages import KVDestination

from tests.support.tiny_model import make_tiny_llama

MAX_TOKENS = 24
Streams = dict[tuple[str, int], dict[int, int]]


class TwoEngines:
    """A prefill and a decode engine; their control messages go straight to each other."""

    def __init__(self, model_dir: Path) -> None:
        self.updates: dict[str, SimpleQueue[RequestUpdate]] = {"prefill": SimpleQueue(), "decode": SimpleQueue()}
        config = EngineConfig(model_dir=str(model_dir), dtype="float32", num_blocks=128, max_step_tokens=64)
        self.loops: dict[str, EngineLoop] = {}
        prefill = replace(config, worker_id="p", worker_epoch=1, sends_kv=True)
        decode = replace(config, worker_id="d", worker_epoch=2, receives_kv=True)
        self.loops["prefill"], _ = assemble(prefill, self._outbox("prefill", "decode", "stream"))
        self.loops["decode"], self.ready = assemble(decode, self._outbox("decode", "prefill", "decode:1"))
        for loop in self.loops.values():
            loop.start()

    def run(self, requests: list[Request]) -> Streams:
        """Reserves, prefills and decodes; the tokens of each choice by offset."""
        streams: Streams = defaultdict(dict)
        for request in requests:
            self.loops["decode"].post(Reserve(request=request, ttl_s=60.0))
        by_id = {request.id: request for request in requests}
        self._collect(streams, 2 * len(requests), lambda update: self._granted(by_id[update.request_id], update))
        return streams

    def run_colocated(self, requests: list[Request]) -> Streams:
        """The same on the decode engine alone."""
        streams: Streams = defaultdict(dict)
        for request in requests:
            self.loops["decode"].post(Submit(request=request))
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
            kv_fingerprint=self.ready.kv_spec.fingerprint(),
            ttl_s=update.reserved.ttl_s,
        )
        self.loops["prefill"].post(Submit(request=request, destination=destination))

    def _collect(self, streams: Streams, num_ends: int, seen: Callable[[RequestUpdate], None]) -> None:
        ends: list[RequestEnd] = []
        due_s = time.monotonic() + 60.0
        while len(ends) < num_ends:
            assert time.monotonic() < due_s, f"{len(ends)} of {num_ends} ends"
            for queue in self.updates.values():
                while not queue.empty():
                    update = queue.get()
                    for delta in update.deltas:
                        offsets = enumerate(delta.tokens, start=delta.offset)
                        streams[update.request_id, delta.choice].update((at, token.id) for at, token in offsets)
                    seen(update)
                    ends += [update.end] if update.end else []
            time.sleep(0.001)
        assert [end.message for end in ends if end.error is not None] == []


@pytest.fixture
def engines(tmp_path: Path) -> Iterator[TwoEngines]:
    made = TwoEngines(make_tiny_llama(tmp_path / "model"))
    yield made
    made.stop()


def make_request(number: int, suffix: str = "") -> Request:
    """Lengths cross blocks and chunks; groups of three share their prefixes; some have two choices."""
    return Request(
        id=f"r{number}{suffix}",
        token_ids=tuple((number // 3 * 7 + at) % 200 + 3 for at in range(5 + number * 9)),
        sampling=SamplingParams(
            temperature=0.8 if number % 2 else 0.0, seed=number, max_tokens=MAX_TOKENS, ignore_eos=True
        ),
        n=1 + (number % 5 == 0),
    )


def test_split_streams_are_colocated_streams(engines: TwoEngines) -> None:
    split = engines.run([make_request(number) for number in range(20)])
    whole = engines.run_colocated([make_request(number, "c") for number in range(20)])
    assert len(split) == 24
    for (request_id, choice), tokens in split.items():
        assert sorted(tokens) == list(range(MAX_TOKENS))
        assert tokens == whole[f"{request_id}c", choice]
