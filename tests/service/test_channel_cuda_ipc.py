"""A sender in another process that writes to this one's blocks, and dies or stops in the middle of it.

On a card over CUDA IPC; on a host a file that both map stands in for the device's memory, and all else is as there.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from queue import Empty

import pytest
import torch
from twostroke_engine.request import ErrorCode

from tests.support.block_ends import make_block_receiving
from tests.support.prefill_client import PrefillProcess
from tests.support.prefill_process import Outcome, RunPrompt
from tests.support.transfer_ends import NUM_LAYERS, SPEC, Receiving, make_request

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
TOKENS = tuple(range(500, 600))
NUM_BLOCKS = 7
DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA device")],
    ),
]


class Writer(PrefillProcess):
    """The other process, and what became of its prompts."""

    def __init__(self, device: str) -> None:
        super().__init__("cuda_ipc", device)
        self.outcomes: dict[str, Outcome] = {}


class Pairs:
    """A receiver here, and writers."""

    def __init__(self, device: str) -> None:
        torch.set_num_threads(1)
        self.device = device
        self.receiving: Receiving = make_block_receiving(torch.device(device), timeout_s=10.0, stall_timeout_s=3.0)
        self.writers: dict[str, Writer] = {}

    def start(self, name: str) -> Writer:
        self.writers[name] = Writer(self.device)
        return self.writers[name]

    def run(self, writer: Writer, request_id: str, pause_s: float = 0.0) -> None:
        self.receiving.receiver.reserve(make_request(request_id, TOKENS), 60.0)
        writer.tell(RunPrompt(request_id, TOKENS, self.receiving.host.grants()[request_id], 1000, pause_s))

    def until(self, condition: Callable[[], bool], timeout_s: float = 60.0) -> None:
        due_s = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < due_s, "it did not come to pass"
            self.carry()

    def carry(self) -> None:
        self.receiving.receiver.poll(0.0)
        for entry in self.receiving.receiver.take_outgoing():
            self.writers[entry.peer].tell(entry)
        for name, writer in self.writers.items():
            self._hear(name, writer)
        time.sleep(0.001)

    def check_clean(self) -> None:
        host = self.receiving.host
        host.pool.check()
        assert (host.pool.num_promised, host.pool.num_referenced, host.wrong_blocks) == (0, 0, 0)

    def forget_prefixes(self) -> None:
        self.receiving.host.pool = type(self.receiving.host.pool)(self.receiving.host.pool.num_blocks)

    def _hear(self, name: str, writer: Writer) -> None:
        try:
            message = writer.said.get_nowait()
        except Empty:
            return
        if isinstance(message, Outcome):
            writer.outcomes[message.request_id] = message
        else:
            self.receiving.receiver.receive(name, message.message)


@pytest.fixture(params=DEVICES)
def pairs(request: pytest.FixtureRequest) -> Iterator[Pairs]:
    made = Pairs(request.param)
    yield made
    for writer in made.writers.values():
        writer.kill()
    made.receiving.receiver.close()


def test_a_prompt_crosses_and_a_killed_writer_is_proven_dead_before_its_blocks_are_free(pairs: Pairs) -> None:
    receiver, host = pairs.receiving.receiver, pairs.receiving.host
    first, second = pairs.start("first"), pairs.start("second")
    pairs.run(first, "whole")
    pairs.until(lambda: "whole" in first.outcomes)
    assert (first.outcomes["whole"].error, first.outcomes["whole"].kv_bytes) == ("", SPEC.block_bytes * NUM_BLOCKS)

    pairs.forget_prefixes()
    moved = receiver.kv_bytes
    pairs.run(first, "broken", pause_s=0.2)
    pairs.until(lambda: receiver.kv_bytes > moved)
    first.process.send_signal(signal.SIGKILL)
    receiver.peer_lost("first", "its control stream ended")
    pairs.until(lambda: "broken" in host.ends())
    assert host.ends()["broken"].error is ErrorCode.TRANSFER
    pairs.until(lambda: receiver.num_quarantined == 0)
    assert first.process.wait(1.0) == -signal.SIGKILL
    pairs.check_clean()

    pairs.run(second, "again")
    pairs.until(lambda: "again" in second.outcomes)
    assert second.outcomes["again"].error == ""
    pairs.check_clean()


def test_a_stopped_writer_keeps_its_blocks_from_others_and_writes_to_no_one_elses_when_it_goes_on(
    pairs: Pairs,
) -> None:
    receiver, host, pool = pairs.receiving.receiver, pairs.receiving.host, pairs.receiving.bytes
    stopped, other = pairs.start("stopped"), pairs.start("other")
    pairs.run(other, "warm")
    pairs.until(lambda: "warm" in other.outcomes)
    pairs.forget_prefixes()

    begun = receiver.kv_bytes
    pairs.run(stopped, "late", pause_s=0.4)
    pairs.until(lambda: receiver.kv_bytes > begun)
    stopped.process.send_signal(signal.SIGSTOP)  # in the pause before its next write
    pairs.until(lambda: "late" in host.ends())
    assert host.ends()["late"].error is ErrorCode.TRANSFER
    assert receiver.num_quarantined == NUM_BLOCKS
    (lease,) = receiver._quarantine._leases.values()
    held = list(lease.block_ids)
    pool[held] = torch.nan  # nobody's content, so that what is written late can be seen

    pairs.run(other, "meanwhile")
    pairs.until(lambda: "meanwhile" in host.adopted)
    assert receiver.num_quarantined == NUM_BLOCKS
    untouched = [block for block in range(host.pool.num_blocks) if block not in held]
    before = pool[untouched].clone()

    stopped.process.send_signal(signal.SIGCONT)
    pairs.until(lambda: receiver.num_quarantined == 0)
    late = torch.isfinite(pool[held]).any(dim=0).flatten(1).any(dim=1).tolist()
    assert sum(late) == 1, f"one layer of {NUM_LAYERS} was on its way"
    assert torch.equal(pool[untouched].nan_to_num(9.0), before.nan_to_num(9.0))
    pairs.until(lambda: "late" in stopped.outcomes)
    assert stopped.outcomes["late"].error
    pairs.check_clean()

    pairs.run(stopped, "after")
    pairs.until(lambda: "after" in stopped.outcomes)
    assert stopped.outcomes["after"].error == ""
    pairs.check_clean()
