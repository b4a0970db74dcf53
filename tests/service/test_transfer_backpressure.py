"""A decode worker that takes segments slowly: its own pair waits, others do not, the sender's memory is bounded."""

from __future__ import annotations

import time
import weakref
from collections.abc import Iterator
from threading import Event, Lock
from typing import Any

import pytest
from msgspec.structs import replace
from torch import Tensor
from twostroke_engine.messages import PeerMessage
from twostroke_engine.request import Request
from twostroke_engine.transfer.channel import ChannelListener, ChannelScheme, KVChannel
from twostroke_engine.transfer.messages import KVDestination

from tests.support.channel_schemes import make_scheme
from tests.support.transfer_ends import Prompt, Receiving, Sending, make_request, make_spec

SPEC = make_spec(head_dim=256)
TOKENS = tuple(range(1000, 1480))
NUM_BLOCKS = SPEC.num_blocks(len(TOKENS))
NUM_SLOW, NUM_QUICK = 8, 3
"""Prompts of 3 MB each: those for the slow side are more than sockets and rings hold."""
TIMEOUT_S = 30.0


class GatedScheme:
    """Another scheme whose receiver takes nothing while its gate is shut."""

    def __init__(self, inner: ChannelScheme, gate: Event) -> None:
        self.name = inner.name
        self.ability = inner.ability
        self._inner = inner
        self._gate = gate

    def listen(self) -> ChannelListener:
        return _GatedListener(self._inner.listen(), self._gate)

    def connect(self, endpoint: str, pair_id: str) -> KVChannel:
        return self._inner.connect(endpoint, pair_id)


class _GatedListener:
    def __init__(self, inner: ChannelListener, gate: Event) -> None:
        self.endpoint = inner.endpoint
        self.close = inner.close
        self._inner = inner
        self._gate = gate

    def accept(self, pair_id: str) -> KVChannel:
        return _GatedChannel(self._inner.accept(pair_id), self._gate)


class _GatedChannel:
    def __init__(self, inner: KVChannel, gate: Event) -> None:
        self.send = inner.send
        self.close = inner.close
        self._inner = inner
        self._gate = gate

    def receive(self, payload: Tensor) -> None:
        assert self._gate.wait(TIMEOUT_S)
        self._inner.receive(payload)


class Payloads:
    """How many packed segments a sender has in memory."""

    def __init__(self, sending: Sending) -> None:
        self.most = 0
        self._alive = 0
        self._lock = Lock()
        backend: Any = sending.sender._context.backend
        pack = backend.pack_kv

        def tracked(*told: Any) -> tuple[Tensor, Tensor]:
            packed, digests = pack(*told)
            self._change(1)
            weakref.finalize(packed, self._change, -1)
            return packed, digests

        backend.pack_kv = tracked

    def _change(self, by: int) -> None:
        with self._lock:
            self._alive += by
            self.most = max(self.most, self._alive)


class OneToTwo:
    """A prefill worker's end, and two decode workers' ends."""

    def __init__(self, channel: str) -> None:
        self.gate = Event()
        scheme = make_scheme(channel, TIMEOUT_S)
        self.sending = Sending(scheme, num_blocks=NUM_BLOCKS * (NUM_SLOW + NUM_QUICK), spec=SPEC, timeout_s=TIMEOUT_S)
        self.payloads = Payloads(self.sending)
        self.decodes = {
            "slow:1": self._receiving(GatedScheme(make_scheme(channel, TIMEOUT_S), self.gate), NUM_SLOW),
            "quick:1": self._receiving(make_scheme(channel, TIMEOUT_S), NUM_QUICK),
        }
        self.sending.sender.deliver_to(self._deliver)
        for endpoint, receiving in self.decodes.items():
            receiving.receiver.deliver_to(
                lambda entry, endpoint=endpoint: self.sending.sender.receive(endpoint, entry.message)
            )

    def run(self, endpoint: str, request: Request) -> None:
        receiving = self.decodes[endpoint]
        receiving.receiver.reserve(request, 60.0)
        grant = receiving.host.grants()[request.id]
        destination = KVDestination(
            worker_id="d",
            endpoint=endpoint,
            lease_id=grant.lease_id,
            epoch=grant.epoch,
            kv_fingerprint=SPEC.fingerprint(),
            ttl_s=grant.ttl_s,
        )
        blocks = tuple(next(self.sending._free) for _ in range(NUM_BLOCKS))
        prompt = Prompt(self.sending, request, self.sending.sender.begin(request, destination), blocks, 0)
        prompt.chunk(len(TOKENS))
        prompt.finish()

    def until(self, endpoint: str, num_adopted: int) -> float:
        """Seconds until so many prompts were adopted there."""
        begun_s = time.monotonic()
        while len(self.decodes[endpoint].host.adopted) < num_adopted:
            assert time.monotonic() < begun_s + TIMEOUT_S, "it did not come to pass"
            self.poll()
            time.sleep(0.001)
        return time.monotonic() - begun_s

    def poll(self) -> None:
        for receiving in self.decodes.values():
            receiving.receiver.poll(0.0)
        self.sending.sender.poll(0.0)

    def close(self) -> None:
        self.gate.set()
        self.sending.sender.close()
        for receiving in self.decodes.values():
            receiving.receiver.close()

    def _receiving(self, scheme: ChannelScheme, num_prompts: int) -> Receiving:
        return Receiving(scheme, num_blocks=(NUM_BLOCKS + 1) * num_prompts, spec=SPEC, timeout_s=TIMEOUT_S)

    def _deliver(self, entry: PeerMessage) -> None:
        self.decodes[entry.peer].receiver.receive("stream-1", entry.message)


@pytest.fixture(params=["shm", "tcp", "collective"])
def ends(request: pytest.FixtureRequest) -> Iterator[OneToTwo]:
    made = OneToTwo(request.param)
    yield made
    made.close()


def test_a_slow_decode_worker_holds_up_its_own_pair_alone_and_bounds_the_senders_memory(ends: OneToTwo) -> None:
    request = make_request("", TOKENS)
    for number in range(NUM_SLOW):
        ends.run("slow:1", replace(request, id=f"slow-{number}"))
    for number in range(NUM_QUICK):
        ends.run("quick:1", replace(request, id=f"quick-{number}"))
    ends.until("quick:1", NUM_QUICK)
    assert not ends.decodes["slow:1"].host.adopted
    assert ends.sending.sender.num_open >= NUM_SLOW, "what is not taken is not over"
    assert ends.payloads.most <= 2, "each pair has one segment in memory at a time"
    ends.gate.set()
    ends.until("slow:1", NUM_SLOW)
    assert ends.payloads.most <= 2
    for receiving in ends.decodes.values():
        receiving.host.pool.check()
        assert (receiving.host.wrong_blocks, receiving.host.pool.num_referenced) == (0, 0)
