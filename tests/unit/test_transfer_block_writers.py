"""Senders that write to the receiver's blocks themselves: what arrives, and who may use a block again, and when."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import msgspec
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from twostroke_engine.kv.spec import KVSpec
from twostroke_engine.request import ErrorCode
from twostroke_engine.transfer import peer_process
from twostroke_engine.transfer.channel import ChannelError, ChannelFactory, ChannelUnusable
from twostroke_engine.transfer.cuda_ipc import CudaIpcListener, CudaIpcScheme
from twostroke_engine.transfer.cuda_ipc_driver import check_exported
from twostroke_engine.transfer.hand_off import HandOff
from twostroke_engine.transfer.lease import KVLease
from twostroke_engine.transfer.peer_process import ProcessName, own_process, watch
from twostroke_engine.transfer.plan import place_items
from twostroke_engine.transfer.quarantine import Quarantine
from twostroke_engine.transfer.shm import place
from twostroke_engine.transfer.writer_fence import WriterFence
from twostroke_kernels.backend import KVItems, KVWire
from twostroke_kernels.torch_backend import TorchBackend

from tests.support.block_ends import HostDriver, make_block_receiving, make_block_sending
from tests.support.channel_schemes import make_scheme
from tests.support.transfer_ends import (
    SPEC,
    TOKENS,
    Link,
    Sending,
    begin,
    make_pool,
    make_request,
    make_spec,
    run_whole,
)

CPU = torch.device("cpu")
KEYS = [("a", 1), ("a", 2), ("b", 1)]


class GatedBackend(TorchBackend):
    """Writes to others' blocks only while the gate is open, and may spoil what it wrote."""

    def __init__(self) -> None:
        super().__init__(CPU)
        self.gate = threading.Event()
        self.gate.set()
        self.begun = threading.Event()
        self.num_spoiled = 0

    def push_kv(self, source: KVItems, target: KVItems, first_layer: int, num_layers: int, wire: KVWire) -> Tensor:
        self.begun.set()
        assert self.gate.wait(20.0)
        digest = super().push_kv(source, target, first_layer, num_layers, wire)
        if self.num_spoiled:
            self.num_spoiled -= 1
            block = int(target.ids[0]) // wire.split(target.pool)
            target.pool[block, first_layer].view(torch.uint8).view(-1)[0] ^= 1
        return digest


def make_link(backend: TorchBackend | None = None, spec: KVSpec = SPEC, theirs: KVSpec = SPEC, **more: object) -> Link:
    tolerance = 0.0 if spec.dtype == theirs.dtype else 0.01
    sending = make_block_sending(CPU, spec=spec, backend=backend or TorchBackend(CPU))
    return Link(sending, make_block_receiving(CPU, spec=theirs, tolerance=tolerance, **more))


@pytest.fixture
def backend() -> GatedBackend:
    return GatedBackend()


@pytest.fixture
def link(backend: GatedBackend) -> Iterator[Link]:
    made = make_link(backend, stall_timeout_s=0.3)
    yield made
    backend.gate.set()
    made.close()


# ---- what arrives ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [(16, 16), (16, 64), (64, 16), (32, 48)], ids=str)
@pytest.mark.parametrize("dtypes", [("float32", "float32"), ("bfloat16", "float32"), ("float32", "bfloat16")], ids=str)
def test_prompts_arrive_whole_whatever_the_pools_are_like(sizes: tuple[int, int], dtypes: tuple[str, str]) -> None:
    link = make_link(spec=make_spec(sizes[0], dtypes[0]), theirs=make_spec(sizes[1], dtypes[1]))
    try:
        for length in (1, 15, 16, 17, 100):
            run_whole(link, make_request(f"r{length}", TOKENS[:length]), chunk=40)
            link.settle()
            assert f"r{length}" in link.receiving.host.adopted
    finally:
        link.close()


def test_what_the_receiver_holds_is_neither_sent_nor_written(link: Link) -> None:
    link.receiving.hold(TOKENS, 3)
    run_whole(link, make_request("r", TOKENS))
    link.settle()
    outcome = link.sending.outcome("r")
    assert outcome is not None
    assert (outcome.error, outcome.skipped_tokens) == ("", 48)
    assert outcome.kv_bytes == 4 * SPEC.block_bytes


def test_a_wish_for_fewer_bytes_on_the_wire_is_void_where_there_is_no_wire() -> None:
    spec = make_spec(head_dim=4)
    link = make_link(spec=spec, theirs=spec, transfer_dtype="int8")
    try:
        run_whole(link, make_request("r", TOKENS))
        link.settle()  # which checks every number, to the bit
        assert link.receiving.receiver.kv_bytes == 7 * spec.block_bytes
    finally:
        link.close()


def test_a_segment_that_is_not_what_was_announced_is_written_again(link: Link, backend: GatedBackend) -> None:
    backend.num_spoiled = 1
    run_whole(link, make_request("r", TOKENS))
    link.settle()
    outcome = link.sending.outcome("r")
    assert outcome is not None
    assert (outcome.error, outcome.kv_resends) == ("", 1)
    assert link.receiving.receiver.digest_failures == 1


def test_a_sender_that_would_write_to_blocks_that_others_read_is_stopped_before_it_does(
    link: Link, monkeypatch: pytest.MonkeyPatch
) -> None:
    link.receiving.hold(TOKENS, 3)
    before = link.receiving.bytes.clone()
    opened = HandOff.opened
    monkeypatch.setattr(HandOff, "opened", lambda self, num_held: opened(self, 0))  # it forgets what was said of them
    prompt = begin(link, make_request("r", TOKENS))
    prompt.chunk(1000)
    link.until(lambda: link.sending.outcome("r") is not None)
    outcome = link.sending.outcome("r")
    assert outcome is not None
    assert "not granted" in outcome.error
    link.settle()
    assert torch.equal(link.receiving.bytes.nan_to_num(9.0)[:3], before.nan_to_num(9.0)[:3])


# ---- who may use a block again ---------------------------------------------------------------------------------------


def test_a_lease_given_up_in_mid_write_ends_at_once_and_its_blocks_wait_for_the_writer(
    link: Link, backend: GatedBackend
) -> None:
    receiver, host = link.receiving.receiver, link.receiving.host
    backend.gate.clear()
    prompt = begin(link, make_request("stalled", TOKENS))
    prompt.chunk(1000)
    link.until(backend.begun.is_set)
    link.until(lambda: "stalled" in host.ends())
    assert host.ends()["stalled"].error is ErrorCode.TRANSFER
    assert receiver.num_open == 0
    assert receiver.num_quarantined == 7

    before = host.pool.num_available
    receiver.reserve(make_request("other", TOKENS), 60.0)  # which may have every block but those
    assert "other" in host.grants()
    time.sleep(0.2)
    link.carry()
    assert receiver.num_quarantined == 7, "time alone frees nothing"
    receiver.cancel("other")

    backend.gate.set()
    link.until(lambda: receiver.num_quarantined == 0)
    assert host.pool.num_available == before + 7
    run_whole(link, make_request("after", TOKENS))
    link.settle()
    assert "after" in host.adopted


def test_a_cancelled_hand_off_is_acknowledged_between_two_segments(link: Link) -> None:
    prompt = begin(link, make_request("r", TOKENS))
    prompt.chunk(40)
    link.until(lambda: link.receiving.receiver.kv_bytes > 0)
    link.receiving.receiver.cancel("r")
    link.settle()
    assert link.receiving.host.ends()["r"].error is ErrorCode.CANCELLED
    assert link.receiving.receiver.num_quarantined == 0


@pytest.mark.parametrize("side", ["sender", "receiver"])
def test_a_pair_that_ends_in_mid_write_is_unmapped_before_its_blocks_are_free(
    link: Link, backend: GatedBackend, side: str
) -> None:
    receiver, host = link.receiving.receiver, link.receiving.host
    backend.gate.clear()
    prompt = begin(link, make_request("r", TOKENS))
    prompt.chunk(1000)
    link.until(backend.begun.is_set)
    if side == "receiver":
        receiver.peer_lost(link.peer, "lost")
    else:
        link.sending.sender.peer_lost("decode:1", "lost")
        receiver.peer_lost(link.peer, "lost")  # a service tells both
    link.until(lambda: "r" in host.ends())
    time.sleep(0.1)
    link.carry()
    assert receiver.num_quarantined == 7
    assert mapped(link.sending) == 1
    backend.gate.set()
    link.until(lambda: receiver.num_quarantined == 0)
    assert mapped(link.sending) == 0
    assert host.pool.num_referenced == 0


def mapped(sending: Sending) -> int:
    scheme = sending.sender._context.channels._schemes["cuda_ipc"]
    assert isinstance(scheme, CudaIpcScheme)
    assert isinstance(scheme._driver, HostDriver)
    return scheme._driver.num_mapped


def test_a_pool_that_cannot_be_mapped_is_given_up_and_the_next_pair_goes_another_way() -> None:
    driver = HostDriver()
    driver.is_broken = True
    pools = [driver.shared(make_pool(64)) for _ in range(2)]
    ends = [ChannelFactory([CudaIpcScheme(pool, driver, 2.0), make_scheme("tcp", 2.0)]) for pool in pools]
    listeners = ends[1].listen()
    try:
        best = listeners.choose(ends[0].abilities)
        assert isinstance(best, CudaIpcListener)
        with ThreadPoolExecutor(1) as meeting:
            accepted = meeting.submit(best.accept_writer, "p", print)
            with pytest.raises(ChannelUnusable, match="no mapping today"):
                ends[0].connect(best.endpoint("p"), "p")
        with pytest.raises(ChannelError, match="no pair"):
            accepted.result()
        assert ends[0].abilities == ("tcp",)
        assert listeners.choose(ends[0].abilities).endpoint("q").startswith("tcp://")
    finally:
        listeners.close()


def test_two_workers_can_use_it_only_in_one_place_and_for_a_gpu_that_both_know() -> None:
    driver = HostDriver()
    scheme = CudaIpcScheme(driver.shared(make_pool(2)), driver, 1.0)
    assert scheme.ability == f"cuda_ipc:{place()}.{os.stat('/proc/self/ns/pid').st_ino}.host"


@pytest.mark.parametrize(
    "change",
    [
        {"shape": (64, 4, 2, 16, 1, 2)},
        {"shape": (64, 3, 2, 16, 2, 2)},
        {"shape": (64, 3, 2, 16, 1)},
        {"shape": (-64, 3, 2, -16, 1, 2)},
        {"dtype": "int8"},
        {"offset": 8},
        {"offset": -8},
        {"allocation_bytes": 64 * SPEC.block_bytes - 1},
        {"handle": b"short"},
    ],
    ids=str,
)
def test_a_pool_that_does_not_fit_is_not_written_to(change: dict[str, object]) -> None:
    driver = HostDriver()
    pool = driver.shared(make_pool(64))
    exported = driver.export(pool)
    check_exported(exported, make_pool(8))
    with pytest.raises(ChannelError):
        check_exported(msgspec.structs.replace(exported, **change), pool)


def test_items_lie_in_blocks_and_nowhere_else() -> None:
    assert place_items((7, 3), 1, 3, 2) == [15, 6, 7]
    with pytest.raises(ValueError, match="do not lie"):
        place_items((7, 3), 1, 4, 2)


# ---- the fence by itself ---------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.sampled_from(["grant", "take", "done", "say", "over"]), st.sampled_from(KEYS))))
def test_a_lease_is_let_go_of_once_and_only_with_proof(events: list[tuple[str, tuple[str, int]]]) -> None:
    fence, granted, waiting, is_over = WriterFence(), set(), set(), False
    for event, key in events:
        if event == "grant" and not is_over and key not in waiting:
            fence.grant(key)
            granted.add(key)
        elif event == "take":
            was_let_go = fence.end(key, is_acknowledged=False)
            assert was_let_go == (is_over or key not in granted)
            waiting |= set() if was_let_go else {key}
            granted.discard(key)
        elif event == "done" and key in granted:
            assert fence.end(key, is_acknowledged=True)
            granted.discard(key)
        elif event == "say":
            assert fence.acknowledged(key) == (key in waiting)
            waiting.discard(key)
        elif event == "over":
            assert set(fence.over()) == waiting
            waiting, is_over = set(), True
        assert fence.num_ending == len(waiting)


@pytest.mark.parametrize("is_early", [False, True])
def test_a_quarantine_takes_its_news_in_either_order(is_early: bool) -> None:
    quarantine, lease = Quarantine(), KVLease("a", 1)
    lease.bind((4, 5))
    lease.begin_write(1)
    if is_early:
        assert quarantine.fenced("a", 1) is None
        assert not quarantine.hold(lease)
    else:
        assert quarantine.hold(lease)
        assert (quarantine.holds(lease), quarantine.num_blocks) == (True, 2)
        assert quarantine.fenced("a", 1) is lease
    assert (quarantine.holds(lease), quarantine.num_blocks) == (False, 0)


# ---- the proof of a process's end ------------------------------------------------------------------------------------


@pytest.mark.parametrize("has_pidfd", [True, False])
def test_a_process_is_known_to_be_dead_when_it_is_and_not_before(
    monkeypatch: pytest.MonkeyPatch, has_pidfd: bool
) -> None:
    if not has_pidfd:
        monkeypatch.delattr(os, "pidfd_open")
    child = subprocess.Popen(["sleep", "60"])
    name = msgspec.structs.replace(own_process(), pid=child.pid, started=peer_process._stat(child.pid)[1])
    found = watch(name)
    assert found is not None
    child.send_signal(signal.SIGSTOP)
    assert not found.is_dead(), "stopped is not dead"
    waiting = threading.Thread(target=found.wait)
    waiting.start()
    child.kill()
    waiting.join(20.0)
    assert found.is_dead(), "before its parent has asked for its status, too"
    child.wait()
    found.close()
    assert found.is_dead()
    late = watch(name)
    assert late is not None
    assert late.is_dead()


def test_a_process_of_another_start_or_place_is_not_taken_for_it() -> None:
    own = own_process()
    other = watch(msgspec.structs.replace(own, started=own.started + 1))
    assert other is not None
    assert other.is_dead(), "its number has been given to a later process"
    assert watch(msgspec.structs.replace(own, boot="another")) is None
    assert watch(msgspec.structs.replace(own, pid_namespace=1)) is None
    assert watch(ProcessName("", 0, own.pid, 0)) is None
