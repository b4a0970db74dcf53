"""`EngineLoop`: messages in, reports out, one thread; and what happens when that thread fails."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from queue import SimpleQueue
from threading import Thread, current_thread

import pytest
from twostroke_engine.loop import EngineLoop
from twostroke_engine.messages import (
    Cancel,
    EngineFailed,
    OutboxMessage,
    PeerLost,
    PeerMessage,
    RequestUpdate,
    Reserve,
    StepReport,
    Stop,
    Submit,
)
from twostroke_engine.request import ErrorCode, Request
from twostroke_engine.schedule.plan import StepOutput, StepPlan
from twostroke_engine.transfer.absent import NoReceiver, NoSender
from twostroke_engine.transfer.end import DecodeHost, KVSink
from twostroke_engine.transfer.messages import (
    AbortTransfer,
    KVDestination,
    ReceiverMessage,
    SenderMessage,
    TransferClosed,
)

from tests.support.engine_bench import EngineBench, make_request
from tests.support.scripted_runner import expected

DESTINATION = KVDestination(
    worker_id="d0", endpoint="127.0.0.1:1", lease_id="l", epoch=1, kv_fingerprint="f", ttl_s=1.0
)


class Running:
    """A loop that runs, and everything it said."""

    def __init__(self, bench: EngineBench, sender: NoSender | None = None, receiver: NoReceiver | None = None) -> None:
        self.said: SimpleQueue[OutboxMessage] = SimpleQueue()
        ends = [end for end in (sender, receiver) if end is not None]
        self.loop = EngineLoop(bench.engine, ends, sender, receiver, self.said.put)
        self.loop.start()

    def until(self, is_enough: Callable[[OutboxMessage], bool]) -> list[OutboxMessage]:
        """Messages up to the first that is enough; queue.Empty after ten seconds."""
        heard: list[OutboxMessage] = []
        while not heard or not is_enough(heard[-1]):
            heard.append(self.said.get(timeout=10))
        return heard

    def until_end(self, request_id: str) -> list[RequestUpdate]:
        reports = self.until(lambda message: _ends(message, request_id))
        updates = [update for report in reports if isinstance(report, StepReport) for update in report.requests]
        return [update for update in updates if update.request_id == request_id]


def _ends(message: OutboxMessage, request_id: str) -> bool:
    assert isinstance(message, StepReport)
    return any(update.request_id == request_id and update.end is not None for update in message.requests)


@pytest.fixture
def running() -> Iterator[Running]:
    running = Running(EngineBench())
    yield running
    running.loop.post(Stop())
    assert running.loop.join(10)


def test_a_request_is_answered_step_by_step(running: Running) -> None:
    request = make_request("a", 20)
    running.loop.post(Submit(request=request))
    updates = running.until_end("a")
    tokens = [token.id for update in updates for delta in update.deltas for token in delta.tokens]
    assert tokens == expected(request, 1024)[0][0]
    assert len(updates) == 8, "one report for each step"


def test_a_load_is_reported_when_it_changes_and_only_then(running: Running) -> None:
    running.loop.post(Submit(request=make_request("a", 20, max_tokens=1)))
    report = running.until(lambda message: _ends(message, "a"))[-1]
    assert isinstance(report, StepReport)
    assert report.load.blocks_leased == 0
    assert report.load.steps == report.step == 1
    assert report.blocks is not None
    assert len(report.blocks.stored) == 1
    for _ in range(3):
        running.loop.wake()
    running.loop.post(Submit(request=make_request("b", 20, max_tokens=1)))
    assert _ends(running.said.get(timeout=10), "b"), "nothing was said in between"


def test_a_cancel_is_answered_and_unknown_ids_are_ignored(running: Running) -> None:
    running.loop.post(Cancel(request_id="nobody"))
    running.loop.post(PeerLost(peer="nobody"))
    running.loop.post(Submit(request=make_request("a", 20, max_tokens=900)))
    running.loop.post(Cancel(request_id="a"))
    assert running.until_end("a")[-1].end.error is ErrorCode.CANCELLED


def test_an_engine_without_ends_refuses_what_needs_them(running: Running) -> None:
    running.loop.post(Reserve(request=make_request("reserved", 20), ttl_s=1.0))
    assert running.until_end("reserved")[-1].end.error is ErrorCode.INVALID
    running.loop.post(Submit(request=make_request("pushed", 20), destination=DESTINATION))
    assert running.until_end("pushed")[-1].end.error is ErrorCode.INVALID
    running.loop.post(Submit(request=make_request("whole", 20)))
    assert running.until_end("whole")[-1].end.error is None


class Recorder:
    """Notes which thread brought what."""

    def __init__(self) -> None:
        self.calls: SimpleQueue[tuple[str, object, Thread]] = SimpleQueue()

    def note(self, what: str, message: object) -> None:
        self.calls.put((what, message, current_thread()))


class RecordingSender(NoSender):
    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder

    def receive(self, peer: str, message: SenderMessage | ReceiverMessage) -> None:
        self._recorder.note("sender", message)

    def peer_lost(self, peer: str, reason: str) -> None:
        self._recorder.note("lost", peer)

    def deliver_to(self, deliver: Callable[[PeerMessage], None]) -> None:
        deliver(PeerMessage(peer="p", message=AbortTransfer(lease_id="l", epoch=1)))

    def close(self) -> None:
        self._recorder.note("closed", None)


class RecordingReceiver(NoReceiver):
    def __init__(self, host: DecodeHost, recorder: Recorder) -> None:
        super().__init__(host)
        self._recorder = recorder

    def receive(self, peer: str, message: SenderMessage | ReceiverMessage) -> None:
        self._recorder.note("receiver", message)

    def reserve(self, request: Request, ttl_s: float) -> None:
        self._recorder.note("reserve", request.id)


def test_messages_reach_the_end_they_are_for() -> None:
    bench, recorder = EngineBench(num_blocks=4), Recorder()
    running = Running(bench, RecordingSender(recorder), RecordingReceiver(bench.engine, recorder))
    first = running.said.get(timeout=10)
    assert isinstance(first, StepReport)
    assert first.peers[0].peer == "p", "what an end has to say goes out at once"
    closed = TransferClosed(lease_id="l", epoch=1)
    abort = AbortTransfer(lease_id="l", epoch=1)
    running.loop.post(PeerMessage(peer="p", message=closed))
    running.loop.post(PeerMessage(peer="p", message=abort))
    assert recorder.calls.get(timeout=10) == ("sender", closed, current_thread())
    assert recorder.calls.get(timeout=10) == ("receiver", abort, current_thread())
    running.loop.post(PeerLost(peer="p"))
    what, peer, thread = recorder.calls.get(timeout=10)
    assert (what, peer, thread.name) == ("lost", "p", "engine")
    running.loop.post(Reserve(request=make_request("fits", 20), ttl_s=1.0))
    assert recorder.calls.get(timeout=10)[:2] == ("reserve", "fits")
    running.loop.post(Reserve(request=make_request("too long", 99), ttl_s=1.0))
    assert running.until_end("too long")[-1].end.error is ErrorCode.INVALID
    running.loop.post(Stop())
    assert recorder.calls.get(timeout=10)[0] == "closed"
    assert running.loop.join(10)
    assert not running.loop.failed


def test_a_failure_is_said_in_one_line_and_ends_the_thread(caplog: pytest.LogCaptureFixture) -> None:
    class BrokenRunner:
        overlaps = False

        def launch(self, plan: StepPlan, sink: KVSink) -> Callable[[], StepOutput]:
            raise RuntimeError("out of memory")

    bench = EngineBench()
    bench.engine._runner = BrokenRunner()
    running = Running(bench)
    running.loop.post(Submit(request=make_request("a", 20)))
    *_, last = running.until(lambda message: isinstance(message, EngineFailed))
    assert last == EngineFailed(message="the engine failed: RuntimeError: out of memory")
    assert running.loop.join(10)
    assert running.loop.failed
    assert "Traceback" in caplog.text
