"""Engine processes for tests with faults, and the control messages between them, some of which go wrong as well.

This side plays the services of all workers: it carries control messages between engines in order, says when a peer is
lost, and hears what engines tell of requests.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable
from pathlib import Path
from queue import SimpleQueue
from threading import Thread

import msgspec
from msgspec.structs import replace
from twostroke_engine.config import EngineConfig
from twostroke_engine.framing import frame, read_frame
from twostroke_engine.messages import EngineLoad, InboxMessage, OutboxMessage, PeerMessage
from twostroke_engine.transfer.messages import (
    CommitTransfer,
    OpenTransfer,
    PairHello,
    PairWelcome,
    ReceiverMessage,
    SegmentReady,
    SenderMessage,
)

from tests.support.engine_process import ROOT, UNINSTALLED
from tests.support.fault_engine import FORK, FORK_SHARED, PID_BYTES
from tests.support.fault_plan import Planned

_HELD_S = 0.05
_NUM_OLD = 64

Event = tuple["EngineUnit", OutboxMessage | str | None]
"""A message of an engine's, a line of its report, or the end of one of the two."""


class EngineUnit:
    """One engine process and this side of its socket."""

    def __init__(self, name: str, role: str, pid: int, connection: socket.socket, report: int, log: Path) -> None:
        self.name = name
        """As a peer: of its stream on the decode side, of its endpoint on the prefill side."""
        self.role = role
        self.pid = pid
        self.log = log
        self.load = EngineLoad()
        self.fingerprint = ""
        self.is_ready = self.is_dead = self.is_stopped = False
        self.num_ends = 0
        """Its socket and its report: only then is everything heard that it had to say."""
        self.end_is_due = False
        """It was told to end, or told of a fault that ends it."""
        self._connection = connection
        self._report = report
        self._outbox: SimpleQueue[bytes | None] = SimpleQueue()

    @property
    def is_of_use(self) -> bool:
        return self.is_ready and not (self.is_dead or self.is_stopped or self.end_is_due)

    @property
    def is_idle(self) -> bool:
        """Nothing is open, and every block is free or cached."""
        load = self.load
        is_empty = not (load.running or load.waiting or load.leases_open or load.blocks_promised or load.blocks_leased)
        return is_empty and load.blocks_free + load.blocks_cached == load.blocks_total

    def start(self, put: Callable[[Event], None]) -> None:
        for target in (self._read, self._read_report):
            Thread(target=target, args=(put,), daemon=True).start()
        Thread(target=self._write, daemon=True).start()

    def send(self, message: InboxMessage | EngineConfig) -> None:
        self._outbox.put(frame(message))

    def signal(self, how: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, how)

    def close(self) -> None:
        self._outbox.put(None)
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)

    def _write(self) -> None:
        while (data := self._outbox.get()) is not None:
            try:
                self._connection.sendall(data)
            except OSError:
                return  # it is gone, and the reader says so

    def _read(self, put: Callable[[Event], None]) -> None:
        decoder: msgspec.msgpack.Decoder[OutboxMessage] = msgspec.msgpack.Decoder(OutboxMessage)
        with contextlib.suppress(OSError):
            while (payload := read_frame(self._connection)) is not None:
                put((self, decoder.decode(payload)))
        put((self, None))
        self._connection.close()

    def _read_report(self, put: Callable[[Event], None]) -> None:
        with os.fdopen(self._report, encoding="utf-8") as lines:
            for line in lines:
                put((self, line.rstrip("\n")))
        put((self, None))


class Engines:
    """Makes engine processes, by forking one that has imported everything."""

    def __init__(self, folder: Path) -> None:
        self.events: SimpleQueue[Event] = SimpleQueue()
        self.units: list[EngineUnit] = []
        """All that are alive."""
        self._folder = folder
        self._numbers: Counter[str] = Counter()
        self._ask, theirs = socket.socketpair()
        self._ask.settimeout(120)
        with theirs:
            fd = theirs.fileno()
            paths = os.pathsep.join([str(ROOT), UNINSTALLED["PYTHONPATH"]])
            environment = UNINSTALLED | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
            command = [sys.executable, "-m", "tests.support.fault_engine", str(fd)]
            self._origin = subprocess.Popen(command, pass_fds=(fd,), cwd=ROOT, env=environment)

    def start(self, role: str, config: EngineConfig, *, shares_pool: bool = False) -> EngineUnit:
        """An engine of its own name; it says when it is ready."""
        self._numbers[role] += 1
        name = f"{role}-{self._numbers[role]}:1"
        ours, theirs = socket.socketpair()
        report, write = os.pipe()
        log = self._folder / f"{role}-{self._numbers[role]}.log"
        with theirs, log.open("wb") as file:
            socket.send_fds(self._ask, [FORK_SHARED if shares_pool else FORK], [theirs.fileno(), write, file.fileno()])
            pid = int.from_bytes(self._ask.recv(PID_BYTES, socket.MSG_WAITALL), "little")
        os.close(write)
        unit = EngineUnit(name, role, pid, ours, report, log)
        self.units.append(unit)
        unit.start(self.events.put)
        number = sum(self._numbers.values())
        unit.send(replace(config, worker_id=name, worker_epoch=number))
        return unit

    def of(self, role: str) -> list[EngineUnit]:
        """Those that can take work."""
        return [unit for unit in self.units if unit.role == role and unit.is_of_use]

    def named(self, name: str) -> EngineUnit | None:
        return next((unit for unit in self.units if unit.name == name), None)

    def gone(self, unit: EngineUnit) -> None:
        unit.is_dead = True
        unit.close()
        self.units.remove(unit)

    def end_all(self) -> None:
        """Ends every engine; more can be made."""
        for unit in list(self.units):
            unit.signal(signal.SIGKILL)
            self.gone(unit)

    def stop(self) -> None:
        self.end_all()
        self._ask.close()
        self._origin.wait(10)


class Watched:
    """What a relay knows of one try of a request, and writes down of it."""

    def __init__(self, faults: tuple[Planned, ...]) -> None:
        self.faults = faults
        self.stream = ("", "")
        """Names of the prefill and the decode engine."""
        self.met: list[tuple[str, int]] = []
        """(kind, number of the segment if it is one) of faults that were injected."""
        self.accepted: set[int] = set()
        self.rejected: set[int] = set()
        self.lags = False
        """What its pair's channel delivers may be one message behind, so a number does not tell whose bytes came."""
        self.num_said = 0
        self.num_answered = 0

    def due(self, at: int, *kinds: str) -> str:
        """The kind of these that is to happen to the at-th message; empty if none is."""
        found = next((fault.kind for fault in self.faults if fault.kind in kinds and fault.at == at), "")
        if found:
            self.met.append((found, -1))
        return found


class Relay:
    """Carries control messages between engines. A stream is one prefill and one decode engine."""

    def __init__(self, engines: Engines, rng: random.Random) -> None:
        self.watched: dict[str, Watched] = {}
        """By lease."""
        self.lagging: set[tuple[str, str]] = set()
        """Streams whose pair was sent a payload twice."""
        self._engines = engines
        self._rng = rng
        self._held: dict[tuple[str, str], tuple[float, SenderMessage, Watched]] = {}
        self._old: defaultdict[tuple[str, str], deque[SenderMessage]] = defaultdict(lambda: deque(maxlen=_NUM_OLD))
        self._due: list[tuple[float, EngineUnit, InboxMessage]] = []

    def carry(self, source: EngineUnit, entry: PeerMessage) -> None:
        """Takes a message of one engine's to the other."""
        target = self._engines.named(entry.peer)
        if target is None:
            return
        if source.role == "prefill":
            self._say(source, target, entry.message)  # type: ignore[arg-type]
        else:
            self._answer(source, target, entry.message)  # type: ignore[arg-type]

    def lag(self, stream: tuple[str, str]) -> None:
        """A payload was sent twice: until there is a new pair, each message is the one before it."""
        self.lagging.add(stream)
        for watched in self.watched.values():
            watched.lags |= watched.stream == stream

    def later(self, after_s: float, target: EngineUnit, message: InboxMessage) -> None:
        """A message that comes some time from now."""
        self._due.append((time.monotonic() + after_s, target, message))

    def tick(self) -> None:
        """Delivers what was held back for long enough."""
        now_s = time.monotonic()
        for stream, (since_s, message, watched) in list(self._held.items()):
            if now_s - since_s >= _HELD_S:
                del self._held[stream]
                watched.met.remove(("swap", -1))  # there was nothing to change places with
                self._deliver(*stream, message)
        due = [entry for entry in self._due if entry[0] <= now_s]
        self._due = [entry for entry in self._due if entry[0] > now_s]
        for _, target, told in due:
            target.send(told)

    # ---- what the sender says ------------------------------------------------------------------------------------

    def _say(self, source: EngineUnit, target: EngineUnit, message: SenderMessage) -> None:
        stream = (source.name, target.name)
        watched = None if isinstance(message, PairHello) else self.watched.get(message.lease_id)
        if isinstance(message, PairHello):
            self.lagging.discard(stream)
        if watched is None or isinstance(message, PairHello):
            self._pass(stream, message)
            return
        at = watched.num_said
        watched.num_said += 1
        match watched.due(at, "dup", "late", "swap", "stale"):
            case "dup":
                self._pass(stream, message)
                self._pass(stream, message)
            case "late" if self._old[stream]:
                self._pass(stream, self._rng.choice(self._old[stream]))
                self._pass(stream, message)
            case "swap" if stream not in self._held:
                self._held[stream] = (time.monotonic(), message, watched)
            case "stale":
                self._pass(stream, replace(message, epoch=message.epoch - 1))
            case "":
                self._pass(stream, message)
            case _:
                watched.met.pop()  # not possible now
                self._pass(stream, message)
        if isinstance(message, OpenTransfer | SegmentReady | CommitTransfer):
            self._old[stream].append(message)

    def _pass(self, stream: tuple[str, str], message: SenderMessage) -> None:
        self._deliver(*stream, message)
        held = self._held.pop(stream, None)
        if held is not None:
            self._deliver(*stream, held[1])

    def _deliver(self, source: str, target: str, message: SenderMessage) -> None:
        unit = self._engines.named(target)
        if unit is not None and self._engines.named(source) is not None:
            unit.send(PeerMessage(peer=source, message=message))

    # ---- what the receiver answers -------------------------------------------------------------------------------

    def _answer(self, source: EngineUnit, target: EngineUnit, message: ReceiverMessage) -> None:
        entry = PeerMessage(peer=source.name, message=message)
        if isinstance(message, PairWelcome):
            if not self._loses_welcome(source, target):
                target.send(entry)
            return
        watched = self.watched.get(message.lease_id)
        if watched is None:
            target.send(entry)
            return
        if hasattr(message, "accepted"):
            (watched.accepted if message.accepted else watched.rejected).add(message.number)
        at = watched.num_answered
        watched.num_answered += 1
        match watched.due(at, "dup-back", "stale-back", "lose-back"):
            case "dup-back":
                target.send(entry)
                target.send(entry)
            case "stale-back":
                target.send(PeerMessage(peer=source.name, message=replace(message, epoch=message.epoch - 1)))
            case "":
                target.send(entry)

    def _loses_welcome(self, source: EngineUnit, target: EngineUnit) -> bool:
        stream = (target.name, source.name)
        for watched in self.watched.values():
            planned = [fault.at for fault in watched.faults if fault.kind == "lose-welcome"]
            if planned and watched.stream == stream and watched.due(planned[0], "lose-welcome"):
                watched.faults = tuple(fault for fault in watched.faults if fault.kind != "lose-welcome")
                return True
        return False
