"""A cluster in virtual time: routers that place as real ones do, over simulated workers.

What routers learn late in a real cluster they learn late here: loads as messages travel, changes of prefix caches
through Redis, and while Redis is away by asking the workers every so often. A worker sends a request back if more waits
there than the router counted on: several routers that place at the same moment would all choose the same worker.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Sequence

from twostroke_router.placement import Policy

from twostroke_cli.bench.trace import Row
from twostroke_cli.replay.cluster import Cluster, Outcome
from twostroke_cli.replay.router import Change, News, Placed, Report, Router
from twostroke_cli.replay.worker import Job, Worker

MAX_MOVES = 16
"""After so many a request stays where it is."""
SLACK_TOKENS = 512
"""So much more than the router counted on may wait."""


class Simulation:
    """One replay of a trace."""

    def __init__(self, rows: Sequence[Row], cluster: Cluster, policy: Policy) -> None:
        self._rows, self._cluster = rows, cluster
        self._queue: list[tuple[float, int, Callable[[float], None]]] = []
        self._order = itertools.count()
        self._news = News()
        self._workers = [self._worker(slot) for slot in range(cluster.num_workers)]
        phases = [cluster.delays.snapshot_s * place / cluster.routers for place in range(cluster.routers)]
        self._routers = [Router(cluster, policy, self._news, phase_s) for phase_s in phases]

    def run(self) -> list[Outcome]:
        """Plays it to its end; what became of each request, in order of arrival."""
        outcomes = []
        for number, row in enumerate(self._rows):
            self._pass_until(row.at_s)
            outcome = Outcome(row.prompt_len, row.max_tokens if self._cluster.decode else 1, row.at_s)
            outcomes.append(outcome)
            self._place(number, row, outcome, row.at_s)
        self._pass_until(float("inf"))
        return outcomes

    def _pass_until(self, until_s: float) -> None:
        while self._queue and self._queue[0][0] <= until_s:
            at_s, _, call = heapq.heappop(self._queue)
            call(at_s)

    def _schedule(self, at_s: float, call: Callable[[float], None]) -> None:
        heapq.heappush(self._queue, (at_s, next(self._order), call))

    def _worker(self, slot: int) -> Worker:
        def heard(now_s: float) -> None:
            worker = self._workers[slot]
            self._news.reports.append(Report(now_s, slot, worker.load))
            self._news.changes += [Change(at_s, slot, came, gone) for at_s, came, gone in worker.take_changes()]

        return Worker(self._cluster.times, self._cluster.limits, self._schedule, heard)

    def _place(self, number: int, row: Row, outcome: Outcome, now_s: float) -> None:
        router = self._routers[number % self._cluster.routers]
        placed = router.place(row, now_s)
        if placed is None:
            return  # refused: it never gets a first token
        job = self._job(number, row, outcome, placed)
        worker, message_s = self._workers[placed.computes], self._cluster.delays.message_s

        def arrived(at_s: float) -> None:
            if outcome.num_moves < MAX_MOVES and worker.load.queued_tokens > placed.believed_tokens + SLACK_TOKENS:
                outcome.num_moves += 1
                self._schedule(at_s + message_s, moved)
            else:
                worker.submit(job, at_s)
                router.accepted(placed, row)

        def moved(at_s: float) -> None:
            router.sent_back(placed)
            self._place(number, row, outcome, at_s)

        self._schedule(now_s + message_s, arrived)

    def _job(self, number: int, row: Row, outcome: Outcome, placed: Placed) -> Job:
        delays = self._cluster.delays

        def first(job: Job, now_s: float) -> None:
            outcome.first_s, outcome.hit_tokens = now_s + delays.message_s, job.hit_tokens
            if placed.decode is None or job.output_len == 1:
                outcome.ended_s = outcome.first_s
            elif not job.runs_on:
                taker = self._workers[placed.decode]
                self._schedule(now_s + delays.move_s * job.prompt_len, lambda at_s: taker.adopt(job, at_s))

        def ended(job: Job, now_s: float) -> None:
            outcome.ended_s = now_s + delays.message_s

        return Job(number, row.prompt_len, outcome.output_len, row.blocks, first, ended, placed.prefill is None)
