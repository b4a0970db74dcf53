"""`EngineLoop`: one thread that owns an engine and its transfer ends. Others talk to it by `post` and `wake` only.

A turn: drain the inbox, poll the ends, step, report. The thread never sleeps: with nothing to compute it waits on its
inbox, for a tenth of a second while a transfer end has something open (time-outs are due), else for a second.

Transfer control messages alone do not wait for a turn, in either direction: layers are sent while a step computes.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from queue import Empty, SimpleQueue
from threading import Thread

from msgspec.structs import replace

from twostroke_engine.engine import Engine
from twostroke_engine.messages import (
    Cancel,
    EngineFailed,
    EngineLoad,
    InboxMessage,
    OutboxMessage,
    PeerLost,
    PeerMessage,
    Reserve,
    StepReport,
    Stop,
    Submit,
)
from twostroke_engine.transfer.absent import CannotSend, NoReceiver, NoSender
from twostroke_engine.transfer.end import ReceivingEnd, SendingEnd, TransferEnd
from twostroke_engine.transfer.messages import (
    CommitTransfer,
    PairWelcome,
    SegmentResult,
    TransferClosed,
    TransferOpened,
)

BUSY_WAIT_S = 0.1
IDLE_WAIT_S = 1.0

log = logging.getLogger(__name__)


class _Wake:
    """Sent to the inbox by `wake`: nothing to read, but something to poll."""


class EngineLoop:
    """Runs an engine in a thread of its own."""

    def __init__(
        self,
        engine: Engine,
        ends: Sequence[TransferEnd],
        sender: SendingEnd | None,
        receiver: ReceivingEnd | None,
        outbox: Callable[[OutboxMessage], None],
    ) -> None:
        self.failed = False
        self._engine = engine
        self._ends = tuple(ends)
        self._sender = sender or NoSender()
        self._receiver = receiver or NoReceiver(engine)
        self._outbox = outbox
        self._inbox: SimpleQueue[InboxMessage | _Wake] = SimpleQueue()
        self._thread = Thread(target=self._run, name="engine", daemon=True)
        self._is_stopping = False
        self._reported_load = EngineLoad()
        engine.attach_sender(self._sender)

    def start(self) -> None:
        """Starts the thread. From now on the outbox is called by any thread."""
        for end in self._ends:
            end.deliver_to(self._deliver)
        self._thread.start()

    def join(self, timeout_s: float | None = None) -> bool:
        """Waits for the thread's end, which follows `Stop` or a failure; False if it still runs."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def post(self, message: InboxMessage) -> None:
        """Hands a message to the engine; callable from any thread."""
        if isinstance(message, PeerMessage):
            self._receive(message)
        else:
            self._inbox.put(message)

    def wake(self) -> None:
        """Makes the loop poll its ends; callable from any thread."""
        self._inbox.put(_Wake())

    def _run(self) -> None:
        try:
            while not self._is_stopping:
                self._turn()
        except Exception as error:
            # The thread's boundary: whatever went wrong, the service must hear of it and end the process.
            log.exception("the engine failed")
            self.failed = True
            self._outbox(EngineFailed(message=f"the engine failed: {type(error).__name__}: {error}"))
        finally:
            for end in self._ends:
                end.close()

    def _turn(self) -> None:
        self._drain()
        now_s = time.monotonic()
        for end in self._ends:
            end.poll(now_s)
        stepped = self._engine.step()
        self._report(stepped)
        if not (stepped or self._is_stopping):
            self._wait()

    def _drain(self) -> None:
        while not self._inbox.empty():
            self._take(self._inbox.get())

    def _wait(self) -> None:
        is_open = any(end.num_open or end.num_waiting for end in self._ends)
        try:
            self._take(self._inbox.get(timeout=BUSY_WAIT_S if is_open else IDLE_WAIT_S))
        except Empty:
            return

    def _take(self, message: InboxMessage | _Wake) -> None:
        match message:
            case Submit():
                self._submit(message)
            case Reserve():
                if self._engine.accepts(message.request):
                    self._receiver.reserve(message.request, message.ttl_s)
            case Cancel(request_id=request_id):
                self._engine.cancel(request_id)
                self._receiver.cancel(request_id)
            case PeerLost(peer=peer, reason=reason):
                for end in self._ends:
                    end.peer_lost(peer, reason)
            case Stop():
                self._is_stopping = True

    def _submit(self, message: Submit) -> None:
        request, destination = message.request, message.destination
        if not self._engine.accepts(request):
            return
        try:
            sink_id = 0 if destination is None else self._sender.begin(request, destination)
            self._engine.submit(request, sink_id, message.received_s)
        except CannotSend as error:
            self._engine.refuse(request.id, str(error))

    def _receive(self, peer: PeerMessage) -> None:
        if isinstance(peer.message, CommitTransfer) and peer.received_s is not None:
            self._receiver.commit_heard(peer.message.lease_id, peer.received_s)
        # What a receiver says is for the local sender, and the other way round.
        is_for_sender = isinstance(peer.message, PairWelcome | TransferOpened | SegmentResult | TransferClosed)
        end: TransferEnd = self._sender if is_for_sender else self._receiver
        end.receive(peer.peer, peer.message)

    def _report(self, stepped: bool) -> None:
        requests = self._engine.take_updates()
        blocks = self._engine.take_block_events()
        load = self._load()
        if stepped or requests or blocks or load != self._reported_load:
            self._reported_load = load
            self._outbox(StepReport(step=load.steps, load=load, requests=requests, blocks=blocks))

    def _deliver(self, message: PeerMessage) -> None:
        load = self._reported_load
        self._outbox(StepReport(step=load.steps, load=load, peers=(message,)))

    def _load(self) -> EngineLoad:
        load = self._engine.load()
        faults = [end.faults for end in self._ends]
        return replace(
            load,
            waiting=load.waiting + sum(end.num_waiting for end in self._ends),
            leases_open=sum(end.num_open for end in self._ends),
            kv_bytes=sum(end.kv_bytes for end in self._ends),
            digest_failures=sum(end.digest_failures for end in self._ends),
            kv_resends=sum(found.resends for found in faults),
            kv_stale=sum(found.stale for found in faults),
            kv_broken_pairs=sum(found.broken_pairs for found in faults),
            kv_failed=sum(found.failed for found in faults),
            kv_quarantined=sum(end.num_quarantined for end in self._ends),
            longest_wait_s=max([load.longest_wait_s, *(end.longest_wait_s for end in self._ends)]),
        )
