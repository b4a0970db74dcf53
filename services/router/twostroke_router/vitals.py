"""Publishes the state of the cluster as metrics: who is there, who came and went, what answers."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import product

from twostroke_chassis.cluster_metrics import ROLES, WORKER_STATES, Change, ClusterMetrics
from twostroke_chassis.membership import Membership, WorkerRecord
from twostroke_chassis.prefix_index import PrefixMirror

from twostroke_router.directory import Directory, profile_of
from twostroke_router.fleet import can_hand_over
from twostroke_router.link import WorkerLink

LOOK_S = 1.0
"""How often the dependencies are looked at; workers are looked at on every change too."""


@dataclass(frozen=True)
class Sighting:
    """A worker at one moment."""

    role: str
    epoch: int
    state: str


class Vitals:
    """Follows a directory and its sources."""

    def __init__(
        self, metrics: ClusterMetrics, directory: Directory, membership: Membership, prefixes: PrefixMirror
    ) -> None:
        self._metrics = metrics
        self._directory = directory
        self._membership = membership
        self._prefixes = prefixes
        self._seen: dict[str, Sighting] = {}

    async def run(self) -> None:
        """Looks for ever."""
        while True:
            self.look()
            with contextlib.suppress(TimeoutError):
                await self._directory.wait_change(LOOK_S)

    def look(self) -> None:
        """Publishes what there is now."""
        links = self._directory.links
        now = {link.worker_id: _sighting(link) for link in links}
        for role, change in changes(self._seen, now):
            self._metrics.changed(role, change)
        self._seen = now
        counts = Counter((each.role, each.state) for each in now.values())
        for role in ROLES:
            for state in WORKER_STATES:
                self._metrics.workers.labels(role, state).set(counts[role, state])
        self._metrics.ready_pairs.set(num_pairs(link.record for link in links if link.state == "ready"))
        self._metrics.dependency_up.labels("etcd").set(self._membership.is_connected)
        self._metrics.dependency_up.labels("redis").set(self._prefixes.is_connected)


def _sighting(link: WorkerLink) -> Sighting:
    # The stream of a drained worker ends before its record is gone: it has still left, and is not lost.
    state = "draining" if link.load.draining else link.state
    return Sighting(link.record.role, link.record.epoch, state)


def changes(before: dict[str, Sighting], now: dict[str, Sighting]) -> Iterator[tuple[str, Change]]:
    """What happened to workers between two looks: role and change."""
    for worker_id, old in before.items():
        new = now.get(worker_id)
        if new is None:
            yield old.role, "left" if old.state == "draining" else "lost"
        elif new.epoch != old.epoch:
            yield new.role, "restarted"
        elif new.state == "connecting" != old.state:
            yield new.role, "disconnected"
    for worker_id in now.keys() - before.keys():
        yield now[worker_id].role, "joined"


def num_pairs(records: Iterable[WorkerRecord]) -> int:
    """Pairs of a prefill and a decode worker between which KV can go."""
    alike = Counter((record.role, profile_of(record).kind) for record in records)
    return sum(
        alike["prefill", giver] * alike["decode", taker]
        for (role, giver), (other_role, taker) in product(alike, alike)
        if (role, other_role) == ROLES and can_hand_over(giver, taker)
    )
