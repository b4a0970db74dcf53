"""A KV transfer between two processes over each channel: bytes, a killed peer, and the pair after it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from queue import Empty

import pytest
import torch
from twostroke_engine.request import ErrorCode
from twostroke_engine.transfer.messages import SegmentReady

from tests.support.channel_schemes import NETWORKED, make_scheme
from tests.support.prefill_client import PrefillProcess
from tests.support.prefill_process import Outcome, RunPrompt
from tests.support.transfer_ends import NUM_LAYERS, SPEC, Receiving, make_request

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
TOKENS = tuple(range(500, 600))


class NamedPrefill(PrefillProcess):
    """One of several."""

    def __init__(self, name: str, channel: str) -> None:
        super().__init__(channel)
        self.name = name


class Cluster:
    """A receiver here, and prefill processes."""

    def __init__(self, channel: str) -> None:
        torch.set_num_threads(1)
        self.channel = channel
        self.receiving = Receiving(make_scheme(channel, 10.0), timeout_s=10.0)
        self.processes: list[NamedPrefill] = []
        self.outcomes: dict[str, Outcome] = {}
        self.segments = 0

    def start(self, name: str) -> NamedPrefill:
        self.processes.append(NamedPrefill(name, self.channel))
        return self.processes[-1]

    def run(self, process: NamedPrefill, request_id: str, pause_s: float = 0.0) -> None:
        self.receiving.receiver.reserve(make_request(request_id, TOKENS), 60.0)
        grant = self.receiving.host.grants()[request_id]
        process.tell(RunPrompt(request_id, TOKENS, grant, 40, pause_s))

    def until(self, condition: Callable[[], bool], timeout_s: float = 30.0) -> float:
        begun_s = time.monotonic()
        while not condition():
            assert time.monotonic() < begun_s + timeout_s, "it did not come to pass"
            self._carry()
        return time.monotonic() - begun_s

    def _carry(self) -> None:
        self.receiving.receiver.poll(0.0)
        for entry in self.receiving.receiver.take_outgoing():
            next(process for process in self.processes if process.name == entry.peer).tell(entry)
        for process in self.processes:
            self._hear(process)
        time.sleep(0.001)

    def _hear(self, process: NamedPrefill) -> None:
        try:
            message = process.said.get_nowait()
        except Empty:
            return
        if isinstance(message, Outcome):
            self.outcomes[message.request_id] = message
        elif message is not None:
            self.segments += isinstance(message.message, SegmentReady)
            self.receiving.receiver.receive(process.name, message.message)


@pytest.fixture(params=NETWORKED)
def cluster(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    made = Cluster(request.param)
    yield made
    for process in made.processes:
        process.kill()
    made.receiving.receiver.close()


def check_clean(cluster: Cluster) -> None:
    host = cluster.receiving.host
    host.pool.check()
    assert (host.pool.num_promised, host.pool.num_referenced, host.wrong_blocks) == (0, 0, 0)


def test_a_prompt_crosses_a_killed_peer_ends_its_leases_only_and_a_new_pair_works(cluster: Cluster) -> None:
    receiver, host = cluster.receiving.receiver, cluster.receiving.host
    first = cluster.start("stream-1")
    cluster.run(first, "whole")
    cluster.until(lambda: "whole" in cluster.outcomes)
    assert cluster.outcomes["whole"].error == ""
    assert cluster.outcomes["whole"].kv_bytes == SPEC.block_bytes * 7
    assert "whole" in host.adopted

    host.pool = type(host.pool)(host.pool.num_blocks)  # forget the prefix: the next prompt is sent again
    cluster.run(first, "broken", pause_s=0.2)
    cluster.until(lambda: receiver.kv_bytes > SPEC.block_bytes * 7)
    first.kill()
    # Its last announcement is still on its way: the receive that it asks for must fail at once, not in ten seconds.
    grant = host.grants()["broken"]
    receiver.receive("stream-1", announcement(grant.lease_id, grant.epoch, cluster.segments))
    assert cluster.until(lambda: "broken" in host.ends()) < 2.0
    assert host.ends()["broken"].error is ErrorCode.TRANSFER
    check_clean(cluster)

    second = cluster.start("stream-2")
    cluster.run(second, "again")
    cluster.until(lambda: "again" in cluster.outcomes)
    assert cluster.outcomes["again"].error == ""
    check_clean(cluster)


def announcement(lease_id: str, epoch: int, number: int) -> SegmentReady:
    return SegmentReady(
        lease_id=lease_id,
        epoch=epoch,
        number=number,
        first_layer=0,
        num_layers=1,
        first_block=6,
        num_blocks=1,
        num_bytes=SPEC.layer_block_bytes,
        digests=(0,),
    )


def test_the_first_segment_is_on_the_wire_before_the_last_layer_is_computed(cluster: Cluster) -> None:
    """Bar 8, from outside: each layer takes 0.3 s, and bytes are here long before the last one began."""
    process = cluster.start("stream-1")
    cluster.run(process, "warm")
    cluster.until(lambda: "warm" in cluster.outcomes)
    cluster.receiving.host.pool = type(cluster.receiving.host.pool)(64)
    before = cluster.receiving.receiver.kv_bytes
    tokens = TOKENS[:40]  # one chunk
    cluster.receiving.receiver.reserve(make_request("slow", tokens), 60.0)
    process.tell(RunPrompt("slow", tokens, cluster.receiving.host.grants()["slow"], 40, 0.3))
    cluster.until(lambda: cluster.receiving.receiver.kv_bytes > before)
    seconds = cluster.until(lambda: "slow" in cluster.receiving.host.adopted)
    assert seconds > 0.3 * (NUM_LAYERS - 2), "the first segment came only when the last layer had been computed"
    assert cluster.outcomes.get("slow") is None or cluster.outcomes["slow"].error == ""
