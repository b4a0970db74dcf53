"""What must hold of tries with faults, whether it did, and how often what happened."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field

from twostroke_engine.messages import EngineLoad

from tests.support.fault_plan import BYTES_ARE_WRONG, KINDS
from tests.support.fault_traffic import Attempt, Tokens


@dataclass
class ClassCount:
    """What became of the faults of one class."""

    injected: int = 0
    resent: int = 0
    re_prefilled: int = 0
    absorbed: int = 0
    """Nothing had to be done again: a duplicate that was dropped, an answer that was not needed."""


@dataclass
class Tally:
    """Everything that is counted."""

    classes: dict[str, ClassCount] = field(default_factory=lambda: defaultdict(ClassCount))
    violations: list[str] = field(default_factory=list)
    requests: int = 0
    tries: int = 0
    collateral: int = 0
    """Tries that failed by faults of others of their pair."""
    tokens: int = 0
    hashes_compared: int = 0
    processes: int = 0
    continued: int = 0
    """Stopped writers that went on after their lease had lapsed,"""
    continued_over_reuse: int = 0
    """and when their memory was in use again."""
    drains: int = 0
    longest_try_s: float = 0.0

    @property
    def injected(self) -> int:
        return sum(count.injected for count in self.classes.values())


_ENGINE_COUNTS = ("digest_failures", "kv_resends", "kv_stale", "kv_broken_pairs", "kv_failed")


class Judge:
    """Looks at tries as they end, and at what engines tell of a prompt's KV."""

    def __init__(self) -> None:
        self.tally = Tally()
        self.kinds: Counter[str] = Counter()
        self.engine_counts: Counter[str] = Counter()
        """What engines counted themselves, as far as they lived to report it."""
        self.expected: dict[str, Tokens] = {}
        """By prompt: what one engine alone says."""
        self._hashes: dict[str, dict[str, str]] = defaultdict(dict)

    def fail(self, what: str) -> None:
        """Something that must never happen."""
        self.tally.violations.append(what)
        print(f"VIOLATION {what}", flush=True)

    def judge(self, attempt: Attempt) -> None:
        """A try is over."""
        tally = self.tally
        tally.tokens += sum(map(len, attempt.tokens.values()))
        tally.longest_try_s = max(tally.longest_try_s, time.monotonic() - attempt.begun_s)
        if wrong := attempt.wrong_tokens(self.expected[attempt.job.request.id]):
            self.fail(f"{attempt.id}: wrong or missing tokens at (choice, offset) {wrong[:5]}")
        tally.collateral += not attempt.is_served and not attempt.met
        for kind, number in attempt.met:
            self._count(attempt, kind, number)

    def compare(self, request_id: str, where: str, value: str) -> None:
        """A prompt's KV was hashed: as it was computed, adopted or kept to the end."""
        known = self._hashes[request_id]
        for other, before in known.items():
            self.tally.hashes_compared += 1
            if before != value:
                self.fail(f"{request_id}: its KV as {where} is not what it was as {other}")
        known[where] = value

    def at_rest(self) -> None:
        """Nothing runs: no hash is still to come."""
        self.tally.drains += 1
        self._hashes.clear()

    def note_load(self, load: EngineLoad) -> None:
        """An engine's last words."""
        self.engine_counts.update({name: getattr(load, name) for name in _ENGINE_COUNTS})

    def _count(self, attempt: Attempt, kind: str, number: int) -> None:
        count = self.tally.classes[KINDS[kind]]
        count.injected += 1
        self.kinds[kind] += 1
        is_wrong = kind in BYTES_ARE_WRONG and not attempt.lags
        if is_wrong and number in attempt.accepted:
            self.fail(f"{attempt.id}: segment {number} was accepted after {kind}")
        if not attempt.is_served:
            count.re_prefilled += 1
        elif number in attempt.rejected or (number < 0 and attempt.rejected):
            count.resent += 1
        elif is_wrong and attempt.needs_kv:
            self.fail(f"{attempt.id}: {kind} of segment {number} went unnoticed")
        else:
            count.absorbed += 1
