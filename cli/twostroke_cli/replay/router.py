"""A router in virtual time: the real placement code, over what a router would know at that moment."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from twostroke_chassis.prefix_table import Keys, PrefixTable
from twostroke_router.fleet import Fleet, Numbers, Profile
from twostroke_router.placement import Policy, RequestShape

from twostroke_cli.bench.trace import Row
from twostroke_cli.replay.cluster import Cluster
from twostroke_cli.replay.worker import Load

_SCRAMBLE = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True, slots=True)
class Report:
    """A worker's load, as of a moment."""

    at_s: float
    slot: int
    load: Load


@dataclass(frozen=True, slots=True)
class Change:
    """What came into a worker's prefix cache and what went, at a moment."""

    at_s: float
    slot: int
    came: Sequence[int]
    gone: Sequence[int]


@dataclass(slots=True)
class News:
    """All that workers have said, in the order of time; each router reads on from where it was."""

    reports: list[Report] = field(default_factory=list)
    changes: list[Change] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Placed:
    """A placement, and what it counted on."""

    prefill: int | None
    decode: int | None
    token: int
    """By which the router knows it until the worker's load shows it."""
    believed_tokens: float
    """Queued where its prompt will be computed, this request left out."""

    @property
    def computes(self) -> int:
        """The worker that computes the prompt."""
        return self.workers[0]

    @property
    def workers(self) -> tuple[int, ...]:
        """Whoever has something of the request."""
        return tuple(slot for slot in (self.prefill, self.decode) if slot is not None)


@dataclass(frozen=True, slots=True)
class _Own:
    """A placement on a worker that its load does not show yet."""

    token: int
    arrives_s: float
    prompt_tokens: int
    kv_tokens: int


def keys_of_blocks(blocks: Sequence[int]) -> Keys:
    """Keys of a trace's blocks, which are numbers."""
    return (np.array(blocks, np.uint64) + np.uint64(1)) * _SCRAMBLE


class Router:
    """What one router knows, and its placements."""

    def __init__(self, cluster: Cluster, policy: Policy, news: News, phase_s: float) -> None:
        self._cluster, self._policy, self._news, self._phase_s = cluster, policy, news, phase_s
        self._table = PrefixTable()
        self._fleet = Fleet(self._table)
        self._num_reports = self._num_changes = self._num_placed = 0
        self._loads = [Load(0, 0, cluster.limits.kv_tokens)] * cluster.num_workers
        self._own: list[list[_Own]] = [[] for _ in self._loads]
        for slot in range(cluster.num_workers):
            self._fleet.join(_profile(cluster, slot), slot)
            self._show(slot)

    def place(self, row: Row, now_s: float) -> Placed | None:
        """Workers for a request; None refuses it."""
        self._catch_up(now_s)
        keys = keys_of_blocks(row.blocks)
        output_len = row.max_tokens if self._cluster.decode else 1
        view = self._fleet.view(lambda block_size: keys, row.prompt_len)
        placement = self._policy(RequestShape(row.prompt_len, output_len), view)
        if placement is None:
            return None
        self._fleet.placed()
        self._num_placed += 1
        prefill, decode = (None if name is None else int(name) for name in (placement.prefill, placement.decode))
        believed_tokens = self._queued(int(placement.prefill or placement.decode or 0))
        placed = Placed(prefill, decode, self._num_placed, believed_tokens)
        arrives_s = now_s + self._cluster.delays.message_s
        for slot in placed.workers:
            tokens = row.prompt_len - placement.expected_hit if slot == placed.computes else 0
            self._own[slot].append(_Own(placed.token, arrives_s, tokens, row.prompt_len + output_len))
            self._show(slot)
        return placed

    def accepted(self, placed: Placed, row: Row) -> None:
        """The worker took it, so it will hold the prompt."""
        self._table.add(placed.computes, keys_of_blocks(row.blocks))

    def sent_back(self, placed: Placed) -> None:
        """The worker did not take it."""
        for slot in placed.workers:
            self._own[slot] = [own for own in self._own[slot] if own.token != placed.token]
            self._show(slot)

    # ---- what it hears -----------------------------------------------------------------------------------------------

    def _catch_up(self, now_s: float) -> None:
        """Reads what has come since the last time."""
        reports, touched = self._news.reports, set()
        known_s = now_s - self._cluster.delays.message_s
        while self._num_reports < len(reports) and reports[self._num_reports].at_s <= known_s:
            report = reports[self._num_reports]
            self._num_reports += 1
            self._loads[report.slot] = report.load
            self._own[report.slot] = [own for own in self._own[report.slot] if own.arrives_s > report.at_s]
            touched.add(report.slot)
        for slot in touched:
            self._show(slot)
        self._read_changes(self._index_until(now_s))

    def _read_changes(self, until_s: float) -> None:
        changes = self._news.changes
        while self._num_changes < len(changes) and changes[self._num_changes].at_s <= until_s:
            change = changes[self._num_changes]
            self._num_changes += 1
            self._table.add(change.slot, keys_of_blocks(change.came))
            self._table.remove(change.slot, keys_of_blocks(change.gone))

    def _index_until(self, now_s: float) -> float:
        """Up to when the prefix caches' changes are known."""
        known_s, away = now_s - self._cluster.delays.index_s, self._cluster.redis_away
        if away is None or not away[0] <= known_s < away[1]:
            return known_s
        period_s = self._cluster.delays.snapshot_s
        return max(away[0], (now_s - self._phase_s) // period_s * period_s + self._phase_s)

    def _queued(self, slot: int) -> float:
        return self._loads[slot].queued_tokens + sum(own.prompt_tokens for own in self._own[slot])

    def _show(self, slot: int) -> None:
        load, own, times = self._loads[slot], self._own[slot], self._cluster.times
        numbers = Numbers(
            queued_tokens=self._queued(slot),
            sequences=load.sequences + len(own),
            free_tokens=load.free_tokens - sum(each.kv_tokens for each in own),
            token_s=times.token_s,
            step_s=times.step_s,
            sequence_s=times.sequence_s,
        )
        self._fleet.update(str(slot), numbers)


def _profile(cluster: Cluster, slot: int) -> Profile:
    return Profile(
        worker_id=str(slot),
        role="prefill" if slot < cluster.prefill else "decode",
        block_size=cluster.limits.block_len,
        max_model_len=2**31,
        channels=("any",),
    )
