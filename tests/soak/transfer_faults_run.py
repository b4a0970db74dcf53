"""The router's part in a soak of KV hand-offs: asks, tries again, and ends or continues engine processes on the way."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from queue import Empty

from twostroke_engine.config import EngineConfig
from twostroke_engine.messages import (
    Cancel,
    EngineFailed,
    EngineReady,
    OutboxMessage,
    PeerLost,
    Reserve,
    StepReport,
    Submit,
)
from twostroke_engine.transfer.messages import KVDestination

from tests.support.fault_cluster import Engines, EngineUnit, Event, Relay
from tests.support.fault_judge import Judge
from tests.support.fault_plan import FATAL, KINDS, Planned, draw
from tests.support.fault_traffic import Attempt, Job, Prompts
from tests.support.tiny_model import TOKENIZER_SIZE

SHARED_MEMORY = "cuda_ipc-host"
"""`cuda_ipc` with memory of the host in place of a GPU's: senders write to blocks."""
CHANNELS = ("shm", "tcp", "collective", "nixl", SHARED_MEMORY)
NUM_PREFILL = 4
NUM_LAYERS = 4
"""Of the model: segments of a chunk."""
IN_FLIGHT = 16
POOL_TOKENS = 2048
"""Of each engine: memory is used again all the time."""
DEADLINE_S = 30.0
TRANSFER_TIMEOUT_S = 2.0
LEASE_S = 6.0
MOST_STOPPED = 2
REUSE_TOKENS = 800
"""A stopped writer goes on when so many tokens were adopted since its lease lapsed: a pool gives first what was freed
last, so the memory that it wrote to is someone else's by then. It goes on after `most_reuse_s` at the latest."""
MAX_FAULTY_TRIES = 4
SHARE_OF_HITS = 0.3


class FaultSoak:
    """Engines, requests, faults and what came of them."""

    def __init__(
        self,
        channel: str,
        seed: int,
        engines: Engines,
        model_dir: Path,
        device: str = "cpu",
        num_prompts: int = 150,
        drain_every: int = 500,
        most_reuse_s: float = 8.0,
    ) -> None:
        self.judge = Judge()
        self._tally = self.judge.tally
        self._shares_pools = channel == SHARED_MEMORY
        self._rng = random.Random(f"{seed}/{channel}")
        self._drain_every = drain_every
        self._most_reuse_s = most_reuse_s
        self._config = EngineConfig(
            model_dir=str(model_dir),
            device=device,
            dtype="float32" if device == "cpu" else "bfloat16",
            batch_invariant=True,
            max_step_tokens=64,
            max_running=32,
            channels=() if channel == SHARED_MEMORY else (channel,),
            transfer_timeout_s=TRANSFER_TIMEOUT_S,
        )
        self._engines = engines
        self._relay = Relay(self._engines, self._rng)
        self._prompts = Prompts(seed, num_prompts, TOKENIZER_SIZE)
        self._attempts: dict[str, Attempt] = {}
        self._late: dict[str, Attempt] = {}
        """Over for the router; the stopped engine has yet to end them."""
        self._retries: list[Job] = []
        self._num_jobs = 0
        self._stopped: dict[str, Attempt | None] = {}
        """By engine: the try that stopped it; None if that was over before."""
        self._adopted_tokens = 0
        self._lapses: dict[str, tuple[float, int]] = {}
        """By engine: when its try's lease had lapsed, and how many tokens had been adopted by then."""

    # ---- the run -------------------------------------------------------------------------------------------------

    def run(self, num_faults: int, seconds: float = float("inf")) -> None:
        """Until so many faults were injected, some of each class, and everything has ended."""
        self._ask_alone()
        for _ in range(NUM_PREFILL):
            self._start("prefill")
        self._start("decode")
        drained_at = 0
        began_s = time.monotonic()
        while (self._tally.injected < num_faults or self._missing()) and not self._is_hopeless:
            if time.monotonic() - began_s > seconds:
                break
            if self._tally.injected - drained_at >= self._drain_every:
                self._drain()
                drained_at = self._tally.injected
                print(f"{drained_at} faults, {time.monotonic() - began_s:.0f} s", flush=True)
            while len(self._attempts) < IN_FLIGHT and self._begin():
                pass
            self._turn()
        if not self._is_hopeless:
            self._drain()
        for unit in self._engines.units:
            self.judge.note_load(unit.load)

    @property
    def _is_hopeless(self) -> bool:
        return len(self._tally.violations) > 20

    def _drain(self) -> None:
        """Lets everything end, failed tries repeated without faults; then no engine may hold anything."""
        self._until(lambda: not (self._attempts or self._retries or self._stopped or self._late), is_draining=True)
        self._until(lambda: all(unit.is_idle for unit in self._engines.units if unit.is_of_use))
        for unit in self._engines.units:
            if not unit.is_idle:
                self.judge.fail(f"{unit.name} holds something at rest: {unit.load}")
        self.judge.at_rest()

    def _until(self, condition: Callable[[], bool], is_draining: bool = False) -> None:
        due_s = time.monotonic() + 3 * DEADLINE_S
        while not condition() and time.monotonic() < due_s and not self._is_hopeless:
            while is_draining and self._retries and self._begin(is_faulty=False):
                pass
            self._turn()
        if not condition():
            names = [*self._attempts, *self._late, *self._stopped]
            self.judge.fail(f"not at rest after {3 * DEADLINE_S:g} s: {names}")
            for attempt in [*self._attempts.values()]:
                del self._attempts[attempt.id]

    def _turn(self) -> None:
        try:
            self._take(self._engines.events.get(timeout=0.02))
            while not self._engines.events.empty():
                self._take(self._engines.events.get())
        except Empty:
            pass
        self._relay.tick()
        self._continue_stopped()
        self._check_deadlines()

    def _ask_alone(self) -> None:
        """What one engine says that computes everything itself."""
        unit = self._start("alone")
        found: dict[str, Attempt] = {}
        for number, request in enumerate(self._prompts.requests):
            attempt = Attempt(Job(number, request, b""), (), unit)
            found[request.id] = self._attempts[attempt.id] = attempt
            unit.send(Submit(request=attempt.request))
        while any("alone" not in attempt.ends for attempt in found.values()):
            self._take(self._engines.events.get(timeout=DEADLINE_S))
        self.judge.expected = {name: attempt.tokens for name, attempt in found.items()}
        self._attempts.clear()
        unit.end_is_due = True
        unit.signal(signal.SIGKILL)

    # ---- requests ------------------------------------------------------------------------------------------------

    def _begin(self, is_faulty: bool = True) -> bool:
        decode = self._engines.of("decode")
        if not decode or not self._engines.of("prefill"):
            return False
        job = self._retries.pop() if self._retries else self._new_job()
        faults = self._faults() if is_faulty and job.tries < MAX_FAULTY_TRIES else ()
        attempt = Attempt(job, faults, self._rng.choice(decode))
        self._attempts[attempt.id] = attempt
        self._tally.tries += 1
        attempt.decode.send(Reserve(request=attempt.request, ttl_s=LEASE_S))
        return True

    def _faults(self) -> tuple[Planned, ...]:
        most_fatal = self._most_fatal()
        kinds = [kind for kind in self._missing() if most_fatal or kind not in FATAL]
        if kinds and self._rng.random() < 0.5:
            return (Planned(self._rng.choice(kinds), self._rng.randrange(3)),)
        return draw(self._rng, most_fatal)

    def _missing(self) -> list[str]:
        """Kinds of the classes of which there was no fault yet."""
        return [kind for kind, name in KINDS.items() if not self._tally.classes[name].injected]

    def _new_job(self) -> Job:
        self._num_jobs += 1
        self._tally.requests += 1
        request = self._rng.choice(self._prompts.requests)
        salt = b"" if self._rng.random() < SHARE_OF_HITS else self._num_jobs.to_bytes(8, "little")
        return Job(self._num_jobs, request, salt)

    def _most_fatal(self) -> int:
        """Not so many at once that nothing else is left to be tested."""
        planned = sum(fault.kind in FATAL for attempt in self._attempts.values() for fault in attempt.faults)
        return int(planned < 4 and len(self._stopped) < MOST_STOPPED)

    def _granted(self, attempt: Attempt) -> None:
        prefill = self._engines.of("prefill")
        if attempt.lease is None or not prefill:
            self._give_up(attempt)
            return
        attempt.prefill = unit = self._rng.choice(prefill)
        attempt.stream = (unit.name, attempt.decode.name)
        attempt.lags = attempt.stream in self._relay.lagging
        self._relay.watched[attempt.lease.lease_id] = attempt
        destination = KVDestination(
            worker_id=attempt.decode.name,
            endpoint=attempt.decode.name,
            lease_id=attempt.lease.lease_id,
            epoch=attempt.lease.epoch,
            kv_fingerprint=attempt.decode.fingerprint,
            ttl_s=attempt.lease.ttl_s,
        )
        unit.send(Submit(request=attempt.request, destination=destination))

    def _give_up(self, attempt: Attempt) -> None:
        """As a router does with what is left of a failed try."""
        if attempt.is_given_up:
            return
        attempt.is_given_up = True
        for role, unit in (("decode", attempt.decode), ("prefill", attempt.prefill)):
            if unit is not None and role not in attempt.ends:
                unit.send(Cancel(request_id=attempt.id))

    def _look_at(self, attempt: Attempt) -> None:
        """After news of it."""
        if attempt.failed and not attempt.is_served:
            self._give_up(attempt)
        if not attempt.is_over or attempt.id not in self._attempts:
            return
        del self._attempts[attempt.id]
        if attempt.prefill is not None and "prefill" not in attempt.ends:
            self._late[attempt.id] = attempt
        if attempt.lease is not None:
            self._relay.watched.pop(attempt.lease.lease_id, None)
        self.judge.judge(attempt)
        if not attempt.is_served:
            self._retries.append(attempt.job)

    # ---- engines -------------------------------------------------------------------------------------------------

    def _start(self, role: str) -> EngineUnit:
        block_size = 16 if role == "alone" else self._rng.choice((16, 16, 32, 64))
        made = {"sends_kv": role == "prefill", "receives_kv": role == "decode"}
        config = {name: getattr(self._config, name) for name in self._config.__struct_fields__} | made
        config |= {"block_size": block_size, "num_blocks": POOL_TOKENS // block_size}
        self._tally.processes += 1
        return self._engines.start(role, EngineConfig(**config), shares_pool=self._shares_pools)

    def _take(self, event: Event) -> None:
        unit, message = event
        if unit.is_dead:
            return
        if message is None:
            unit.num_ends += 1
            if unit.num_ends == 2:
                self._gone(unit)
        elif isinstance(message, str):
            self._told(unit, message.split())
        else:
            self._heard(unit, message)

    def _heard(self, unit: EngineUnit, message: OutboxMessage) -> None:
        match message:
            case EngineReady():
                unit.is_ready = True
                unit.fingerprint = message.kv_spec.fingerprint()
            case EngineFailed():
                self.judge.fail(f"{unit.name}: {message.message}")
            case StepReport():
                self._reported(unit, message)

    def _reported(self, unit: EngineUnit, report: StepReport) -> None:
        if report.step >= unit.load.steps and not report.peers:
            unit.load = report.load
        for entry in report.peers:
            self._relay.carry(unit, entry)
        for update in report.requests:
            attempt = self._attempts.get(update.request_id) or self._late.get(update.request_id)
            if attempt is None:
                continue
            attempt.hear(unit.role, update)
            if update.reserved is not None:
                attempt.lease = update.reserved
                self._granted(attempt)
            if update.end is not None:
                if unit.role == "prefill":
                    self._late.pop(attempt.id, None)
                self._look_at(attempt)

    def _told(self, unit: EngineUnit, words: list[str]) -> None:
        """A line of an engine process: of a fault, or of a prompt's hash."""
        if words[0] != "fault":
            if words[0] == "adopted" and words[1] in self._attempts:
                self._adopted_tokens += self._attempts[words[1]].request.num_prompt_tokens
            self.judge.compare(words[1], words[0], words[2])
            return
        _, kind, lease_id, number = words
        attempt = self._relay.watched.get(lease_id)
        if attempt is not None:
            attempt.met.append((kind, int(number)))
            if kind == "twice":
                self._relay.lag(attempt.stream)
        unit.end_is_due |= kind in FATAL and kind != "stop"
        if kind == "stop":
            unit.is_stopped = True
            self._stopped[unit.name] = attempt if isinstance(attempt, Attempt) else None
            for waiting in [entry for entry in self._attempts.values() if entry.prefill is unit]:
                self._look_at(waiting)

    def _gone(self, unit: EngineUnit) -> None:
        if not unit.end_is_due:
            tail = unit.log.read_text(errors="replace")[-2000:]
            self.judge.fail(f"{unit.name} ended by itself:\n{tail}")
        self.judge.note_load(unit.load)
        self._engines.gone(unit)
        self._stopped.pop(unit.name, None)
        for other in self._engines.units:
            if other.role != unit.role:
                # A peer's death may be known by its channel first, or by its control stream.
                lost = PeerLost(peer=unit.name, reason="its process ended")
                self._relay.later(self._rng.choice((0.0, 0.3)), other, lost)
        for attempt in [*self._attempts.values(), *self._late.values()]:
            if unit in (attempt.prefill, attempt.decode):
                attempt.ends.setdefault(unit.role, None)
                self._late.pop(attempt.id, None)
                self._look_at(attempt)
        if unit.role != "alone":
            self._start(unit.role)

    # ---- time ----------------------------------------------------------------------------------------------------

    def _continue_stopped(self) -> None:
        """Once its lease has lapsed, and its blocks were given to others."""
        now_s = time.monotonic()
        for name, attempt in list(self._stopped.items()):
            if attempt is not None and "decode" not in attempt.ends:
                continue
            lapsed_s, adopted = self._lapses.setdefault(name, (now_s, self._adopted_tokens))
            is_reused = self._adopted_tokens - adopted >= REUSE_TOKENS
            if now_s - lapsed_s < self._most_reuse_s and not is_reused:
                continue
            unit = self._engines.named(name)
            del self._stopped[name], self._lapses[name]
            if unit is not None:
                self._tally.continued += 1
                self._tally.continued_over_reuse += is_reused
                unit.signal(signal.SIGCONT)
                unit.is_stopped = False
                for late in self._late.values():
                    late.begun_s = now_s

    def _check_deadlines(self) -> None:
        now_s = time.monotonic()
        for attempt in [*self._attempts.values(), *self._late.values()]:
            is_stopped = attempt.prefill is not None and attempt.prefill.is_stopped
            if now_s - attempt.begun_s > DEADLINE_S and not is_stopped:
                self.judge.fail(f"{attempt.id}: not over after {DEADLINE_S:g} s; ends: {attempt.ends}; {attempt.met}")
                self._attempts.pop(attempt.id, None)
                self._late.pop(attempt.id, None)
